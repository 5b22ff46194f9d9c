"""What is read is what was saved: every file has a digest, and what has none says so."""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
import subprocess
from pathlib import Path

import checkpoint_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import META, RUN, run_record, trained
from damage import as_before_formats, damaged

from tinker_jax.checkpoints import export_merged, export_peft, export_tinker, state
from tinker_jax.checkpoints.digests import SUMS
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import StorageError, TinkerError, UnprocessableEntityError

# Arrays of up to a kilobyte lie within other files, under checksums of their own; these are larger.
adapter = functools.partial(checkpoint_cases.adapter, rank=16)
optimizer = functools.partial(checkpoint_cases.optimizer, rank=16)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


WANTED, WANTED_OPTIMIZER = abstract(adapter(0)), abstract(optimizer(0))


def load(directory):
    return state.load_adapter(directory, WANTED, WANTED_OPTIMIZER)


def same(got, expected) -> bool:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32)) for a, b in pairs)


@pytest.fixture
def saved(tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    state.save_adapter(directory, adapter(0), optimizer(0), META)
    return directory


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_every_file_has_a_digest_that_sha256sum_finds_right(saved):
    listed = {line.split("  ", 1)[1] for line in (saved / SUMS).read_text().splitlines()}
    assert listed == {str(path.relative_to(saved)) for path in files_of(saved)} - {SUMS}
    assert {name.partition("/")[0] for name in listed} == {"meta.json", "adapter", "optimizer"}
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=saved, check=False).returncode == 0


def test_one_flipped_bit_in_any_file_is_refused_by_its_name(saved):
    for file in files_of(saved):
        whole = file.read_bytes()
        flip(file)
        with pytest.raises(StorageError) as error:
            load(saved)
        assert str(file) in str(error.value) or file.name == SUMS, file
        file.write_bytes(whole)
    assert same(load(saved), (adapter(0), optimizer(0)))


def test_missing_and_surplus_files_are_named(saved):
    lost = next(iter((saved / "optimizer").rglob("d/*")))
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(StorageError, match=rf"{lost.name} is missing \(1 of \d+ files that were saved are\)"):
        load(saved)
    lost.write_bytes(kept)
    (saved / "adapter" / "array_metadatas" / "process_1").write_text("{}")
    with pytest.raises(StorageError, match=r"process_1 is not among the files that were saved \(1 are not\)\. Remove it"):
        load(saved)
    (saved / "adapter" / "array_metadatas" / "process_1").unlink()
    (saved / "notes.txt").write_text("what orbax does not read may lie beside")
    assert same(load(saved), (adapter(0), optimizer(0)))


def test_a_link_to_its_own_directory_is_a_surplus_file(saved):
    (saved / "adapter" / "again").symlink_to(saved)
    with pytest.raises(StorageError, match=r"again is not among the files that were saved"):
        load(saved)


def test_weights_load_though_the_optimizer_is_damaged(saved):
    flip(next(iter((saved / "optimizer").rglob("d/*"))))
    got, none = state.load_adapter(saved, WANTED)
    assert same(got, adapter(0)) and none is None
    assert same(list(state.read_adapter(saved).values()), adapter(0))


@pytest.mark.parametrize("damage", [b"", b"\xff", b"no digest\n"])
def test_a_damaged_list_of_digests_is_refused(saved, damage):
    (saved / SUMS).write_bytes(damage)
    with pytest.raises(StorageError):
        load(saved)


def test_a_checkpoint_that_lost_its_digests_is_refused(saved):
    (saved / SUMS).unlink()
    with pytest.raises(StorageError, match=r"SHA256SUMS is missing, so the checkpoint cannot be verified"):
        load(saved)


def test_a_checkpoint_older_than_digests_loads_and_says_once_that_it_cannot_be_verified(tmp_path, caplog):
    store = Store(tmp_path)
    store.create_run(run_record())
    path = store.write(
        RUN, "weights", "a", lambda d: state.save_adapter(d, adapter(0), optimizer(0), META), has_optimizer=True
    ).path
    as_before_formats(tmp_path)
    record = Store(tmp_path).get(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert same(load(record.directory), (adapter(0), optimizer(0)))
    assert caplog.text.count("is older than digests and cannot be verified") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, value):
    weights, moments = adapter(0), optimizer(0)
    weights["lm_head"]["a"] = weights["lm_head"]["a"].at[3, 1].set(value)
    state.save_adapter(tmp_path / "weights", weights, optimizer(0), META)
    text = r"adapter tensor 'lm_head\.a' of checkpoint .* holds 1 values that are NaN or infinite; use a checkpoint from before"
    for read in (load, state.read_adapter):
        with pytest.raises(UnprocessableEntityError, match=text):
            read(tmp_path / "weights")
    moments["nu"]["layers"]["q_proj"]["b"] = jnp.full((3, 16, 32), value)
    state.save_adapter(tmp_path / "moments", adapter(0), moments, META)
    with pytest.raises(UnprocessableEntityError, match=r"optimizer tensor 'nu\.layers\.q_proj\.b' .* holds 1536 values"):
        load(tmp_path / "moments")
    assert same(state.load_adapter(tmp_path / "moments", WANTED)[0], adapter(0))


