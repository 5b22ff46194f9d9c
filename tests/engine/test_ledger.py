"""Engines of one process share the device's memory: what is set aside is known, and what does not fit is refused."""

import gc
import os
import threading
import time

import jax
import pytest

from tinker_jax import EngineConfig, ServiceClient, memory
from tinker_jax.checkpoints.hub import canonical
from tinker_jax.engine import engine as engine_module
from tinker_jax.engine.engine import get_engine
from tinker_jax.engine.ledger import Ledger
from tinker_jax.types import AdamParams, Datum, ModelInput, SamplingParams
from tinker_jax.types.errors import BadRequestError, UnprocessableEntityError

PROMPT = ModelInput.from_ints([5, 6, 7, 8])
DATA = [Datum(PROMPT, {"target_tokens": [6, 7, 8, 9]})]


@pytest.fixture(autouse=True)
def ledger(monkeypatch):
    """A ledger of the test's own; engines of earlier tests are closed, and it is empty in the end."""
    gc.collect()
    engine_module.close_engines()
    ledger = Ledger()
    monkeypatch.setattr(engine_module, "LEDGER", ledger)
    yield ledger
    gc.collect()
    engine_module.close_engines()
    assert not ledger.total, ledger.report()


@pytest.fixture
def models(checkpoint):
    return [str(checkpoint(family)) for family in ("qwen3", "llama", "qwen2")]


def service(tmp_path, **options):
    return ServiceClient(engine=EngineConfig(home=tmp_path, **options))


def purposes(engine):
    return dict(engine_module.LEDGER._held[engine])


def test_sums_and_refusals_are_exact(ledger):
    ledger.hold("a", {"weights": 60, "cache": 10}, 100)
    ledger.hold("a", {"cache": 30}, 100)
    ledger.hold("b", {"weights": 10}, 100)
    assert ledger.total == 100
    with pytest.raises(UnprocessableEntityError, match=r"b: adapter x would take .* of a device of .* are free: a \(weights"):
        ledger.hold("b", {"adapter x": 1}, 100)
    ledger.hold("b", {"adapter x": 1}, None)
    ledger.release("a", "cache")
    ledger.release("b", "adapter x", "not there")
    assert ledger.total == 70
    ledger.release("a"), ledger.release("a"), ledger.release("b")
    assert ledger.total == 0 and ledger.report() == "nothing is set aside"


def test_an_engine_sets_aside_weights_cache_activations_adapters_and_samplers(models, tmp_path):
    client = service(tmp_path).create_lora_training_client(models[0], rank=5).result()
    held, engine = purposes(client._engine), client._engine
    cfg = engine._trainer._model._cfg
    assert held["weights"] == memory.base_bytes(cfg, 4) == sum(x.nbytes for x in engine._params.values())
    pool = engine._sampler._runner._pages  # made at the first use on a CPU
    assert 0 <= held["cache"] - sum(x.nbytes for x in jax.tree.leaves(pool)) < 3 * engine._sampler._page_bytes
    assert held["activations"] > 0
    params = sum(x.nbytes for x in jax.tree.leaves(engine._adapters[client.model_id].params))
    assert held[f"adapter {client.model_id}"] == 4 * params
    sampler = client.save_weights_and_get_sampling_client().result()
    sampler.sample(PROMPT, 1, SamplingParams(max_tokens=1)).result()
    assert purposes(engine)[f"sampler {sampler._sampler_id}"] == params
    del sampler
    gc.collect()
    engine.info().result()
    engine.create_adapter("after the release", client._lora).result()
    assert not [name for name in purposes(engine) if name.startswith("sampler")]


