"""Meshes, and the map from logical axes (what a dimension means) to mesh axes (where it is cut).

`data` splits rows of a batch, `fsdp` splits rows and the model width of frozen weights, `expert` splits rows and experts,
`tensor` splits heads, feed-forward width and vocabulary. GSPMD derives the collectives.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinker_jax.types.errors import BadRequestError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

#: Logical axis → mesh axis. Axes that are absent are replicated.
RULES: Mapping[str, str | tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "experts": "expert",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(axis_sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `data × fsdp × expert × tensor`; missing axes have size 1; None is one device.

    Raises:
        BadRequestError: an unknown axis, or more devices asked for than there are.
    """
    sizes = dict(axis_sizes or {})
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise BadRequestError(f"mesh has unknown axis {unknown[0]!r}; known axes are {', '.join(MESH_AXES)}.")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    devices = list(jax.devices()) if devices is None else list(devices)
    need = int(np.prod(shape))
    if need > len(devices):
        wanted = " × ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape, strict=True))
        raise BadRequestError(f"mesh {wanted} needs {need} devices, but only {len(devices)} are visible.")
    grid = np.asarray(devices[:need]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def named(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array whose dimensions mean `axes`, e.g. `("embed", "heads")` → `P("fsdp", "tensor")`.

    Written as XLA writes that of an output, without axes of one device and without None at the end: a program whose output
    comes back as its input under another spelling of the same sharding is compiled a second time.
    """

    def cut(axis: str | None) -> str | tuple[str, ...] | None:
        names = RULES.get(axis, ()) if axis else ()
        names = tuple(name for name in ((names,) if isinstance(names, str) else names) if mesh.shape[name] > 1)
        return names if len(names) > 1 else next(iter(names), None)

    entries = [cut(axis) for axis in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, P(*entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, P())


def host_view(x: jax.Array) -> np.ndarray:
    """The memory of an array that lies on one CPU device, read-only, without a copy.

    `np.asarray` would do the same, but the array keeps what it returns, which holds on to the array: both would stay until
    the garbage collector comes.
    """
    buffer: Any = (ctypes.c_char * x.nbytes).from_address(x.block_until_ready().unsafe_buffer_pointer())
    buffer.owner = x
    view = np.frombuffer(buffer, x.dtype).reshape(x.shape)
    view.flags.writeable = False
    return view


def views_of_layers(stacked: Any, count: int) -> list[Any]:
    """Each layer of arrays stacked on a leading axis: NumPy's, or JAX's on its default device, a CPU.

    No copies as long as a layer begins where XLA can read it: at a multiple of 64 bytes.
    """
    host = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else host_view(x), stacked)
    return [jax.device_put(jax.tree.map(lambda x, at=at: x[at], host)) for at in range(count)]


def views(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Arrays of JAX's default device, a CPU, committed to none."""
    return jax.device_put({name: host_view(x) for name, x in params.items()})


def on_default_cpu(mesh: Mesh) -> bool:
    """Is the mesh one CPU device, the one that JAX uses by itself?"""
    device = mesh.devices.flat[0]
    return mesh.size == 1 and device.platform == "cpu" and device == jax.local_devices()[0]


def parts(mesh: Mesh | Mapping[str, int], axis: str) -> int:
    """How many pieces a mesh, or one of such sizes, cuts a logical axis into; absent mesh axes have one device."""
    mesh_axes = RULES[axis]
    sizes: Any = getattr(mesh, "shape", mesh)
    return math.prod(sizes.get(a, 1) for a in ((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes))


def check_divisible(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> None:
    """Refuses a weight that the mesh cannot cut evenly.

    Raises:
        BadRequestError: names the tensor, its dimension and the mesh axis.
    """
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        mesh_axes = RULES.get(axis) if axis else None
        for mesh_axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            parts = mesh.shape[mesh_axis]
            if size % parts:
                raise BadRequestError(
                    f"{name}: dimension {dim} ({axis}) has size {size}, which mesh axis {mesh_axis!r} of size {parts} "
                    f"does not divide; choose a size that divides it."
                )