@pytest.mark.parametrize("export", [export_peft, export_merged, export_tinker])
def test_an_export_of_a_damaged_checkpoint_is_refused_and_leaves_nothing(tmp_path, checkpoint, export):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    file = next(iter((Path(Store(tmp_path / "home").get(path).directory) / "adapter").rglob("d/*")))
    flip(file)
    with pytest.raises(StorageError, match=rf"{file.name} is damaged: its SHA-256 is not the one in SHA256SUMS"):
        export(path, tmp_path / "out", home=tmp_path / "home")
    assert [found.name for found in tmp_path.iterdir()] == ["home"]


def meta_with(**change):
    def write(directory: Path) -> None:
        description = json.loads((directory / "meta.json").read_text())
        (directory / "meta.json").write_text(json.dumps(description | change))

    return write


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "meta.json has format 2; this version reads format 1. Update tinker_jax"),
        ({"format": "1"}, "format: expected a whole number, got '1'"),
        ({"lora_alpha": 0}, "lora_alpha: expected a finite number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number above 0, got nan"),
        ({"meta": []}, r"meta: expected an object, got \[\]"),
        ({"meta": {"groups": 3}}, r"meta: expected a list as its groups, got \{'groups': 3\}"),
        ({"tensors": {}}, "tensors: expected objects 'adapter' and"),
        ({"tensors": {"adapter": 3}}, "tensors: expected an object of tensors for each part"),
        ({"tensors": {"adapter": {"x": {"shape": [-1], "dtype": "float32"}}}}, "adapter tensor 'x': expected its shape and"),
        ({"tensors": {"adapter": {"x": {"shape": [1], "dtype": "float99"}}}}, "adapter tensor 'x': expected its shape and"),
        (
            {"tensors": {"adapter": {name: {"shape": [1], "dtype": "float32"} for name in ("x", "x.y")}}},
            "adapter tensor 'x.y' lies within another tensor",
        ),
    ],
)
def test_a_description_that_nobody_could_use_names_the_field(saved, change, text):
    meta_with(**change)(saved)
    with pytest.raises(StorageError, match=text):
        state.read_meta(saved)


def test_a_description_with_more_fields_is_read(saved):
    meta_with(tomorrow=[1])(saved)
    assert state.read_meta(saved)["tomorrow"] == [1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two checkpoints of one run, of different numbers."""
    directory = tmp_path_factory.mktemp("home")
    store = Store(directory)
    store.create_run(run_record())
    for name, seed in (("a", 0), ("b", 50)):
        store.write(
            RUN,
            "weights",
            name,
            lambda d, seed=seed: state.save_adapter(d, adapter(seed), optimizer(seed), META),
            has_optimizer=True,
        )
    return directory


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damaged_checkpoint_loads_with_other_numbers(home, trials):
    rng = random.Random(8)
    files = files_of(home / "runs" / RUN / "weights")
    own = files_of(Path(Store(home).get(f"tinker://{RUN}/weights/a").directory))
    own.append(home / "runs" / RUN / "weights" / "a.json")
    sizes = [file.stat().st_size for file in own]
    refused = 0
    for trial in range(trials):
        file = rng.choice(own) if trial % 2 else rng.choices(own, sizes)[0]  # else numbers themselves would hardly be met
        with damaged(rng, file, [other for other in files if other != file]) as how:
            try:
                got = load(Store(home).get(f"tinker://{RUN}/weights/a").directory)
            except TinkerError as error:
                assert len(str(error)) < 2000
                refused += 1
            else:
                assert same(got, (adapter(0), optimizer(0))), f"trial {trial}: {how} of {file}"
    assert refused > 0.95 * trials
    assert same(load(Store(home).get(f"tinker://{RUN}/weights/a").directory), (adapter(0), optimizer(0)))


@pytest.mark.slow  # orbax leaves its tasks to the garbage collector, which complains at length
def test_a_damaged_checkpoint_without_digests_gives_no_raw_error(home, tmp_path):
    rng = random.Random(9)
    old = tmp_path / "old"
    shutil.copytree(home, old)
    as_before_formats(old)
    files = files_of(old / "runs" / RUN / "weights")
    own = files_of(Path(Store(old).get(f"tinker://{RUN}/weights/a").directory))
    for _ in range(300):
        file = rng.choice(own)
        with damaged(rng, file, [other for other in files if other != file]):
            try:
                load(Store(old).get(f"tinker://{RUN}/weights/a").directory)
            except TinkerError as error:
                assert len(str(error)) < 2000
