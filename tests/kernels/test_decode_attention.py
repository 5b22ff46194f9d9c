"""Every backend of attention over pages equals the plain formula."""

import functools
import inspect
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from tinker_jax import sharding
from tinker_jax.kernels.attention import attention
from tinker_jax.kernels.decode_attention import (
    PAGE,
    PagedAttention,
    api,
    cudnn,
    mosaic,
    paged_attention_on,
    ragged,
    self_check,
    worklist,
    xla,
)
from tinker_jax.kernels.decode_attention.pages import empty_rows, write_rows
from tinker_jax.kernels.heads import Heads

HEADS = Heads(4, 2, 8)
LATENT = Heads(4, 1, 24, values=16, latent=True)
WIDTHS = [Heads(4, 2, 16, values=8), Heads(4, 2, 8, values=24), LATENT, Heads(6, 1, 16, latent=True)]


class Batch:
    """Rows of given lengths, their keys and values by position, and tables of pages in random order.

    Args:
        lengths: tokens of each row; the last T are the queries. A row of fewer than T is padded behind, of none is padding.
        T: queries of each row.
        heads: a latent is a key whose first numbers are the value.
        parts: that the mesh cuts rows into.
    """

    def __init__(self, lengths, T, heads=HEADS, *, parts=1, dtype=jnp.float32, seed=0):
        rng = np.random.default_rng(seed)
        R, L = len(lengths), max(*lengths, 1)
        self.heads, self.T, self.dtype, W = heads, T, dtype, -(-L // PAGE) + 1
        self.k, v = (rng.standard_normal((R, L, heads.K, width)).astype(dtype) for width in (heads.H, heads.V))
        self.v = self.k[..., : heads.V] if heads.latent else v
        self.q = rng.standard_normal((R, T, heads.N, heads.H)).astype(dtype)
        lengths = np.asarray(lengths)[:, None]
        every = np.arange(L, dtype=np.int32)[None]
        self.written = np.where(every < lengths, every, -1)
        own = np.maximum(lengths - T, 0) + np.arange(T, dtype=np.int32)[None]
        self.positions = np.where(own < lengths, own, -1)
        self.pages = R // parts * W + 1
        self.tables = np.concatenate([1 + rng.permutation(self.pages - 1).reshape(-1, W) for _ in range(parts)]).astype(
            np.int32
        )

    def take(self, rows):
        """The same batch with other rows in other places."""
        other = Batch.__new__(Batch)
        other.__dict__.update(self.__dict__)
        for name in ("k", "v", "q", "written", "positions", "tables"):
            setattr(other, name, getattr(self, name)[np.asarray(rows)])
        return other

    def arrays(self):
        """What `attended` takes after the backend."""
        return self.k, None if self.heads.latent else self.v, self.written, self.q, self.tables, self.positions

    def run(self, paged: PagedAttention, window=None, sinks_N=None):
        """Writes all keys and values, then attends; float32."""
        program = jax.jit(functools.partial(attended, paged, self.pages, window=window))
        out = program(*self.arrays(), sinks_N=sinks_N)
        assert out.dtype == self.dtype
        return np.asarray(out, np.float32)

    def formula(self, **more):
        """What the plain formula says, on one device."""
        return self.run(on(self, "reference"), **more)


def attended(paged, pages, k, v, written, q, tables, positions, *, window=None, sinks_N=None):
    pool = paged.write(paged.empty(pages), k, v, tables, written)
    return paged.attend(pool, q, tables, positions, scale=0.3, window=window, sinks_N=sinks_N)


def on(batch, implementation, axes=None, **more):
    return paged_attention_on(sharding.make_mesh(axes), batch.heads, batch.dtype, implementation, **more)


def by_hand(batch, r, t, n, window=None, sink=None):
    """One query's result, in float64, from keys and values as they were before they were paged."""
    position, k = batch.positions[r, t], n // (batch.heads.N // batch.heads.K)
    seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
    weights = np.exp(0.3 * batch.k[r, seen, k].astype(float) @ batch.q[r, t, n].astype(float))
    return weights @ batch.v[r, seen, k].astype(float) / (weights.sum() + (0 if sink is None else np.exp(sink)))


@pytest.mark.parametrize("heads", [HEADS, *WIDTHS[:3]])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("sinks", [None, np.linspace(-2, 3, 4, dtype=np.float32)])
def test_the_plain_formula_equals_one_written_without_pages(window, sinks, heads):
    batch = Batch([1, 16, 17, 45], 3, heads)
    out = batch.formula(window=window, sinks_N=sinks)
    for r, t, n in np.ndindex(out.shape[:3]):
        if batch.positions[r, t] < 0:
            assert (out[r, t] == 0).all()
        else:
            expected = by_hand(batch, r, t, n, window, None if sinks is None else sinks[n])
            np.testing.assert_allclose(out[r, t, n], expected, atol=1e-5)


EDGES = [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 1, 2, 300]
CASES = {
    "decode": (EDGES, 1, Heads(4, 2, 8)),
    "decode, as many key heads": (EDGES, 1, Heads(4, 4, 8)),
    "decode, one key head": ([40, 1, 33], 1, Heads(6, 1, 16)),
    "decode, padding rows": ([0, 5, 0, 200], 1, Heads(4, 2, 8)),
    "only padding": ([0, 0], 1, Heads(4, 2, 8)),
    "more rows than a tile": ([1 + 17 * i for i in range(37)], 1, Heads(4, 2, 8)),
    "prefill": ([64, 65, 80, 300, 128, 129, 192], 64, Heads(4, 2, 8)),
    "prefill, as many key heads": ([64, 70, 200], 64, Heads(2, 2, 8)),
    "prefill, rows shorter than the chunk": ([0, 1, 63, 16, 250], 64, Heads(4, 2, 8)),
    "prefill of an odd length": ([37, 100, 12], 37, Heads(4, 2, 8)),
}
WINDOWS = [1, PAGE + 1, PAGE, 10_000]


class PagedTests:
    """What a backend must do; each backend subclasses it."""

    implementation: api.Implementation
    tolerance = 5e-6

    def paged(self, batch, axes=None) -> PagedAttention:
        return on(batch, self.implementation, axes)

    def check(self, batch, axes=None, **more):
        atol = self.tolerance if batch.dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(batch.run(self.paged(batch, axes), **more), batch.formula(**more), rtol=0, atol=atol)

    @pytest.mark.parametrize("case", CASES)
    def test_equals_the_formula(self, case):
        self.check(Batch(*CASES[case]))

    @pytest.mark.parametrize("T", [1, 64])
    @pytest.mark.parametrize("window", WINDOWS)
    def test_windows_equal_the_formula(self, T, window):
        self.check(Batch([*EDGES, 0], T), window=window)

    @pytest.mark.parametrize(("T", "window"), [(1, None), (64, None), (1, 20), (64, 20), (1, 2 * PAGE), (130, 2 * PAGE)])
    def test_sinks_equal_the_formula(self, T, window):
        self.check(Batch([*EDGES, 0], T), window=window, sinks_N=jnp.linspace(-2, 3, 4))

    @pytest.mark.parametrize("T", [1, 64])
    def test_bfloat16_keeps_float32_accuracy_of_the_softmax(self, T):
        self.check(Batch([*EDGES, 0], T, Heads(4, 2, 32), dtype=jnp.bfloat16))

    @pytest.mark.parametrize("T", [1, 20])
    def test_rows_share_the_pages_of_a_prefix(self, T):
        batch = Batch([100, 120, 150], T)
        shared = 64
        batch.tables[1:, : shared // PAGE] = batch.tables[0, : shared // PAGE]
        batch.k[1:, :shared], batch.v[1:, :shared] = batch.k[0, :shared], batch.v[0, :shared]
        whole = batch.run(self.paged(batch))
        batch.written[1:, :shared] = -1
        np.testing.assert_array_equal(batch.run(self.paged(batch)), whole)
        self.check(batch)

    def test_pages_of_a_former_row_do_no_harm(self):
        batch = Batch([60, 30], 16)
        paged = self.paged(batch)

        def run(spoilt, k, v, written, q, tables, positions):
            everywhere = jnp.broadcast_to(jnp.arange(60)[None], (2, 60))
            pool = paged.write(paged.empty(batch.pages), spoilt, spoilt, tables, everywhere)
            pool = paged.write(pool, k, v, tables, written)
            return paged.attend(pool, q, tables, positions, scale=0.3)

        for value in (np.nan, np.inf):
            out = jax.jit(run)(np.full_like(batch.k, value), *batch.arrays())
            np.testing.assert_allclose(out, batch.formula(), rtol=0, atol=self.tolerance)

    def test_a_copied_page_is_as_good_as_its_original(self):
        batch = Batch([40], 1)
        paged = self.paged(batch)

        def run(k, v, written, q, tables, positions):
            pool = paged.write(paged.empty(2 * batch.pages), k, v, tables, written)
            copied = tables + batch.pages
            pool = jax.tree.map(lambda x: x.at[copied].set(x[tables]), pool)
            return paged.attend(pool, q, copied, positions, scale=0.3)

        np.testing.assert_array_equal(jax.jit(run)(*batch.arrays()), batch.run(paged))

    def test_a_row_that_is_not_finite_spoils_no_other(self):
        batch = Batch([300, 40, 130, 70, 640], 1)
        expected = batch.formula()
        batch.q[[0, 2]] = np.nan
        out = batch.run(self.paged(batch))
        assert np.isnan(out[[0, 2]]).all()
        np.testing.assert_allclose(out[[1, 3, 4]], expected[[1, 3, 4]], rtol=0, atol=self.tolerance)

    @pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "data": 2}, {"tensor": 4, "fsdp": 2}])
    @pytest.mark.parametrize("T", [1, 16])
    def test_every_device_of_a_mesh_takes_its_rows_and_the_heads_that_divide(self, axes, T):
        batch = Batch([200, 1, 0, 17, 140, 128, 16, 64], T, parts=axes.get("data", 1) * axes["fsdp"])
        alone = np.concatenate([batch.take([r]).formula(sinks_N=jnp.linspace(-2, 3, 4)) for r in range(8)])
        paged = self.paged(batch, axes)
        out = batch.run(paged, sinks_N=jnp.linspace(-2, 3, 4))
        np.testing.assert_allclose(out, alone, rtol=0, atol=self.tolerance)

    @pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "fsdp": 2}])
    def test_a_pool_lies_where_it_is_written_however_it_was_made(self, axes):
        batch = Batch([3] * 8, 1, parts=1 if axes is None else axes.get("data", 1) * axes["fsdp"])
        paged = self.paged(batch, axes)
        write = jax.jit(paged.write, donate_argnums=0)
        for pool in (paged.empty(batch.pages), jax.jit(lambda: paged.empty(batch.pages))()):
            before = pool.k.sharding
            for _ in range(2):
                pool = write(pool, batch.k, batch.v, batch.tables, batch.written)
            assert pool.k.sharding == before and len(before.device_set) == paged.mesh.size
        assert write._cache_size() == 1

    @pytest.mark.parametrize("T", [1, 16])
    @pytest.mark.parametrize("window", [None, 40])
    def test_a_row_is_the_same_to_the_last_bit_whatever_shares_its_batch(self, T, window):
        self.check_bits(T, window, Heads(8, 4, 32))

    def check_bits(self, T, window, heads):
        batch = Batch([130, *(T + 7 * i for i in range(19)), 500, 400], T, heads)
        program = jax.jit(functools.partial(attended, self.paged(batch), batch.pages, window=window))
        program = program.lower(*batch.arrays()).compile({"xla_backend_optimization_level": 3})  # as outside of tests

        def of(rows):
            return np.asarray(program(*batch.take(rows).arrays()))

        alone = of([0] + [21] * 21)[0]
        assert np.abs(alone).max() > 0
        for place in (0, 1, 7, 16, 21):
            for others in ([*range(1, 22)], [20, 21, 1] * 7, [21] * 21):
                out = of([*others[:place], 0, *others[place:]])
                np.testing.assert_array_equal(out[place], alone)

    @pytest.mark.parametrize("T", [1, 64])
    def test_a_loop_of_steps_over_a_donated_pool_copies_nothing_of_its_size(self, T):
        self.check_nothing_is_copied(T, HEADS)

    def check_nothing_is_copied(self, T, heads):
        batch, W = Batch([64] * 16, T, heads), 256
        paged = self.paged(batch)
        pool = jax.eval_shape(lambda: paged.empty(64 * W))
        q, k, v = (jax.ShapeDtypeStruct((16, *x.shape[1:]), x.dtype) for x in (batch.q, batch.k[:, :T], batch.v[:, :T]))
        shapes = pool, q, k, None if heads.latent else v
        ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((16, W), (16, T))]

        def steps(pool, q, k, v, tables, positions):
            def one(i, carry):
                pool, q = carry
                pool = paged.write(pool, k, v, tables, positions + i)
                out = paged.attend(pool, q, tables, positions + i, scale=0.3)
                return pool, jnp.pad(out, [*[(0, 0)] * 3, (0, heads.H - heads.V)])

            return jax.lax.fori_loop(0, 8, one, (pool, q))

        memory = jax.jit(steps, donate_argnums=0).lower(*shapes, *ints).compile().memory_analysis()
        assert memory.temp_size_in_bytes < sum(x.size * 4 for x in jax.tree.leaves(pool)) / 2


