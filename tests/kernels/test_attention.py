"""Every attention backend equals the plain formula, forward and backward, on packed rows."""

import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinker_jax import sharding
from tinker_jax.kernels.attention import api, attention, attention_on, cudnn, mesh
from tinker_jax.kernels.attention.blockwise import blockwise_attention
from tinker_jax.kernels.attention.reference import reference_attention
from tinker_jax.kernels.heads import Heads


def make(B, T, N, K, H, segments, V=None):
    V, keys = V or H, jax.random.split(jax.random.key(0), 4)
    shapes = (N, H), (K, H), (K, V), (N, V)
    q, k, v, g = (jax.random.normal(key, (B, T, *shape)) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v, jnp.asarray(segments, jnp.int32), g


def packed(T, lengths):
    ids = np.zeros(T, np.int32)
    at = 0
    for i, n in enumerate(lengths):
        ids[at : at + n] = i + 1
        at += n
    return ids


CASES = {
    "one segment a row": (2, 64, 4, 2, 8, [packed(64, [64]), packed(64, [50])]),
    "odd length": (1, 300, 2, 1, 16, [packed(300, [300])]),
    "segments across blocks": (2, 640, 4, 2, 8, [packed(640, [10, 200, 30, 400]), packed(640, [130, 1, 2, 100])]),
    "single tokens": (1, 8, 2, 2, 8, [packed(8, [1] * 8)]),
    "row of padding": (2, 256, 2, 1, 8, [packed(256, []), packed(256, [129, 127])]),
    "narrow values": (2, 300, 4, 2, 24, [packed(300, [10, 200, 90]), packed(300, [300])], 16),
    "wide values": (1, 300, 4, 1, 8, [packed(300, [10, 200, 90])], 24),
}
# name: (window, sinks)
VARIANTS = {
    "window": (37, False),
    "window of a block": (128, False),
    "window beyond the row, sinks": (1000, True),
    "sinks": (None, True),
    "window and sinks": (37, True),
}


class AttentionTests:
    """What a backend must do; each backend subclasses it."""

    implementation: api.Implementation
    dtype = jnp.float32
    tolerance = 5e-6
    refused: tuple[str, ...] = ()
    """Variants for which the backend raises."""

    def run(self, q, k, v, seg, g, implementation=None, *, window=None, sinks=None):
        """Output and gradients of q, k, v and the sinks, in float32."""

        def f(q, k, v, sinks):
            name = implementation or self.implementation
            return attention(q, k, v, seg, scale=0.3, window=window, sinks_N=sinks, implementation=name)

        def both(q, k, v, sinks, g):
            out, vjp = jax.vjp(f, q, k, v, sinks)
            return out, *vjp(g)

        low = self.dtype if implementation is None else jnp.float32
        q, k, v, g = (x.astype(self.dtype).astype(low) for x in (q, k, v, g))
        return [np.asarray(x, np.float32) for x in jax.jit(both)(q, k, v, sinks, g) if x is not None]

    def check(self, ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=self.tolerance * max(1, np.abs(b).max()))

    @pytest.mark.parametrize("case", CASES)
    def test_equals_the_formula_forward_and_backward(self, case):
        arrays = make(*CASES[case])
        self.check(self.run(*arrays), self.run(*arrays, "reference"))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_windows_and_sinks_equal_the_formula_or_are_refused(self, variant):
        window, sinks = VARIANTS[variant]
        arrays = make(*CASES["narrow values" if variant == "window and sinks" else "segments across blocks"])
        more = {"window": window, "sinks": jnp.linspace(-2, 3, 4) if sinks else None}
        if variant in self.refused:
            with pytest.raises(NotImplementedError, match="sinks" if sinks else "window"):
                self.run(*arrays, **more)
        else:
            self.check(self.run(*arrays, **more), self.run(*arrays, "reference", **more))

    def test_a_sequence_packed_beside_others_equals_itself_alone(self):
        q, k, v, _, g = make(1, 200, 4, 2, 8, [packed(200, [200])])
        whole = self.run(q, k, v, jnp.asarray([packed(200, [70, 90, 40])]), g)
        part = slice(70, 160)
        alone = self.run(q[:, part], k[:, part], v[:, part], jnp.ones((1, 90), jnp.int32), g[:, part])
        self.check([x[:, part] for x in whole], alone)

    def test_padding_has_finite_output_and_gives_no_gradient(self):
        q, k, v, seg, g = make(2, 256, 2, 1, 8, [packed(256, []), packed(256, [60, 70])])
        out, *gradients = self.run(q, k, v, seg, jnp.where((seg > 0)[..., None, None], g, 0))
        assert np.isfinite(out).all()
        for x in gradients:
            assert (x[np.asarray(seg) == 0] == 0).all() and (x[1, :130] != 0).any()

    def test_bfloat16_inputs_keep_float32_accuracy_of_the_softmax(self):
        q, k, v, seg, _ = make(1, 256, 2, 2, 32, [packed(256, [256])])
        exact = attention(q, k, v, seg, scale=0.2, implementation="reference")
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        low = attention(q, k, v, seg, scale=0.2, implementation=self.implementation)
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.03)


