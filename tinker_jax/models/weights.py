"""The table that names every weight: our place, the Hugging Face name, shape, meaning of each axis, LoRA group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tinker_jax.lora import PER_EXPERT
from tinker_jax.models.config import ModelConfig

LoraGroup = Literal["attn", "mlp", "unembed"]
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Fused:
    """A tensor in a file that holds all experts of a layer, and how one expert's part becomes ours.

    Which of several orders a family's files have is known from the family, never from shapes: a square tensor has no order.

    Attributes:
        hf: Hugging Face name, with `{layer}`.
        shape: of the tensor, experts first.
        axis: of an expert's part, along which our weight is cut out of it.
        first, step: of the cut. Its length is our weight's.
        transposed: the cut is turned round.
    """

    hf: str
    shape: tuple[int, ...]
    axis: int = 0
    first: int = 0
    step: int = 1
    transposed: bool = False

    def span(self, length: int) -> slice:
        """Where a cut of this length lies along `axis`."""
        return slice(self.first, self.first + self.step * length, self.step)


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        name: key in the flat parameter dict, e.g. `"layers.q_proj.kernel"`.
        hf: Hugging Face name; `{layer}` stands for the layer's number when `layers` are given, `{expert}` for an expert's.
        shape: shape in our layout, without the leading layer axis.
        axes: logical axis of each dimension of `shape` (see `tinker_jax.sharding.RULES`).
        layers: numbers of the model's layers that are stacked on a leading axis; none for a weight outside the layers.
        lora: group that trains an adapter on it, or None.
        fused: of an expert's weight: another form that files may have; the only one where `hf` has no `{expert}`.
        adapter: name of the adapter's module; weights of one name have one adapter.
        shares: of an expert's weight: the factor of its adapter that all experts share.
        exact: stays float32 whatever the model's dtype.
    """

    name: str
    hf: str
    shape: tuple[int, ...]
    axes: Axes
    layers: tuple[int, ...] = ()
    lora: LoraGroup | None = None
    fused: Fused | None = None
    adapter: str = ""
    shares: Literal["a", "b"] | None = None
    exact: bool = False

    @property
    def stacked(self) -> int:
        """Number of layers on the leading axis; 0: there is none."""
        return len(self.layers)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape in the parameter dict, layer axis included."""
        return (self.stacked, *self.shape) if self.stacked else self.shape

    @property
    def full_axes(self) -> Axes:
        """Logical axes in the parameter dict; the layer axis is never cut."""
        return (None, *self.axes) if self.stacked else self.axes

    @property
    def module(self) -> str:
        """Name of the module it belongs to, e.g. `"q_proj"`, `"lm_head"`."""
        return self.name.split(".")[-2]

    def cut(self, part: np.ndarray) -> np.ndarray:
        """An expert's weight out of its part of the `fused` tensor; a view."""
        assert self.fused is not None
        at = self.fused
        index = [slice(None)] * part.ndim
        index[at.axis] = at.span(self.shape[1])
        return part[tuple(index)].T if at.transposed else part[tuple(index)]

    def put(self, part: np.ndarray, value: np.ndarray) -> None:
        """Writes an expert's weight into its part of the `fused` tensor."""
        self.cut(part)[...] = value

    def of_layer(self, number: int) -> Weight:
        """The row of one of its layers alone, names filled in, `{expert}` left."""
        fused = self.fused and replace(self.fused, hf=self.fused.hf.format(layer=number))
        return replace(self, hf=self.hf.format(layer=number, expert="{expert}"), layers=(), fused=fused)

    @property
    def experts(self) -> int:
        """Number of experts on the first axis of `shape`; 0: it belongs to none."""
        return self.shape[0] if self.axes[0] == "experts" else 0


def linear(module: str, hf: str, shape: tuple[int, int], axes: Axes, lora: LoraGroup, bias: bool = False) -> list[Weight]:
    """Rows of a linear of a layer, [out, in] as files hold it; `hf` is its path below the layer."""
    rows = [Weight(f"{module}.kernel", f"{hf}.weight", shape, axes, lora=lora)]
    if bias:
        rows.append(Weight(f"{module}.bias", f"{hf}.bias", shape[:1], axes[:1]))
    return rows


def norm(module: str, hf: str, width: int) -> Weight:
    """Row of a norm of a layer."""
    return Weight(f"{module}.scale", f"{hf}.weight", (width,), (None,))


