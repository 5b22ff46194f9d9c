"""forward_backward and optim_step of one base model, for any number of adapters.

Host code over packed micro-batches: it has them dispatched (`layer_by_layer`, `whole_model`), and leaves the waiting to whoever
reads the `Pending` result. Nothing here knows clients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax import lora as lora_lib
from tinker_jax import memory, optim, sharding
from tinker_jax.kernels.attention import MAX_SEGMENTS
from tinker_jax.losses import combine_metrics, default_config
from tinker_jax.memory import OutOfMemory, Plan, out_of_memory
from tinker_jax.models.block import Report
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.routers import load_metrics
from tinker_jax.models.weights import lora_targets
from tinker_jax.programs import Program
from tinker_jax.training.layer_by_layer import LayerByLayer
from tinker_jax.training.objective import Call, adapter_shape
from tinker_jax.training.packing import bucket, pack, pack_apart, unpack
from tinker_jax.training.pending import Pending, Retracted
from tinker_jax.training.whole_model import WholeModel
from tinker_jax.types import LoraConfig
from tinker_jax.types.errors import BadRequestError, UnprocessableEntityError
from tinker_jax.types.loss_specs import LOSS_SPECS

if TYPE_CHECKING:
    from tinker_jax.types import AdamParams, Datum

logger = logging.getLogger("tinker_jax")


@dataclass
class AdapterState:
    """One adapter in training, padded to its rank's bucket. Trees are replaced, never changed: a snapshot is a reference."""

    lora: LoraConfig
    params: lora_lib.Adapter
    opt: dict[str, Any]
    grads: lora_lib.Adapter | None = None

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return lora_lib.scale(self.lora.rank)

    def stored(self) -> tuple[lora_lib.Adapter, dict[str, Any]]:
        """Parameters and optimiser state at the adapter's own rank."""
        return lora_lib.trim(self.params, self.lora.rank), lora_lib.trim(self.opt, self.lora.rank)

    def undo(self) -> Callable[[], None]:
        """A function that puts back what is here now."""
        now = self.params, self.opt, self.grads

        def put_back() -> None:
            self.params, self.opt, self.grads = now

        return put_back


@dataclass(frozen=True)
class PerExpertLora(LoraConfig):
    """Of an adapter whose experts share no factor: an imported one may be such, a new one never is."""


def groups(lora: LoraConfig) -> tuple[str, ...]:
    """Trained groups of a LoRA configuration."""
    flags = {name: getattr(lora, name) for name in ("train_attn", "train_mlp", "train_unembed")}
    return lora_lib.groups(**flags, per_expert=isinstance(lora, PerExpertLora))


