"""Attention over pages for NVIDIA GPUs from Hopper on: a kernel in Pallas Mosaic GPU, one query a row. Not measured on a card.

Decoding is bound by memory, so the kernel uses plain arithmetic, no tensor cores. Each of its programs reads the pages that one
part of one row sees, of one key head, for all query heads that share it: what it costs follows the pages that rows see, and a
window leaves out those in front of it. Rows are cut into parts (flash-decoding), so that few long rows fill the card, too.
Parts depend on the row's own length and on static shapes alone: a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from tinker_jax.kernels.decode_attention import self_check
from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, visible
from tinker_jax.kernels.decode_attention.xla import rows_attend
from tinker_jax.kernels.heads import Heads

plgpu: Any = mosaic_gpu  # older versions, which `check` refuses, lack some of it
_JAX = (0, 12)  # 0.10 lacks some of what is used here, 0.11 was not tried
_LOWEST = -1e30  # of a query that has seen nothing yet; finite, as -inf - -inf is NaN
_STAGES = 2  # pages in shared memory: one is worked on while the next is copied
_SHARED_BYTES = 220_000  # that a program may have
_MOST_QUERIES = 8  # of a program, which has them and their sums in registers
_PROGRAMS, _LEAST_PAGES = 1024, 4  # enough to fill a card twice over; fewer pages would not pay for a program


def check(heads: Heads, dtype: Any, compute_capability: str | None, *, on_this_device: bool) -> None:
    """Looks at whether the kernel can do the case, and on a GPU that is there whether it is right.

    Args:
        heads: of one device.
        dtype: of queries, keys and values.
        compute_capability: of the GPU, if it is known.
        on_this_device: programs will run on this process's first device.

    Raises:
        NotImplementedError: it cannot, or is not; the text says why.
    """
    name, H = jnp.dtype(dtype).name, heads.H
    if jax.__version_info__[:2] < _JAX:
        raise NotImplementedError(f"the kernel needs jax {_JAX[0]}.{_JAX[1]}, found {jax.__version__}")
    if compute_capability is not None and float(compute_capability) < 9:
        raise NotImplementedError(f"the kernel needs compute capability 9.0 (Hopper), the GPU has {compute_capability}")
    if name not in ("bfloat16", "float16", "float32"):
        raise NotImplementedError(f"the kernel takes bfloat16, float16 and float32, not {name}")
    if H not in (64, 128, 256) or 2 * _STAGES * PAGE * H * jnp.dtype(dtype).itemsize > _SHARED_BYTES:
        raise NotImplementedError(f"the kernel takes head widths of 64, 128 and, in half precision, 256, not {H} in {name}")
    if on_this_device and (wrong := self_check.fault(mosaic_attend, heads, name, window=5 * PAGE + 3, sinks=True)):
        raise NotImplementedError(f"the kernel failed its self-check: {wrong}")


def mosaic_attend(
    pages: Pages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """See `PagedAttention.attend`; over pages of `empty_rows`. Prefills go through plain XLA.

    J are sets of G query heads of one key head, S parts of a row.
    """
    R, T, N, H = q_RTNH.shape
    if T > 1:
        return rows_attend(pages, q_RTNH, tables_RW, positions_RT, sinks_N, scale=scale, window=window)
    shared = N // pages.k.shape[1]
    G = max(g for g in range(1, _MOST_QUERIES + 1) if shared % g == 0)
    parts = max(1, _PROGRAMS // (R * N // G))
    acc, top, total = _attend_parts(q_RTNH.reshape(R, N // G, G, H), pages, tables_RW, positions_RT[:, 0], parts, scale, window)
    out_RJGH = _together(acc, top, total, None if sinks_N is None else sinks_N.reshape(N // G, G))
    return out_RJGH.reshape(R, T, N, H).astype(q_RTNH.dtype)


def _attend_parts(
    q_RJGH: jax.Array,
    pages: Pages,
    tables_RW: jax.Array,
    positions_R: jax.Array,
    parts: int,
    scale: float,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parts of the softmax, whose scores s are logarithms of base 2.

    Returns:
        Σ 2^(s - top) v [R, J, S, G, H], top and Σ 2^(s - top) [R, J, S, G], float32. Where the last is zero the part
        has no page, and the first is left to chance.
    """
    R, J, G, H = q_RJGH.shape
    P, K = pages.k.shape[:2]
    # `lanes` threads share a key, each with four numbers in a row of it, once or several times. The 128 of a program work on C
    # keys at a time, `blocks` times a page, n of these at once: n · C keys are 32 numbers a thread.
    lanes = max(2, min(H // 8, 16))
    C = 128 // lanes
    blocks = PAGE // C
    n = min(blocks, max(1, 32 * lanes // H))
    tiling = plgpu.Tiling(((n, C, 4 * lanes), (C // 4, 4 * lanes), (4,)))
    tile = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def body(tables, positions, q, k, v, acc_out, top_out, total_out, k_pages, v_pages, arrived):
        row, j, part = (jax.lax.axis_index(name) for name in ("row", "heads", "part"))
        position = positions[row]
        begin = 0 if window is None else jnp.maximum(position - window + 1, 0) // PAGE
        end = (position + PAGE) // PAGE
        length = jnp.maximum((end - begin + parts - 1) // parts, _LEAST_PAGES)
        first = begin + part * length
        last = jnp.minimum(first + length, end)

        def fetch(i):
            slot = jax.lax.rem(i - first, _STAGES)
            place = tables[row, i], j // (J // K)
            plgpu.copy_gmem_to_smem(k.at[place], k_pages.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(v.at[place], v_pages.at[slot], arrived.at[slot])

        @pl.when(first >= last)
        def _():
            for g in range(G):
                plgpu.store(top_out.at[row, j, part, g], jnp.float32(_LOWEST))
                plgpu.store(total_out.at[row, j, part, g], jnp.float32(0))

        @pl.when(first < last)
        def _():
            for i in range(_STAGES):
                pl.when(first + i < last)(functools.partial(fetch, first + i))
            queries = [plgpu.load(q.at[row, j, g], layout=tile.reduce((0, 1)), optimized=False) for g in range(G)]
            queries = [x.astype(jnp.float32) * (scale * math.log2(math.e)) for x in queries]
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (n, C), layout=tile.reduce(2))
            place_nC = iota(0) * C + iota(1)

            def page(i, carry):
                slot = jax.lax.rem(i - first, _STAGES)
                plgpu.barrier_wait(arrived.at[slot])
                carry = attend(i, k_pages.at[slot], v_pages.at[slot], *carry)

                @pl.when(i + _STAGES < last)
                def _():
                    plgpu.commit_smem()  # orders the reads above before the writes of the copy unit
                    fetch(i + _STAGES)

                return carry

            def attend(i, k_page, v_page, tops, totals, accs):
                scores = [[] for _ in range(G)]
                for t in range(0, blocks, n):
                    k_nCH = plgpu.load(k_page.at[pl.ds(t, n)], layout=tile).astype(jnp.float32)
                    seen_nC = visible(i * PAGE + t * C + place_nC, position, window)
                    for g in range(G):
                        s_nC = jnp.sum(k_nCH * _spread(queries[g], (n, C, H), 2), axis=2)
                        scores[g].append(jnp.where(seen_nC, s_nC, -jnp.inf))
                news = [functools.reduce(jnp.maximum, (jnp.max(s, axis=0) for s in scores[g]), tops[g]) for g in range(G)]
                shrinks = [jnp.exp2(top - new) for top, new in zip(tops, news, strict=True)]
                totals = [total * shrink for total, shrink in zip(totals, shrinks, strict=True)]
                accs = [acc * _spread(shrink, (C, H), 0) for acc, shrink in zip(accs, shrinks, strict=True)]
                for t in range(0, blocks, n):
                    v_nCH = plgpu.load(v_page.at[pl.ds(t, n)], layout=tile).astype(jnp.float32)
                    for g in range(G):
                        p_nC = jnp.exp2(scores[g][t // n] - _spread(news[g], (n, C), 1))
                        totals[g] += jnp.sum(p_nC, axis=0)
                        accs[g] += jnp.sum(v_nCH * _spread(p_nC, (n, C, H), 0, 1), axis=0)
                return news, totals, accs

            # Each group of threads that shares keys has a softmax of its own; they are put together behind the loop.
            def start(value, shape, axes):
                return [plgpu.layout_cast(jnp.full(shape, value, jnp.float32), tile.reduce(axes)) for _ in range(G)]

            nothing = start(_LOWEST, (C,), (0, 2)), start(0, (C,), (0, 2)), start(0, (C, H), 0)
            tops, totals, accs = jax.lax.fori_loop(first, last, page, nothing)
            for g in range(G):
                top = jnp.max(tops[g])
                weight_C = jnp.exp2(tops[g] - top)
                acc_H = jnp.sum(accs[g] * _spread(weight_C, (C, H), 0), axis=0)
                plgpu.store(acc_out.at[row, j, part, g], acc_H, optimized=False)
                plgpu.store(top_out.at[row, j, part, g], top)
                plgpu.store(total_out.at[row, j, part, g], jnp.sum(totals[g] * weight_C))

    out = [jax.ShapeDtypeStruct((R, J, parts, G, *more), jnp.float32) for more in ((H,), (), ())]
    two_pages = plgpu.SMEM((_STAGES, blocks, C, H), pages.k.dtype)
    run = plgpu.kernel(
        body,
        out_type=out,
        grid=(parts, J, R),
        grid_names=("part", "heads", "row"),
        scratch_types=[two_pages, two_pages, plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_attention",
    )
    return run(tables_RW, positions_R, q_RJGH, *(x.reshape(P, K, blocks, C, H) for x in jax.tree.leaves(pages)))


def _spread(x: jax.Array, shape: tuple[int, ...], *axes: int) -> jax.Array:
    """x as `axes` of an array of this shape, the same along the others."""
    return jax.lax.broadcast_in_dim(x, shape, axes)


def _together(acc_RJSGH: jax.Array, top_RJSG: jax.Array, total_RJSG: jax.Array, sinks_JG: jax.Array | None) -> jax.Array:
    """A row's parts put together, with the sinks: [R, J, G, H]."""
    top_RJG = jnp.max(top_RJSG, axis=2)
    if sinks_JG is not None:
        sinks_JG = sinks_JG.astype(jnp.float32) * math.log2(math.e)
        top_RJG = jnp.maximum(top_RJG, sinks_JG[None])
    weight_RJSG = jnp.exp2(top_RJSG - top_RJG[:, :, None])
    total_RJG = jnp.sum(total_RJSG * weight_RJSG, axis=2)
    if sinks_JG is not None:
        total_RJG += jnp.exp2(sinks_JG[None] - top_RJG)
    acc_RJSGH = jnp.where(total_RJSG[..., None] == 0, 0, acc_RJSGH)
    acc_RJGH = jnp.sum(acc_RJSGH * weight_RJSG[..., None], axis=2)
    return acc_RJGH / jnp.where(total_RJG == 0, 1, total_RJG)[..., None]