class MeshTests(AttentionTests):
    """For backends that run on several devices."""

    def test_every_device_of_a_mesh_takes_its_rows_and_heads(self):
        devices = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        q, k, v, seg, g = make(4, 128, 4, 2, 8, [packed(128, [50, 60])] * 3 + [packed(128, [128])], 24)
        sinks = jnp.linspace(-2, 3, 4)

        def run(implementation, mesh):
            def f(q, k, v, sinks):
                return attention(q, k, v, seg, scale=0.3, sinks_N=sinks, implementation=implementation, mesh=mesh)

            out, vjp = jax.vjp(f, q, k, v, sinks)
            return out, *vjp(g)

        self.check(jax.jit(lambda: run(self.implementation, devices))(), run("reference", None))

    def test_rows_and_heads_that_a_mesh_does_not_divide_are_computed_everywhere(self):
        devices = sharding.make_mesh({"data": 2, "tensor": 2})
        q, k, v, seg, _ = make(1, 128, 3, 1, 8, [packed(128, [50, 60])])
        run = jax.jit(lambda: attention(q, k, v, seg, scale=0.3, implementation=self.implementation, mesh=devices))
        cut = run()
        self.check([cut], [attention(q, k, v, seg, scale=0.3, implementation="reference")])


class TestBlockwise(MeshTests):
    implementation = "blockwise"

    def test_rows_taken_together_equal_rows_one_by_one(self):
        q, k, v, seg, g = make(*CASES["segments across blocks"])

        def run(rows):
            def f(q, k, v):
                return blockwise_attention(q, k, v, seg, None, scale=0.3, window=None, rows_at_once=rows)

            out, vjp = jax.vjp(f, q, k, v)
            return out, *vjp(g)

        self.check(run(None), run(1))

    def test_never_holds_a_square_of_the_row_length(self):
        T = 8192
        shapes = [((1, T, 1, 8), jnp.float32)] * 3 + [((1, T), jnp.int32)]
        q, k, v, seg = (jax.ShapeDtypeStruct(s, d) for s, d in shapes)

        def loss(q, k, v, seg):
            return attention(q, k, v, seg, scale=1.0, implementation="blockwise").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, seg).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 / 8


class TestSplash(MeshTests):
    implementation = "splash"  # interpreted


@pytest.mark.gpu
class TestCudnn(AttentionTests):
    implementation = "cudnn"
    dtype = jnp.bfloat16
    tolerance = 0.02
    refused = tuple(VARIANTS)

    def test_passes_its_self_check(self):
        assert mesh.cudnn_fault(Heads(4, 2, 128), "bfloat16") is None

    def test_room_for_fewer_segments_changes_nothing(self):
        q, k, v, seg, g = make(2, 96, 4, 2, 64, [packed(96, [30, 50]), packed(96, [96])])
        q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, g))

        def run(most):
            f = functools.partial(attention, implementation="cudnn", scale=0.3, most_segments=most)
            out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, seg), q, k, v)
            return [np.asarray(x, np.float32) for x in (out, *vjp(g))]

        for few, many in zip(run(3), run(cudnn.MAX_SEGMENTS), strict=True):
            np.testing.assert_allclose(few, many, atol=0.02 * np.abs(many).max())

    def test_a_row_of_too_many_segments_is_not_silently_wrong(self):
        T = 2 * cudnn.MAX_SEGMENTS
        seg = [packed(T, [1] * T), packed(T, [2] * cudnn.MAX_SEGMENTS)]
        out, *_ = self.run(*make(2, T, 2, 1, 8, seg))
        assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


# ---- cuDNN without a GPU ----


