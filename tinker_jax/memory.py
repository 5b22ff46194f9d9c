"""Memory plan: how many tokens one training program may hold, what it keeps for the backward pass, room for keys and values.

Pure functions of configuration and byte counts; no device or file is asked here except in `device_bytes`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Remat, in_order
from tinker_jax.models.weights import Weight, weights
from tinker_jax.sharding import parts

_MOST_TOKENS = 8192  # bounds how long other requests wait behind one program; not tuned
_MOST_TOKENS_CPU = 1024  # of each of two at once, measured (docs/performance.md)
_LEAST_TOKENS = 2048
AT_ONCE_CPU = 2
"""Most micro-batches that a CPU works on at once, see `tinker_jax.training.layer_by_layer`."""
_MOST_CACHED_CPU = 1 << 16  # tokens; a CPU decodes a few dozen rows at a time, and writes every page of the cache at the start
_SHORT_ROW = 128  # tokens, the shortest that there is

POLICIES: tuple[Remat, ...] = ("none", "attention", "full")
"""From the fastest to the smallest."""


@dataclass(frozen=True)
class Plan:
    """What fits.

    Attributes:
        token_budget: positions of a micro-batch.
        remat: rematerialisation policy.
        kv_bytes: for the key/value cache, on each device.
        unstack: decoding may hold a second copy of the layers' weights.
        at_once: positions of two micro-batches that a CPU works on at once; larger ones run one after the other.
        memory: bytes of one device that were divided.
    """

    token_budget: int
    remat: Remat
    kv_bytes: int
    unstack: bool = False
    at_once: int = 0
    memory: int = 0


class OutOfMemory(MemoryError):
    """A training step found no room on the device.

    Attributes:
        plan: what it ran under.
        shape: (rows, length) of its largest micro-batch; None: it has none.
        least: length of the row that its longest sequence needs.
        several: it has more micro-batches than one.
    """

    def __init__(self, text: str, plan: Plan, shape: tuple[int, int] | None, least: int, several: bool) -> None:
        super().__init__(text)
        self.plan, self.shape, self.least, self.several = plan, shape, least, several


@contextlib.contextmanager
def out_of_memory(plan: Plan, shape: tuple[int, int] | None = None, least: int = 0, several: bool = False) -> Iterator[None]:
    """Raises XLA's out-of-memory as `OutOfMemory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error), plan, shape, least, several) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Is it XLA's out-of-memory, which is known by its text alone?"""
    signs = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in signs)


def smaller(plan: Plan, shape: tuple[int, int], least: int, several: bool) -> Plan | None:
    """What to try after a micro-batch of `shape` did not fit: none of `several` others beside it, then half of it, or when
    its longest sequence needs it all, more recomputed.

    Returns:
        A plan that makes the same micro-batch smaller or leaves it alone, or None when nothing is left to save.
    """
    rows, length = shape
    if several and 2 * rows * length <= plan.at_once:
        return replace(plan, at_once=2 * rows * length - 1)
    if length > least:
        budget = min(plan.token_budget, rows * length) // 2
        return replace(plan, token_budget=budget, at_once=min(plan.at_once, rows * length - 1))
    at = POLICIES.index(plan.remat)
    return replace(plan, remat=POLICIES[at + 1]) if at + 1 < len(POLICIES) else None


def device_bytes() -> int | None:
    """Memory of one device: what it reports; of a CPU half of what the machine has or the process's control group allows.
    None: an accelerator that does not tell."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits()]) // 2


def used_bytes() -> int:
    """Bytes of one device that are taken, by whomever in this process; 0 where it does not tell."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0))


def _group_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the process's control group and those above it allow, where they set a limit (Linux, cgroup v2 and v1)."""
    found = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        own = top / path.strip("/")
        for place in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                found.append(int((place / name).read_text()))
            if place == top:
                break
    return found


def base_bytes(cfg: ModelConfig, itemsize: int, mesh: Mapping[str, int] | None = None) -> int:
    """Bytes of the frozen weights on each device of such a mesh."""
    return sum(_weight_bytes(weight, itemsize, mesh or {}) for weight in weights(cfg))


def _weight_bytes(weight: Weight, itemsize: int, mesh: Mapping[str, int]) -> int:
    cut = math.prod(parts(mesh, axis) for axis in weight.axes if axis)
    return math.prod(weight.full_shape) // cut * (4 if weight.exact else itemsize)


