"""Public entry: checks shapes, chooses the tile, calls the tiled XLA backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import xla

# What one tile of float32 logits may take. A GPU or TPU needs about a thousand rows before the product stops waiting
# for the head to be read from memory (reasoned, not measured); a CPU
# reaches its peak long before.
_TILE_BYTES = {"cpu": 64 << 20}
_TILE_BYTES_ACCELERATOR = 512 << 20
# A CPU computes fastest when a tile of logits stays in its cache (measured: docs/performance.md).
_BLOCK_CPU = 2048
_BLOCK_ROWS_CPU = 1024


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns.

    Attributes:
        logprobs_MK: float32 `[M, K]`, differentiable.
        entropy_M: float32 `[M]` in nats, without gradient; None unless asked for.
    """

    logprobs_MK: jax.Array
    entropy_M: jax.Array | None


def default_block(vocab_size: int) -> int:
    """Tokens of the vocabulary in a block of `linear_cross_entropy`: all of it, but on a CPU what its cache holds."""
    return min(vocab_size, _BLOCK_CPU) if jax.default_backend() == "cpu" else vocab_size


def default_tile(vocab_size: int, block: int | None = None) -> int:
    """Rows of a tile whose float32 logits fit the memory budget of the default backend: at least 8, a round number.

    Args:
        vocab_size: size of the vocabulary.
        block: tokens of it that are looked at at a time; None: all.
    """
    if block is not None and block < vocab_size:
        return _BLOCK_ROWS_CPU
    rows = _TILE_BYTES.get(jax.default_backend(), _TILE_BYTES_ACCELERATOR) // (4 * vocab_size)
    step = 128 if rows >= 128 else 8
    return max(8, rows // step * step)


def linear_cross_entropy(
    h_MD: jax.Array,
    kernel_VD: jax.Array,
    targets_MK: jax.Array,
    *,
    lora: Mapping[str, jax.Array] | None = None,
    entropy: bool = False,
    tile: int | None = None,
    block: int | None = None,
) -> LinearCrossEntropyOutput:
    """Log-softmax over the whole vocabulary at K chosen tokens a row.

    `logprobs[m, k] = log softmax(h[m] @ kernel.T + (h[m] @ a) @ b)[targets[m, k]]`.

    Works through tiles of rows, and in each through blocks of the vocabulary; neither the forward nor the backward pass
    holds more than one tile of one block of logits. Logits are computed once, in the forward pass, which makes what the
    gradient of `h` needs of them: [M, D] float32. The gradient of the factor `b` alone computes them again. Logits,
    softmax and all sums are float32. Rows may be sharded over data axes, and, in one block, the vocabulary over a
    tensor axis (GSPMD): a tile then takes rows from every shard.

    The head is frozen: the gradient with respect to `kernel_VD` is zero by definition and costs nothing. `h` and both
    LoRA factors get exact gradients; entropy carries none.

    Args:
        h_MD: hidden states `[M, D]`, float32 or bfloat16.
        kernel_VD: head `[V, D]` in embedding orientation, tied or not; `h`'s dtype, or it is cast.
        targets_MK: integer ids `[M, K]` in `[0, V)`. Rows that do not count need any valid id and a zero cotangent.
        lora: `{"a": [D, R], "b": [R, V]}` with the scale already inside `b`, or None.
        entropy: also return the entropy of every row's distribution.
        tile: rows in a tile; None takes `default_tile(V, block)`. On a mesh the tile is shared by the data shards, so a
            multiple of `default_tile` by their number keeps each shard as busy.
        block: tokens of the vocabulary in a block; None takes `default_block(V)`. V where the vocabulary is sharded: a
            block would be gathered.

    Raises:
        ValueError: an argument's shape or dtype does not fit; the text names it.
    """
    _check(h_MD, kernel_VD, lora)
    if targets_MK.ndim != 2 or targets_MK.shape[0] != h_MD.shape[0] or targets_MK.shape[1] < 1:
        raise ValueError(f"targets_MK must be [{h_MD.shape[0]}, K] with K >= 1 like h_MD's rows, got {targets_MK.shape}")
    if not jnp.issubdtype(targets_MK.dtype, jnp.integer):
        raise ValueError(f"targets_MK must hold integers, got {targets_MK.dtype}")
    vocab_size = kernel_VD.shape[0]
    block = default_block(vocab_size) if block is None else block
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    tiles = xla.plan_tiles(h_MD.shape[0], default_tile(vocab_size, block) if tile is None else tile)
    factors = None if lora is None else (lora["a"], lora["b"])
    output: Any = xla.linear_cross_entropy(tiles, min(block, vocab_size), entropy, h_MD, kernel_VD, targets_MK, factors)
    return LinearCrossEntropyOutput(*output)


def linear_top_k(
    h_MD: jax.Array,
    kernel_VD: jax.Array,
    k: int,
    *,
    lora: Mapping[str, jax.Array] | None = None,
    tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `k` likeliest tokens of every row and their log-probabilities over the whole vocabulary, likeliest first.

    Tiled as `linear_cross_entropy`; not meant to be differentiated.

    Returns:
        `(logprobs [M, k] float32, ids [M, k] int32)`.

    Raises:
        ValueError: `k` outside `[1, V]`, or a shape that does not fit.
    """
    _check(h_MD, kernel_VD, lora)
    vocab_size = kernel_VD.shape[0]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be between 1 and the vocabulary's {vocab_size}, got {k}")
    tiles = xla.plan_tiles(h_MD.shape[0], tile or default_tile(vocab_size))
    return xla.linear_top_k(tiles, h_MD, kernel_VD, k, None if lora is None else (lora["a"], lora["b"]))


def _check(h_MD: jax.Array, kernel_VD: jax.Array, lora: Mapping[str, jax.Array] | None) -> None:
    if h_MD.ndim != 2 or kernel_VD.ndim != 2 or h_MD.shape[1] != kernel_VD.shape[1]:
        raise ValueError(f"expected h_MD [M, D] and kernel_VD [V, D] of one width, got {h_MD.shape}, {kernel_VD.shape}")
    if lora is None:
        return
    a, b = lora["a"], lora["b"]
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape) != (h_MD.shape[1], (a.shape[1], kernel_VD.shape[0])):
        raise ValueError(f"expected lora a [{h_MD.shape[1]}, R] and b [R, {kernel_VD.shape[0]}], got {a.shape} and {b.shape}")