def test_segments_are_starts_and_lengths_and_then_minus_one():
    starts, lengths, too_many = cudnn.segments(jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0], [0] * 8, [1, 2, 3, 4, 5, 5, 5, 5]]), 4)
    np.testing.assert_array_equal(starts, [[0, 2, 5, 6, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, -1]])
    np.testing.assert_array_equal(lengths, [[2, 3, 1, 2], [8, -1, -1, -1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(too_many, [False, False, True])


def on_gpu(q, k, v, seg, **more):
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), size=1)
    return attention(q, k, v, seg, scale=0.3, mesh=gpu, **more)


@pytest.mark.parametrize(
    ("dtype", "H", "more", "reason"),
    [
        (jnp.float32, 8, {}, "bfloat16 and float16, not float32"),
        (jnp.bfloat16, 12, {}, "not 12"),
        (jnp.bfloat16, 264, {}, "not 264"),
        (jnp.bfloat16, 8, {"sinks_N": jnp.zeros(2)}, "no attention sinks"),
        (jnp.bfloat16, 8, {"window": 4}, "sliding window"),
    ],
)
def test_cudnn_says_what_it_cannot_do(dtype, H, more, reason):
    q, k, v, seg, _ = make(1, 16, 2, 1, H, [packed(16, [16])])
    with pytest.raises(NotImplementedError, match=reason):
        on_gpu(*(x.astype(dtype) for x in (q, k, v)), seg, implementation="cudnn", **more)


def test_a_changed_private_function_is_refused_by_name(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    cudnn._private()  # this jax is known
    monkeypatch.setattr(private, "dot_product_attention", lambda query, key, value, q_seqlen, scale: None)
    with pytest.raises(NotImplementedError, match="no kv_offsets, kv_seqlen, mask_type, q_offsets, qkv_layout"):
        cudnn._private()
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 90500)
    monkeypatch.setattr(cudnn, "_KEYWORDS", {"q_seqlen", "scale"})
    with pytest.raises(NotImplementedError, match=r"needs cuDNN 9\.6, found 90500"):
        cudnn._private()
    monkeypatch.setattr(cudnn, "_KEYWORDS", {"scale"})
    with pytest.raises(NotImplementedError, match="it wants q_seqlen"):
        cudnn._private()


def test_cudnn_is_given_queries_keys_and_values_of_one_width(monkeypatch):
    def stand_in(q, k, v, *, q_offsets, scale, **_):
        assert q.shape[3] == k.shape[3] == v.shape[3] == 24
        edges = jnp.arange(q.shape[1])[None, :, None] >= jnp.where(q_offsets < 0, q.shape[1], q_offsets)[:, None]
        return reference_attention(q, k, v, edges.sum(axis=2), None, scale=scale, window=None)

    module = SimpleNamespace(dot_product_attention=stand_in, MaskType=SimpleNamespace(PADDING_CAUSAL=None))
    monkeypatch.setattr(cudnn, "_private", lambda: module)
    for H, V in ((24, 16), (8, 24)):
        q, k, v, seg, _ = make(2, 40, 2, 2, H, [packed(40, [10, 25]), packed(40, [40])], V)
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = on_gpu(q, k, v, seg, implementation="cudnn")
        np.testing.assert_array_equal(out, attention(q, k, v, seg, scale=0.3, implementation="reference"))


@pytest.mark.parametrize("ignored", ["nothing", "segments", "windows", "sinks"])
def test_the_self_check_finds_a_kernel_that_ignores_what_it_is_given(ignored, monkeypatch):
    def kernel(q, k, v, seg, sinks, *, scale, window):
        given = {"segments": seg, "windows": window, "sinks": sinks}
        given |= {ignored: jnp.ones_like(seg) if ignored == "segments" else None}
        return reference_attention(q, k, v, given["segments"], given["sinks"], scale=scale, window=given["windows"])

    backend = api._backend
    monkeypatch.setattr(api, "_backend", lambda name, *more: kernel if name == "cudnn" else backend(name, *more))
    heads = Heads(2, 1, 8, values=16)
    fault = mesh.cudnn_fault.__wrapped__(heads, "bfloat16", sinks=True, windows=True)
    assert fault is None if ignored == "nothing" else "output differs from the plain formula" in fault
    if ignored in ("windows", "sinks"):
        assert mesh.cudnn_fault.__wrapped__(heads, "bfloat16") is None


# ---- choosing ----


def test_a_backend_that_cannot_do_the_case_is_passed_over_and_logged_once(caplog):
    q, k, v, seg, _ = make(1, 16, 2, 1, 8, [packed(16, [9])])
    api._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, "tinker_jax"):
        outs = [on_gpu(q, k, v, seg) for _ in range(2)]
    assert len(caplog.messages) == 1 and "cudnn is not used: cuDNN attention takes bfloat16" in caplog.messages[0]
    np.testing.assert_array_equal(outs[0], attention(q, k, v, seg, scale=0.3, implementation="blockwise"))


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_a_named_backend_on_the_wrong_platform_raises(implementation):
    other = SimpleNamespace(devices=np.array([SimpleNamespace(platform={"cudnn": "tpu", "splash": "gpu"}[implementation])]))
    q, k, v, seg, _ = make(1, 16, 2, 1, 8, [packed(16, [9])])
    with pytest.raises(NotImplementedError, match=f"not on '{other.devices[0].platform}'"):
        attention(q, k, v, seg, scale=0.3, implementation=implementation, mesh=other)


def test_an_engine_on_cpu_uses_blockwise_attention_without_a_check():
    q, k, v, seg, _ = make(2, 130, 4, 2, 8, [packed(130, [9, 100]), packed(130, [130])])
    bound = attention_on(sharding.make_mesh({"data": 2}), Heads(4, 2, 8), jnp.float32)
    blockwise = attention(q, k, v, seg, scale=0.3, implementation="blockwise")
    np.testing.assert_array_equal(bound(q, k, v, seg, scale=0.3), blockwise)