class Trainer:
    """Training programs of one base model.

    Args:
        cfg: shape of the model.
        params: flat base weights, committed to `mesh`.
        mesh: devices.
        plan: micro-batch size and rematerialisation.
        others_wait: does anyone else want the device? Asked between micro-batches, from any thread.
        deterministic: a datum has the same log-probabilities and gradient bit for bit whatever else is in its call: none
            shares a row with another, and gradients are added in order. `forward` and `forward_backward` with any loss give the
            same log-probabilities.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Mapping[str, jax.Array],
        mesh: jax.sharding.Mesh,
        plan: Plan,
        others_wait: Callable[[], bool] = lambda: False,
        deterministic: bool = False,
    ) -> None:
        self._mesh, self._plan, self._others_wait, self._deterministic = mesh, plan, others_wait, deterministic
        self._targets = lora_targets(cfg)
        self._row_shards = sharding.parts(mesh, "rows")
        self._add = Program(lambda total, new: jax.tree.map(jnp.add, total, new), "add_gradients", donate=(1,))
        self._update = Program(optim.adamw, "optim_step")
        self._model = (
            LayerByLayer(cfg, params, mesh, self._add)
            if sharding.on_default_cpu(mesh)
            else WholeModel(cfg, params, mesh, self.adapter_shardings, self._add)
        )

    @property
    def programs(self) -> int:
        """Number of training programs compiled so far, the optimiser's left out."""
        return self._model.programs

    def close(self) -> None:
        """Gives the weights back; nothing can be run any more."""
        self._model.close()

    # ---- adapters ----

    def adapter_shardings(self, trained: Sequence[str]) -> lora_lib.Adapter:
        """Where each factor of an adapter of the trained groups lies."""
        axes = lora_lib.logical_axes(self._targets, trained)
        return jax.tree.map(lambda a: sharding.named(self._mesh, a), axes, is_leaf=lambda a: isinstance(a, tuple))

    def abstract(self, lora: LoraConfig) -> tuple[lora_lib.Adapter, dict[str, Any]]:
        """Adapter and optimiser state as they are stored: `ShapeDtypeStruct`s with shardings, for a restore."""
        shapes = lora_lib.abstract(self._targets, lora.rank, groups(lora))

        def place(x: jax.ShapeDtypeStruct, s: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

        adapter = jax.tree.map(place, shapes, self.adapter_shardings(groups(lora)))
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self._mesh))
        return adapter, {"mu": adapter, "nu": adapter, "count": count}

    def adapter_bytes(self, lora: LoraConfig, itemsize: int) -> int:
        """Bytes on each device of an adapter's parameters at the rank at which they are computed, so many for each number."""
        shapes = lora_lib.abstract(self._targets, lora_lib.bucket(lora.rank), groups(lora))
        cuts = self.adapter_shardings(groups(lora))
        return itemsize * sum(jax.tree.leaves(jax.tree.map(lambda x, cut: math.prod(cut.shard_shape(x.shape)), shapes, cuts)))

    def new_adapter(self, lora: LoraConfig, seed: int) -> AdapterState:
        """A fresh adapter; equal seeds give equal values on every mesh."""
        return self.place(lora, lora_lib.init(seed, self._targets, lora.rank, groups(lora)), None)

    def place(self, lora: LoraConfig, params: lora_lib.Adapter, opt: dict[str, Any] | None) -> AdapterState:
        """Readies an adapter of its own rank, with its optimiser state or a fresh one, for training."""
        params = lora_lib.pad(params)
        opt = optim.init(params) if opt is None else lora_lib.pad(opt)
        adapter, state = jax.tree.map(lambda x: x.sharding, self.abstract(lora))
        return AdapterState(lora, jax.device_put(params, adapter), jax.device_put(opt, state))

    # ---- forward_backward ----

    def forward_backward(
        self, state: AdapterState, data: Sequence[Datum], loss_fn: str, config: Mapping[str, float] | None, *, backward: bool
    ) -> Generator[None, None, Pending[tuple[list[np.ndarray], dict[str, float]]]]:
        """Log-probabilities and metrics of `data`; with `backward`, gradients join `state.grads` at the end.

        A generator that pauses, with the device at rest, between two micro-batches while others wait. It can be closed there,
        and nothing has changed.

        Args:
            state: the adapter.
            data: checked by `tinker_jax.training.validate`.
            loss_fn: name in `LOSS_SPECS`.
            config: the caller's loss configuration; missing keys take the loss's defaults.
            backward: also compute gradients.

        Returns:
            Per datum float32 log-probabilities of its targets, [N] or [N, K], in order; and metrics `name:reduction`.

        Raises:
            OutOfMemory: on the way or at the read.
            Retracted: at the read: the loss is not finite.
        """
        what = "forward_backward" if backward else "forward"
        values = default_config(loss_fn, config)
        plan, undo = self._plan, state.undo()
        tokens = [model_tokens(datum) for datum in data]
        if self._deterministic:
            inputs = [loss_inputs([datum], loss_fn, values)[0] for datum in data]
            batches = pack_apart(tokens, inputs, rows=self._row_shards)
        else:
            batches = pack(
                tokens,
                loss_inputs(data, loss_fn, values),
                token_budget=plan.token_budget,
                rows=self._row_shards,
                most_sequences=MAX_SEGMENTS - 1 if self._mesh.devices.flat[0].platform == "gpu" else None,  # and the padding
            )
        widest, least = max(batch.tokens.shape for batch in batches), bucket(max(map(len, tokens)))
        trained, rank = groups(state.lora), lora_lib.bucket(state.lora.rank)
        at_once = 0 if self._deterministic else plan.at_once
        adapter = state.params, state.scale
        call = Call(*adapter, batches, loss_fn, values, backward, plan.remat, trained, rank, at_once, self._deterministic)
        if backward:  # its program will be there when it is asked for
            hyper = optim.AdamHyper(*[np.float32(0)] * len(optim.AdamHyper._fields))
            self._update.prepare(state.params, state.params, state.opt, hyper, shape=call.adapter_shape)
        several = len(batches) > 1
        with out_of_memory(plan, widest, least, several):
            outputs, grads = yield from self._model.run(call, self._others_wait)
            if backward and state.grads is not None:
                grads = self._add(state.grads, grads, shape=call.adapter_shape)
        if backward:
            state.grads = grads

        def read() -> tuple[list[np.ndarray], dict[str, float]]:
            with out_of_memory(plan, widest, least, several):
                host = jax.device_get(outputs)  # one transfer
                jax.block_until_ready(grads)  # the sum is a program of its own, whose failure must not surface later
            logprobs = unpack(batches, [output.logprobs for output in host], len(data))
            shapes = [datum.loss_fn_inputs["target_tokens"].to_numpy().shape for datum in data]
            logprobs = [_like(lp, shape) for lp, shape in zip(logprobs, shapes, strict=True)]
            metrics = combine_metrics([output.metrics for output in host]) | _of_experts([output.reports for output in host])
            if reason := _not_finite(logprobs, metrics, call.adapter):
                raise Retracted(UnprocessableEntityError(f"{what}: {reason}; nothing was changed."))
            return logprobs, metrics

        return Pending(read, undo)

    # ---- optim_step ----

    def optim_step(self, state: AdapterState, params: AdamParams) -> Pending[dict[str, float]]:
        """AdamW on the accumulated gradients, which are gone afterwards.

        Raises:
            BadRequestError: there are no gradients.
            UnprocessableEntityError: at the read: they, or what they would have made of the adapter, are not finite; the step
                was not applied.
            OutOfMemory: at the call or at the read.
        """
        if state.grads is None:
            raise BadRequestError("optim_step without gradients: call forward_backward first.")
        undo = state.undo()
        with out_of_memory(self._plan):
            shape = adapter_shape(lora_lib.bucket(state.lora.rank), groups(state.lora))
            state.params, state.opt, metrics, applied = self._update(
                state.params, state.grads, state.opt, hyperparameters(params), shape=shape
            )
        state.grads = None

        def read() -> dict[str, float]:
            with out_of_memory(self._plan):
                host, fine = jax.device_get((metrics, applied))
            values = {name: float(value) for name, value in host.items()}
            if not np.isfinite(values["grad_norm"]):
                raise UnprocessableEntityError(
                    "optim_step: the gradients are not finite; the step was not applied and the gradients were dropped. "
                    "Look for extreme advantages or log-probability ratios, or lower the learning rate."
                )
            if not fine:
                raise UnprocessableEntityError(
                    f"optim_step: after a step with {params} the adapter or its moments would not be finite in float32; the "
                    "step was not applied and the gradients were dropped. Lower learning_rate or weight_decay, or raise eps."
                )
            return values

        return Pending(read, undo)

    # ---- out of memory ----

    def recover(self, error: BaseException, again: bool) -> BaseException | None:
        """Makes room after a training step ran out of memory.

        Args:
            error: what a step, or its read, raised.
            again: the step had the device to itself.

        Returns:
            None when the step may run again: micro-batches one at a time, or half as large, or with more recomputed where
            that is one row. Else the error to report.
        """
        if not isinstance(error, OutOfMemory):
            return error
        if error.shape is None:  # the optimiser, whose size no plan changes
            return self._too_large("optim_step") if again else None
        if error.plan is not self._plan:  # there is more room since
            return None
        plan = memory.smaller(self._plan, error.shape, error.least, error.several)
        if plan is None:
            return self._too_large(f"a row of {error.shape[1]} tokens, with every layer recomputed,")
        logger.warning(
            "out of memory on %d x %d tokens: micro-batches of %d tokens, remat %s, become %d tokens, remat %s%s",
            *error.shape,
            *(self._plan.token_budget, self._plan.remat, plan.token_budget, plan.remat),
            ", one at a time" if plan.at_once < self._plan.at_once else "",
        )
        self._plan = plan
        return None

    def _too_large(self, what: str) -> UnprocessableEntityError:
        return UnprocessableEntityError(
            f"{what} does not fit into a device of {self._plan.memory / 2**30:.3g} GiB beside the model; nothing was changed. "
            "Shorten the longest sequence, lower the LoRA rank, or cut the model over more devices (EngineConfig.mesh)."
        )


