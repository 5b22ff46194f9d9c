"""One engine per base model and configuration: weights on the mesh, a worker thread, adapters in training, a sampler.

Every public method queues a request and returns a `concurrent.futures.Future` at once. State belongs to the worker thread.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import lora as lora_lib
from tinker_jax import memory, sharding
from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.checkpoints.hub import canonical, resolve, verify_download
from tinker_jax.checkpoints.state import MismatchError, load_adapter, read_meta, save_adapter
from tinker_jax.checkpoints.store import CheckpointRecord, Store
from tinker_jax.engine.config import EngineConfig
from tinker_jax.engine.ledger import LEDGER, gib
from tinker_jax.engine.model_files import Text, read_config, read_quantization, stop_ids
from tinker_jax.engine.worker import Detour, Worker
from tinker_jax.models.weights import weights
from tinker_jax.programs import end_compilers, keep_compiled
from tinker_jax.sampling.sampler import Sampler
from tinker_jax.sampling.sequence import Score
from tinker_jax.training.pending import Pending, complete
from tinker_jax.training.trainer import AdapterState, PerExpertLora, Trainer, groups, hyperparameters
from tinker_jax.training.validate import check_data
from tinker_jax.types import Datum, ForwardBackwardOutput, LoraConfig, ModelInput, OptimStepResponse, TensorData
from tinker_jax.types.errors import BadRequestError, NotFoundError, StateError, UnprocessableEntityError

if TYPE_CHECKING:
    from tinker_jax.models.config import ModelConfig
    from tinker_jax.types import AdamParams, SampleRequest, SampleResponse

logger = logging.getLogger("tinker_jax")

#: From a custom loss: loss, metrics, and its gradient with respect to each datum's log-probabilities.
CustomGradient = Callable[[list[np.ndarray]], tuple[float, dict[str, float], list[np.ndarray]]]


@dataclass(frozen=True)
class ModelInfo:
    """What a client may know of the base model. `context_length` and `vocab_size` are in tokens."""

    name: str
    model_type: str
    directory: str
    context_length: int
    vocab_size: int


@dataclass(frozen=True)
class _SamplerWeights:
    """Weights of a sampling client. Requests under equal keys share cached prompts; `score` see `Sampler.submit`."""

    key: str
    adapter: lora_lib.Adapter | None
    score: Score | None


_engines: dict[tuple[str, EngineConfig], Engine] = {}
_leaving: set[Engine] = set()  # closed, and still giving their memory back
_engines_lock = threading.RLock()  # a finalizer that the garbage collector runs may take it again


def get_engine(base_model: str, config: EngineConfig, user: str, client: str) -> Engine:
    """The process's engine for a base model and configuration; starts loading on first use, and again after a failure.

    Args:
        base_model: a hub id and the directory in the hub's cache that it stands for are one.
        config: of the engine.
        user: keeps the engine until it is told to `leave`; the last one closes it.
        client: adapter or sampler that will be asked for, until its `release`. An engine that has none is closed where another
            needs the room.
    """
    base_model = canonical(base_model)
    with _engines_lock:
        engine = _engines.get((base_model, config))
        if engine is None or engine.failed:
            engine = _engines[base_model, config] = Engine(base_model, config)
        engine.users.add(user)
        engine.expect(client)
        return engine


def _make_way(loading: Engine) -> bool:
    """Closes engines that nobody uses, and waits until those that are closed have given their memory back; were there any?"""
    with _engines_lock:
        for key, engine in list(_engines.items()):
            if engine is not loading and engine.idle:
                del _engines[key]
                _leaving.add(engine)
        leaving = list(_leaving)
    for engine in leaving:
        engine.close()
        _leaving.discard(engine)  # also one that never loaded, or does not end: nothing is gained by waiting again
    return bool(leaving)


def loaded_engines() -> list[Engine]:
    """Engines of this process whose model is loaded or being loaded."""
    with _engines_lock:
        return [engine for engine in _engines.values() if not engine.failed]


def close_engines(timeout: float = 30.0) -> list[Engine]:
    """Ends every engine: running requests finish, waiting ones are cancelled, device memory is freed.

    Args:
        timeout: seconds to wait for all of them together.

    Returns:
        Those that were still at work then.
    """
    deadline = time.monotonic() + timeout
    with _engines_lock:
        engines = [*_engines.values(), *_leaving]
        _engines.clear()
    for engine in engines:
        engine.close(timeout=0)
    return [engine for engine in engines if not engine.close(max(0.0, deadline - time.monotonic()))]


@atexit.register
def _leave() -> None:
    """At the interpreter's exit. After Ctrl-C nothing is waited for that takes long: no compiler can be interrupted."""
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    deadline = time.monotonic() + (_PATIENCE_INTERRUPTED if interrupted else _PATIENCE)
    at_work = [f"engine {engine}" for engine in close_engines(deadline - time.monotonic())]
    if not end_compilers(deadline):
        at_work.append("compiler")
    if interrupted and at_work:
        print(f"tinker_jax: interrupted, left without waiting for: {', '.join(at_work)}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # as Python itself ends after Ctrl-C


_PATIENCE, _PATIENCE_INTERRUPTED = 30.0, 2.0  # seconds

_NO_CHANGE = LoraConfig(rank=1, train_mlp=False, train_unembed=False)
"""The smallest adapter: fresh, it stands for the base model where training wants one."""


class Engine:
    """Runs requests for one base model. Use `get_engine`.

    Args:
        base_model: hub id, local Hugging Face directory, or embedded model.
        config: what the hosted service would decide: dtype, mesh, memory, storage.
    """

    def __init__(self, base_model: str, config: EngineConfig) -> None:
        self.base_model, self.config = base_model, config
        self._adapters: dict[str, AdapterState] = {}
        self._samplers: dict[str, _SamplerWeights] = {}
        self._inflight: dict[str, list[str]] = {}  # samplers that follow an adapter, by its model_id
        self.users: set[str] = set()  # see `get_engine`
        self._clients: set[str] = set()  # names of adapters and samplers, from the moment when they are asked for
        self._info: ModelInfo | None = None
        self._text: Text | None = None
        self._worker = Worker(
            f"tinker_jax-engine {base_model}", self._load, self._sample_slice, self._precision, self._unload, self._recover
        )

    @property
    def failed(self) -> bool:
        """Did the model fail to load?"""
        return self._worker.failure is not None

    @property
    def known_info(self) -> ModelInfo | None:
        """Facts about the base model; None while it is being loaded. Waits for nothing."""
        return self._info

    @property
    def idle(self) -> bool:
        """Has nobody an adapter or a sampler here?"""
        return not self._clients

    def __str__(self) -> str:
        return self.base_model

    def close(self, timeout: float = 30.0) -> bool:
        """Ends the worker thread and frees the device memory; later requests raise StateError. Has it ended in time?"""
        return self._worker.close(timeout)

    def leave(self, user: str) -> None:
        """`user` needs the engine no more. The last one closes it, without waiting. Idempotent, callable from anywhere."""
        with _engines_lock:
            self.users.discard(user)
            if self.users or _engines.get((self.base_model, self.config)) is not self:
                return
            del _engines[self.base_model, self.config]
            if not self.failed:
                _leaving.add(self)
        self._worker.close(timeout=0)

    def expect(self, client: str) -> None:
        """Notes the name of an adapter or a sampler that will be asked for; `release` ends that."""
        with _engines_lock:
            self._clients.add(client)

    # ---- loading, on the worker ----

    def _precision(self):
        # Accelerators multiply float32 in lower precision unless told otherwise; asking for float32 means float32.
        exact = self.config.dtype == "float32" or (self.config.dtype is None and jax.default_backend() == "cpu")
        return jax.default_matmul_precision("highest" if exact else "default")

    def _load(self) -> None:
        try:
            self._load_model()
        except BaseException:
            self._give_back()
            raise

    def _give_back(self) -> None:
        """Nothing of the device's memory is set aside for this engine any more."""
        LEDGER.release(self)
        with _engines_lock:
            _leaving.discard(self)

    def _plan(self, cfg: ModelConfig, itemsize: int, mesh: Mesh) -> memory.Plan:
        """Divides what other engines leave of the memory, and sets it aside.

        Raises:
            UnprocessableEntityError: the model does not fit, even after engines that nobody uses are closed.
            BadRequestError: nobody knows how much memory there is.
        """
        own, limit, platform = self.config.memory, memory.device_bytes(), mesh.devices.flat[0].platform
        if own is None and limit is None:
            raise BadRequestError(
                f"{mesh.devices.flat[0].device_kind} does not tell how much memory it has; say how many bytes an engine may "
                "plan with (EngineConfig.memory)."
            )
        least = memory.least_bytes(cfg, itemsize, mesh.shape)
        while True:
            with LEDGER.lock:
                free = None if limit is None else limit - max(LEDGER.total, memory.used_bytes())
                budget = min(size for size in (own, free) if size is not None)
                if least <= budget:
                    plan = memory.plan(cfg, itemsize, budget, mesh.shape, platform)
                    LEDGER.hold(self, memory.planned_bytes(cfg, itemsize, plan, mesh.shape), limit)
                    return plan
            if budget == own or not _make_way(self):
                raise UnprocessableEntityError(self._no_room(least, budget, limit))

    def _no_room(self, least: int, budget: int, limit: int | None) -> str:
        needs = f"{self.base_model} needs at least {gib(least)} of each device's memory"
        if budget == self.config.memory:
            return f"{needs}; EngineConfig.memory allows {gib(budget)}."
        return (
            f"{needs}; of {gib(limit or 0)} {gib(max(0, budget))} are free: {LEDGER.report()}. Close clients that are not "
            "needed, let the engines plan with less (EngineConfig.memory), or take more devices (EngineConfig.mesh)."
        )

    def _hold_adapter(self, model_id: str, lora: LoraConfig) -> None:
        """Sets memory aside for training: parameters, two moments, gradients, float32."""
        LEDGER.hold(self, {f"adapter {model_id}": 4 * self._trainer.adapter_bytes(lora, 4)}, memory.device_bytes())

    def _hold_sampler(self, sampler_id: str, lora: LoraConfig) -> None:
        """Sets memory aside for an adapter that is sampled from, see `_for_sampling`."""
        size = self._trainer.adapter_bytes(lora, self._dtype.itemsize)
        if self.config.deterministic:
            size += self._trainer.adapter_bytes(lora, 4)
        LEDGER.hold(self, {f"sampler {sampler_id}": size}, memory.device_bytes())

    def _reserve_slots(self, size: int) -> bool:
        """See `tinker_jax.sampling.adapter_slots.AdapterSlots`."""
        try:
            LEDGER.hold(self, {"slots": size}, memory.device_bytes())
        except UnprocessableEntityError:
            return False
        return True

    def _for_sampling(self, state: AdapterState) -> tuple[lora_lib.Adapter, Score | None]:
        """The adapter as it is now: with its scale, in the model's dtype, in which every product with it is computed; and with
        `deterministic` as training has it, to score with."""
        scaled = lora_lib.scaled(state.params, state.scale)
        return jax.tree.map(lambda x: x.astype(self._dtype), scaled), self._score_under(state)

    def _load_model(self) -> None:
        start = time.perf_counter()
        self._store = Store(self.config.home)
        keep_compiled(self._store.home)  # before anything compiles
        directory = resolve(self.base_model)
        cfg, stops = read_config(directory), stop_ids(directory)
        mesh = sharding.make_mesh(self.config.mesh)
        dtype = jnp.dtype(self.config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        table = weights(cfg)
        for weight in table:
            sharding.check_divisible(weight.hf, weight.full_shape, weight.full_axes, mesh)
        shardings = {weight.name: sharding.named(mesh, weight.full_axes) for weight in table}
        verify_download(directory, self._store.home / "verified")
        plan = self._plan(cfg, dtype.itemsize, mesh)
        params = load_base(
            directory, table, dtype, shardings, quantization=read_quantization(directory), unused=cfg.file_names.unused
        )
        trainer = Trainer(cfg, params, mesh, plan, lambda: self._worker.others_wait(), self.config.deterministic)
        text = Text(directory)
        sampler = Sampler(
            cfg,
            params,
            mesh=mesh,
            dtype=dtype,
            kv_bytes=plan.kv_bytes,
            unstack=plan.unstack,
            stop_ids=stops,
            decode_text=text,
            deterministic=self.config.deterministic,
            reserve=self._reserve_slots,
        )
        if mesh.devices.flat[0].platform != "cpu":  # there it would take room that training alone never needs
            sampler.allocate()
        LEDGER.hold(self, {"cache": sampler.cache_bytes}, None)  # at most what was planned
        self._params, self._dtype, self._trainer, self._sampler, self._text = params, dtype, trainer, sampler, text
        self._info = ModelInfo(self.base_model, cfg.model_type, str(directory), cfg.context_length, cfg.V)
        logger.info(
            "loaded %s (%s, %.3g M parameters, %s, mesh %s) in %.1f s; micro-batches of %d tokens, remat %s, cache %.3g GiB",
            self.base_model,
            cfg.model_type,
            sum(x.size for x in params.values()) / 1e6,
            dtype.name,
            dict(mesh.shape),
            time.perf_counter() - start,
            plan.token_budget,
            plan.remat,
            sampler.cache_bytes / 2**30,
        )

    def _sample_slice(self) -> bool:
        try:
            return self._sampler.step()
        except Exception as error:  # a defect of the sampler itself: whoever waits must hear of it
            self._sampler.fail(error)
            return False

    def _recover(self, error: BaseException, again: bool) -> BaseException | None:
        return self._trainer.recover(error, again)

    def _unload(self) -> None:
        self._sampler.close()
        self._trainer.close()
        self._adapters.clear()
        self._samplers.clear()
        self._inflight.clear()
        self._params.clear()  # the one dict that trainer and sampler share: clients may hold on to this engine for long
        self._give_back()

    # ---- adapters ----

    def info(self) -> Future[ModelInfo]:
        """Facts about the base model, once it is loaded."""
        return self._worker.submit("info", lambda: self._info)

    def create_adapter(self, model_id: str, lora: LoraConfig) -> Future[LoraConfig]:
        """Makes a fresh adapter; without a seed it draws one, which the result tells."""

        def run() -> LoraConfig:
            seed = secrets.randbits(32) if lora.seed is None else lora.seed
            self._hold_adapter(model_id, lora)
            self._adapters[model_id] = self._trainer.new_adapter(lora, seed)
            return dataclasses.replace(lora, seed=seed)

        return self._worker.submit(model_id, run)

    def load_adapter(self, model_id: str, path: str, *, with_optimizer: bool, create: bool) -> Future[LoraConfig]:
        """Loads a checkpoint into an adapter, new with `create`; gradients are dropped, optimiser state restored or fresh."""

        def run() -> Detour:
            own = None if create else self._adapter(model_id).lora
            return Detour(partial(read, own), place)

        def read(own: LoraConfig | None):
            record = self._store.get(path, kinds=("weights",) if with_optimizer else ("weights", "sampler_weights"))
            lora = _lora_of(record)
            if own is not None:
                self._check_same_kind(record, lora, own)
            self._hold_adapter(model_id, lora)
            abstract, abstract_opt = self._trainer.abstract(lora)
            with self._fitting(record):
                return lora, *load_adapter(record.directory, abstract, abstract_opt if with_optimizer else None)

        def place(loaded) -> LoraConfig:
            lora, params, opt = loaded
            self._adapters[model_id] = self._trainer.place(lora, params, opt)
            return lora

        return self._worker.submit(model_id, run)

    def release(self, name: str) -> None:
        """Forgets an adapter or a sampler's weights after what is queued for it. Idempotent, callable from anywhere."""

        def run() -> None:
            LEDGER.release(self, f"adapter {name}", f"sampler {name}")
            with _engines_lock:
                self._clients.discard(name)
            self._adapters.pop(name, None)
            self._samplers.pop(name, None)
            self._inflight.pop(name, None)
            for followers in self._inflight.values():
                if name in followers:
                    followers.remove(name)

        with contextlib.suppress(StateError):  # closed already, which freed everything
            self._worker.submit(name, run)

    def _adapter(self, model_id: str) -> AdapterState:
        try:
            return self._adapters[model_id]
        except KeyError:
            raise NotFoundError(f"there is no training client {model_id!r}; was it closed?") from None

    @contextlib.contextmanager
    def _fitting(self, record: CheckpointRecord) -> Iterator[None]:
        """Names checkpoint and base model where their shapes differ."""
        try:
            yield
        except MismatchError as error:
            raise UnprocessableEntityError(
                f"{record.path} was trained on {record.base_model!r} and does not fit {self.base_model!r}: {error}"
            ) from error

    def _check_same_kind(self, record: CheckpointRecord, saved: LoraConfig, own: LoraConfig) -> None:
        """A client keeps its base model and its shape; a new client takes them from its caller and the checkpoint."""
        if record.base_model != self.base_model:
            raise UnprocessableEntityError(
                f"{record.path} was trained on {record.base_model!r}; this client's base model is {self.base_model!r}."
            )
        if _describe(saved) != _describe(own):
            raise UnprocessableEntityError(
                f"{record.path} holds {_describe(saved)}, but this client trains {_describe(own)}; "
                "use create_training_client_from_state instead."
            )

    # ---- training ----

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
        *,
        backward: bool,
    ) -> Future[ForwardBackwardOutput]:
        """Computes a loss on `data`; with `backward`, its gradient joins the adapter's accumulator.

        Raises:
            BadRequestError: the data, the loss or its configuration; ids and lengths are checked as soon as the model is known.
        """
        data = list(data)
        self._check(data, loss_fn, loss_fn_config)

        def run() -> Generator[None, None, Pending[ForwardBackwardOutput]]:
            return self._forward_backward(model_id, data, loss_fn, loss_fn_config, backward)

        return self._worker.submit(model_id, run, overlaps=True)

    def _check(self, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None) -> None:
        info = self._info
        limits = {} if info is None else {"vocab_size": info.vocab_size, "context_length": info.context_length}
        check_data(data, loss_fn, config, **limits)

    def _forward_backward(
        self, model_id, data, loss_fn, config, backward: bool
    ) -> Generator[None, None, Pending[ForwardBackwardOutput]]:
        self._check(data, loss_fn, config)  # again: the model may not have been loaded at the call
        state = self._adapter(model_id)

        def output(result: tuple[list[np.ndarray], dict[str, float]]) -> ForwardBackwardOutput:
            logprobs, metrics = result
            return ForwardBackwardOutput(
                loss_fn_output_type="ArrayRecord",
                loss_fn_outputs=[{"logprobs": TensorData.from_numpy(lp)} for lp in logprobs],
                metrics=metrics,
            )

        pending = yield from self._trainer.forward_backward(state, data, loss_fn, config, backward=backward)
        return pending.then(output)

    def forward_backward_custom(
        self, model_id: str, data: Sequence[Datum], gradient: CustomGradient
    ) -> Future[tuple[ForwardBackwardOutput, float, dict[str, float]]]:
        """Forward, the caller's loss on a thread of its own, backward of its gradient; later requests of the client wait.

        Returns:
            The backward output (cross-entropy with weights −gradient), the custom loss and the custom metrics.
        """
        plain = [_only_targets(datum) for datum in data]
        self._check(plain, "cross_entropy", None)

        def forward():
            pending = yield from self._forward_backward(model_id, plain, "cross_entropy", None, False)
            return pending.then(call_back)

        def call_back(output: ForwardBackwardOutput) -> Detour:
            logprobs = [out["logprobs"].to_numpy() for out in output.loss_fn_outputs]
            return Detour(lambda: gradient(logprobs), backward, callers=True)

        def backward(result: tuple[float, dict[str, float], list[np.ndarray]]):
            loss, metrics, gradients = result
            weighted = [
                Datum(
                    model_input=datum.model_input,
                    loss_fn_inputs={
                        "target_tokens": datum.loss_fn_inputs["target_tokens"],
                        "weights": TensorData.from_numpy(-np.asarray(g, np.float32)),
                    },
                )
                for datum, g in zip(plain, gradients, strict=True)
            ]
            pending = yield from self._forward_backward(model_id, weighted, "cross_entropy", None, True)
            return pending.then(lambda output: (output, loss, metrics))

        return self._worker.submit(model_id, forward)

    def optim_step(self, model_id: str, params: AdamParams) -> Future[OptimStepResponse]:
        """One AdamW step on the accumulated gradients.

        Raises:
            BadRequestError: a hyperparameter that float32 cannot hold.
        """
        hyperparameters(params)

        def response(metrics: dict[str, float]) -> OptimStepResponse:
            return OptimStepResponse(metrics={f"{name}:mean": value for name, value in metrics.items()})

        def run() -> Pending[OptimStepResponse]:
            return self._trainer.optim_step(self._adapter(model_id), params).then(response)

        return self._worker.submit(model_id, run, overlaps=True)

    # ---- checkpoints ----

    def save_state(
        self,
        model_id: str,
        run_id: str,
        name: str,
        *,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[str]:
        """Writes weights and optimiser state; the result is the checkpoint's tinker:// path."""
        return self._save(model_id, run_id, name, "weights", ttl_seconds, overwrite, user_metadata)

    def save_sampler(
        self,
        model_id: str,
        run_id: str,
        name: str,
        *,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[str]:
        """Writes weights for sampling, without optimiser state; the result is the checkpoint's tinker:// path."""
        return self._save(model_id, run_id, name, "sampler_weights", ttl_seconds, False, user_metadata)

    def _save(self, model_id, run_id, name, kind, ttl_seconds, overwrite, user_metadata) -> Future[str]:
        def run() -> Detour:
            return Detour(partial(write, dataclasses.replace(self._adapter(model_id))))

        def write(state: AdapterState) -> str:
            start = time.perf_counter()
            params, opt = state.stored()
            opt = opt if kind == "weights" else None
            meta = {"base_model": self.base_model, "rank": state.lora.rank, "groups": list(groups(state.lora))}
            record = self._store.write(
                run_id,
                kind,
                name,
                lambda directory: save_adapter(directory, params, opt, meta),
                has_optimizer=opt is not None,
                overwrite=overwrite,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
            )
            logger.info("wrote %s (%.3g MB) in %.1f s", record.path, record.size_bytes / 1e6, time.perf_counter() - start)
            return record.path

        return self._worker.submit(model_id, run)

    # ---- sampling ----

    def snapshot(self, model_id: str, sampler_id: str, *, inflight: bool = False) -> Future[None]:
        """Gives the adapter's weights, as of now in the client's order, to a sampler. Later training does not change them.

        With `inflight` a later call with `inflight` does: every such sampler of the adapter gets the new weights, and requests
        that wait or run go on under them, on the keys and values there are.
        """

        self.expect(sampler_id)

        def run() -> None:
            state = self._adapter(model_id)
            self._hold_sampler(sampler_id, state.lora)
            adapter, score = self._for_sampling(state)
            self._samplers[sampler_id] = _SamplerWeights(sampler_id, adapter, score)
            if inflight:
                followers = self._inflight.setdefault(model_id, [])
                for name in followers:
                    self._samplers[name] = _SamplerWeights(name, adapter, score)
                    self._sampler.replace(name, adapter, score)
                followers.append(sampler_id)

        return self._worker.submit(model_id, run, before=sampler_id)

    def load_sampler(self, sampler_id: str, path: str | None) -> Future[None]:
        """Gives a checkpoint's weights, or with None the bare base model, to a sampler."""

        def read(path: str) -> tuple[lora_lib.Adapter, Score | None]:
            record = self._store.get(path)
            lora = _lora_of(record)
            self._hold_sampler(sampler_id, lora)
            with self._fitting(record):
                params, _ = load_adapter(record.directory, self._trainer.abstract(lora)[0])
            state = AdapterState(lora, jax.device_put(lora_lib.pad(params), self._trainer.adapter_shardings(groups(lora))), {})
            return self._for_sampling(state)

        def keep(loaded: tuple[lora_lib.Adapter, Score | None]) -> None:
            self._samplers[sampler_id] = _SamplerWeights(sampler_id, *loaded)

        def run() -> Detour | None:
            if path is not None:
                return Detour(partial(read, path), keep)
            score = None
            if self.config.deterministic:
                self._hold_sampler(sampler_id, _NO_CHANGE)
                score = self._score_under(self._trainer.new_adapter(_NO_CHANGE, 0))
            self._samplers[sampler_id] = _SamplerWeights("base", None, score)
            return None

        return self._worker.submit(sampler_id, run)

    def _score_under(self, state: AdapterState) -> Score | None:
        """With `deterministic`, the log-probabilities of tokens as `forward` gives them under the adapter as it is now."""
        if not self.config.deterministic:
            return None
        state = dataclasses.replace(state, opt={}, grads=None)

        def score(tokens: np.ndarray) -> np.ndarray:
            data = [Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:]})]
            while True:
                try:
                    forward = complete(self._trainer.forward_backward(state, data, "cross_entropy", None, backward=False))
                    (logprobs,), _ = forward.finish()
                    return logprobs
                except memory.OutOfMemory as error:
                    if failure := self._trainer.recover(error, True):
                        raise failure from error

        return score

    def warm_up(self, sampler_id: str, adapters: int) -> Future[int]:
        """Compiles what sampling from so many adapters like the sampler's can need; the number of compiled programs."""

        def run() -> int:
            return self._sampler.warm_up(self._sampler_weights(sampler_id).adapter, adapters)

        return self._worker.submit(sampler_id, run)

    def _sampler_weights(self, sampler_id: str) -> _SamplerWeights:
        try:
            return self._samplers[sampler_id]
        except KeyError:
            raise NotFoundError(f"there is no sampling client {sampler_id!r}; was it closed?") from None

    def sample(self, sampler_id: str, request: SampleRequest) -> Future[SampleResponse]:
        """Queues a sampling request; many share the device, and each resolves when its own rows are done.

        Raises:
            BadRequestError, UnsupportedError: the request, as soon as the model is known.
        """
        checked = request if self._info is None else self._sampler.parse(request)

        def admit(future: Future[SampleResponse]) -> None:
            weights = self._sampler_weights(sampler_id)
            self._sampler.submit(checked, weights.key, weights.adapter, future, weights.score)

        if _stops_at_text(request) and not (self._text and self._text.loaded):
            self._worker.submit(sampler_id, self._load_text)  # other samplers do not wait for it
        return self._worker.hand_over(sampler_id, admit)

    def _load_text(self) -> Detour | None:
        assert self._text is not None
        return None if self._text.loaded else Detour(self._text.load)


def _lora_of(record: CheckpointRecord) -> LoraConfig:
    is_per_expert = lora_lib.PER_EXPERT in read_meta(record.directory)["meta"].get("groups", ())
    return (PerExpertLora if is_per_expert else LoraConfig)(
        rank=record.lora_rank, train_mlp=record.train_mlp, train_attn=record.train_attn, train_unembed=record.train_unembed
    )


def _stops_at_text(request: SampleRequest) -> bool:
    stop = request.sampling_params.stop
    return isinstance(stop, str) or any(isinstance(item, str) for item in stop or ())


def _describe(lora: LoraConfig) -> str:
    return f"rank {lora.rank} on {', '.join(groups(lora))}"


def _only_targets(datum: Datum) -> Datum:
    targets = datum.loss_fn_inputs.get("target_tokens")
    return Datum(model_input=datum.model_input, loss_fn_inputs={} if targets is None else {"target_tokens": targets})
