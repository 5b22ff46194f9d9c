"""The store: a checkpoint is visible complete or not at all, and every wrong path says what is wrong with it."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from checkpoint_cases import RUN, run_record
from fsspec.implementations.memory import MemoryFileSystem

from tinker_jax.checkpoints import store as store_module
from tinker_jax.checkpoints.records import parse_path
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import BadRequestError, ConflictError, NotFoundError, StorageError


def says(text: str):
    def writer(directory):
        (directory / "part").mkdir()
        (directory / "part" / "a.txt").write_text(text)

    return writer


def text_of(record) -> str:
    return (record.directory / "part" / "a.txt").read_text()


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "home")
    made.create_run(run_record())
    return made


@pytest.fixture
def remote(monkeypatch) -> Store:
    """A store on an object store: fsspec's memory file system under the s3 scheme."""

    class Memory(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

    monkeypatch.setattr(store_module.epath_backend.fsspec_backend, "_get_filesystem", lambda name: Memory())
    fsspec.register_implementation("s3", Memory, clobber=True)
    made = Store("s3://bucket/home")
    made.create_run(run_record())
    return made


@pytest.fixture(params=["local", "remote"])
def any_store(request) -> Store:
    return request.getfixturevalue("store" if request.param == "local" else "remote")


class Clock:
    def __init__(self, monkeypatch):
        self.now = datetime.now(UTC)
        monkeypatch.setattr(store_module, "_now", lambda: self.now)

    def advance(self, **kw):
        self.now += timedelta(**kw)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_a_checkpoint_survives_the_store_that_wrote_it(any_store):
    record = any_store.write(
        RUN, "weights", "step-1", says("hello"), has_optimizer=True, user_metadata={"step": "1"}, ttl_seconds=7200
    )
    again = Store(any_store.home).get(f"tinker://{RUN}/weights/step-1")
    assert again == record
    assert text_of(again) == "hello"
    assert again.size_bytes == len("hello")
    assert again.user_metadata == {"step": "1"} and again.has_optimizer
    assert (again.base_model, again.lora_rank, again.train_unembed) == ("tinker-jax/nano", 8, False)
    assert again.expires_at is not None and again.expires_at - again.time == timedelta(hours=2)


def test_runs_are_listed_newest_first(any_store):
    for day in (3, 2):
        any_store.create_run(run_record(f"sess-{day}:train:0", datetime(2026, 1, day, tzinfo=UTC)))
    fresh = Store(any_store.home)
    assert [r.run_id for r in fresh.list_runs()] == ["sess-3:train:0", "sess-2:train:0", RUN]
    assert fresh.get_run(RUN) == run_record()


def test_an_empty_home_lists_nothing(tmp_path):
    assert Store(tmp_path / "none").list_runs() == []
    assert Store(tmp_path / "none").list_checkpoints() == []
    assert not (tmp_path / "none").exists()


def test_a_run_id_is_taken_once(store):
    with pytest.raises(ConflictError, match=rf"run '{RUN}' exists already"):
        store.create_run(run_record())
    with pytest.raises(BadRequestError, match=r"run id '../x' is not allowed"):
        store.create_run(run_record("../x"))


def test_an_unknown_run_names_similar_ones(store):
    with pytest.raises(NotFoundError, match=r"run 'sess-1:train:1' does not exist .* Did you mean: sess-1:train:0"):
        store.get_run("sess-1:train:1")
    with pytest.raises(NotFoundError, match=r"does not exist"):
        store.list_checkpoints("../../etc")
    with pytest.raises(NotFoundError, match=r"does not exist"):
        store.write("sess-9:train:0", "weights", "a", says("x"), has_optimizer=False)


def test_touch_is_seen_at_once_here_and_written_rarely(store, clock):
    for _ in range(3):
        clock.advance(seconds=20)
        store.touch_run(RUN)
        assert store.get_run(RUN).last_request_time == clock.now
    assert Store(store.home).get_run(RUN).last_request_time == clock.now
    clock.advance(seconds=10)
    store.touch_run(RUN)
    assert Store(store.home).get_run(RUN).last_request_time == clock.now - timedelta(seconds=10)
    with pytest.raises(NotFoundError):
        store.touch_run("nobody")


def test_list_filters_by_run_and_sorts_newest_first(any_store, clock):
    any_store.create_run(run_record("sess-2:train:0"))
    for run_id, kind, name in [
        (RUN, "weights", "a"),
        (RUN, "sampler_weights", "b"),
        ("sess-2:train:0", "weights", "c"),
    ]:
        clock.advance(seconds=1)
        any_store.write(run_id, kind, name, says(name), has_optimizer=False)
    assert [r.name for r in any_store.list_checkpoints()] == ["c", "b", "a"]
    assert [r.path for r in any_store.list_checkpoints(RUN)] == [
        f"tinker://{RUN}/sampler_weights/b",
        f"tinker://{RUN}/weights/a",
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 129, "a b", "ü", "a\n", None, 3])
def test_names_that_are_not_one_plain_component_are_refused(store, name):
    with pytest.raises(BadRequestError, match=r"checkpoint name .* is not allowed; use 1 to 128 letters"):
        store.write(RUN, "weights", name, says("x"), has_optimizer=False)
    with pytest.raises(BadRequestError):
        Store.check_name(name)


