"""After a warm-up nothing compiles any more."""

import jax
import numpy as np
import pytest
from sampler_cases import adapter, ask, check, finish, make, model, shared, submit, tokens_of

from tinker_jax.sampling import sampler as sampler_module


def random_request(rng):
    stop = [[], None, "ab", [chr(98), "xyz"], rng.integers(2, 300, rng.integers(1, 12)).tolist()][rng.integers(5)]
    return ask(
        tokens_of(int(rng.integers(1, 90)), seed=int(rng.integers(3))),
        int(rng.integers(1, 4)),
        max_tokens=int(rng.integers(1, 30)),
        temperature=float(rng.choice([0, rng.uniform(0, 2)])),
        top_k=int(rng.integers(1, 50)),
        top_p=float(rng.uniform(0.1, 1)),
        stop=stop,
        prompt_logprobs=bool(rng.integers(2)),
    )


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fewer shapes", "every shape"])
def test_after_a_warm_up_500_requests_of_all_kinds_compile_nothing(monkeypatch, caplog, few):
    caplog.set_level("INFO", "tinker_jax")
    if few:
        monkeypatch.setattr(sampler_module, "ROWS", (1, 4, 32))
        monkeypatch.setattr(sampler_module, "_CHUNKS", {64: (1, 8), 256: (1,)})
    warm, rng = make(pages=400), np.random.default_rng(0)
    assert warm.warm_up(adapter(1, 8), adapters=2) == warm.programs
    programs = warm.programs
    assert programs == sum("compiled " in record.message for record in caplog.records)
    trees = {"base": None, "one": adapter(1, 8), "two": adapter(2, 8)}
    futures = []
    caplog.clear()
    with jax.log_compiles():
        while len(futures) < 500:
            for _ in range(rng.integers(1, 60)):
                name = list(trees)[rng.integers(3)]
                futures.append(submit(warm, random_request(rng), name, trees[name]))
            for _ in range(rng.integers(1, 6)):
                warm.step()
            if rng.random() < 0.2:
                finish(warm)  # adapters come back to an empty batch, alone or together
        finish(warm, *futures)
        assert not [record.message for record in caplog.records if "ompil" in record.message]
        jax.jit(lambda x: x + 1)(np.ones(3))
        assert any("Finished XLA compilation" in record.message for record in caplog.records), "JAX says it in other words"
    assert warm.programs == programs


def test_a_warm_up_disturbs_nobody(monkeypatch):
    sampler = shared()
    running = submit(sampler, ask(tokens_of(30), 2, max_tokens=40, seed=1, stop=[], prompt_logprobs=True))
    sampler.step()
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "_rows", sampler._rows[:2])
        patch.setattr(sampler, "_chunks", {64: [1]})
        sampler.warm_up(None)
    finish(sampler)
    check(model()[0], tokens_of(30), running.result(0))


def test_a_warm_up_needs_no_room_for_a_whole_context():
    small = make(pages=1, deterministic=True, context_length=1024)
    assert small.warm_up(None) == small.programs > 0