def weights(cfg: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of a decoder, in the order of its forward pass."""
    table = [Weight("embed.embedding", "model.embed_tokens.weight", (cfg.V, cfg.D), ("vocab", "embed"))]
    for group in cfg.groups:
        for stack in group:
            for row in stack.block.weights():
                fused = row.fused and replace(row.fused, hf=f"model.layers.{{layer}}.{row.fused.hf}")
                hf = f"model.layers.{{layer}}.{row.hf}"
                table.append(replace(row, name=f"{stack.name}.{row.name}", hf=hf, layers=stack.layers, fused=fused))
    table.append(Weight("final_norm.scale", "model.norm.weight", (cfg.D,), (None,)))
    if not cfg.tied:
        table.append(_head(cfg))
    return tuple(table)


def _head(cfg: ModelConfig) -> Weight:
    return Weight("lm_head.kernel", "lm_head.weight", (cfg.V, cfg.D), ("vocab", "embed"), lora="unembed")


@dataclass(frozen=True)
class LoraTarget:
    """Linears that an adapter can train: `y = x Wᵀ + scale · (x a) b`, `a` [D_in, R], `b` [R, D_out].

    Attributes:
        stack: of the layers it belongs to, e.g. `"layers"`; empty outside of them.
        module: its name there, e.g. `"q_proj"`.
        groups: each of which trains it.
        fan_in, fan_out: D_in and D_out.
        axes: logical axes of the two.
        stacked: layers on the leading axis of both factors, 0 where there is none.
        weights: rows of the table that it updates; of a tied unembedding the row that it would have.
        a_lead, b_lead: further leading axes of a factor, as (length, logical axis): experts, and gate and up.
    """

    stack: str
    module: str
    groups: tuple[str, ...]
    fan_in: int
    fan_out: int
    axes: tuple[str | None, str | None]
    stacked: int
    weights: tuple[Weight, ...]
    a_lead: tuple[tuple[int, str | None], ...] = ()
    b_lead: tuple[tuple[int, str | None], ...] = ()

    def of_weight(self, number: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views of what updates one of its weights, out of a layer's factors; of experts with an axis in front, whose length is
        1 where all experts share the factor."""

        def own(factor: np.ndarray, lead: tuple[tuple[int, str | None], ...]) -> np.ndarray:
            if len(lead) == 2:
                return factor[number]
            return factor[None] if self.weights[number].experts and not lead else factor

        return own(a, self.a_lead), own(b, self.b_lead)


def lora_targets(cfg: ModelConfig) -> tuple[LoraTarget, ...]:
    """Linears with a LoRA group; the unembedding is one even when it shares the embedding's matrix.

    Experts are there twice. In the group `"mlp"` they have one factor for all of them and one of their own each: those that
    read the model's width share `a`, those that write it share `b`, so that the wide product of the adapter is a plain one. In
    the group `tinker_jax.lora.PER_EXPERT` they share none.
    """
    rows: dict[tuple[str, str], list[Weight]] = {}
    for w in weights(cfg):
        if w.lora in ("attn", "mlp"):
            rows.setdefault((w.name.split(".")[0], w.adapter or w.module), []).append(w)
    targets, per_expert = [], []
    for (stack, module), own in rows.items():
        w = own[0]
        assert w.lora is not None
        (fan_out, fan_in), (out_axis, in_axis) = w.shape[-2:], w.axes[-2:]
        sizes = fan_in, fan_out, (in_axis, out_axis), w.stacked, tuple(own)
        if w.shares is None:
            groups = ("mlp", PER_EXPERT) if w.lora == "mlp" else (w.lora,)
            targets.append(LoraTarget(stack, module, groups, *sizes))
            continue
        each = (*(((len(own), None),) if len(own) > 1 else ()), (w.experts, "experts"))
        leads = ((), each) if w.shares == "a" else (each, ())
        targets.append(LoraTarget(stack, module, ("mlp",), *sizes, *leads))
        per_expert.append(LoraTarget(stack, module.replace("experts", "per_expert"), (PER_EXPERT,), *sizes, each, each))
    targets.append(LoraTarget("", "lm_head", ("unembed",), cfg.D, cfg.V, ("embed", "vocab"), 0, (_head(cfg),)))
    return (*targets, *per_expert)  # these last: a fresh adapter's numbers depend on the places of the others