@pytest.mark.parametrize("name", ["a", "0001", "step-1.final_v2", "x" * 128, "-", "_"])
def test_plain_names_are_accepted(store, name):
    assert store.write(RUN, "weights", name, says("x"), has_optimizer=False).name == name


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/tmp/x", "'/tmp/x' is not a checkpoint path; expected tinker://<run id>/<weights|sampler_weights>/<name>"),
        (7, "7 is not a checkpoint path"),
        ("tinker://run/weights", "has 2 parts after tinker://"),
        ("tinker://run/weights/a/b", "has 4 parts"),
        ("tinker://run/external_weights/a", "is of kind 'external_weights'"),
        ("tinker://../weights/a", "has the run id '..', which is not allowed"),
        ("tinker://run/weights/..", "checkpoint name '..' is not allowed"),
    ],
)
def test_malformed_paths_say_what_is_expected(store, path, text):
    with pytest.raises(BadRequestError) as error:
        store.get(path)
    assert text in str(error.value)


def test_paths_split_into_their_three_parts():
    assert parse_path(f"tinker://{RUN}/sampler_weights/x") == (RUN, "sampler_weights", "x")


def test_a_path_of_the_wrong_kind_is_refused(store):
    store.write(RUN, "sampler_weights", "a", says("x"), has_optimizer=False)
    with pytest.raises(
        BadRequestError, match=r"is a checkpoint of kind 'sampler_weights'; expected kind 'weights'.*save_state keeps it"
    ):
        store.get(f"tinker://{RUN}/sampler_weights/a", kinds=("weights",))


def test_a_missing_checkpoint_names_similar_ones(store):
    with pytest.raises(NotFoundError, match=r"There is none yet"):
        store.get(f"tinker://{RUN}/weights/a")
    store.write(RUN, "weights", "final", says("x"), has_optimizer=False)
    with pytest.raises(NotFoundError, match=rf"Did you mean: tinker://{RUN}/weights/final"):
        store.get(f"tinker://{RUN}/weights/finale")
    with pytest.raises(NotFoundError, match=rf"Run 'sess-1:train:7' does not exist. Did you mean: {RUN}"):
        store.get("tinker://sess-1:train:7/weights/final")


def test_a_taken_name_is_refused_unless_overwritten(any_store):
    first = any_store.write(RUN, "weights", "a", says("one"), has_optimizer=True)
    with pytest.raises(ConflictError, match=r"'tinker://.*/weights/a' exists already; .* overwrite=True"):
        any_store.write(RUN, "weights", "a", says("two"), has_optimizer=True)
    assert text_of(any_store.get(first.path)) == "one"
    second = any_store.write(RUN, "weights", "a", says("two"), has_optimizer=False, overwrite=True)
    assert text_of(any_store.get(first.path)) == "two"
    assert not any_store.get(first.path).has_optimizer
    assert second.directory.exists()
    any_store.write(RUN, "sampler_weights", "a", says("other kind"), has_optimizer=False)


def test_what_was_overwritten_stays_for_its_readers_for_ten_minutes(any_store, clock):
    clock.advance(days=-3)
    first = any_store.write(RUN, "weights", "a", says("one"), has_optimizer=True)
    clock.advance(days=3)  # older than an orphan may be
    second = any_store.write(RUN, "weights", "a", says("two"), has_optimizer=True, overwrite=True)
    clock.advance(minutes=9)
    third = any_store.write(RUN, "weights", "a", says("three"), has_optimizer=True, overwrite=True)
    assert [text_of(record) for record in (first, second, third)] == ["one", "two", "three"]
    clock.advance(minutes=2)
    any_store.set_ttl(first.path, None)
    any_store.write(RUN, "weights", "b", says("x"), has_optimizer=True)
    assert not first.directory.exists() and text_of(second) == "two"
    clock.advance(minutes=9)
    any_store.write(RUN, "weights", "b", says("x"), has_optimizer=True, overwrite=True)
    assert not second.directory.exists() and text_of(any_store.get(first.path)) == "three"


