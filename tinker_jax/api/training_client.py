"""`TrainingClient`: one adapter in training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from tinker_jax.api.client_future import BackcompatClientFuture
from tinker_jax.api.custom_loss import CustomLossBackend, CustomLossFn, LossHandle, grad_fn, with_custom_metrics
from tinker_jax.api.deprecation import final_twin, future_twin, warn
from tinker_jax.api.door import base_model_name, check_metadata, check_save, tokenizer_of, training_data
from tinker_jax.api.futures import APIFuture, AwaitableConcurrentFuture, Derived
from tinker_jax.api.sampling_client import BackcompatSamplingClientFuture, open_sampling_client, sampling_client_of
from tinker_jax.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LoraConfig,
    LossFnType,
    ModelData,
    OptimParams,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    _check,
)
from tinker_jax.types.coerce import looks_like
from tinker_jax.types.errors import ArgumentTypeError, BadRequestError, UnsupportedError
from tinker_jax.types.training import as_optim_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinker_jax.api.session import Session
    from tinker_jax.engine.engine import Engine, ModelInfo

T = TypeVar("T")


class TrainingClient:
    """Trains one LoRA adapter. Calls run in the order they were made, and each returns at once: queue `optim_step` right
    behind `forward_backward`. A call that fails changes nothing, and does not hold up the next.

    Made by `ServiceClient.create_lora_training_client` and `create_training_client_from_state`.

    Attributes:
        model_id: also the id of the training run, and the first part of its `tinker://` paths.
    """

    def __init__(self, session: Session, engine: Engine, info: ModelInfo, model_id: str, lora: LoraConfig) -> None:
        self.model_id = model_id
        self._session, self._engine, self._info, self._lora = session, engine, info, lora
        session.adopt(self, engine.release, model_id)

    def __repr__(self) -> str:
        what = f"{self._info.name!r}, rank {self._lora.rank}, model_id {self.model_id!r}, {self._session.state}"
        return f"<tinker_jax.TrainingClient of {what}>"

    def forward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The loss, summed over tokens and datums, without a gradient.

        Args:
            data: at least one datum; copied, so it may change after the call. Its `loss_fn_inputs` have the shape of
                `target_tokens`, which is [N] for the N tokens of `model_input` (under `cross_entropy` [N, K] too: K targets a
                position). In brackets: may be left out.

                cross_entropy: target_tokens, [weights]
                importance_sampling: target_tokens, logprobs, advantages
                ppo: target_tokens, logprobs, advantages, [clip_low_threshold], [clip_high_threshold]
                cispo: target_tokens, logprobs, advantages, [clip_low_threshold], [clip_high_threshold]
                dro: target_tokens, logprobs, advantages
                gspo: target_tokens, logprobs, advantages, sequence_ratio_mask, [clip_low_threshold], [clip_high_threshold]
                stable_reinforce: target_tokens, logprobs, advantages, [clip_high_threshold]

                `target_tokens` are int64: the target of position i is the token after it. All others are float32.
            loss_fn: one of these names; `docs/losses.md` has the formulas.
            loss_fn_config: numbers of the loss, by name:

                ppo: clip_low_threshold 0.8, clip_high_threshold 1.2
                cispo: clip_low_threshold 0.0, clip_high_threshold 4.0
                dro: beta 0.05
                gspo: clip_low_threshold 0.9997, clip_high_threshold 1.0004
                stable_reinforce: clip_high_threshold 4.0, kl_coeff 0.0

        Returns:
            A future of a `ForwardBackwardOutput`:

            loss_fn_output_type: `"ArrayRecord"`.
            loss_fn_outputs: one dict for each datum, in order; its `"logprobs"` is a float32 `TensorData` in the shape of
                `target_tokens`, the log-probability of each target in nats.
            metrics: floats under `name:reduction`; `loss:sum` always, others as the loss has them.

        Raises:
            BadRequestError: at the call, naming datum and field; nothing is queued.
            StateError: the service client is closed.
        """
        return self._pass(data, loss_fn, loss_fn_config, backward=False)

    forward_async = future_twin(forward)

    def forward_backward(
        self, data: list[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The loss, summed over tokens and datums; its gradient is added to what earlier calls left.

        Args:
            data: at least one datum; copied, so it may change after the call. Its `loss_fn_inputs` have the shape of
                `target_tokens`, which is [N] for the N tokens of `model_input` (under `cross_entropy` [N, K] too: K targets a
                position). In brackets: may be left out.

                cross_entropy: target_tokens, [weights]
                importance_sampling: target_tokens, logprobs, advantages
                ppo: target_tokens, logprobs, advantages, [clip_low_threshold], [clip_high_threshold]
                cispo: target_tokens, logprobs, advantages, [clip_low_threshold], [clip_high_threshold]
                dro: target_tokens, logprobs, advantages
                gspo: target_tokens, logprobs, advantages, sequence_ratio_mask, [clip_low_threshold], [clip_high_threshold]
                stable_reinforce: target_tokens, logprobs, advantages, [clip_high_threshold]

                `target_tokens` are int64: the target of position i is the token after it. All others are float32.
            loss_fn: one of these names; `docs/losses.md` has the formulas.
            loss_fn_config: numbers of the loss, by name:

                ppo: clip_low_threshold 0.8, clip_high_threshold 1.2
                cispo: clip_low_threshold 0.0, clip_high_threshold 4.0
                dro: beta 0.05
                gspo: clip_low_threshold 0.9997, clip_high_threshold 1.0004
                stable_reinforce: clip_high_threshold 4.0, kl_coeff 0.0

        Returns:
            A future of a `ForwardBackwardOutput`:

            loss_fn_output_type: `"ArrayRecord"`.
            loss_fn_outputs: one dict for each datum, in order; its `"logprobs"` is a float32 `TensorData` in the shape of
                `target_tokens`, the log-probability of each target in nats.
            metrics: floats under `name:reduction`; `loss:sum` always, others as the loss has them.

        Raises:
            BadRequestError: at the call, naming datum and field; nothing is queued.
            StateError: the service client is closed.
        """
        return self._pass(data, loss_fn, loss_fn_config, backward=True)

    forward_backward_async = future_twin(forward_backward)

    def _pass(
        self, data: Any, loss_fn: str, loss_fn_config: Mapping[str, float | str] | None, *, backward: bool
    ) -> APIFuture[ForwardBackwardOutput]:
        self._session.require_open()
        if isinstance(loss_fn, str) and loss_fn == "custom":
            raise UnsupportedError("loss_fn 'custom' names an uploaded loss; pass a callable to forward_backward_custom()")
        batch = training_data(data)
        config = dict(loss_fn_config) if isinstance(loss_fn_config, Mapping) else loss_fn_config  # its own, as the data are
        return self._submit(self._engine.forward_backward(self.model_id, batch, loss_fn, config, backward=backward))

    def forward_backward_custom(
        self,
        data: list[Datum],
        loss_fn: CustomLossFn | LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
        backend: CustomLossBackend = "torch",
    ) -> APIFuture[ForwardBackwardOutput]:
        """As `forward_backward`, for a loss of the caller's own.

        Args:
            data: datums with `target_tokens`.
            loss_fn: `loss_fn(data, logprobs) -> (scalar loss, metrics)`. It gets the data as passed here and, for each
                datum, the log-probabilities of its `target_tokens`, and must depend on all of them. It runs on a thread
                of its own; other clients go on meanwhile.
            loss_type_input: deprecated, no effect.
            backend: `"torch"`: logprobs are float32 torch tensors and the loss is one; `"jax"`: they are `jax.Array`s and
                the loss is differentiated by `jax.value_and_grad`.

        Returns:
            The output; `loss:sum` is the custom loss, its metrics are added as they are, and `surrogate_loss:sum` is the
            linear loss whose gradient stood in for it. An error of `loss_fn` comes out of the future unchanged, and the
            client stays usable.
        """
        self._session.require_open()
        if loss_type_input is not None:
            _check.one_of(loss_type_input, ("logprobs",), "loss_type_input")
            warnings.warn(
                "loss_type_input is deprecated in the Tinker API and has no effect; leave it out",
                DeprecationWarning,
                stacklevel=2,
            )
        if looks_like(LossHandle, loss_fn):
            raise UnsupportedError("a LossHandle cannot run here; pass the loss itself, a callable (data, logprobs)")
        batch = training_data(data)
        for i, datum in enumerate(batch):
            if "target_tokens" not in datum.loss_fn_inputs:
                raise BadRequestError(f"data[{i}]: target_tokens must be provided when using forward_backward_custom")
        gradient = grad_fn(loss_fn, data, backend)  # type: ignore[arg-type]
        future = self._track(self._engine.forward_backward_custom(self.model_id, batch, gradient))
        return AwaitableConcurrentFuture(Derived(lambda result: with_custom_metrics(*result), future))

    forward_backward_custom_async = future_twin(forward_backward_custom)

    def optim_step(
        self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step along the accumulated gradient, which is zero afterwards.

        Args:
            optim_params: hyperparameters of this step, `AdamParams(learning_rate, beta1, beta2, eps, weight_decay,
                grad_clip_norm)`; they may differ from call to call.
            adam_params: the older name of `optim_params`.

        Returns:
            A future of an `OptimStepResponse`:

            metrics: `grad_norm:mean`, the global norm of the gradient before clipping.

        Raises:
            ArgumentTypeError: neither, or not AdamParams (also a TypeError). BadRequestError: both, or beyond float32.
            UnsupportedError: DimuonParams.
            StateError: the service client is closed.
            From the future: BadRequestError where no gradient was accumulated, UnprocessableEntityError where it is not finite;
            the step is not applied then.
        """
        self._session.require_open()
        if optim_params is not None and adam_params is not None:
            raise BadRequestError("optim_step: give optim_params or adam_params, not both")
        given = optim_params if optim_params is not None else adam_params
        if given is None:
            raise ArgumentTypeError("optim_step: optim_params is missing; pass AdamParams(learning_rate=...)")
        params = as_optim_params(given)
        if not isinstance(params, AdamParams):
            raise UnsupportedError("optim_step: Dimuon is not available: its mathematics is unpublished; use AdamParams")
        return self._submit(self._engine.optim_step(self.model_id, params))

    optim_step_async = future_twin(optim_step)

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Saves adapter and optimiser state, to go on from later.

        Args:
            name: last part of the path: letters, digits, `.`, `_`, `-`.
            ttl_seconds: life of the checkpoint; None: for ever.
            overwrite: replace a checkpoint of that name, its metadata included; otherwise ConflictError.
            user_metadata: kept with the checkpoint.

        Returns:
            `.path` is `tinker://<model_id>/weights/<name>`.
        """
        self._session.require_open()
        ttl_seconds, user_metadata = check_save(name, ttl_seconds, user_metadata)
        future = self._engine.save_state(
            self.model_id,
            self.model_id,
            name,
            ttl_seconds=ttl_seconds,
            overwrite=_check.boolean(overwrite, "overwrite"),
            user_metadata=user_metadata,
        )
        return self._response(future, lambda path: SaveWeightsResponse(path=path, type="save_weights"))

    save_state_async = future_twin(save_state)

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Loads weights into this client; gradients and optimiser state start afresh. Deprecated in the Tinker API:
        `create_training_client_from_state`. `weights_access_token` is not needed here."""
        warn("load_state()", "use ServiceClient.create_training_client_from_state()")
        return self._load(path, with_optimizer=False)

    load_state_async = future_twin(load_state)

    def load_state_with_optimizer(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """As `load_state`, with the optimiser state. Deprecated in the Tinker API:
        `create_training_client_from_state_with_optimizer`."""
        warn("load_state_with_optimizer()", "use ServiceClient.create_training_client_from_state_with_optimizer()")
        return self._load(path, with_optimizer=True)

    load_state_with_optimizer_async = future_twin(load_state_with_optimizer)

    def _load(self, path: str, *, with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        self._session.require_open()
        self._session.store.get(_check.name(path, "path"), kinds=_loadable(with_optimizer))
        future = self._engine.load_adapter(self.model_id, path, with_optimizer=with_optimizer, create=False)
        return self._response(future, lambda _: LoadWeightsResponse(path=path, model_id=self.model_id, type="load_weights"))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Saves the adapter alone, to sample from. Arguments as `save_state`; `.path` is
        `tinker://<model_id>/sampler_weights/<name>`."""
        self._session.require_open()
        ttl_seconds, user_metadata = check_save(name, ttl_seconds, user_metadata)
        future = self._engine.save_sampler(
            self.model_id, self.model_id, name, ttl_seconds=ttl_seconds, user_metadata=user_metadata
        )
        return self._response(future, lambda path: SaveWeightsForSamplerResponse(path=path, type="save_weights_for_sampler"))

    save_weights_for_sampler_async = future_twin(save_weights_for_sampler)

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> NoReturn:
        """Refused: the weights are on your own disk."""
        raise UnsupportedError(
            "save_weights_external prepares a download from a service; here, save_weights_for_sampler() and then "
            "tinker_jax.checkpoints.export_peft(path, directory)"
        )

    save_weights_external_async = future_twin(save_weights_external)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> BackcompatSamplingClientFuture:
        """A client that samples from the weights as they are after the calls made so far. Nothing is written or copied.

        Args:
            name: deprecated, no effect.
            retry_config: no effect; nothing is retried in process.
            record_stability_info: no effect; the losses here need none.
            kind: `"snapshot"`: its weights never change. `"inflight"`: the next call with `"inflight"` gives its weights to
                this client too, in the middle of what it is drawing; keys and values of the tokens so far stay as they are.

        Raises:
            BadRequestError: another `kind`.
        """
        self._session.require_open()
        _check.one_of(kind, ("snapshot", "inflight"), "kind")
        if name is not None:
            warnings.warn(
                "save_weights_and_get_sampling_client(name=...) is deprecated in the Tinker API and has no effect; "
                "save_weights_for_sampler(name) keeps the weights",
                DeprecationWarning,
                stacklevel=2,
            )
        sampler_id = self._session.next_sampler_id()
        snapshot = self._track(self._engine.snapshot(self.model_id, sampler_id, inflight=kind == "inflight"))
        return sampling_client_of(self._session, self._engine, sampler_id, snapshot)

    save_weights_and_get_sampling_client_async = final_twin(save_weights_and_get_sampling_client)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> BackcompatSamplingClientFuture:
        """A client that samples from a checkpoint. See `ServiceClient.create_sampling_client`."""
        return open_sampling_client(self._session, model_path, None)

    create_sampling_client_async = final_twin(create_sampling_client)

    def get_info(self) -> GetInfoResponse:
        """The model and the adapter."""
        info = self._info
        return GetInfoResponse(
            type="get_info",
            model_data=ModelData(arch=info.model_type, model_name=info.name, tokenizer_id=info.directory),
            model_id=self.model_id,
            is_lora=True,
            lora_rank=self._lora.rank,
            model_name=info.name,
        )

    get_info_async = future_twin(get_info)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return tokenizer_of(self._info.directory)

    def get_console_url(self) -> NoReturn:
        """Refused: there is no console."""
        raise UnsupportedError("there is no console in process; RestClient().get_training_run(client.model_id) has the run")

    def get_telemetry(self) -> None:
        """Nothing is ever sent anywhere."""
        return None

    def _track(self, future: Future[T]) -> Future[T]:
        self._session.touch(self.model_id)
        return self._session.track(future, self)

    def _submit(self, future: Future[T]) -> APIFuture[T]:
        return AwaitableConcurrentFuture(self._track(future))

    def _response(self, future: Future[Any], make: Any) -> APIFuture[Any]:
        return AwaitableConcurrentFuture(Derived(make, self._track(future)))


class BackcompatTrainingClientFuture(BackcompatClientFuture[TrainingClient], TrainingClient):
    """A `TrainingClient` that is not ready yet."""


def _loadable(with_optimizer: bool) -> tuple[str, ...]:
    return ("weights",) if with_optimizer else ("weights", "sampler_weights")


def open_training_client(
    session: Session, base_model: str, lora: LoraConfig, user_metadata: dict[str, str] | None
) -> BackcompatTrainingClientFuture:
    """A client of a fresh adapter."""
    session.require_open()
    user_metadata = check_metadata(user_metadata)
    model_id = session.next_model_id()
    engine = session.engine(base_model_name(base_model), model_id)
    ready = engine.create_adapter(model_id, lora)
    return _training_client_of(session, engine, model_id, ready, user_metadata)


def restore_training_client(
    session: Session, path: str, base_model: str | None, user_metadata: dict[str, str] | None, *, with_optimizer: bool
) -> BackcompatTrainingClientFuture:
    """A client, and so a run, of its own that starts from a checkpoint."""
    session.require_open()
    user_metadata = check_metadata(user_metadata)
    record = session.store.get(_check.name(path, "path"), kinds=_loadable(with_optimizer))
    model_id = session.next_model_id()
    engine = session.engine(base_model_name(record.base_model if base_model is None else base_model), model_id)
    ready = engine.load_adapter(model_id, path, with_optimizer=with_optimizer, create=True)
    return _training_client_of(session, engine, model_id, ready, user_metadata)


def _training_client_of(
    session: Session, engine: Engine, model_id: str, ready: Future[LoraConfig], user_metadata: dict[str, str] | None
) -> BackcompatTrainingClientFuture:
    from tinker_jax.checkpoints.store import RunRecord

    def make(info: ModelInfo, lora: LoraConfig) -> TrainingClient:
        client = TrainingClient(session, engine, info, model_id, lora)
        now = datetime.now(UTC)
        run = RunRecord(
            run_id=model_id,
            session_id=session.id,
            base_model=engine.base_model,
            lora_rank=lora.rank,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
            train_unembed=lora.train_unembed,
            seed=lora.seed,
            user_metadata=user_metadata,
            created=now,
            last_request_time=now,
        )
        session.store.create_run(run)
        return client

    session.track(ready, engine)
    client = Derived(make, engine.info(), ready)
    session.give_up(client, engine.release, model_id)
    return BackcompatTrainingClientFuture(client)
