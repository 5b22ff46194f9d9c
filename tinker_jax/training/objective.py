"""What a forward_backward computes: the loss of packed micro-batches under one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import lora as lora_lib
from tinker_jax import sharding
from tinker_jax.kernels.linear_cross_entropy import default_block, default_tile, linear_cross_entropy
from tinker_jax.losses import Packing, evaluate
from tinker_jax.models.block import Params
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Remat, unembedding
from tinker_jax.training.packing import MicroBatch

KNOWN = "known log-probabilities"


class Output(NamedTuple):
    """What a micro-batch gives beside gradients.

    Attributes:
        logprobs: of its targets, [B, T(, K)].
        metrics: raw, see `tinker_jax.losses`.
        reports: what each layer reports, see `tinker_jax.models.block.Report`.
    """

    logprobs: Any
    metrics: Any
    reports: Any


def adapter_shape(rank: int, trained: Sequence[str]) -> str:
    """Names the shapes of an adapter of that rank with those groups; equal names mean equal shapes."""
    return f"rank={rank} {'+'.join(trained)}"


@dataclass(frozen=True)
class Call:
    """One forward or forward_backward.

    Attributes:
        adapter: its parameters.
        scale: factor of the low-rank update.
        batches: packed data.
        loss_fn: name in `LOSS_SPECS`.
        config: complete configuration of the loss.
        backward: also compute gradients.
        remat: what layers keep for the backward pass.
        trained: groups of the adapter that are trained.
        rank: at which the adapter is computed.
        at_once: positions of two micro-batches that may be at work together, see `tinker_jax.memory.Plan`.
        one_program: log-probabilities come from the same compiled programs whatever the loss, and with or without gradients;
            compiled into others they may round another way.
    """

    adapter: lora_lib.Adapter
    scale: float
    batches: Sequence[MicroBatch]
    loss_fn: str
    config: Mapping[str, np.float32]
    backward: bool
    remat: Remat
    trained: tuple[str, ...]
    rank: int
    at_once: int
    one_program: bool

    @property
    def adapter_shape(self) -> str:
        """Names the shapes of the adapter."""
        return adapter_shape(self.rank, self.trained)

    def loss_shape(self, batch: MicroBatch) -> str:
        """Names the shapes of a micro-batch's loss, as `adapter_shape` does those of an adapter."""
        wide = "".join(f" {k}{list(x.shape[2:])}" if x.ndim > 2 else f" {k}" for k, x in sorted(batch.inputs.items()))
        return f"{wide.strip()} {self.loss_fn}{' backward' if self.backward else ''}{' known' if self.one_program else ''}"


def logprobs_of_hidden(
    cfg: ModelConfig,
    params: Params,
    mesh: Mesh,
    h_MD: jax.Array,
    head: Mapping[str, jax.Array] | None,
    targets: jax.Array,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probabilities of targets [B, T(, K)], in their shape, and entropies [M] if asked for; see `loss_of_hidden`."""
    B, T, *columns = targets.shape
    kernel_VD = unembedding(cfg, params)
    if mesh.size > 1:  # gathered over `fsdp` once, or every tile would gather it again
        kernel_VD = jax.lax.with_sharding_constraint(kernel_VD, sharding.named(mesh, ("vocab", None)))
    block = default_block(cfg.V) if mesh.shape["tensor"] == 1 else cfg.V
    output = linear_cross_entropy(
        h_MD,
        kernel_VD,
        targets.reshape(B * T, -1),
        lora=head,
        entropy=entropy,
        tile=default_tile(cfg.V, block) * sharding.parts(mesh, "rows"),
        block=block,
    )
    return output.logprobs_MK.reshape(B, T, *columns), output.entropy_M


def loss_of_hidden(
    cfg: ModelConfig,
    params: Params,
    mesh: Mesh,
    loss_fn: str,
    h_MD: jax.Array,
    head: Mapping[str, jax.Array] | None,
    batch: Mapping[str, jax.Array],
    config: Mapping[str, Any],
) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:
    """The loss of a micro-batch.

    Args:
        cfg: shape of the model.
        params: base weights, of which the unembedding is read.
        mesh: devices.
        loss_fn: name in `LOSS_SPECS`.
        h_MD: hidden states after the final norm, M = B·T.
        head: the unembedding's adapter, scaled, if it has one.
        batch: `MicroBatch.arrays`; under `KNOWN` log-probabilities [B, T(, K)] that another program has computed, which take
            the place of those computed here and leave them their gradient.
        config: complete configuration of the loss.

    Returns:
        The loss, a sum over tokens, and beside it log-probabilities [B, T(, K)] and raw metrics.
    """
    inputs = dict(batch)
    tokens, _, segments, sequences = (inputs.pop(k) for k in ("tokens", "positions", "segments", "sequences"))
    targets, known = inputs.pop("target_tokens"), inputs.pop(KNOWN, None)
    B, T = tokens.shape
    flat = {k: x.reshape((B * T, *x.shape[2:])) for k, x in inputs.items()}
    logprobs, entropy_M = logprobs_of_hidden(cfg, params, mesh, h_MD, head, targets, entropy=loss_fn != "cross_entropy")
    if known is not None:
        logprobs = _in_place_of(known, logprobs)
    packing = Packing(segments.reshape(B * T) > 0, sequences.reshape(B * T), B * T)
    out = evaluate(loss_fn, logprobs.reshape(B * T, *targets.shape[2:]), flat, config, packing, entropy_M)
    return jnp.sum(out.per_token_loss), (logprobs, out.metrics)


@jax.custom_vjp
def _in_place_of(known: jax.Array, computed: jax.Array) -> jax.Array:
    """`known`, with the gradient of `computed`."""
    return known


_in_place_of.defvjp(lambda known, computed: (known, None), lambda _, g: (None, g))