def _of_experts(reports: Sequence[Sequence[Report]]) -> dict[str, float]:
    """Metrics of what the layers of each micro-batch report; none for a model without experts."""
    counts = [[report["expert_tokens"] for report in layers if report] for layers in reports]
    return load_metrics(np.sum([np.stack(layers) for layers in counts], axis=0)) if any(counts) else {}


def _not_finite(logprobs: Sequence[np.ndarray], metrics: Mapping[str, float], adapter: lora_lib.Adapter) -> str | None:
    """Why results are not finite, or None when they are."""
    wrong = next((i for i, lp in enumerate(logprobs) if not np.isfinite(lp).all()), None)
    if wrong is None:
        if np.isfinite(metrics["loss:sum"]):
            return None
        return "the loss is not finite, though the log-probabilities are: weights, advantages or logprobs are too large"
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        if not bool(jnp.isfinite(leaf).all()):
            return f"the log-probabilities of data[{wrong}] are not finite: the adapter's {_dotted(path)} has such values"
    return (
        f"the log-probabilities of data[{wrong}] are not finite, though the adapter is: the base weights have such values, or "
        "their dtype's range is exceeded"
    )


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(str(key.key) for key in path)


def hyperparameters(params: AdamParams) -> optim.AdamHyper:
    """What the compiled step takes; BadRequestError names a value that float32 cannot hold."""
    return optim.adam_hyper(**{name: getattr(params, name) for name in optim.AdamHyper._fields})