def token_bytes(cfg: ModelConfig, itemsize: int, tensor: int = 1) -> int:
    """Bytes on each device of a token's keys and values; `tensor` devices share the heads where that divides them."""
    return itemsize * sum(stack.block.attn.cached.cached(tensor) for stack, _ in in_order(cfg))


def activation_bytes(cfg: ModelConfig, itemsize: int, remat: Remat, mesh: Mapping[str, int] | None = None) -> int:
    """Bytes a token takes on each device: what layers keep from the forward for the backward pass, and one layer's working set.

    Every layer keeps its input. `"attention"` adds attention's output and, float32, its log-sum-exp; `"none"` also what
    matrix products made. The working set is that of the largest layer, computed again with its gradients. Devices of the
    axis `tensor` share heads and feed-forward width, but each holds the model's full width; what those of `expert` hold of a
    token in a mixture of experts grows with their number.
    """
    kept = working = 0
    for stack, _ in in_order(cfg):
        sizes = stack.block.sizes(mesh or {})
        kept += itemsize * cfg.D
        if remat != "full":
            kept += itemsize * sizes.residuals + 4 * sizes.residuals_f32
        if remat == "none":
            kept += itemsize * sizes.products
        working = max(working, itemsize * sizes.working)
    return kept + working


def least_bytes(cfg: ModelConfig, itemsize: int, mesh: Mapping[str, int] | None = None) -> int:
    """Bytes of each device without which nothing can be done: its weights, one short row in training with every layer
    recomputed, and keys and values of as many tokens."""
    tensor = parts(mesh or {}, "heads")
    work = _SHORT_ROW * (activation_bytes(cfg, itemsize, "full", mesh) + token_bytes(cfg, itemsize, tensor))
    return base_bytes(cfg, itemsize, mesh) + work


def planned_bytes(cfg: ModelConfig, itemsize: int, plan: Plan, mesh: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes of each device that a plan takes, by purpose."""
    tokens = plan.token_budget // parts(mesh or {}, "rows") * (AT_ONCE_CPU if plan.at_once else 1)
    return {
        "weights": base_bytes(cfg, itemsize, mesh),
        "cache": plan.kv_bytes,
        "activations": tokens * activation_bytes(cfg, itemsize, plan.remat, mesh),
    }


def plan(
    cfg: ModelConfig, itemsize: int, memory: int, mesh: Mapping[str, int] | None = None, platform: str | None = None
) -> Plan:
    """Divides the `memory` bytes of each device.

    After its part of the frozen weights (cut as `tinker_jax.sharding.RULES` says) a fifth goes to keys and values and half
    to the activations of its rows, on a CPU of two micro-batches; the rest is left to adapters, optimiser state and XLA's
    temporaries. Of the policies under which a useful micro-batch fits, the one that recomputes least is taken. On a GPU a
    slice of a stack of layers is a copy at every step of decoding; where a copy of all of them fits into the half that
    activations have, which are not there at the same time, decoding makes that once for many steps. A TPU reads the stack
    in place, a CPU decodes layer by layer.

    Args:
        cfg: shape of the model.
        itemsize: bytes of a weight and of an activation.
        memory: bytes of one device.
        mesh: devices along each axis; absent axes have one.
        platform: of the devices: `"cpu"`, `"gpu"` or `"tpu"`.
    """
    rows, tensor = parts(mesh or {}, "rows"), parts(mesh or {}, "heads")
    free = max(0, memory - base_bytes(cfg, itemsize, mesh))
    most, at_once = _MOST_TOKENS_CPU if platform == "cpu" else _MOST_TOKENS, 1
    if platform == "cpu" and rows * tensor == 1:
        at_once = AT_ONCE_CPU
    tokens, remat = 0, POLICIES[-1]
    for remat in POLICIES:
        tokens = free // 2 // activation_bytes(cfg, itemsize, remat, mesh)
        if tokens // at_once >= _LEAST_TOKENS:
            break
    kv_bytes = free // 5
    if platform == "cpu":
        kv_bytes = min(kv_bytes, max(_MOST_CACHED_CPU, cfg.context_length + 1) * token_bytes(cfg, itemsize, tensor))
    layers = sum(_weight_bytes(weight, itemsize, mesh or {}) for weight in weights(cfg) if weight.stacked)
    unstack = platform == "gpu" and layers <= free // 2
    budget = min(max(tokens // at_once, 1), most) * rows
    return Plan(budget, remat, kv_bytes, unstack, tokens if at_once > 1 else 0, memory)