def test_a_bfloat16_model_samples_from_bfloat16_adapters_that_are_counted_side_by_side(models, tmp_path, monkeypatch):
    client = service(tmp_path, dtype="bfloat16").create_lora_training_client(models[0], rank=8).result()
    samplers = [client.save_weights_and_get_sampling_client().result() for _ in range(2)]
    engine, seen = client._engine, []
    step = engine._sampler.step
    monkeypatch.setattr(engine._sampler, "step", lambda: (step(), seen.append(purposes(engine).get("slots", 0)))[0])
    futures = [sampler.sample(PROMPT, 1, SamplingParams(max_tokens=40, stop=[])) for sampler in samplers]
    assert all(len(future.result().sequences[0].tokens) == 40 for future in futures)
    own = jax.tree.leaves(engine._samplers[samplers[0]._sampler_id].adapter)
    assert {x.dtype.name for x in own} == {"bfloat16"}
    assert purposes(engine)[f"sampler {samplers[0]._sampler_id}"] == sum(x.nbytes for x in own)
    assert max(seen) == 2 * sum(x.nbytes for x in own), "a tree as wide as both"
    engine.info().result()
    assert purposes(engine)["slots"] == 0


def test_a_sharded_adapter_counts_its_part_alone(models, tmp_path):
    client = service(tmp_path, mesh={"fsdp": 2, "tensor": 2}).create_lora_training_client(models[0], rank=8).result()
    params = jax.tree.leaves(client._engine._adapters[client.model_id].params)
    own = sum(x.addressable_shards[0].data.nbytes for x in params)
    assert purposes(client._engine)[f"adapter {client.model_id}"] == 4 * own < 4 * sum(x.nbytes for x in params)


def test_engines_share_what_there_is_and_one_too_many_is_refused_with_the_numbers(models, tmp_path, monkeypatch, ledger):
    limit = 24 << 20
    monkeypatch.setattr(memory, "device_bytes", lambda: limit)
    ours = service(tmp_path)
    first = ours.create_lora_training_client(models[0], rank=4).result()
    second = ours.create_lora_training_client(models[1], rank=4).result()
    assert ledger.total <= limit
    # Somebody else holds nearly all of what is left.
    ledger.hold("another", {"weights": limit - ledger.total - 1000}, limit)
    with pytest.raises(UnprocessableEntityError) as refused:
        ours.create_lora_training_client(models[2], rank=4).result()
    ledger.release("another")
    assert refused.match(r"needs at least .* GiB of each device's memory; of 0\.0234 GiB .* GiB are free: ")
    for name in models[:2]:
        assert f"{name} (" in str(refused.value)
    assert refused.match("Close clients that are not needed, let the engines plan with less")
    for client in (first, second):
        client.forward_backward(DATA, "cross_entropy").result()
        client.optim_step(AdamParams()).result()


def test_what_others_have_on_the_device_counts(models, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "used_bytes", lambda: (memory.device_bytes() or 0) - 1000)
    with pytest.raises(UnprocessableEntityError, match=r"needs at least .* GiB of each device's memory; of .* are free"):
        service(tmp_path).create_lora_training_client(models[0], rank=4).result()


def test_engines_that_failed_to_load_do_not_keep_another_waiting(models, tmp_path, monkeypatch, ledger):
    """They have nothing to give back, and whoever needs room looks for it once."""
    monkeypatch.setattr(memory, "device_bytes", lambda: 1000)
    for _ in range(3):
        with service(tmp_path) as ours, pytest.raises(UnprocessableEntityError, match="are free"):
            ours.create_lora_training_client(models[0], rank=4).result(60)
    assert not engine_module._leaving and not ledger.total


def test_an_adapter_that_does_not_fit_is_refused_and_the_client_before_goes_on(models, tmp_path):
    ours = service(tmp_path)
    client = ours.create_lora_training_client(models[0], rank=4).result()
    with pytest.raises(UnprocessableEntityError, match=r"adapter .* would take .* GiB of a device of"):
        ours.create_lora_training_client(models[0], rank=10**9).result()
    client.forward_backward(DATA, "cross_entropy").result()
    assert len([name for name in purposes(client._engine) if name.startswith("adapter")]) == 1


