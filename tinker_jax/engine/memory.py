"""Memory plan: how many tokens one training program may hold, what it keeps for the backward pass, room for keys and values.

Pure functions of configuration and byte counts; no device is asked here except in `device_bytes`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import jax

from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.dense import Remat
from tinker_jax.models.weights import weights

_MOST_TOKENS = 8192  # larger micro-batches gain nothing measurable and lengthen the wait of other requests
_LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """What fits: positions per micro-batch, rematerialisation policy, bytes for the key/value cache."""

    token_budget: int
    remat: Remat
    kv_bytes: int


def device_bytes() -> int:
    """Memory of one device: what it reports, else (CPU) half of the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def base_bytes(cfg: DecoderConfig, itemsize: int) -> int:
    """Bytes of the frozen weights."""
    return itemsize * sum(math.prod(w.full_shape) for w in weights(cfg))


def activation_bytes(cfg: DecoderConfig, itemsize: int, remat: Remat) -> int:
    """Bytes a token keeps from the forward for the backward pass, with one layer's working set.

    A layer keeps its two normed inputs, q, k, v and the attention output, gate, up and their product, and the residual
    stream; with full rematerialisation every layer keeps its input alone.
    """
    layer = 4 * cfg.D + 3 * cfg.N * cfg.H + 4 * cfg.K * cfg.H + 4 * cfg.F
    kept = cfg.L * layer if remat == "none" else cfg.L * cfg.D + 2 * layer
    return itemsize * kept


def plan(cfg: DecoderConfig, itemsize: int, memory: int, devices: int = 1) -> Plan:
    """Divides `memory` bytes a device, over `devices` that share weights and rows.

    After the frozen weights a fifth goes to keys and values and half to activations; the rest is left to adapters,
    optimiser state and XLA's temporaries. Activations are kept when a useful micro-batch fits, else rematerialised.
    """
    free = max(0, memory * devices - base_bytes(cfg, itemsize))
    for remat in ("none", "full"):
        tokens = free // 2 // activation_bytes(cfg, itemsize, remat)
        if remat == "full" or tokens >= _LEAST_TOKENS:
            break
    return Plan(token_budget=int(min(max(tokens, 1), _MOST_TOKENS * devices)), remat=remat, kv_bytes=free // 5)
