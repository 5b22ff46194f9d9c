"""The gated feed-forward layer of dense decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from tinker_jax.models.layers import Linear, project
from tinker_jax.models.sizes import ADAPTER_RANK, Sizes
from tinker_jax.models.weights import Weight, linear
from tinker_jax.sharding import parts

if TYPE_CHECKING:
    from tinker_jax.models.block import Report, Tokens


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate x) · up x).

    Attributes:
        D, F: width of the model, feed-forward width.
        prefix: before the names of its weights, where a layer has others of these names.
        hf: its path below the layer.
    """

    D: int
    F: int
    prefix: str = ""
    hf: str = "mlp"

    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same tokens."""
        return ((f"{self.prefix}gate_proj", f"{self.prefix}up_proj"),)

    def weights(self) -> list[Weight]:
        """Rows of the table, as a layer knows them."""
        rows = []
        for name in ("gate_proj", "up_proj"):
            rows += linear(f"{self.prefix}{name}", f"{self.hf}.{name}", (self.F, self.D), ("mlp", "embed"), "mlp")
        return rows + linear(f"{self.prefix}down_proj", f"{self.hf}.down_proj", (self.D, self.F), ("embed", "mlp"), "mlp")

    def __call__(
        self, params: Mapping[str, jax.Array], x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]
    ) -> tuple[jax.Array, Report]:
        """Its part of the layer, [M, D], and nothing to report."""

        def linears(x_MD: jax.Array, *names: str) -> list[jax.Array]:
            layers = [Linear(params[f"{name}.kernel"]) for name in names]
            return project(x_MD, layers, [lora.get(name) for name in names], tokens.slots_MR)

        gate_MF, up_MF = linears(x_MD, *self.same_input[0])
        (down_MD,) = linears(jax.nn.silu(gate_MF) * up_MF, f"{self.prefix}down_proj")
        return down_MD, {}

    def sizes(self, mesh: Mapping[str, int]) -> Sizes:
        """Numbers that it holds of a token, on each device of such a mesh."""
        width = -(-self.F // parts(mesh, "mlp"))
        return Sizes(products=2 * width + 3 * ADAPTER_RANK, working=3 * self.D + 8 * width)
