"""An engine without a model: one worker thread, so that requests run in order, and a log of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinker_jax.types import (
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from tinker_jax.types.errors import BadRequestError


@dataclass(frozen=True)
class FakeInfo:
    name: str
    model_type: str
    directory: str
    context_length: int
    vocab_size: int


class FakeEngine:
    """Keeps what the clients asked for in `log`, as (method, id, ...); `hold()` stops the worker until `go()`."""

    def __init__(self, base_model: str, config: Any, store: Callable[[], Any]) -> None:
        self.base_model, self.config, self._store = base_model, config, store
        self.log: list[tuple] = []
        self.released: list[str] = []
        self.left: list[str] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tinker_jax-engine fake")
        self._gate = threading.Event()
        self._gate.set()

    def hold(self) -> None:
        self._gate.clear()
        self._pool.submit(self._gate.wait)

    def go(self) -> None:
        self._gate.set()

    def close(self) -> None:
        self.go()
        self._pool.shutdown()

    def _run(self, entry: tuple, result: Any = None, make: Callable[[], Any] | None = None) -> Future[Any]:
        def work() -> Any:
            self.log.append(entry)
            return result if make is None else make()

        return self._pool.submit(work)

    @property
    def known_info(self) -> FakeInfo | None:
        return FakeInfo(self.base_model, "qwen3", "/nowhere", 64, 100)

    def info(self) -> Future[FakeInfo]:
        return self._pool.submit(lambda: self.known_info)

    def create_adapter(self, model_id: str, lora: LoraConfig) -> Future[LoraConfig]:
        return self._run(("create_adapter", model_id, lora), lora)

    def load_adapter(self, model_id: str, path: str, *, with_optimizer: bool, create: bool) -> Future[LoraConfig]:
        return self._run(("load_adapter", model_id, path, with_optimizer, create), LoraConfig(rank=4))

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config, *, backward) -> Future[Any]:
        if loss_fn == "nonsense":
            raise BadRequestError("loss_fn: unknown loss 'nonsense'")

        def make() -> ForwardBackwardOutput:
            if loss_fn == "dro":
                raise RuntimeError("the device is on fire")
            outputs = [{"logprobs": TensorData(np.zeros(d.model_input.length), "float32")} for d in data]
            return ForwardBackwardOutput("TensorRecord", outputs, {"loss:sum": 1.5})

        return self._run(("forward_backward", model_id, data, loss_fn, loss_fn_config, backward), make=make)

    def forward_backward_custom(self, model_id, data, grad_fn) -> Future[Any]:
        def make() -> tuple[Any, float, dict]:
            logprobs = [np.full(d.loss_fn_inputs["target_tokens"].shape, -2.0, np.float32) for d in data]
            loss, metrics, grads = grad_fn(logprobs)
            outputs = [{"logprobs": TensorData(values, "float32")} for values in grads]
            return ForwardBackwardOutput("TensorRecord", outputs, {"loss:sum": 7.0, "other:mean": 1.0}), loss, metrics

        return self._run(("forward_backward_custom", model_id, data), make=make)

    def optim_step(self, model_id, params) -> Future[OptimStepResponse]:
        return self._run(("optim_step", model_id, params), OptimStepResponse(metrics={"grad_norm:mean": 1.0}))

    def save_state(self, model_id, run_id, name, *, ttl_seconds, overwrite, user_metadata) -> Future[str]:
        path = f"tinker://{run_id}/weights/{name}"
        return self._run(("save_state", model_id, name, ttl_seconds, overwrite, user_metadata), path)

    def save_sampler(self, model_id, run_id, name, *, ttl_seconds, user_metadata) -> Future[str]:
        path = f"tinker://{run_id}/sampler_weights/{name}"
        return self._run(("save_sampler", model_id, name, ttl_seconds, user_metadata), path)

    def snapshot(self, model_id: str, sampler_id: str, *, inflight: bool = False) -> Future[None]:
        return self._run(("inflight" if inflight else "snapshot", model_id, sampler_id))

    def warm_up(self, sampler_id: str, adapters: int) -> Future[int]:
        return self._run(("warm_up", sampler_id, adapters), 7)

    def load_sampler(self, sampler_id: str, path: str | None) -> Future[None]:
        return self._run(("load_sampler", sampler_id, path))

    def sample(self, sampler_id: str, request: Any) -> Future[SampleResponse]:
        def make() -> SampleResponse:
            sequence = SampledSequence("length", "s", np.array([1, 2], np.int32), np.array([-1.0, -2.0], np.float32))
            scores = np.full(request.prompt.length, -1.0, np.float32)
            scores[0] = np.nan
            return SampleResponse(
                [sequence] * request.num_samples, prompt_logprobs_np=scores if request.prompt_logprobs else None
            )

        return self._run(("sample", sampler_id, request), make=make)

    def release(self, name: str) -> None:
        self.released.append(name)

    def leave(self, user: str) -> None:
        self.left.append(user)
