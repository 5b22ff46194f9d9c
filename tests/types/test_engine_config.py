from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tinker_jax import EngineConfig
from tinker_jax.types.errors import BadRequestError


def test_equal_configurations_are_one_key():
    one = EngineConfig(mesh={"tensor": 2, "data": 4}, home=Path("/x"))
    other = EngineConfig(mesh={"data": 4, "tensor": 2}, home="/x")
    assert one == other and hash(one) == hash(other)
    assert list(one.mesh) == ["data", "tensor"]
    assert one != EngineConfig(mesh={"data": 4}, home="/x")
    assert EngineConfig() == EngineConfig() and hash(EngineConfig()) == hash(EngineConfig())


def test_the_mesh_cannot_change_afterwards_and_the_configuration_pickles():
    mesh = {"data": 2}
    config = EngineConfig(mesh=mesh)
    mesh["data"] = 3
    assert config.mesh["data"] == 2
    with pytest.raises(TypeError):
        config.mesh["data"] = 3
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dtype": "float16"}, "EngineConfig.dtype: expected one of None, 'float32', 'bfloat16', got str 'float16'"),
        ({"mesh": {"model": 2}}, "EngineConfig.mesh: unknown axis 'model'; the axes are data, fsdp, expert, tensor"),
        ({"mesh": {"data": 0}}, r"EngineConfig.mesh\['data'\]: expected an integer >= 1, got int 0"),
        ({"mesh": 8}, "EngineConfig.mesh: expected a mapping"),
        ({"memory": 0}, "EngineConfig.memory: expected an integer >= 1"),
        ({"home": 3}, "EngineConfig.home: expected a path"),
        ({"home": ""}, "EngineConfig.home: expected a non-empty string"),
    ],
)
def test_bad_values_are_refused_by_name(bad, message):
    with pytest.raises(BadRequestError, match=message):
        EngineConfig(**bad)


def test_a_relative_home_does_not_move_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert EngineConfig(home="runs").home == str(tmp_path / "runs")
    assert EngineConfig(home="gs://bucket/runs").home == "gs://bucket/runs"
