"""A mixture of experts: each token goes to a few of many feed-forward layers.

References: Shazeer et al., arXiv:1701.06538; Fedus et al., Switch Transformers, arXiv:2101.03961. Nothing is dropped: an expert
takes all tokens that chose it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tinker_jax.kernels.grouped_matmul import by_expert, combine, goes_over_experts, grouped_matmul, over_experts, spread
from tinker_jax.kernels.products import times_transposed
from tinker_jax.lora import PRODUCTS
from tinker_jax.models.mlp import GatedMLP
from tinker_jax.models.sizes import ADAPTER_RANK, Sizes
from tinker_jax.models.weights import Fused, Weight
from tinker_jax.sharding import RULES, parts

if TYPE_CHECKING:
    from tinker_jax.models.block import Params, Report, Tokens


#: Logical axes of what belongs to experts one by one, as it stands on a mesh while they work: the model's width is whole.
_OF_EXPERTS_AXES: Mapping[str, tuple[str | None, ...]] = {
    "gate_experts.kernel": ("experts", "mlp", None),
    "up_experts.kernel": ("experts", "mlp", None),
    "down_experts.kernel": ("experts", None, "mlp"),
    "gate_experts.bias": ("experts", "mlp"),
    "up_experts.bias": ("experts", "mlp"),
    "gate_up_experts.b": (None, "experts", None, "mlp"),
    "down_experts.a": ("experts", "mlp", None),
    "gate_up_per_expert.a": (None, "experts", None, None),
    "gate_up_per_expert.b": (None, "experts", None, "mlp"),
    "down_per_expert.a": ("experts", "mlp", None),
    "down_per_expert.b": ("experts", None, None),
}


class Router(Protocol):
    """How tokens choose."""

    @property
    def k(self) -> int:
        """Experts of a token."""
        ...

    def weights(self, D: int, E: int) -> list[Weight]:
        """Rows of the table, the router's matrix `"router.kernel"` [E, D] among them."""
        ...

    def __call__(self, params: Params, logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights float32 and experts int32, [M, K] each, of logits float32 without any bias."""
        ...


class Layout(NamedTuple):
    """Where a family's files have the experts of a layer.

    Attributes:
        per_expert: name of an expert's matrix, with `{expert}` and `{name}` (gate_proj, up_proj or down_proj); None: the family
            has none.
        fused: path of the tensors that hold all experts, `gate_up_proj` and `down_proj` below it.
        transposed: fused matrices are [in, out].
        interleaved: gate and up take turns along the fused tensor's outputs; else gate stands before up.
    """

    per_expert: str | None
    fused: str
    transposed: bool = False
    interleaved: bool = False


def silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up."""
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class Experts:
    """Σ over the chosen experts e of weight_e · down_e(act(gate_e x, up_e x)), plus an expert that every token goes to.

    The router's logits are float32 whatever the dtype, in training and in sampling, so that both choose the same experts. The
    weight is multiplied into what `down` reads, which is narrower than what it writes.

    An adapter (Tinker's parametrisation) has one first factor for gate and up of all experts, one second factor for down of all
    experts, and for each expert the others: its wide products are plain ones, and no expert's update is ever built. One from
    elsewhere may have both factors of each expert, as modules of other names; tokens can be under adapters of either form.

    Attributes:
        D, F, E: width of the model, feed-forward width of an expert, experts.
        router: how tokens choose.
        layout: of the family's files.
        act: of gate and up, [.., F] each.
        biases: do gate, up and down have them?
        shared: the expert of all tokens.
    """

    D: int
    F: int
    E: int
    router: Router
    layout: Layout
    act: Callable[[jax.Array, jax.Array], jax.Array] = silu_gate
    biases: bool = False
    shared: GatedMLP | None = None

    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same tokens, those of experts left out."""
        return self.shared.same_input if self.shared else ()

    def weights(self) -> list[Weight]:
        """Rows of the table, as a layer knows them."""
        D, F, rows = self.D, self.F, self.router.weights(self.D, self.E)
        for name in ("gate", "up"):
            rows += self._rows(name, (F, D), ("mlp", "embed"), "gate_up_experts", "a")
        rows += self._rows("down", (D, F), ("embed", "mlp"), "down_experts", "b")
        return rows + (self.shared.weights() if self.shared else [])

    def _rows(self, name: str, shape: tuple[int, int], axes: tuple[str, str], adapter: str, shares: Any) -> list[Weight]:
        E, layout, (out, fan_in) = self.E, self.layout, shape
        whole, first, step = out, 0, 1
        if name != "down":
            whole, step = 2 * out, 2 if layout.interleaved else 1
            first = 0 if name == "gate" else 1 if layout.interleaved else out
        path = f"{layout.fused}.{'down' if name == 'down' else 'gate_up'}_proj"
        turned = (E, fan_in, whole) if layout.transposed else (E, whole, fan_in)
        fused = Fused(path, turned, int(layout.transposed), first, step, layout.transposed)
        hf = path if layout.per_expert is None else layout.per_expert.replace("{name}", f"{name}_proj")
        kernel = Weight(
            f"{name}_experts.kernel",
            hf,
            (E, *shape),
            ("experts", *axes),
            lora="mlp",
            fused=fused,
            adapter=adapter,
            shares=shares,
        )
        if not self.biases:
            return [kernel]
        fused = Fused(f"{path}_bias", (E, whole), 0, first, step)
        return [kernel, Weight(f"{name}_experts.bias", fused.hf, (E, out), ("experts", axes[0]), fused=fused)]

    def __call__(self, params: Params, x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]) -> tuple[jax.Array, Report]:
        """Its part of the layer, [M, D], and `"expert_tokens"` int32 [E]: how many tokens chose each expert."""
        router_ED = params["router.kernel"].astype(jnp.float32)
        logits_ME = jnp.einsum("MD,ED->ME", x_MD.astype(jnp.float32), router_ED, precision="highest")
        weights_MK, ids_MK = self._choose(tokens.mesh, params, logits_ME)
        ids_MK = jnp.where(tokens.real_M[:, None], ids_MK, self.E)
        gate_up, down = lora.get("gate_up_experts"), lora.get("down_experts")

        z_MR = None
        if gate_up is not None:
            z_MR = _masked(checkpoint_name(x_MD @ gate_up["a"].astype(x_MD.dtype), PRODUCTS), tokens.slots_MR)
        own = {name: x for name, x in params.items() if name in _OF_EXPERTS_AXES}
        own |= {} if gate_up is None else {"gate_up_experts.b": gate_up["b"]}
        own |= {} if down is None else {"down_experts.a": down["a"]}
        per_expert = [name for name in ("gate_up_per_expert", "down_per_expert") if name in lora]
        own |= {f"{name}.{factor}": x for name in per_expert for factor, x in lora[name].items()}
        slots_MR = tokens.slots_MR if per_expert else None
        out_MD, z_down_MR = self._on_mesh(tokens, own, x_MD, weights_MK, ids_MK, z_MR, slots_MR)
        if down is not None:
            out_MD = out_MD + _masked(z_down_MR, tokens.slots_MR) @ down["b"].astype(x_MD.dtype)
        if self.biases:
            weight_ME = jnp.einsum("MK,MKE->ME", weights_MK, jax.nn.one_hot(ids_MK, self.E))
            out_MD = out_MD + weight_ME.astype(x_MD.dtype) @ params["down_experts.bias"]
        if self.shared is not None:
            shared_MD, _ = self.shared(params, x_MD, tokens, lora)
            out_MD = out_MD + shared_MD
        return out_MD, {"expert_tokens": jnp.zeros(self.E + 1, jnp.int32).at[ids_MK.reshape(-1)].add(1)[: self.E]}

    def _choose(self, mesh, params, logits_ME):
        """The router's choice, every device's for its own tokens: GSPMD would gather all logits for a `top_k`."""
        if mesh is None or mesh.size == 1:
            return self.router(params, logits_ME)
        own, rows = {name: x for name, x in params.items() if name.startswith("router.")}, P(RULES["rows"])
        return jax.shard_map(self.router, mesh=mesh, in_specs=(P(), rows), out_specs=(rows, rows), check_vma=False)(
            own, logits_ME
        )

    def _on_mesh(self, tokens, own, x_MD, weights_MK, ids_MK, z_MR, slots_MR):
        """`_routed` of all devices: a token goes to every device that shares its experts with others, and what they make of it
        is summed. With several experts a token most devices have one of them, so that sending it only there would save little.
        """
        mesh = tokens.mesh
        run = functools.partial(self._routed, mesh, tokens.kept)
        if mesh is None or mesh.size == 1:
            return run(own, x_MD, weights_MK, ids_MK, z_MR, slots_MR)

        def on_each_device(own, *tokens):
            if mesh.shape["expert"] > 1:
                tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, "expert", tiled=True), tokens)
            x_MD, weights_MK, ids_MK, *of_adapters = tokens
            here = self.E // mesh.shape["expert"]
            ids_MK = ids_MK - here * jax.lax.axis_index("expert")
            out = run(own, x_MD, weights_MK, jnp.where((ids_MK >= 0) & (ids_MK < here), ids_MK, here), *of_adapters)
            if mesh.shape["tensor"] > 1:
                out = jax.tree.map(lambda x: jax.lax.psum(x, "tensor"), out)
            if mesh.shape["expert"] > 1:
                out = jax.tree.map(lambda x: jax.lax.psum_scatter(x, "expert", tiled=True), out)
            return out

        rows = P(RULES["rows"])
        specs = {name: P(*(RULES[axis] if axis else None for axis in _OF_EXPERTS_AXES[name])) for name in own}
        out = rows, rows if "down_experts.a" in own else None
        each = jax.shard_map(
            on_each_device, mesh=mesh, in_specs=(specs, rows, rows, rows, rows, rows), out_specs=out, check_vma=False
        )
        return each(own, x_MD, weights_MK, ids_MK, z_MR, slots_MR)

    def _routed(self, mesh, one_size, own, x_MD, weights_MK, ids_MK, z_MR, slots_MR):
        """What the chosen experts of a device make [M, D], and what the `a` of down that goes with a shared `b` make [M, R]."""
        E, (M, K) = own["gate_experts.kernel"].shape[0], ids_MK.shape
        dispatch = by_expert(ids_MK, E)
        own |= {name: tuple(x) for name, x in own.items() if name.startswith("gate_up_")}

        def sorted_rows(x_MK: jax.Array) -> jax.Array:
            return jnp.zeros(M * K, x_MK.dtype).at[dispatch.place_MK.reshape(-1)].set(x_MK.reshape(-1), mode="drop")

        weights_S = sorted_rows(weights_MK)
        if goes_over_experts(mesh):
            trained = {name: x for name, x in own.items() if name.endswith((".a", ".b"))}
            frozen = {name: x for name, x in own.items() if name not in trained}
            return over_experts(
                functools.partial(self._hidden, _product_of_block, lambda bias_F: bias_F[None]),
                functools.partial(self._down, _product_of_block),
                trained,
                frozen,
                (x_MD, z_MR, slots_MR),
                weights_S,
                dispatch,
                one_size=one_size,
                keep_as=PRODUCTS,
            )

        def product(x_SD: jax.Array, w: jax.Array, frozen: bool) -> jax.Array:
            w = w.astype(x_SD.dtype)
            return grouped_matmul(x_SD, w, dispatch.sizes_E, transposed=frozen, frozen=frozen, mesh=mesh)

        expert_S = sorted_rows(ids_MK)
        rows = [None if x is None else spread(x, dispatch) for x in (x_MD, z_MR, slots_MR)]
        hidden = checkpoint_name(self._hidden(product, lambda bias_EF: bias_EF[expert_S], own, rows), PRODUCTS)
        made, ones_MK = self._down(product, own, hidden, weights_S[:, None]), jnp.ones_like(weights_MK)
        return jax.tree.map(lambda y_S: combine(y_S, ones_MK, dispatch.place_MK), made)

    def _hidden(self, product, bias, own, rows):
        """Gate and up before the activation, of rows of x and of z, and the rows' slots, which `_down` needs."""
        x_SD, z_SR, slots_SR = rows
        hidden = []
        for i, name in enumerate(("gate", "up")):
            y_SF = product(x_SD, own[f"{name}_experts.kernel"], True)
            if self.biases:
                y_SF = y_SF + bias(own[f"{name}_experts.bias"])
            if z_SR is not None:
                y_SF = y_SF + product(z_SR, own["gate_up_experts.b"][i], False)
            if "gate_up_per_expert.a" in own:
                z_own_SR = _masked(product(x_SD, own["gate_up_per_expert.a"][i], False), slots_SR)
                y_SF = y_SF + product(z_own_SR, own["gate_up_per_expert.b"][i], False)
            hidden.append(y_SF)
        return *hidden, slots_SR

    def _down(self, product, own, hidden, weights_S1):
        """What rows of gate and up become: of the model's width, and what the adapter's `a` makes of them."""
        gate_SF, up_SF, slots_SR = hidden
        h_SF = self.act(gate_SF, up_SF) * weights_S1.astype(gate_SF.dtype)
        made = product(h_SF, own["down_experts.kernel"], True)
        if "down_per_expert.a" in own:
            z_SR = _masked(product(h_SF, own["down_per_expert.a"], False), slots_SR)
            made = made + product(z_SR, own["down_per_expert.b"], False)
        return made, product(h_SF, own["down_experts.a"], False) if "down_experts.a" in own else None

    def sizes(self, mesh: Mapping[str, int]) -> Sizes:
        """Numbers that it holds of a token, on each device of such a mesh.

        Devices that share the experts work on each other's tokens, too, in arrays that have room for every choice.
        """
        width, k, shared_by = -(-self.F // parts(mesh, "mlp")), self.router.k, parts(mesh, "experts")
        products, working = 2 * k * width + 2 * ADAPTER_RANK, (3 + 4 * k) * self.D + 10 * k * width
        own = Sizes(products=shared_by * products, working=shared_by * working)
        return own + self.shared.sizes(mesh) if self.shared else own


def _masked(z_MR: Any, slots_MR: jax.Array | None) -> jax.Array:
    """As in `tinker_jax.lora.updates`."""
    return z_MR if slots_MR is None else jnp.where(slots_MR, z_MR, 0)


def _product_of_block(x_CD: jax.Array, w: jax.Array, frozen: bool) -> jax.Array:
    """Of rows of one expert."""
    w = w.astype(x_CD.dtype)
    return times_transposed(x_CD, w) if frozen else x_CD @ w
