"""Records on disk: one that is damaged hides no other, and tomorrow's fields and formats are told apart."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from checkpoint_cases import RUN, run_record
from damage import as_before_formats, damaged, replace

from tinker_jax.checkpoints.json_files import seal
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import NotFoundError, StorageError, TinkerError

OTHER = "sess-2:train:0"
NAMES = ("a", "b", "c")


@pytest.fixture
def store(tmp_path) -> Store:
    """Two runs with three checkpoints each."""
    made = Store(tmp_path / "home")
    for day, run_id in enumerate((RUN, OTHER), 1):
        made.create_run(run_record(run_id, datetime(2026, 1, day, tzinfo=UTC)))
        for name in NAMES:
            made.write(run_id, "weights", name, lambda d: (d / "x").write_text("x"), has_optimizer=True)
    return made


def record_file(store: Store, name: str, run_id: str = RUN) -> Path:
    run = Path(store.home) / "runs" / run_id
    return run / "run.json" if name == "run" else run / "weights" / f"{name}.json"


def change(file: Path, **fields) -> None:
    """Rewrites a record with other fields, and a digest of them."""
    value = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(seal({name: v for name, v in value.items() if name not in ("format", "record_sha256")})))


UNREADABLE = {
    "no UTF-8": b'{"data": "\xff"}',
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"' + b"x" * 15_000 + b'"',
    "nothing in it": b"",
    "brackets": b"[" * 100_000,
    "digits": b'{"time": ' + b"9" * 5000 + b"}",
    "directory": "directory",
    "loop": "loop",
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_record_is_named_and_hides_no_other(store, caplog, damage):
    replace(record_file(store, "a"), damage)
    replace(record_file(store, "run", OTHER), damage)
    assert [run.run_id for run in store.list_runs()] == [RUN]
    assert {(r.run_id, r.name) for r in store.list_checkpoints()} == {
        (run_id, name) for run_id in (RUN, OTHER) for name in NAMES
    } - {(RUN, "a")}
    assert {r.name for r in store.list_checkpoints(OTHER)} == set(NAMES), "checkpoints do not need their run's record"
    assert "/a.json" in caplog.text and "run.json" in caplog.text
    with pytest.raises(StorageError, match=r"/a\.json"):
        store.get(f"tinker://{RUN}/weights/a")
    with pytest.raises(StorageError, match=r"run\.json"):
        store.get_run(OTHER)
    with pytest.raises(NotFoundError, match=r"Did you mean: "):
        store.get(f"tinker://{OTHER}/weights/d")
    assert all(len(record.getMessage()) < 600 for record in caplog.records if record.name.startswith("tinker_jax"))
    assert store.write(RUN, "weights", "d", lambda d: None, has_optimizer=False).name == "d", "the store stays usable"


@pytest.mark.parametrize("place", ["runs/stray", f"runs/{RUN}/sampler_weights"])
@pytest.mark.parametrize("what", [b"a file", "loop"])
def test_what_is_no_directory_hides_no_record(store, place, what):
    replace(Path(store.home) / place, what)
    assert len(store.list_runs()) == 2 and len(store.list_checkpoints()) == 6


WRONG_FIELDS = [
    ("a", {"data": "../../.."}, r"data: expected the name of a directory, got '\.\./\.\./\.\.'"),
    ("a", {"expires_at": "soon"}, "expires_at: expected a time with its zone, got 'soon'"),
    ("a", {"time": 3}, "time: expected a time with its zone, got 3"),
    ("a", {"time": "2026-01-01T00:00:00"}, "time: expected a time with its zone"),
    ("a", {"time": "0001-01-01T00:00:00+14:00"}, "time: expected a time with its zone"),
    ("a", {"size_bytes": -1}, "size_bytes: expected a whole number from 0, got -1"),
    ("a", {"lora_rank": True}, "lora_rank: expected a whole number from 1, got True"),
    ("a", {"lora_rank": 8.5}, r"lora_rank: expected a whole number from 1, got 8\.5"),
    ("a", {"train_mlp": "yes"}, "train_mlp: expected true or false, got 'yes'"),
    ("a", {"base_model": None}, "base_model: expected a text, got None"),
    ("a", {"user_metadata": {"step": 1}}, "user_metadata: expected an object of texts, or null"),
    ("a", {"superseded": [3]}, "superseded: expected a list of objects"),
    ("a", {"superseded": [{"data": "..", "until": "x"}]}, "data: expected the name of a directory"),
    ("a", {"path": f"tinker://{RUN}/weights/b"}, f"it is the record of 'tinker://{RUN}/weights/b'"),
    ("run", {"seed": 1.5}, r"seed: expected a whole number or null, got 1\.5"),
    ("run", {"run_id": OTHER}, f"it is the record of run '{OTHER}'"),
    ("run", {"created": "x" * 15_000}, "created: expected a time with its zone"),
]


@pytest.mark.parametrize(("name", "fields", "text"), WRONG_FIELDS)
def test_a_wrong_field_is_named_with_what_was_expected(store, name, fields, text):
    change(record_file(store, name), **fields)
    with pytest.raises(StorageError, match=rf"{name}\.json is damaged: {text}.*Remove it to go on without it") as error:
        store.get_run(RUN) if name == "run" else store.get(f"tinker://{RUN}/weights/a")
    assert len(str(error.value)) < 600
    assert len(store.list_checkpoints()) == (6 if name == "run" else 5)


def test_a_changed_record_does_not_match_its_digest(store):
    file = record_file(store, "a")
    file.write_text(file.read_text().replace('"lora_rank": 8', '"lora_rank": 9'))
    with pytest.raises(StorageError, match=r"a\.json is damaged: its content does not match its SHA-256"):
        store.get(f"tinker://{RUN}/weights/a")


def test_two_pointers_that_changed_places_are_refused(store):
    a, b = record_file(store, "a"), record_file(store, "b")
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    for name in "ab":
        with pytest.raises(StorageError, match=rf"{name}\.json is damaged: it is the record of "):
            store.get(f"tinker://{RUN}/weights/{name}")


def test_fields_of_tomorrow_are_left_alone(store):
    change(record_file(store, "a"), tomorrow=[1])
    change(record_file(store, "run"), tomorrow={"x": 2})
    store.set_ttl(f"tinker://{RUN}/weights/a", 3600)
    store.touch_run(RUN)
    assert store.get(f"tinker://{RUN}/weights/a").expires_at is not None
    assert json.loads(record_file(store, "a").read_text())["tomorrow"] == [1]
    assert json.loads(record_file(store, "run").read_text())["tomorrow"] == {"x": 2}


@pytest.mark.parametrize("name", ["a", "run"])
def test_a_format_of_tomorrow_is_refused_by_name(store, name, caplog):
    file = record_file(store, name)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(StorageError, match=rf"{name}\.json has format 2; this version reads format 1\. Update tinker_jax\."):
        store.get_run(RUN) if name == "run" else store.get(f"tinker://{RUN}/weights/a")
    store.list_runs(), store.list_checkpoints()
    assert "Update tinker_jax" in caplog.text


def test_records_without_a_format_are_read_and_get_one_when_written(store):
    before = store.list_checkpoints(), store.list_runs()
    as_before_formats(Path(store.home))
    again = Store(store.home)
    assert (again.list_checkpoints(), again.list_runs()) == before
    again.set_ttl(f"tinker://{RUN}/weights/a", None)
    assert json.loads(record_file(store, "a").read_text())["format"] == 1


def test_data_that_a_damaged_record_may_point_to_is_not_swept_away(store, monkeypatch):
    data = Path(store.get(f"tinker://{RUN}/weights/a").directory)
    replace(record_file(store, "a"), b"{")
    monkeypatch.setattr("tinker_jax.checkpoints.store.ORPHAN_AGE", datetime.resolution * -1e9)
    store.write(RUN, "weights", "b", lambda d: None, has_optimizer=False, overwrite=True)
    assert data.exists()


VALUES = (None, True, -1, 0, 1.5, 10**30, float("nan"), "", "x" * 15_000, "2026-01-01", "\ud800", "a\nb\0", [], [[]], {})


def damage_record(rng: random.Random, file: Path, others: list[Path]):
    """Bytes damaged at random, something else in the file's place, or fields of another kind under a right digest."""
    how = rng.randrange(4)
    if how == 0:
        return replace(file, rng.choice(list(UNREADABLE.values())))
    if how == 1:
        return replace(file, bytes(rng.randrange(256) for _ in range(rng.randrange(200))))
    fields = json.loads(file.read_text())
    for name in rng.sample(sorted(fields), rng.randrange(1, 3)):
        fields[name] = rng.choice(VALUES)
    if how == 2:
        fields.pop("format", None), fields.pop("record_sha256", None)
        return file.write_text(json.dumps(fields))
    return change(file, **{name: value for name, value in fields.items() if name not in ("format", "record_sha256")})


