"""RestClient over a store that another process left, and over live sessions."""

from __future__ import annotations

import asyncio
import inspect
import threading
from datetime import UTC, datetime, timedelta

import pytest
from fake_engine import FakeInfo

import tinker_jax
from tinker_jax import AdminClient, APIFuture, EngineConfig, RestClient

RUN = "old:train:0"
INFO = FakeInfo("base", "qwen3", "/nowhere", 64, 100)
PATH = f"tinker://{RUN}/weights/a"
EMBEDDED = {"tinker-jax/tiny-moe": None, "tinker-jax/tiny-qwen3": None}


@pytest.fixture
def rest(tmp_path, stored) -> RestClient:
    return RestClient(base_url="http://x", api_key="k", engine=EngineConfig(home=tmp_path))


def test_runs_are_found_by_id_and_by_path(rest):
    run = rest.get_training_run(RUN).result()
    assert run == rest.get_training_run_by_tinker_path(PATH, "accessible").result()
    assert (run.base_model, run.lora_rank, run.is_lora, run.user_metadata) == ("base", 4, True, {"renderer_name": "r"})
    assert run.last_checkpoint.tinker_path == PATH
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/a"


def test_lists_are_paged(rest, stored):
    page = rest.list_training_runs(limit=1).result()
    assert [run.training_run_id for run in page.training_runs] == [RUN]
    assert page.cursor == tinker_jax.types.Cursor(offset=0, limit=1, total_count=1)
    assert rest.list_training_runs(offset=1).result().training_runs == []
    both = rest.list_checkpoints(RUN).result().checkpoints
    assert sorted(c.checkpoint_type for c in both) == ["sampler", "training"]
    page = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert (page.checkpoints, page.cursor.total_count) == ([both[1]], 2)
    with pytest.raises(ValueError, match="limit: expected an integer >= 1"):
        rest.list_training_runs(limit=0).result()
    with pytest.raises(tinker_jax.UnsupportedError, match="projects"):
        rest.list_training_runs(project_id="p")


def test_a_checkpoint_is_described_kept_and_deleted(rest):
    info = rest.get_weights_info_by_tinker_path(PATH).result()
    assert (info.base_model, info.lora_rank, info.train_mlp, info.train_unembed) == ("base", 4, True, False)
    assert rest.set_checkpoint_ttl_from_tinker_path(PATH, 7200).result() is None
    checkpoint = rest.get_training_run(RUN).result().last_checkpoint
    assert timedelta(hours=1) < checkpoint.expires_at - datetime.now(UTC) <= timedelta(hours=2)
    assert (checkpoint.user_metadata, checkpoint.size_bytes) == ({"k": "weights"}, 1)
    rest.set_checkpoint_ttl_from_tinker_path(PATH, None).result()
    assert rest.get_training_run(RUN).result().last_checkpoint.expires_at is None
    rest.delete_checkpoint_from_tinker_path(PATH).result()
    rest.delete_checkpoint(RUN, "sampler_weights/a").result()
    assert rest.list_checkpoints(RUN).result().checkpoints == []
    with pytest.raises(tinker_jax.NotFoundError):
        rest.get_weights_info_by_tinker_path(PATH).result()


def test_what_does_not_exist_is_an_error_of_the_future(rest):
    for future in (
        rest.get_training_run("nobody"),
        rest.list_checkpoints("nobody"),
        rest.get_session("nobody"),
        rest.get_sampler("nobody"),
        rest.delete_checkpoint(RUN, "weights/b"),
    ):
        assert isinstance(future, APIFuture)
        with pytest.raises(tinker_jax.NotFoundError, match="does not exist"):
            future.result()
    with pytest.raises(ValueError, match="Invalid tinker path"):
        rest.get_training_run_by_tinker_path("nonsense").result()