def test_a_delete_takes_what_was_overwritten_along(any_store):
    first = any_store.write(RUN, "weights", "a", says("one"), has_optimizer=True)
    any_store.write(RUN, "weights", "a", says("two"), has_optimizer=True, overwrite=True)
    any_store.delete(first.path)
    assert not first.directory.exists() and any_store.list_checkpoints() == []


def test_the_old_checkpoint_stays_readable_while_it_is_overwritten(store):
    path = store.write(RUN, "weights", "a", says("old"), has_optimizer=True).path

    def writer(directory):
        says("new")(directory)
        assert text_of(Store(store.home).get(path)) == "old"

    store.write(RUN, "weights", "a", writer, has_optimizer=True, overwrite=True)
    assert text_of(store.get(path)) == "new"


def leftovers(store: Store, kind: str = "weights") -> list[str]:
    folder = Path(store.home) / "runs" / RUN / kind
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(store, old):
    if old:
        store.write(RUN, "weights", "a", says("old"), has_optimizer=True)
    before = leftovers(store)

    def full(directory):
        says("half")(directory)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write checkpoint tinker://.*/weights/a in .*: No space left on device"):
        store.write(RUN, "weights", "a", full, has_optimizer=True, overwrite=True)
    assert leftovers(store) == before
    assert [text_of(r) for r in store.list_checkpoints()] == (["old"] if old else [])


def test_a_failing_pointer_write_leaves_nothing_visible(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"No space left on device"):
        store.write(RUN, "weights", "a", says("x"), has_optimizer=True)
    assert leftovers(store) == [] and store.list_checkpoints() == []


