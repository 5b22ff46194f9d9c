"""Names and paths drawn at random: what is no name is refused with an error of ours, and nothing else is."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
from checkpoint_cases import RUN, run_record

from tinker_jax.checkpoints import hub
from tinker_jax.checkpoints.records import check_name, is_run_id, parse_path
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import BadRequestError, ConflictError, NotFoundError, TinkerError

PLAIN = string.ascii_letters + string.digits + "-_."
PIECES = ("..", ".", "/", "\\", "~", "~root", ":", "tinker://", "weights", "sampler_weights", "%2e")
PIECES += ("\0", "\n", " ", "é", "\ud800")
OTHERS = (None, 3, 1.5, b"name", [], {}, Path("name"), True)


def drawn(rng: random.Random, valid: str) -> object:
    """A name near a valid one, of random pieces, of any length, or no text at all."""
    how = rng.randrange(8)
    if how == 0:
        return rng.choice(OTHERS)
    if how == 1:
        return rng.choice(("x", "ab/", "..", "/", "é")) * rng.choice((100, 255, 256, 300, 5000, 20_000))
    if how == 2:
        return "".join(rng.choice(PLAIN) for _ in range(rng.randrange(300)))
    if how == 3:
        return "".join(rng.choice((*PIECES, *PLAIN)) for _ in range(rng.randrange(12)))
    text = list(valid)
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randrange(2)] = rng.choice((*PIECES, *PLAIN))
    return "".join(text)


def is_plain(text: object, most: int, more: str = "") -> bool:
    letters = set(PLAIN + more)
    return isinstance(text, str) and 0 < len(text) <= most and set(text) <= letters and text[0] not in "." + more


def is_path(text: object) -> bool:
    if not isinstance(text, str) or not text.startswith("tinker://"):
        return False
    parts = text[len("tinker://") :].split("/")
    return (
        len(parts) == 3
        and is_plain(parts[0], 255, ":")
        and parts[1] in ("weights", "sampler_weights")
        and is_plain(parts[2], 128)
    )


def refused(call, *args, **kwargs) -> TinkerError | None:
    try:
        call(*args, **kwargs)
    except TinkerError as error:
        assert len(str(error)) < 2000
        return error
    return None


TRIALS = [100, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("trials", TRIALS)
def test_a_path_is_taken_exactly_if_it_has_the_form(tmp_path, trials):
    rng, store = random.Random(1), Store(tmp_path)
    store.create_run(run_record())
    for _ in range(trials):
        path = drawn(rng, f"tinker://{RUN}/weights/final")
        error = refused(parse_path, path)
        assert (error is None) == is_path(path), path
        assert isinstance(refused(store.get, path), NotFoundError if is_path(path) else BadRequestError), path


@pytest.mark.parametrize("trials", TRIALS)
def test_a_checkpoint_name_is_taken_exactly_if_it_is_plain(tmp_path, trials):
    rng, store = random.Random(2), Store(tmp_path)
    store.create_run(run_record())
    taken = set()
    for _ in range(trials):
        name = drawn(rng, "step-1.final")
        plain = is_plain(name, 128)
        assert (refused(check_name, name) is None) == plain, name
        error = refused(store.write, RUN, "weights", name, lambda directory: None, has_optimizer=False)
        expected = BadRequestError if not plain else ConflictError if name in taken else type(None)
        assert isinstance(error, expected), name
        taken |= {name} if plain else set()
    assert {record.name for record in store.list_checkpoints()} == taken
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("trials", TRIALS)
def test_a_run_id_is_taken_exactly_if_it_is_plain(tmp_path, trials):
    rng, store = random.Random(3), Store(tmp_path / "home")
    taken = set()
    for _ in range(trials):
        run_id = drawn(rng, RUN)
        plain = is_plain(run_id, 255, ":")
        assert is_run_id(run_id) == plain, run_id
        known = plain and run_id in taken
        assert isinstance(refused(store.get_run, run_id), type(None) if known else NotFoundError), run_id
        if run_id is not None:
            assert isinstance(refused(store.list_checkpoints, run_id), type(None) if known else NotFoundError), run_id
        error = refused(store.create_run, run_record(run_id))
        assert isinstance(error, BadRequestError if not plain else ConflictError if known else type(None)), run_id
        taken |= {run_id} if plain else set()
    assert {run.run_id for run in store.list_runs()} == taken
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


@pytest.mark.parametrize("trials", TRIALS)
def test_a_base_model_that_is_not_there_is_refused(tmp_path, monkeypatch, trials):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(4)
    valid = ("Qwen/Qwen3-0.6B", "tinker-jax/no-such-model", "./model", str(tmp_path / "model"))
    for _ in range(trials):
        name = drawn(rng, rng.choice(valid))
        error = refused(hub.resolve, name)
        assert isinstance(error, NotFoundError if isinstance(name, str) else BadRequestError), name