def test_sessions_are_known_by_their_runs_and_while_alive_by_their_clients(rest, tmp_path, engines):
    service = tinker_jax.ServiceClient({"who": "me"}, display_name="d", engine=EngineConfig(home=tmp_path))
    training = service.create_lora_training_client("base").result()
    sampling = training.save_weights_and_get_sampling_client().result()
    session_id = training.model_id.partition(":")[0]
    assert rest.list_sessions().result().sessions == [session_id, "old"]
    session = rest.get_session(session_id).result()
    assert (session.training_run_ids, session.sampler_ids) == ([training.model_id], [sampling._sampler_id])
    assert (session.user_metadata, session.display_name) == ({"who": "me"}, "d")
    assert rest.get_session("old").result().training_run_ids == [RUN]
    sampler = rest.get_sampler(sampling._sampler_id).result()
    assert (sampler.base_model, sampler.model_path) == ("base", None)


def test_capabilities_name_the_embedded_and_the_loaded_models(rest, service, engines):
    service.create_lora_training_client("base").result()
    models = {m.model_name: m.max_context_length for m in rest.get_server_capabilities().result().supported_models}
    assert models == {**EMBEDDED, "base": 64}
    with pytest.warns(FutureWarning, match="RestClient"):
        assert len(service.get_server_capabilities().supported_models) == len(models)
    with pytest.warns(FutureWarning, match="create_rest_client"):
        assert service.create_rest_client() is service._rest_client()


def test_capabilities_wait_neither_for_a_busy_engine_nor_for_one_that_loads(rest, service, engines, monkeypatch):
    for name in ("base", "loading"):
        service.create_lora_training_client(name).result()
    engines["base"].hold()
    monkeypatch.setattr(type(engines["loading"]), "known_info", property(lambda e: None if e.base_model == "loading" else INFO))
    models = {m.model_name: m.max_context_length for m in rest.get_server_capabilities().result(5).supported_models}
    assert models == {**EMBEDDED, "base": 64, "loading": None}


def test_what_is_no_path_or_configuration_is_refused(rest):
    with pytest.raises(tinker_jax.BadRequestError, match="Invalid tinker path: None"):
        rest.get_training_run_by_tinker_path(None).result()
    with pytest.raises(tinker_jax.BadRequestError, match="engine: expected EngineConfig, got dict"):
        tinker_jax.RestClient(engine={"home": "x"})


def test_calls_do_not_block_the_event_loop(rest, monkeypatch):
    slow = threading.Event()
    monkeypatch.setattr(rest._store, "list_runs", lambda: slow.wait(5) and [])

    async def main():
        waiting = asyncio.create_task(rest.list_training_runs().coroutine())
        await asyncio.sleep(0.01)
        slow.set()
        return (await waiting).cursor.total_count

    assert asyncio.run(main()) == 0


def test_async_twins_give_the_final_value(rest):
    with pytest.warns(FutureWarning, match=r"await get_training_run\(\)"):
        assert asyncio.run(rest.get_training_run_async(RUN)).training_run_id == RUN


ARGUMENTS = {
    "path": PATH, "tinker_path": PATH, "session_id": "s", "project_id": "p", "request": None,
    "starting_on": "2026-01-01", "ending_before": "2026-02-01",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "assign_session_project", "copy_weights", "export_session_trace", "get_audit_log", "get_billing_usage",
        "get_current_checkpoint_storage_usage", "get_external_weights_urls", "publish_checkpoint_from_tinker_path",
        "search_sessions", "unpublish_checkpoint_from_tinker_path", "whoami",
    ],
)  # fmt: skip
@pytest.mark.parametrize("twin", [False, True])
def test_what_needs_an_account_is_refused(rest, name, twin):
    for client in [rest] + [AdminClient()] * hasattr(AdminClient, name):
        method = getattr(client, name)
        required = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        arguments = [ARGUMENTS[p.name] for p in required]
        if twin and hasattr(client, f"{name}_async"):
            with pytest.raises(NotImplementedError), pytest.warns(FutureWarning):
                asyncio.run(getattr(client, f"{name}_async")(*arguments))
        with pytest.raises(tinker_jax.UnsupportedError, match=r"cloud account|in process|list_sessions|export_peft"):
            method(*arguments)