class WidthTests(PagedTests):
    """For backends that take values of another width than keys, and latents."""

    @pytest.mark.parametrize("heads", WIDTHS)
    @pytest.mark.parametrize(("T", "window"), [(1, None), (20, PAGE + 1)])
    def test_heads_of_any_width_equal_the_formula(self, T, window, heads):
        sinks_N = None if window is None else jnp.linspace(-2, 3, heads.N)
        self.check(Batch([*EDGES, 0], T, heads), window=window, sinks_N=sinks_N)

    @pytest.mark.parametrize("T", [1, 130])
    def test_latents_in_bfloat16_keep_float32_accuracy_of_the_softmax(self, T):
        self.check(Batch([*EDGES, 0], T, LATENT, dtype=jnp.bfloat16))

    @pytest.mark.parametrize("heads", [*WIDTHS[1:], Heads(4, 1, 8)])
    def test_heads_of_any_width_on_a_mesh_equal_those_of_one_device(self, heads):
        lengths, sinks_N = [200, 1, 0, 17], jnp.linspace(-2, 3, heads.N)
        batch = Batch(lengths, 1, heads, parts=2)
        out = batch.run(self.paged(batch, {"fsdp": 2, "tensor": 4}), sinks_N=sinks_N)
        alone = Batch(lengths, 1, heads).formula(sinks_N=sinks_N)
        np.testing.assert_allclose(out, alone, rtol=0, atol=self.tolerance)

    @pytest.mark.parametrize("T", [1, 16])
    def test_a_row_of_latents_is_the_same_to_the_last_bit_whatever_shares_its_batch(self, T):
        self.check_bits(T, None, Heads(8, 1, 40, values=32, latent=True))

    @pytest.mark.parametrize("T", [1, 64])
    def test_steps_over_a_donated_pool_of_latents_copy_nothing_of_its_size(self, T):
        self.check_nothing_is_copied(T, LATENT)

    @pytest.mark.parametrize("T", [1, 150])
    def test_absorbed_latent_attention_equals_that_of_whole_keys_and_values(self, T):
        """Of a latent c: key (W_uk c, r) and value W_uv c of every head, where r, which rotates, is shared by all heads."""
        rng, (R, L, N, C, rotated, plain, V) = np.random.default_rng(0), (2, 150, 4, 16, 8, 12, 10)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        c_RLC, r_RLH, to_k_NHC, to_v_NVC = normal(R, L, C), normal(R, L, rotated), normal(N, plain, C) / 4, normal(N, V, C) / 4
        q_RTNH, rotated_RTNH = normal(R, L, N, plain), normal(R, L, N, rotated)
        product = functools.partial(jnp.einsum, precision="highest")
        shared_RLNH = jnp.broadcast_to(r_RLH[:, :, None], (R, L, N, rotated))
        k = jnp.concatenate([product("RLC,NHC->RLNH", c_RLC, to_k_NHC), shared_RLNH], axis=-1)
        q, v = jnp.concatenate([q_RTNH, rotated_RTNH], axis=-1), product("RLC,NVC->RLNV", c_RLC, to_v_NVC)
        whole = attention(q, k, v, jnp.zeros((R, L), jnp.int32), scale=0.3, implementation="reference")[:, -T:]

        batch = Batch([L] * R, T, Heads(N, 1, C + rotated, values=C, latent=True))
        batch.k = np.asarray(jnp.concatenate([c_RLC, r_RLH], axis=-1)[:, :, None])
        absorbed = jnp.concatenate([product("RTNH,NHC->RTNC", q_RTNH, to_k_NHC), rotated_RTNH], axis=-1)
        batch.q = np.asarray(absorbed[:, -T:])
        out = product("RTNC,NVC->RTNV", batch.run(self.paged(batch)), to_v_NVC)
        np.testing.assert_allclose(out, whole, rtol=0, atol=1e-5)


