"""`RestClient`: what is stored, and what is running. Named for what it is in the SDK; nothing here uses HTTP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, TypeVar

from tinker_jax.api import session as sessions
from tinker_jax.api.admin_client import AdminClient
from tinker_jax.api.deprecation import final_twin
from tinker_jax.api.door import check_ttl, engine_config
from tinker_jax.api.futures import APIFuture, AwaitableConcurrentFuture
from tinker_jax.engine.config import EngineConfig
from tinker_jax.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    _check,
)
from tinker_jax.types.errors import NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from tinker_jax.checkpoints.store import CheckpointRecord, RunRecord, Store

P = ParamSpec("P")
T = TypeVar("T")

AccessScope = Literal["owned", "accessible"]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="tinker_jax-rest")


def _run(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> APIFuture[T]:
    """`fn` on a thread of the pool: storage may be slow, and an event loop must not wait for it."""
    return AwaitableConcurrentFuture(_pool().submit(fn, *args, **kwargs))


class RestClient:
    """Runs, checkpoints and sessions in the storage directory.

    Args:
        base_url, api_key: accepted for compatibility, no effect.
        engine: whose `home` to read; the default home without it.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        self._config = engine_config(engine)

    @functools.cached_property
    def _store(self) -> Store:
        from tinker_jax.checkpoints.store import Store

        return Store(self._config.home)

    # Runs

    def get_training_run(self, training_run_id: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        """A run by id. The future raises NotFoundError. Everything stored is owned, so `access_scope` has no effect."""
        _check.name(training_run_id, "training_run_id")
        return _run(lambda: self._training_run(self._store.get_run(training_run_id)))

    get_training_run_async = final_twin(get_training_run)

    def get_training_run_by_tinker_path(self, tinker_path: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        """The run that wrote a checkpoint."""

        def find() -> TrainingRun:
            run_id = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path).training_run_id
            return self._training_run(self._store.get_run(run_id))

        return _run(find)

    get_training_run_by_tinker_path_async = final_twin(get_training_run_by_tinker_path)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """Runs, newest first."""
        if project_id is not None:
            raise _no_account("projects")

        def find() -> TrainingRunsResponse:
            runs, cursor = _page(self._store.list_runs(), limit, offset)
            return TrainingRunsResponse(training_runs=[self._training_run(run) for run in runs], cursor=cursor)

        return _run(find)

    list_training_runs_async = final_twin(list_training_runs)

    def _training_run(self, run: RunRecord) -> TrainingRun:
        records = self._store.list_checkpoints(run.run_id)
        return TrainingRun(
            training_run_id=run.run_id,
            base_model=run.base_model,
            model_owner="local",
            is_lora=True,
            lora_rank=run.lora_rank,
            last_request_time=run.last_request_time,
            last_checkpoint=_newest(records, "weights"),
            last_sampler_checkpoint=_newest(records, "sampler_weights"),
            user_metadata=run.user_metadata,
        )

    # Checkpoints

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """A run's checkpoints, newest first."""
        _check.name(training_run_id, "training_run_id")

        def find() -> CheckpointsListResponse:
            self._store.get_run(training_run_id)
            return CheckpointsListResponse(checkpoints=_checkpoints(self._store.list_checkpoints(training_run_id)))

        return _run(find)

    list_checkpoints_async = final_twin(list_checkpoints)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """Checkpoints of all runs, newest first."""

        def find() -> CheckpointsListResponse:
            checkpoints, cursor = _page(_checkpoints(self._store.list_checkpoints()), limit, offset)
            return CheckpointsListResponse(checkpoints=list(checkpoints), cursor=cursor)

        return _run(find)

    list_user_checkpoints_async = final_twin(list_user_checkpoints)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """What a checkpoint holds."""
        _check.name(tinker_path, "tinker_path")

        def find() -> WeightsInfoResponse:
            record = self._store.get(tinker_path)
            return WeightsInfoResponse(
                base_model=record.base_model,
                is_lora=True,
                lora_rank=record.lora_rank,
                train_unembed=record.train_unembed,
                train_mlp=record.train_mlp,
                train_attn=record.train_attn,
            )

        return _run(find)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Deletes `checkpoint_id` (`"weights/<name>"` or `"sampler_weights/<name>"`) of a run."""
        _check.name(training_run_id, "training_run_id")
        _check.name(checkpoint_id, "checkpoint_id")
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    delete_checkpoint_async = final_twin(delete_checkpoint)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Deletes a checkpoint."""
        _check.name(tinker_path, "tinker_path")
        return _run(lambda: self._store.delete(tinker_path))

    delete_checkpoint_from_tinker_path_async = final_twin(delete_checkpoint_from_tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Lets a checkpoint live `ttl_seconds` from now; None: for ever."""
        _check.name(tinker_path, "tinker_path")
        ttl_seconds = check_ttl(ttl_seconds)

        def change() -> None:
            self._store.set_ttl(tinker_path, ttl_seconds)

        return _run(change)

    set_checkpoint_ttl_from_tinker_path_async = final_twin(set_checkpoint_ttl_from_tinker_path)

    # Sessions, samplers, models

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        """The runs of one `ServiceClient`; also its samplers and metadata while its process is this one."""
        _check.name(session_id, "session_id")

        def find() -> GetSessionResponse:
            runs = [run.run_id for run in self._store.list_runs() if run.session_id == session_id]
            live = sessions.find(session_id)
            if not runs and live is None:
                raise NotFoundError(f"session {session_id!r} does not exist in {self._store.home}")
            return GetSessionResponse(
                training_run_ids=sorted(runs),
                sampler_ids=[] if live is None else sorted(live.samplers),
                user_metadata=None if live is None else live.user_metadata,
                display_name=None if live is None else live.display_name,
            )

        return _run(find)

    get_session_async = final_twin(get_session)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Ids of the sessions that trained something, newest first."""

        def find() -> ListSessionsResponse:
            ids = list(dict.fromkeys(run.session_id for run in self._store.list_runs()))
            return ListSessionsResponse(sessions=list(_page(ids, limit, offset)[0]))

        return _run(find)

    list_sessions_async = final_twin(list_sessions)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """What a sampling client alive in this process samples from."""
        _check.name(sampler_id, "sampler_id")

        def find() -> GetSamplerResponse:
            live = sessions.find(sampler_id.partition(":")[0])
            client = None if live is None else live.samplers.get(sampler_id)
            if client is None:
                raise NotFoundError(f"sampler {sampler_id!r} does not exist in this process")
            return GetSamplerResponse(sampler_id=sampler_id, base_model=client.get_base_model(), model_path=client._model_path)

        return _run(find)

    get_sampler_async = final_twin(get_sampler)

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """The embedded models and those loaded in this process. Others can be used by hub id or directory."""

        def find() -> GetServerCapabilitiesResponse:
            from tinker_jax.checkpoints.hub import embedded_models
            from tinker_jax.engine.engine import loaded_engines

            lengths: dict[str, int | None] = dict.fromkeys(embedded_models())
            for engine in loaded_engines():
                info = engine.known_info  # a busy engine would answer late
                lengths[engine.base_model] = None if info is None else info.context_length
            models = [
                SupportedModel(model_name=name, max_context_length=length, trainable=True, sampleable=True)
                for name, length in lengths.items()
            ]
            return GetServerCapabilitiesResponse(supported_models=models)

        return _run(find)

    # What needs an account

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> NoReturn:
        """Refused: projects need an account."""
        raise UnsupportedError(
            "copy_weights copies between accounts and projects, which do not exist in process; "
            "set_checkpoint_ttl_from_tinker_path(path, None) keeps a checkpoint"
        )

    copy_weights_async = final_twin(copy_weights)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> NoReturn:
        """Refused: there is nobody to publish to."""
        raise _no_account("publishing")

    publish_checkpoint_from_tinker_path_async = final_twin(publish_checkpoint_from_tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> NoReturn:
        """Refused: there is nobody to publish to."""
        raise _no_account("publishing")

    unpublish_checkpoint_from_tinker_path_async = final_twin(unpublish_checkpoint_from_tinker_path)

    def get_external_weights_urls(self, tinker_path: str) -> NoReturn:
        """Refused: the weights are on your own disk."""
        raise UnsupportedError(
            "get_external_weights_urls gives download links of a service; here the weights are on your own disk: "
            "tinker_jax.checkpoints.export_peft(path, directory)"
        )

    get_external_weights_urls_async = final_twin(get_external_weights_urls)

    def assign_session_project(self, session_id: str, project_id: str) -> NoReturn:
        """Refused: projects need an account."""
        raise _no_account("projects")

    assign_session_project_async = final_twin(assign_session_project)

    def export_session_trace(self, session_id: str) -> NoReturn:
        """Refused: no trace is kept."""
        raise UnsupportedError("no session trace is kept in process; the logger 'tinker_jax' tells what the engine does")

    export_session_trace_async = final_twin(export_session_trace)

    def search_sessions(self, request: Any) -> NoReturn:
        """Refused: `list_sessions` lists them all."""
        raise UnsupportedError("search_sessions is not available; list_sessions() and list_training_runs() list them all")

    def whoami(self) -> NoReturn:
        """Refused: there is no account."""
        raise _no_account("identity")

    def get_audit_log(
        self,
        event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
        day: date | None = None,
    ) -> NoReturn:
        """Refused: needs an account."""
        AdminClient().get_audit_log(event_type, day)

    get_audit_log_async = final_twin(get_audit_log)

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> NoReturn:
        """Refused: needs an account."""
        AdminClient().get_billing_usage(starting_on, ending_before)

    get_billing_usage_async = final_twin(get_billing_usage)

    def get_current_checkpoint_storage_usage(self, project_id: str | None = None) -> NoReturn:
        """Refused: needs an account."""
        AdminClient().get_current_checkpoint_storage_usage(project_id)

    get_current_checkpoint_storage_usage_async = final_twin(get_current_checkpoint_storage_usage)

    def get_telemetry(self) -> None:
        """Nothing is ever sent anywhere."""
        return None


def _no_account(what: str) -> UnsupportedError:
    return UnsupportedError(f"{what} needs a cloud account, which does not exist in process")


def _page(items: Sequence[T], limit: int, offset: int) -> tuple[Sequence[T], Cursor]:
    limit, offset = _check.integer(limit, "limit", minimum=1), _check.integer(offset, "offset", minimum=0)
    return items[offset : offset + limit], Cursor(offset=offset, limit=limit, total_count=len(items))


def _checkpoints(records: Sequence[CheckpointRecord]) -> list[Checkpoint]:
    return [_checkpoint(record) for record in sorted(records, key=lambda record: record.time, reverse=True)]


def _newest(records: Sequence[CheckpointRecord], kind: str) -> Checkpoint | None:
    return next(iter(_checkpoints([record for record in records if record.kind == kind])), None)


def _checkpoint(record: CheckpointRecord) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=f"{record.kind}/{record.name}",
        checkpoint_type=ParsedCheckpointTinkerPath.from_tinker_path(record.path).checkpoint_type,
        time=record.time,
        tinker_path=record.path,
        size_bytes=record.size_bytes,
        user_metadata=record.user_metadata,
        expires_at=record.expires_at,
    )
