"""`EngineConfig`: what a hosted service decides for you, and here is yours to decide."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError

MESH_AXES = ("data", "fsdp", "expert", "tensor")


@dataclass(frozen=True)
class EngineConfig:
    """Where and how the engine runs. Hashable: clients of equal configuration and base model share one engine.

    Attributes:
        dtype: of the base model; None: float32 on CPU, bfloat16 on accelerators.
        mesh: devices along each axis (`data`, `fsdp`, `expert`, `tensor`), such as `{"fsdp": 4, "tensor": 2}`; None: one
            device.
        memory: bytes of each device's memory the engine may plan with; None: what the device reports.
        home: directory of the checkpoints; None: `$TINKER_JAX_HOME`, or `~/.tinker_jax`.
        deterministic: sampling and training give the same numbers bit for bit whatever else runs or is in the call, at a cost:
            sampling always computes 64 rows, under one adapter at a time; training pads every datum to a row of its own. The
            log-probabilities that samples report at temperature 1 are then those of training, which takes a forward pass each.

    Raises:
        BadRequestError: naming the field, what was expected and what was got.
    """

    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: Mapping[str, int] | None = None
    memory: int | None = None
    home: str | os.PathLike[str] | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        _check.one_of(self.dtype, (None, "float32", "bfloat16"), "EngineConfig.dtype")
        if self.mesh is not None:
            put(self, "mesh", _as_mesh(self.mesh))
        if not isinstance(self.deterministic, bool):
            raise _check.refuse("EngineConfig.deterministic", "a bool", self.deterministic)
        if self.memory is not None:
            put(self, "memory", _check.integer(self.memory, "EngineConfig.memory", minimum=1))
        if self.home is not None:
            if not isinstance(self.home, (str, os.PathLike)):
                raise _check.refuse("EngineConfig.home", "a path", self.home)
            home = _check.text(os.fspath(self.home), "EngineConfig.home")
            # Absolute, so that a later change of the working directory does not part an engine from its clients.
            try:
                put(self, "home", home if "://" in home else os.path.abspath(os.path.expanduser(home)))
            except ValueError:  # a character that no path has
                raise _check.refuse("EngineConfig.home", "a path", home) from None

    def __hash__(self) -> int:
        mesh = None if self.mesh is None else tuple(self.mesh.items())
        return hash((self.dtype, mesh, self.memory, self.home, self.deterministic))

    def __reduce__(self) -> tuple:
        mesh = None if self.mesh is None else dict(self.mesh)  # a mapping proxy does not pickle
        return EngineConfig, (self.dtype, mesh, self.memory, self.home, self.deterministic)


def _as_mesh(mesh: Mapping[str, int]) -> Mapping[str, int]:
    """Checked, read-only, axes in the order of `MESH_AXES`."""
    if not isinstance(mesh, Mapping):
        raise _check.refuse("EngineConfig.mesh", "a mapping of axis names to sizes", mesh)
    unknown = [axis for axis in mesh if axis not in MESH_AXES]
    if unknown:
        raise BadRequestError(f"EngineConfig.mesh: unknown axis {brief(unknown[0])}; the axes are {', '.join(MESH_AXES)}")
    sizes = {a: _check.integer(mesh[a], f"EngineConfig.mesh[{a!r}]", minimum=1) for a in MESH_AXES if a in mesh}
    return MappingProxyType(sizes)