def poisoned_page_is_read(paged, batch, row, pages, window):
    """NaN, smuggled past `write`, shows whether a row's `pages` were read."""
    b = batch.take([row])
    pool = paged.write(paged.empty(b.pages), b.k, b.v, b.tables, b.written)
    pool = jax.tree.map(lambda x: x.at[b.tables[:, pages].ravel()].set(jnp.nan), pool)
    attend = jax.jit(functools.partial(paged.attend, scale=0.3, window=window))
    return bool(np.isnan(attend(pool, b.q, b.tables, b.positions)).any())


class TestXla(WidthTests):
    implementation = "xla"

    @pytest.mark.parametrize("block", [PAGE, 2 * PAGE])
    def test_blocks_of_any_size_equal_the_formula(self, block):
        for T in (1, 20):
            batch = Batch([*EDGES, 0], T)
            paged = self.paged(batch)
            pool = paged.write(paged.empty(batch.pages), batch.k, batch.v, batch.tables, batch.written)
            q = jnp.asarray(batch.q)
            out = xla.xla_attend(pool, q, batch.tables, batch.positions, None, scale=0.3, window=70, block=block)
            np.testing.assert_allclose(out, batch.formula(window=70), rtol=0, atol=self.tolerance)

    def test_work_ends_with_the_longest_row_and_starts_with_the_window(self):
        batch = Batch([20 * PAGE, PAGE], 1)
        read = functools.partial(poisoned_page_is_read, self.paged(batch), batch)
        first, later = slice(0, 512 // PAGE), slice(512 // PAGE, None)
        assert read(0, first, None) and not read(0, first, PAGE)
        assert read(0, later, None) and not read(1, later, None)


class TestWorklist(WidthTests):
    implementation = "worklist"

    @pytest.mark.parametrize("T", [1, 20])
    def test_rows_longer_than_a_span_of_pages_equal_the_formula(self, T):
        span = worklist._SPAN * PAGE
        batch = Batch([1, span - 1, 40, span, span + 1, 0, 2 * span + 70], T)
        self.check(batch)
        self.check(batch, window=span + 3)
        self.check(batch, window=span + 3, sinks_N=jnp.linspace(-2, 3, 4))

    def test_only_pages_that_a_row_sees_are_read(self):
        batch = Batch([20 * PAGE, PAGE], 1)
        read = functools.partial(poisoned_page_is_read, self.paged(batch), batch)
        assert all(read(0, slice(n, n + 1), None) for n in (0, 7, 8, 19))
        assert not any(read(0, slice(n, n + 1), 2 * PAGE) for n in (0, 17, 20)) and read(0, slice(18, 19), 2 * PAGE)
        assert read(1, slice(0, 1), None) and not read(1, slice(1, None), None)


def over_rows(batch, attend, axes=None):
    """Attention of a GPU's kernel, over pages whose keys lie as values do."""
    empty = functools.partial(empty_rows, heads=batch.heads, dtype=batch.dtype)
    return PagedAttention(sharding.make_mesh(axes), api.Backend(empty, write_rows, attend, heads_axis=1), batch.heads)


def paged_formula(q_RNTH, k_PNSH, v_PNSH, queries_R, keys_R, tables_RW, scale):
    """What cuDNN's operation computes; what lies behind a row's queries is left to chance."""
    k, v = (x[tables_RW].swapaxes(1, 2).reshape(len(tables_RW), x.shape[1], -1, x.shape[3]) for x in (k_PNSH, v_PNSH))
    s = scale * jnp.einsum("RNTH,RNSH->RNTS", q_RNTH, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(s.shape[-1])[None] < keys_R[:, None]
    p = jax.nn.softmax(jnp.where(seen[:, None, None], s, -jnp.inf), axis=-1)
    out = jnp.einsum("RNTS,RNSH->RNTH", p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q_RNTH.dtype)
    return jnp.where((jnp.arange(q_RNTH.shape[2])[None] < queries_R[:, None])[:, None, :, None], out, jnp.nan)


class TestAroundCudnn(PagedTests):
    """What surrounds cuDNN's operation. A formula stands in for it, also for float32; sinks, which it lacks, go to XLA."""

    implementation = "cudnn"

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        monkeypatch.setattr(cudnn, "_paged", paged_formula)

    def paged(self, batch, axes=None):
        def attend(*arrays, **more):
            return (cudnn.cudnn_attend if arrays[4] is None else xla.rows_attend)(*arrays, **more)

        return over_rows(batch, attend, axes)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the Mosaic kernel in JAX's interpreter of GPU kernels, on a CPU, which raises where copies and reads race."""
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"jax {jax.__version__} has no interpreter of GPU kernels")
    monkeypatch.setattr(mosaic, "_PROGRAMS", 16)  # each takes milliseconds
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


class InterpretedMosaic:
    def paged(self, batch, axes=None):
        return over_rows(batch, mosaic.mosaic_attend, axes)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
class TestMosaicInterpreted(InterpretedMosaic, PagedTests):
    """Prefills are XLA's."""

    def test_every_device_of_a_mesh_takes_its_rows_and_the_heads_that_divide(self):
        pytest.skip("JAX's interpreter of GPU kernels runs one device at a time")


@pytest.mark.usefixtures("interpreted")
class TestPartsOfMosaic(InterpretedMosaic):
    tolerance, check = PagedTests.tolerance, PagedTests.check

    @pytest.mark.parametrize("heads", [Heads(4, 1, 64), Heads(12, 1, 64), Heads(2, 1, 128), Heads(1, 1, 256)])
    def test_rows_of_several_parts_equal_the_formula(self, heads):
        least = mosaic._LEAST_PAGES * PAGE
        batch = Batch([2 * least + 70, 0, least, least + 1], 1, heads, dtype=jnp.bfloat16)
        self.check(batch, window=least + 3, sinks_N=jnp.linspace(-2, 3, heads.N))

    def test_other_rows_and_wider_tables_change_no_bit_of_a_row(self):
        batch = Batch([700, 70, 300, 0], 1)
        out = batch.run(self.paged(batch))
        other = batch.take([3, 0, 2, 0])
        other.tables = np.pad(other.tables, [(0, 0), (0, 7)])
        np.testing.assert_array_equal(other.run(self.paged(batch)), out[[3, 0, 2, 0]])

    def test_only_pages_that_a_row_sees_are_read(self):
        batch = Batch([6 * PAGE, PAGE], 1)
        read = functools.partial(poisoned_page_is_read, self.paged(batch), batch)
        assert read(0, slice(5, 6), None) and not read(1, slice(1, None), None)
        assert read(0, slice(4, 5), 2 * PAGE) and not read(0, [*range(4), 6], 2 * PAGE)


class OnGpu:
    """Compared with the plain formula on the same GPU, both in bfloat16."""

    implementation: api.Implementation

    def run(self, lengths, T=1, heads=None, **more):
        batch = Batch(lengths, T, heads or Heads(32, 8, 128), dtype=jnp.bfloat16)
        out = batch.run(on(batch, self.implementation), **more)
        with jax.default_matmul_precision("highest"):
            np.testing.assert_allclose(out, batch.formula(**more), rtol=0, atol=0.02)
        return batch, out

    def test_a_row_is_the_same_to_the_last_bit_whatever_shares_its_batch(self):
        batch, out = self.run([1000, 64, 65, 700, 1, 333, 2, 900])
        for order in ([0, 4, 4, 4, 4, 4, 4, 4], [3, 2, 1, 0, 7, 6, 5, 4], [7, 7, 7, 7, 7, 7, 7, 0]):
            np.testing.assert_array_equal(batch.take(order).run(on(batch, self.implementation)), out[np.asarray(order)])


@pytest.mark.gpu
class TestMosaic(OnGpu):
    implementation = "mosaic"

    @pytest.mark.parametrize("heads", [Heads(*of) for of in ((32, 8, 128), (16, 8, 128), (64, 8, 64), (9, 3, 64), (6, 1, 256))])
    @pytest.mark.parametrize("lengths", [EDGES, [0, 5, 0, 200], [0, 0], [1 + 17 * i for i in range(37)], [20_000]])
    @pytest.mark.parametrize("window", [None, PAGE + 1])
    def test_equals_the_formula(self, lengths, heads, window):
        self.run(lengths, heads=heads, window=window)
        self.run(lengths, heads=heads, window=window, sinks_N=jnp.linspace(-2, 3, heads.N))


@pytest.mark.gpu
class TestCudnn(OnGpu):
    implementation = "cudnn"

    @pytest.mark.parametrize(
        "heads", [Heads(*of) for of in ((32, 8, 128), (16, 8, 128), (4, 4, 64), (9, 3, 64), (6, 1, 256), (4, 2, 8))]
    )
    @pytest.mark.parametrize("lengths", [EDGES, [0, 5, 0, 200], [0, 0], [1 + 17 * i for i in range(37)]])
    def test_equals_the_formula(self, lengths, heads):
        self.run(lengths, heads=heads)

    @pytest.mark.parametrize(("T", "window"), [(1, 20), (64, None), (64, 20)])
    def test_what_goes_through_xla_equals_the_formula(self, T, window):
        self.run([*EDGES, 0], T, window=window)

    def test_passes_its_self_check(self):
        assert self_check.fault(cudnn.cudnn_attend, Heads(32, 8, 128), "bfloat16") is None

    def test_is_what_a_gpu_takes(self):
        chosen = paged_attention_on(sharding.make_mesh(), Heads(32, 8, 128), jnp.bfloat16)
        assert chosen.backend.attend is cudnn.cudnn_attend


@pytest.mark.parametrize(("lengths", "T", "window"), [([0, PAGE + 1], 1, None), ([10, 45], 20, 7)])
def test_the_ragged_kernel_is_given_what_it_wants(lengths, T, window, monkeypatch):
    """It runs on TPUs alone: the formula that JAX ships beside it stands in for it."""

    def stand_in(*arrays, num_kv_pages_per_block, num_queries_per_block, **more):
        kernel.dynamic_validate_inputs(*arrays, **more)
        return kernel.ref_ragged_paged_attention(*arrays, **more)

    monkeypatch.setattr(ragged, "ragged_paged_attention", stand_in)
    batch = Batch(lengths, T, Heads(4, 2, 128))
    backend = api._backend("ragged", mesh_of("tpu"), batch.heads, batch.dtype, sinks=False, windows=False)
    paged = PagedAttention(sharding.make_mesh(), backend, batch.heads)
    out = attended(paged, batch.pages, *map(jnp.asarray, batch.arrays()), window=window)
    np.testing.assert_allclose(out, batch.formula(window=window), rtol=0, atol=1e-5)


# ---- what a token takes ----


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2}, {"tensor": 4}])
@pytest.mark.parametrize("heads", [HEADS, *WIDTHS])
def test_the_heads_say_how_many_numbers_a_token_takes_on_each_device(heads, axes):
    paged = paged_attention_on(sharding.make_mesh(axes), heads, jnp.bfloat16)
    taken = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(paged.empty(3))) // (3 * PAGE)
    assert taken == heads.cached((axes or {}).get("tensor", 1)) * 2