@pytest.mark.parametrize("trials", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damaged_record_breaks_a_listing(store, trials, caplog):
    rng = random.Random(3)
    everything = {(r.run_id, r.name): r for r in store.list_checkpoints()}
    runs = {run.run_id: run for run in store.list_runs()}
    places = [(run_id, name) for run_id in runs for name in (*NAMES, "run")]
    files = [record_file(store, name, run_id) for run_id, name in places]
    for trial in range(trials):
        run_id, name = rng.choice(places)
        file = record_file(store, name, run_id)
        whole = file.read_bytes()
        if trial % 2:
            with damaged(rng, file, []):
                check_listings(store, run_id, name, everything, runs)
        else:
            damage_record(rng, file, files)
            check_listings(store, run_id, name, everything, runs)
        replace(file, whole)
        assert all(len(record.getMessage()) < 1000 for record in caplog.records if record.name.startswith("tinker_jax"))
        caplog.clear()
    assert {(r.run_id, r.name): r for r in store.list_checkpoints()} == everything


def check_listings(store: Store, run_id: str, name: str, everything: dict, runs: dict) -> None:
    """All other records are listed as they were; the damaged one is refused with an error of ours, or reads."""
    listed = {(r.run_id, r.name): r for r in store.list_checkpoints()}
    rest = {key: r for key, r in everything.items() if key != (run_id, name)}
    assert {key: r for key, r in listed.items() if key != (run_id, name)} == rest
    listed_runs = {run.run_id: run for run in store.list_runs()}
    rest_runs = {key: run for key, run in runs.items() if name != "run" or key != run_id}
    assert {key: run for key, run in listed_runs.items() if key in rest_runs} == rest_runs
    try:
        store.get_run(run_id) if name == "run" else store.get(f"tinker://{run_id}/weights/{name}")
    except TinkerError as error:
        assert len(str(error)) < 1000