def model_tokens(datum: Datum) -> np.ndarray:
    """Token ids of a text datum, int32 [N]."""
    return np.asarray(datum.model_input.to_ints(), np.int32)


def _like(logprobs: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What a datum of a mixed batch asked for: [N] or its own K columns."""
    if logprobs.ndim == 1:
        return logprobs
    return (logprobs[:, 0] if len(shape) == 1 else logprobs[:, : shape[1]]).copy()


def loss_inputs(data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """What the loss reads of each datum, every datum with the same keys.

    An optional input that some data give is filled in for the others; one that none gives is left to the loss. When any datum
    has K targets a position, all become [N, K], each with weights, because columns that pad a narrower one must weigh nothing.

    Args:
        data: checked data.
        loss_fn: name in `LOSS_SPECS`.
        config: complete configuration of the loss, whose values stand in for inputs of the same name.
    """
    given = set().union(*(datum.loss_fn_inputs for datum in data))
    wide = any(datum.loss_fn_inputs["target_tokens"].to_numpy().ndim == 2 for datum in data)
    if wide:
        given.add("weights")
    out = []
    for datum in data:
        arrays = {}
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        for key, declared in LOSS_SPECS[loss_fn].inputs.items():
            if key == "target_tokens":
                arrays[key] = targets.astype(np.int32)
            elif key in datum.loss_fn_inputs:
                arrays[key] = datum.loss_fn_inputs[key].to_numpy().astype(np.float32)
            elif key in given:
                arrays[key] = np.full(targets.shape, config[key] if declared.default is None else declared.default, np.float32)
        out.append({key: x[:, None] if wide and x.ndim == 1 else x for key, x in arrays.items()})
    return out