def test_other_failures_of_the_writer_pass_through(store):
    with pytest.raises(ZeroDivisionError):
        store.write(RUN, "weights", "a", lambda _: 1 // 0, has_optimizer=True)
    assert leftovers(store) == []


def test_an_unwritable_home_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot create run .*file.*Not a directory"):
        Store(tmp_path / "file" / "home").create_run(run_record())


def test_unsupported_schemes_are_named():
    with pytest.raises(BadRequestError, match=r"storage 'ftp://x': scheme 'ftp' is not supported; use a directory or gs://"):
        Store("ftp://x")


def test_home_comes_from_the_environment_and_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_JAX_HOME", str(tmp_path / "env"))
    assert Path(Store().home) == tmp_path / "env"
    monkeypatch.delenv("TINKER_JAX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(Store().home) == tmp_path / ".tinker_jax"
    monkeypatch.chdir(tmp_path)
    assert Path(Store("here").home) == tmp_path / "here"


@pytest.mark.parametrize("ttl", [0, -1, 3599, 10 * 365 * 24 * 3600 + 1, 3600.5, True, "3600"])
def test_ttl_outside_its_bounds_is_refused(store, ttl):
    with pytest.raises(BadRequestError, match=r"ttl_seconds=.* from 3600 \(1 hour\) to 315360000 \(10 years\)"):
        store.write(RUN, "weights", "a", says("x"), has_optimizer=True, ttl_seconds=ttl)
    store.write(RUN, "weights", "a", says("x"), has_optimizer=True)
    with pytest.raises(BadRequestError):
        store.set_ttl(f"tinker://{RUN}/weights/a", ttl)


def test_expired_checkpoints_are_invisible_then_collected(any_store, clock):
    gone = any_store.write(RUN, "weights", "gone", says("x"), has_optimizer=True, ttl_seconds=3600)
    kept = any_store.write(RUN, "weights", "kept", says("x"), has_optimizer=True)
    clock.advance(seconds=3601)
    assert [r.name for r in any_store.list_checkpoints()] == ["kept"]
    with pytest.raises(NotFoundError, match=r"or has expired"):
        any_store.get(gone.path)
    any_store.write(RUN, "weights", "later", says("x"), has_optimizer=True)
    assert not gone.directory.exists() and kept.directory.exists()


def test_an_expired_name_is_free_again(store, clock):
    gone = store.write(RUN, "weights", "a", says("x"), has_optimizer=True, ttl_seconds=3600)
    clock.advance(seconds=3601)
    store.write(RUN, "weights", "a", says("y"), has_optimizer=True)
    assert text_of(store.get(gone.path)) == "y"
    assert not gone.directory.exists()


def test_expired_checkpoints_of_earlier_processes_go_when_a_run_begins(store, clock):
    gone = store.write(RUN, "weights", "a", says("x"), has_optimizer=True, ttl_seconds=3600)
    clock.advance(seconds=3601)
    Store(store.home).create_run(run_record("sess-2:train:0"))
    assert not gone.directory.exists()


def test_ttl_can_be_set_and_lifted(any_store, clock):
    path = any_store.write(RUN, "weights", "a", says("x"), has_optimizer=True).path
    assert any_store.set_ttl(path, 3600).expires_at == clock.now + timedelta(hours=1)
    assert any_store.get(path).expires_at == clock.now + timedelta(hours=1)
    assert any_store.set_ttl(path, None).expires_at is None
    clock.advance(days=4000)
    assert text_of(any_store.get(path)) == "x"
    with pytest.raises(NotFoundError):
        any_store.set_ttl(path + "x", 3600)


def test_deleted_checkpoints_are_gone_with_their_data(any_store):
    record = any_store.write(RUN, "weights", "a", says("x"), has_optimizer=True)
    any_store.delete(record.path)
    assert any_store.list_checkpoints() == []
    assert not record.directory.exists()
    with pytest.raises(NotFoundError):
        any_store.delete(record.path)


def test_only_old_orphans_are_removed(store, clock):
    data = Path(store.home) / "runs" / RUN / "weights" / ".data"
    store.write(RUN, "weights", "a", says("x"), has_optimizer=True)
    orphan = data / f"{clock.now:%Y%m%dT%H%M%SZ}-{'0' * 32}"
    orphan.mkdir()
    (orphan / "half").write_text("x")
    (data / "unknown").mkdir()
    clock.advance(hours=23)
    store.write(RUN, "weights", "b", says("x"), has_optimizer=True)
    assert orphan.exists()
    clock.advance(hours=2)
    store.write(RUN, "weights", "c", says("x"), has_optimizer=True)
    assert not orphan.exists()
    assert (data / "unknown").exists()
    assert [r.name for r in store.list_checkpoints()] == ["c", "b", "a"]
    assert [text_of(r) for r in store.list_checkpoints()] == ["x"] * 3


def test_metadata_must_be_strings(store):
    with pytest.raises(BadRequestError, match=r"user_metadata\['step'\]=1: keys and values must be strings"):
        store.write(RUN, "weights", "a", says("x"), has_optimizer=True, user_metadata={"step": 1})


def test_an_unknown_kind_is_refused(store):
    with pytest.raises(BadRequestError, match=r"checkpoint kind 'external' is unknown"):
        store.write(RUN, "external", "a", says("x"), has_optimizer=True)


def test_records_pickle(store):
    record = store.write(RUN, "weights", "a", says("x"), has_optimizer=True)
    assert pickle.loads(pickle.dumps(record)) == record
    assert dataclasses.replace(record, name="b") != record


def test_of_many_threads_taking_one_name_exactly_one_wins(store):
    outcomes = []
    barrier = threading.Barrier(6)

    def save(i):
        barrier.wait()
        try:
            store.write(RUN, "weights", "a", says(str(i)), has_optimizer=True)
            outcomes.append(i)
        except ConflictError:
            outcomes.append(None)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [o for o in outcomes if o is not None]
    assert len(outcomes) == 6 and text_of(store.get(f"tinker://{RUN}/weights/a")) == str(winner)
    assert len(list((Path(store.home) / "runs" / RUN / "weights" / ".data").iterdir())) == 1


KILLED_SAVE = """
    import os, signal, sys
    from tinker_jax.checkpoints import store as module
    from tinker_jax.checkpoints.store import Store

    home, run, where = sys.argv[1:]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def writer(directory):
        (directory / "part").mkdir()
        (directory / "part" / "a.txt").write_text("new")
        if where == "while writing data":
            die()

    if where == "before the pointer":
        os.replace = die
    if where == "while settling":
        os.fsync = die
    if where == "after the pointer":
        module._fsync_directory = lambda d: die() if d.name == "weights" else None
    Store(home).write(run, "weights", "a", writer, has_optimizer=True, overwrite=True)
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("while writing data", "old"),
        ("while settling", "old"),
        ("before the pointer", "old"),
        ("after the pointer", "new"),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint_whole(store, where, expected):
    path = store.write(RUN, "weights", "a", says("old"), has_optimizer=True).path
    script = textwrap.dedent(KILLED_SAVE)
    done = subprocess.run([sys.executable, "-c", script, str(store.home), RUN, where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert text_of(Store(store.home).get(path)) == expected
    # The dead process holds no lock, and the next save cleans nothing that is still in use.
    store.write(RUN, "weights", "a", says("next"), has_optimizer=True, overwrite=True)
    assert text_of(store.get(path)) == "next"


def test_the_store_needs_no_jax():
    script = "import sys, tinker_jax.checkpoints.store; sys.exit('jax' in sys.modules or 'orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
