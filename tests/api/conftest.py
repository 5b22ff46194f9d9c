from __future__ import annotations

import sys
import types as python_types
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from fake_engine import FakeEngine

import tinker_jax
from tinker_jax.checkpoints.store import RunRecord, Store


class Engines(dict):
    """The fake engines made so far, by base model."""


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """Every engine of the API is a fake one; the dict tells which were made."""
    made = Engines()

    def get_engine(base_model: str, config: tinker_jax.EngineConfig, user: str, client: str) -> FakeEngine:
        if base_model not in made:
            made[base_model] = FakeEngine(base_model, config, lambda: None)
        return made[base_model]

    fake = python_types.ModuleType("tinker_jax.engine.engine")
    fake.get_engine = get_engine  # type: ignore[attr-defined]
    fake.loaded_engines = lambda: list(made.values())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinker_jax.engine.engine", fake)
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture
def service(engines: Engines, tmp_path) -> Iterator[tinker_jax.ServiceClient]:
    """A service over fake engines and a storage directory of its own."""
    yield tinker_jax.ServiceClient(engine=tinker_jax.EngineConfig(home=tmp_path))


@pytest.fixture
def training(service: tinker_jax.ServiceClient) -> tinker_jax.TrainingClient:
    return service.create_lora_training_client("base", rank=4, user_metadata={"renderer_name": "qwen3"}).result()


@pytest.fixture
def engine(engines: Engines, training: tinker_jax.TrainingClient) -> FakeEngine:
    return engines["base"]


@pytest.fixture
def sampling(service: tinker_jax.ServiceClient) -> tinker_jax.SamplingClient:
    return service.create_sampling_client(base_model="base").result()


@pytest.fixture
def stored(tmp_path) -> Store:
    """A run with a checkpoint of each kind named `a`, as another process would have left them."""
    store, now = Store(tmp_path), datetime.now(UTC)
    metadata = {"renderer_name": "r"}
    store.create_run(RunRecord("old:train:0", "old", "base", 4, True, True, False, None, metadata, now, now))
    for kind in ("weights", "sampler_weights"):
        store.write(
            "old:train:0",
            kind,
            "a",
            lambda directory: (directory / "data").write_text("x"),
            has_optimizer=kind == "weights",
            user_metadata={"k": kind},
        )
    return store