def test_a_latent_is_all_that_is_kept_of_a_token():
    heads = Heads(128, 1, 576, values=512, latent=True)  # DeepSeek-V3
    pool = paged_attention_on(sharding.make_mesh(), heads, jnp.bfloat16).empty(2)
    assert pool.v is None and pool.k.nbytes == 2 * PAGE * 576 * 2
    assert heads.cached() == heads.cached(8) == 576 and heads.of_device(8).N == 16
    assert Heads(32, 8, 128).cached() == 2 * 8 * 128 and Heads(32, 8, 128).cached(4) == 2 * 2 * 128
    assert Heads(32, 8, 192, values=128).cached(16) == 8 * (192 + 128)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"N": 6, "K": 4, "H": 8}, "N=6 query heads cannot share K=4 key heads: N must be a multiple of K."),
        ({"N": 4, "K": 2, "H": 8, "latent": True}, "latent heads want K=1 and values of at most H=8 numbers, got K=2 and 8."),
        ({"N": 4, "K": 1, "H": 8, "values": 9, "latent": True}, "got K=1 and 9."),
    ],
)
def test_heads_that_cannot_be_are_refused(numbers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Heads(**numbers)


# ---- choosing ----


def mesh_of(platform, **more):
    device = SimpleNamespace(platform=platform, **more)
    return SimpleNamespace(devices=np.array([device]), size=1, shape=sharding.make_mesh().shape)


@pytest.mark.parametrize(
    ("platform", "heads", "dtype", "more", "reason"),
    [
        ("gpu", Heads(32, 8, 128), jnp.bfloat16, {}, "not on 'gpu'"),
        ("tpu", Heads(32, 8, 64), jnp.bfloat16, {}, "not 64"),
        ("tpu", Heads(32, 8, 128), jnp.float16, {}, "not float16"),
        ("tpu", Heads(6, 3, 128), jnp.bfloat16, {}, "cannot tile 3 key heads"),
        ("tpu", Heads(32, 8, 128), jnp.bfloat16, {"sinks": True}, "no attention sinks"),
    ],
)
def test_the_ragged_kernel_says_what_it_cannot_do(platform, heads, dtype, more, reason):
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention_on(mesh_of(platform), heads, dtype, "ragged", **more)


@pytest.mark.parametrize(
    ("platform", "heads", "dtype", "more", "reason"),
    [
        ("tpu", Heads(32, 8, 128), jnp.bfloat16, {}, "not on 'tpu'"),
        ("gpu", Heads(32, 8, 128), jnp.float32, {}, "bfloat16 and float16, not float32"),
        ("gpu", Heads(32, 8, 100), jnp.bfloat16, {}, "not 100"),
        ("gpu", Heads(32, 8, 128), jnp.bfloat16, {"sinks": True}, "no attention sinks"),
    ],
)
def test_paged_cudnn_says_what_it_cannot_do(platform, heads, dtype, more, reason):
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention_on(mesh_of(platform), heads, dtype, "cudnn", **more)


@pytest.mark.parametrize(
    ("mesh", "heads", "dtype", "reason"),
    [
        (mesh_of("tpu"), Heads(32, 8, 128), jnp.bfloat16, "not on 'tpu'"),
        (mesh_of("gpu", compute_capability="8.9"), Heads(32, 8, 128), jnp.bfloat16, "9.0 .Hopper., the GPU has 8.9"),
        (mesh_of("gpu"), Heads(32, 8, 128), jnp.float64, "not float64"),
        (mesh_of("gpu"), Heads(32, 8, 96), jnp.bfloat16, "not 96 in bfloat16"),
        (mesh_of("gpu"), Heads(32, 8, 256), jnp.float32, "not 256 in float32"),
    ],
)
def test_the_mosaic_kernel_says_what_it_cannot_do(mesh, heads, dtype, reason, monkeypatch):
    monkeypatch.setattr(mosaic, "_JAX", (0, 0))
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention_on(mesh, heads, dtype, "mosaic")


@pytest.mark.parametrize(("platform", "name"), [("tpu", "ragged"), ("gpu", "cudnn"), ("gpu", "mosaic")])
def test_kernels_made_for_one_width_refuse_others_and_leave_them_to_xla(platform, name):
    for heads, reason in ((LATENT, "does not take latents"), (Heads(4, 4, 192, values=128), "keys of 192 and values of 128")):
        with pytest.raises(NotImplementedError, match=f"{name} attention over pages .*{reason}"):
            paged_attention_on(mesh_of(platform), heads, jnp.bfloat16, name)
        attend = paged_attention_on(mesh_of(platform), heads, jnp.bfloat16).backend.attend
        assert getattr(attend, "func", attend) is xla.xla_attend


def test_the_mosaic_kernel_says_which_jax_it_needs(monkeypatch):
    monkeypatch.setattr(mosaic, "_JAX", (99, 1))
    with pytest.raises(NotImplementedError, match=f"needs jax 99.1, found {jax.__version__}"):
        paged_attention_on(mesh_of("gpu"), Heads(32, 8, 128), jnp.bfloat16, "mosaic")


def test_a_mosaic_kernel_that_is_wrong_on_the_device_is_passed_over(monkeypatch):
    def zeros(pages, q, *rest, **more):
        return jnp.zeros_like(q)

    monkeypatch.setattr(mosaic, "_JAX", (0, 0))
    monkeypatch.setattr(mosaic, "mosaic_attend", zeros)
    with pytest.raises(NotImplementedError, match="self-check: it differs from the plain formula"):
        mosaic.check(Heads(4, 2, 64), jnp.bfloat16, None, on_this_device=True)
    monkeypatch.setattr(mosaic, "mosaic_attend", xla.rows_attend)
    mosaic.check(Heads(4, 2, 64), jnp.bfloat16, None, on_this_device=True)


def test_gpus_leave_to_mosaic_what_cudnn_has_not(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as module

    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(mosaic, "_JAX", (0, 0))

    def chosen(dtype=jnp.bfloat16, **more):
        return paged_attention_on(mesh_of("gpu"), Heads(64, 8, 64), dtype, **more).backend.attend

    assert chosen() is cudnn.cudnn_attend
    assert chosen(sinks=True) is chosen(jnp.float32) is mosaic.mosaic_attend
    mixed = chosen(windows=True)
    assert mixed.func is cudnn.cudnn_attend and mixed.keywords == {"otherwise": mosaic.mosaic_attend}
    monkeypatch.setattr(mosaic, "_JAX", (99, 1))
    assert chosen(windows=True).keywords == {"otherwise": xla.rows_attend}


def test_paged_cudnn_needs_the_private_function_as_it_was(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as module

    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    assert paged_attention_on(mesh_of("gpu"), Heads(32, 8, 128), jnp.bfloat16).backend.attend is cudnn.cudnn_attend
    monkeypatch.setattr(module, "_dot_product_attention", lambda query, key, value, page_table_k, page_table_v: None)
    with pytest.raises(NotImplementedError, match="no bias, cudnn_version, dropout_rate"):
        paged_attention_on(mesh_of("gpu"), Heads(32, 8, 128), jnp.bfloat16, "cudnn")
    known = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in (*cudnn._PARAMETERS, *cudnn._NEWER, "other")]
    module._dot_product_attention.__signature__ = inspect.Signature(known)
    with pytest.raises(NotImplementedError, match="it wants other"):
        paged_attention_on(mesh_of("gpu"), Heads(32, 8, 128), jnp.bfloat16, "cudnn")


def test_paged_cudnn_that_is_wrong_on_the_device_is_passed_over(monkeypatch):
    self_check.fault.cache_clear()
    monkeypatch.setattr(cudnn, "_private", lambda: None)
    monkeypatch.setattr(cudnn, "_paged", lambda q, *rest: q)
    with pytest.raises(NotImplementedError, match="self-check: it differs from the plain formula"):
        cudnn.check(Heads(4, 2, 32), jnp.bfloat16, sinks=False, on_this_device=True)
    self_check.fault.cache_clear()
    monkeypatch.setattr(cudnn, "_paged", paged_formula)
    cudnn.check(Heads(4, 2, 32), jnp.bfloat16, sinks=False, on_this_device=True)
    self_check.fault.cache_clear()


def test_a_backend_that_cannot_do_the_case_is_passed_over_and_logged_once(caplog):
    api._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, "tinker_jax"):
        chosen = [paged_attention_on(mesh_of("tpu"), Heads(32, 8, 64), jnp.bfloat16) for _ in range(2)]
    assert len(caplog.messages) == 1 and "ragged is not used" in caplog.messages[0]
    assert chosen[0].backend.attend is xla.xla_attend


def test_each_platform_gets_its_best():
    def chosen(platform):
        return paged_attention_on(mesh_of(platform), Heads(32, 8, 128), jnp.bfloat16).backend.attend

    assert chosen("tpu") is ragged.ragged_attend
    assert chosen("cpu") is worklist.worklist_attend
    assert paged_attention_on(mesh_of("gpu"), Heads(32, 8, 100), jnp.float32).backend.attend is xla.xla_attend