def test_an_engine_that_nobody_uses_makes_way(models, tmp_path, monkeypatch, ledger):
    ours = service(tmp_path)
    idle = ours.create_lora_training_client(models[0], rank=4).result()
    engine = idle._engine
    del idle
    gc.collect()
    monkeypatch.setattr(memory, "device_bytes", lambda: ledger.total + 1000 if engine in ledger._held else 1 << 30)
    other = ours.create_lora_training_client(models[1], rank=4).result()
    assert engine not in ledger._held and not engine._params
    other.forward_backward(DATA, "cross_entropy").result()
    again = ours.create_lora_training_client(models[0], rank=4).result()
    assert again._engine is not engine


def test_the_end_of_the_last_service_gives_the_memory_back(models, tmp_path, ledger):
    ours, others = service(tmp_path), service(tmp_path)
    clients = [s.create_lora_training_client(models[0], rank=4).result() for s in (ours, others)]
    engine = clients[0]._engine
    assert clients[1]._engine is engine
    ours.close("success").result(60)
    clients[1].forward_backward(DATA, "cross_entropy").result()
    clients.clear()
    del others  # collected, not closed
    gc.collect()
    end = time.monotonic() + 60
    while engine in ledger._held and time.monotonic() < end:
        time.sleep(0.01)
    assert not ledger.total and not engine._params
    with pytest.raises(RuntimeError, match="closed"):
        engine.info()


def test_a_hub_id_and_the_path_of_its_snapshot_are_one_engine(models, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc\n")
    os.symlink(models[0], snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert canonical(str(snapshot)) == canonical("owner/name") == "owner/name"
    assert canonical(str(snapshot.parent / "old")) == str(snapshot.parent / "old")
    config = EngineConfig(home=tmp_path / "home")
    monkeypatch.setattr(engine_module, "resolve", lambda name: snapshot)
    assert get_engine(str(snapshot), config, "u", "a") is get_engine("owner/name", config, "u", "b")


def test_where_nobody_knows_the_memory_it_must_be_told(models, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: None)
    with pytest.raises(BadRequestError, match=r"does not tell how much memory it has; .*EngineConfig\.memory"):
        service(tmp_path).create_lora_training_client(models[0], rank=4).result()
    service(tmp_path, memory=1 << 30).create_lora_training_client(models[0], rank=4).result()
    with pytest.raises(UnprocessableEntityError, match=r"needs at least .*; EngineConfig\.memory allows"):
        service(tmp_path, memory=1000).create_lora_training_client(models[0], rank=4).result()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads a process's memory in /proc")
@pytest.mark.parametrize("cycles", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_cycles_of_create_train_sample_and_close_leave_nothing_behind(models, tmp_path, cycles):
    def cycle(seed):
        with service(tmp_path) as ours:
            client = ours.create_lora_training_client(models[0], rank=4, seed=seed).result()
            client.forward_backward(DATA, "cross_entropy")
            client.optim_step(AdamParams()).result()
            sampler = client.save_weights_and_get_sampling_client()
            drawn = sampler.sample(PROMPT, 2, SamplingParams(max_tokens=3, stop=[])).result()
            assert len(drawn.sequences) == 2

    def settled():
        """Bytes of arrays, threads, open files, and resident bytes, once what was released is gone."""
        engine.create_adapter("last", kept._lora).result()  # behind the releases of those before
        engine.release("last")
        engine.info().result()
        gc.collect()
        arrays = sum(x.nbytes for x in jax.live_arrays())
        return arrays, threading.active_count(), len(os.listdir("/proc/self/fd")), resident()

    keep = service(tmp_path)  # the engine stays, as it would beside another client
    kept = keep.create_lora_training_client(models[0], rank=4, seed=0).result()
    engine = kept._engine
    for seed in range(max(3, cycles // 10)):
        cycle(seed)
    before, held = settled(), purposes(engine)
    for seed in range(cycles):
        cycle(seed)
    after = settled()
    assert purposes(engine).keys() == held.keys()
    assert after[0] <= before[0] + 4096 and after[1] <= before[1] and after[2] <= before[2]
    assert after[3] <= before[3] + (32 << 20)
