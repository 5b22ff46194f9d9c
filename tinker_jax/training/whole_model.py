"""A micro-batch as one program, its layers scanned: for accelerators and meshes."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinker_jax import lora as lora_lib
from tinker_jax import sharding
from tinker_jax.kernels.attention import MAX_SEGMENTS
from tinker_jax.models.block import Params
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Decoder, activation_dtype, attention_of
from tinker_jax.programs import Program
from tinker_jax.training.objective import KNOWN, Call, Output, logprobs_of_hidden, loss_of_hidden
from tinker_jax.training.packing import MicroBatch

_MOST_AHEAD = 16_384  # tokens of each part of the rows that are dispatched and not computed: enough to keep a device busy
_FEW_SEGMENTS = 16  # of a row; for such a micro-batch a GPU gets a program that sets aside room for no more


class WholeModel:
    """Training programs of a model.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh.
        mesh: devices.
        places: from trained groups to the sharding of every gradient.
        add: program that sums two adapters' trees and donates the second.
    """

    def __init__(self, cfg: ModelConfig, params: Params, mesh: Mesh, places: Any, add: Program) -> None:
        self._cfg, self._params, self._mesh, self._places, self._add = cfg, params, mesh, places, add
        self._attention = attention_of(cfg, mesh, activation_dtype(params))
        self._ahead: collections.deque[tuple[int, jax.Array]] = collections.deque()  # tokens that are, and their result
        self._logprobs = Program(self._logprobs_alone, "log-probabilities", static=("most_segments",))
        self._step = Program(self.step, "train_step", static=("loss_fn", "backward", "remat", "trained", "most_segments"))

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._step.count + self._logprobs.count

    def close(self) -> None:
        """Gives the weights back."""
        self._params = {}
        self._ahead.clear()

    def run(
        self, call: Call, others_wait: Callable[[], bool]
    ) -> Generator[None, None, tuple[list[Output], lora_lib.Adapter | None]]:
        """Starts every micro-batch: (the output of each, the call's gradients).

        Pauses between micro-batches, with the device at rest, while `others_wait` says so.
        """
        total, outputs = None, []
        for batch in call.batches:
            arrays, most_segments = jax.device_put(batch.arrays, self.rows_of(batch)), self._most_segments(batch)
            model, shape = (call.adapter, np.float32(call.scale), self._params), f"{batch.shape} {call.adapter_shape}"
            if call.one_program:
                read = {name: arrays[name] for name in ("tokens", "positions", "segments", "target_tokens")}
                columns = list(read["target_tokens"].shape[2:])
                arrays[KNOWN] = self._logprobs(*model, read, shape=f"{shape} {columns}", most_segments=most_segments)
            grads, *output = self._step(
                *model,
                arrays,
                call.config,
                shape=f"{shape} {call.loss_shape(batch)}",
                loss_fn=call.loss_fn,
                backward=call.backward,
                remat=call.remat,
                trained=call.trained,
                most_segments=most_segments,
            )
            outputs.append(Output(*output))
            total = grads if total is None else self._add(total, grads, shape=call.adapter_shape)
            self._ahead.append((batch.tokens.size, output[0]))
            interrupted = others_wait()
            self._wait(0 if interrupted else _MOST_AHEAD * sharding.parts(self._mesh, "rows"))
            if interrupted and len(outputs) < len(call.batches):
                yield
        return outputs, total

    def _wait(self, most: int) -> None:
        """Until no more tokens than these are ahead, of any call."""
        while self._ahead and sum(tokens for tokens, _ in self._ahead) > most:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # whoever reads the result hears of it
                jax.block_until_ready(self._ahead.popleft()[1])

    def rows_of(self, batch: MicroBatch) -> dict[str, jax.sharding.Sharding]:
        """Where each array of a micro-batch lies."""
        return {k: sharding.named(self._mesh, ("rows",) + (None,) * (x.ndim - 1)) for k, x in batch.arrays.items()}

    def _most_segments(self, batch: MicroBatch) -> int:
        """The padding counts as one."""
        few = self._mesh.devices.flat[0].platform == "gpu" and batch.segments.max() < _FEW_SEGMENTS
        return _FEW_SEGMENTS if few else MAX_SEGMENTS

    def _logprobs_alone(self, adapter, scale, params, batch, *, most_segments):
        h_MD, head, _ = self._hidden(adapter, scale, params, batch, "none", most_segments)
        return logprobs_of_hidden(self._cfg, params, self._mesh, h_MD, head, batch["target_tokens"])[0]

    def _hidden(self, adapter, scale, params, batch, remat, most_segments):
        """(hidden states after the final norm, the head's adapter with its scale, what layers report)"""
        factors = lora_lib.scaled(adapter, scale)
        attention = functools.partial(self._attention, most_segments=most_segments)
        rows = batch["tokens"], batch["positions"], batch["segments"]
        h_MD, reports = Decoder(self._cfg, params).forward(*rows, factors, remat=remat, attention=attention, mesh=self._mesh)
        return h_MD, factors.get("lm_head"), reports

    def step(self, adapter, scale, params, batch, config, *, loss_fn, backward, remat, trained, most_segments=MAX_SEGMENTS):
        """One micro-batch: (gradients or None, log-probabilities [B, T(, K)], raw metrics, what layers report)."""

        def loss(adapter):
            h_MD, head, reports = self._hidden(adapter, scale, params, batch, remat, most_segments)
            value, output = loss_of_hidden(self._cfg, params, self._mesh, loss_fn, h_MD, head, batch, config)
            return value, (*output, reports)

        if not backward:
            _, output = loss(adapter)
            return None, *output
        grads, output = jax.grad(loss, has_aux=True)(adapter)
        return jax.lax.with_sharding_constraint(grads, self._places(trained)), *output
