"""`ServiceClient`: where every program begins."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, NoReturn

from tinker_jax.api.custom_loss import PerDatumLossFn
from tinker_jax.api.deprecation import final_twin, warn
from tinker_jax.api.door import check_metadata, engine_config, refuse_other_optimizers
from tinker_jax.api.futures import AwaitableConcurrentFuture
from tinker_jax.api.rest_client import RestClient
from tinker_jax.api.sampling_client import BackcompatSamplingClientFuture, open_sampling_client
from tinker_jax.api.session import CloseStatus, Session
from tinker_jax.api.training_client import (
    BackcompatTrainingClientFuture,
    open_training_client,
    restore_training_client,
)
from tinker_jax.engine.config import EngineConfig
from tinker_jax.types import CustomLossInputRank, GetServerCapabilitiesResponse, LoraConfig, OptimizerConfig, _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import UnsupportedError


class ServiceClient:
    """Makes training and sampling clients. Making one is free: models load when first used, and are shared by all clients
    of the process with the same `engine`.

    Args:
        user_metadata, display_name: kept while the process lives.
        project_id, base_url, api_key, default_headers_overrides: accepted for compatibility, no effect.
        engine: dtype, mesh, memory and storage directory.
        kwargs: others are ignored with a FutureWarning.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        engine: EngineConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            warnings.warn(f"ServiceClient ignores unknown arguments: {', '.join(sorted(kwargs))}", FutureWarning, stacklevel=2)
        self._config = engine_config(engine)
        user_metadata = check_metadata(user_metadata)
        self._session = Session(self._config, user_metadata, _check.optional_text(display_name, "display_name"))
        self._rest_lock = threading.Lock()
        self._rest: RestClient | None = None

    def __repr__(self) -> str:
        name = "" if self._session.display_name is None else f" {brief(self._session.display_name)}"
        return f"<tinker_jax.ServiceClient{name}, session {self._session.id!r}, {self._session.state}>"

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """A client that trains a fresh LoRA adapter, which at first changes nothing.

        Args:
            base_model: hub id, local Hugging Face directory (remembered by its absolute path), or
                `"tinker-jax/tiny-qwen3"` or `"tinker-jax/tiny-moe"`, which are embedded.
            rank: >= 1. The update of a weight is scaled by 32 / rank.
            seed: of the adapter; None: drawn anew.
            train_mlp, train_attn, train_unembed: which weights get an adapter; at least one.
            user_metadata: kept with the run.
            optimizer: AdamOptimizerConfig or None.

        Raises:
            BadRequestError: an argument out of range. An unknown model is an error of the future.
        """
        refuse_other_optimizers(optimizer)
        lora = LoraConfig(rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        return open_training_client(self._session, base_model, lora, user_metadata)

    create_lora_training_client_async = final_twin(create_lora_training_client)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> BackcompatTrainingClientFuture:
        """A client, with a run of its own, that starts from a checkpoint's weights and a fresh optimiser.

        Args:
            path: of `save_state`, or of `save_weights_for_sampler`.
            base_model: instead of the name stored with the checkpoint, for a model that has moved.
            user_metadata: kept with the new run.
            weights_access_token: not needed here.
            optimizer: AdamOptimizerConfig or None.

        Raises:
            NotFoundError: no such checkpoint.
        """
        refuse_other_optimizers(optimizer)
        return restore_training_client(self._session, path, base_model, user_metadata, with_optimizer=False)

    create_training_client_from_state_async = final_twin(create_training_client_from_state)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> BackcompatTrainingClientFuture:
        """As `create_training_client_from_state`, with the optimiser's moments and step count: training goes on as if
        it had never stopped. `path` is one of `save_state`."""
        return restore_training_client(self._session, path, base_model, user_metadata, with_optimizer=True)

    create_training_client_from_state_with_optimizer_async = final_twin(create_training_client_from_state_with_optimizer)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> BackcompatSamplingClientFuture:
        """A client that samples from a checkpoint, or from a base model as it is.

        Args:
            model_path: of `save_weights_for_sampler`, or of `save_state`.
            base_model: alone: sample from it; with `model_path`: instead of the name stored with the checkpoint.
            retry_config: no effect; nothing is retried in process.
            record_stability_info: no effect; the losses here need none.

        Raises:
            NotFoundError: no such checkpoint. BadRequestError: neither argument, or not a `tinker://` path.
        """
        return open_sampling_client(self._session, model_path, base_model)

    create_sampling_client_async = final_twin(create_sampling_client)

    def create_rest_client(self) -> RestClient:
        """A `RestClient` of the same storage. Deprecated in the Tinker API: make one yourself."""
        warn("create_rest_client()", "use RestClient(engine=...)")
        return self._rest_client()

    def _rest_client(self) -> RestClient:
        self._session.require_open()
        with self._rest_lock:
            if self._rest is None:
                self._rest = RestClient(engine=self._config)
            return self._rest

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Deprecated in the Tinker API: `RestClient().get_server_capabilities()`. Blocks."""
        warn("ServiceClient.get_server_capabilities()", "use RestClient().get_server_capabilities()")
        return self._rest_client().get_server_capabilities().result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """Deprecated in the Tinker API: `await RestClient().get_server_capabilities()`."""
        warn("ServiceClient.get_server_capabilities_async()", "await RestClient().get_server_capabilities()")
        return await self._rest_client().get_server_capabilities()

    def create_custom_loss(self, fn: PerDatumLossFn, input_ranks: Mapping[str, CustomLossInputRank]) -> NoReturn:
        """Refused: a custom loss needs no upload here."""
        raise UnsupportedError(
            "create_custom_loss uploads a loss to a service; here, pass the loss to "
            "TrainingClient.forward_backward_custom(data, loss_fn)"
        )

    def copy_weights(self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None) -> NoReturn:
        """Refused: see `RestClient.copy_weights`."""
        self._rest_client().copy_weights(path)

    def get_console_url(self) -> NoReturn:
        """Refused: there is no console."""
        raise UnsupportedError("there is no console in process; RestClient().list_training_runs() lists the runs")

    def get_telemetry(self) -> None:
        """Nothing is ever sent anywhere."""
        return None

    def close(self, status: CloseStatus, detail: str | None = None) -> AwaitableConcurrentFuture[None]:
        """Ends the session: later calls of it and of its clients raise StateError; what the clients hold on the device
        is freed once their pending calls are done. Idempotent.

        Args:
            status: `"success"` lets pending calls finish; `"errored"` and `"interrupted"` cancel those not begun.
            detail: no effect.
        """
        _check.one_of(status, ("success", "errored", "interrupted"), "status")
        return AwaitableConcurrentFuture(self._session.close(status))

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status: Literal["success", "errored", "interrupted"] = "success"
        if exc_type is not None:
            status = "errored" if issubclass(exc_type, Exception) else "interrupted"
        self.close(status).result()
