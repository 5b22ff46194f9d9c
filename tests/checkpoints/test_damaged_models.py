"""Damaged model directories: what an engine reads names the file, and the field, what was expected and what is there."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from damage import damaged, replace

from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.checkpoints.hub import resolve
from tinker_jax.checkpoints.tensor_files import INDEX_FILE, SINGLE_FILE
from tinker_jax.engine.model_files import read_config, stop_ids
from tinker_jax.models.weights import weights
from tinker_jax.types.errors import TinkerError


def load(directory: Path) -> tuple:
    """What an engine does with a model directory."""
    found = resolve(str(directory))
    config, stops = read_config(found), stop_ids(found)
    return config, stops, load_base(found, weights(config), jnp.float32, progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("damaged")
    return {
        "one file": tiny.save("llama", place / "one"),
        "shards": tiny.save("qwen3", place / "shards", max_shard_size="20KB"),
    }


@pytest.fixture
def one(models, tmp_path) -> Path:
    return shutil.copytree(models["one file"], tmp_path / "model")


@pytest.fixture
def shards(models, tmp_path) -> Path:
    return shutil.copytree(models["shards"], tmp_path / "model")


NO_OBJECTS = {
    "a list": b"[]",
    "a text": b'"qwen3"',
    "null": b"null",
    "a number": b"3",
    "nothing": b"",
    "half": b'{"model_type": ',
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "qwen3"}'.encode("utf-16"),
    "brackets": b"[" * 100_000,
    "directory": "directory",
}


@pytest.mark.parametrize("damage", NO_OBJECTS.values(), ids=NO_OBJECTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_FILE])
def test_a_file_that_holds_no_object_is_named(shards, name, damage):
    replace(shards / name, damage)
    with pytest.raises(TinkerError) as error:
        load(shards)
    assert name in str(error.value) and len(str(error.value)) < 600


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
NO_SIZES = {"text": "2", "zero": 0, "negative": -1, "half": 1.5, "huge": 10**12, "true": True, "list": [2], "nan": float("nan")}


@pytest.mark.parametrize("value", NO_SIZES.values(), ids=NO_SIZES)
@pytest.mark.parametrize("field", SIZES)
def test_a_size_that_is_none_is_refused_by_name(one, field, value):
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(TinkerError, match=rf"config\.json: {field}: expected an integer >= 1 and <= \d+, got "):
        load(one)


WRONG_VALUES = [
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a finite number > 0, got str '1e-6'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number > 0, got float nan"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: expected a finite number > 0"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a finite number > 0"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta: expected a finite number > 0, got float inf"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta: expected a finite number > 0, got NoneType None"),
    ({"rope_parameters": [1]}, r"rope_parameters: expected an object or null, got list \[1\]"),
    ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling: expected an object or null, got str 'linear'"),
    ({"rope_parameters": {"rope_type": ["default"]}}, r"rope scaling \['default'\] is not supported"),
    ({"rope_parameters": tiny.LLAMA3_ROPE | {"factor": "8"}}, "factor: expected a finite number > 0, got str '8'"),
    ({"rope_parameters": tiny.LLAMA3_ROPE | {"low_freq_factor": float("nan")}}, "low_freq_factor: expected a finite number"),
    (
        {"rope_parameters": tiny.LLAMA3_ROPE | {"original_max_position_embeddings": 0.5}},
        "original_max_position_embeddings: expected an integer >= 1",
    ),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected True or False, got str 'false'"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings: expected True or False, got NoneType None"),
    ({"model_type": None}, "model_type 'None' is not supported"),
    ({"model_type": ["llama"]}, "model_type \"\\['llama'\\]\" is not supported"),
    ({"model_type": "x" * 15_000}, "model_type 'x+… is not supported"),
    ({"hidden_act": "x" * 15_000}, "hidden_act='x+… is not supported"),
    ({"head_dim": None, "hidden_size": 33}, "hidden_size=33 is no multiple of num_attention_heads=4"),
    ({"num_hidden_layers": 10_001}, "num_hidden_layers: expected an integer >= 1 and <= 10000, got int 10001"),
    ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings: expected an integer >= 1 and <= 134217728"),
]


@pytest.mark.parametrize(("change", "text"), WRONG_VALUES)
def test_a_value_that_is_impossible_is_refused_by_name(one, change, text):
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TinkerError, match=rf"config\.json: {text}") as error:
        load(one)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("value", ["1", -1, 1.5, True, {}, [None], [1, "2"], 2**31, float("nan")])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_of_sequence_that_is_no_token_id_is_refused_by_name(one, name, value):
    if name == "config.json":
        (one / "generation_config.json").unlink()
    held = json.loads((one / name).read_text())
    (one / name).write_text(json.dumps(held | {"eos_token_id": value}))
    with pytest.raises(TinkerError, match=rf"{name}: eos_token_id: expected an integer >= 0 and <= 2147483647, got "):
        load(one)


@pytest.mark.parametrize(("value", "ids"), [(None, (1,)), (7, (7,)), ([7, 8], (7, 8)), ([], ())])
def test_end_of_sequence_ids_come_from_the_generation_config_first(one, value, ids):
    held = json.loads((one / "generation_config.json").read_text())
    (one / "generation_config.json").write_text(json.dumps(held | {"eos_token_id": value}))
    assert stop_ids(one) == ids


WRONG_INDEXES = [
    ({}, "weight_map: expected an object of file names, got None"),
    ({"weight_map": []}, r"weight_map: expected an object of file names, got \[\]"),
    ({"weight_map": {"a": 3}}, "weight_map: expected an object of file names"),
    ({"weight_map": {"a": ".."}}, "names the shard '..', which is not a plain file name"),
    ({"weight_map": {"a": ""}}, "names the shard '', which is not a plain file name"),
    ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "which is not a plain file name"),
    ({"weight_map": {"a": "a\0.safetensors"}}, "which is not a plain file name"),
]


@pytest.mark.parametrize(("index", "text"), WRONG_INDEXES)
def test_an_index_of_the_wrong_kind_is_refused(shards, index, text):
    (shards / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(TinkerError, match=text) as error:
        load(shards)
    assert INDEX_FILE in str(error.value) and len(str(error.value)) < 600


def rewrite_header(file: Path, change: Callable[[dict], object], length: int | None = None) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data[end:])


NORM = "model.norm.weight"
WRONG_HEADERS: list[tuple[Callable[[dict], object], str]] = [
    (lambda h: h[NORM].update(data_offsets=[-8, 120]), f"tensor '{NORM}' is described as"),
    (lambda h: h[NORM].update(data_offsets=[h[NORM]["data_offsets"][1], h[NORM]["data_offsets"][0]]), "has bytes"),
    (lambda h: h[NORM].update(data_offsets=[x - 4 for x in h[NORM]["data_offsets"]]), "begins at byte"),
    (lambda h: h[NORM].update(data_offsets=[x + 10**9 for x in h[NORM]["data_offsets"]]), f"it ends within tensor '{NORM}'"),
    (lambda h: h[NORM].update(data_offsets=[0.5, 128]), "is described as"),
    (lambda h: h[NORM].update(data_offsets=[0]), "is described as"),
    (lambda h: h[NORM].update(data_offsets="0"), "is described as"),
    (lambda h: h[NORM].update(shape=[31]), r"for shape \[31\] of 'F32'"),
    (lambda h: h[NORM].update(shape=[-32, -1]), "is described as"),
    (lambda h: h[NORM].update(shape=[True, 32]), "is described as"),
    (lambda h: h[NORM].update(dtype="F16"), r"for shape \[32\] of 'F16'"),
    (lambda h: h[NORM].update(dtype=3), "is described as"),
    (lambda h: h[NORM].pop("dtype") and None, "is described as"),
    (lambda h: h.update({NORM: None}), f"tensor '{NORM}' is described as None"),
    (lambda h: h.update({NORM: ["x" * 15_000]}), "is described as"),
    (lambda h: h.update(twin=h[NORM]), "begins at byte"),
    (lambda h: h.pop(NORM) and None, "tensor"),
    (lambda h: [h], "no valid safetensors header"),
    (lambda h: "header", "no valid safetensors header"),
]


@pytest.mark.parametrize(("change", "text"), WRONG_HEADERS)
def test_a_header_that_does_not_describe_its_file_is_refused(one, change, text):
    rewrite_header(one / SINGLE_FILE, change)
    with pytest.raises(TinkerError, match=rf"model\.safetensors is damaged: .*{text}.*Download it again") as error:
        load(one)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("length", [0, 10**9, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(one, length):
    rewrite_header(one / SINGLE_FILE, lambda header: None, length)
    with pytest.raises(TinkerError, match=rf"its header is said to have {length} bytes, of \d+ in the file"):
        load(one)


def test_bytes_after_the_last_tensor_are_refused(one):
    with open(one / SINGLE_FILE, "ab") as file:
        file.write(b"1234")
    with pytest.raises(TinkerError, match=r"its tensors end at byte \d+ of \d+"):
        load(one)


def test_where_two_shards_hold_a_tensor_the_index_decides(shards):
    index = json.loads((shards / INDEX_FILE).read_text())
    before = load(shards)[2]
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    shutil.copyfile(first, shards / "copy.safetensors")
    lost = next(name for name, file in index["weight_map"].items() if file == second.name)
    index["weight_map"][lost] = "copy.safetensors"
    (shards / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(TinkerError, match=rf"places tensor '{lost}' in copy\.safetensors, but that file does not hold it"):
        load(shards)
    index["weight_map"] = json.loads((shards / INDEX_FILE).read_text())["weight_map"] | {lost: second.name}
    moved = [name for name, file in index["weight_map"].items() if file == first.name]
    index["weight_map"] |= dict.fromkeys(moved, "copy.safetensors")
    (shards / INDEX_FILE).write_text(json.dumps(index))
    after = load(shards)[2]
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("trials", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_model_directory_damaged_at_random_gives_no_raw_error(one, trials):
    rng = random.Random(4)
    files = [one / name for name in ("config.json", "generation_config.json", SINGLE_FILE)]
    for _ in range(trials):
        with damaged(rng, rng.choice(files), []):
            try:
                load(one)
            except TinkerError as error:
                assert len(str(error)) < 2000
