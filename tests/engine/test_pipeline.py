"""Training steps queued back to back overlap, and nothing is lost when one of them fails on the device."""

import logging
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny

from tinker_jax.engine.config import EngineConfig
from tinker_jax.engine.engine import Engine
from tinker_jax.types import AdamParams, Datum, LoraConfig, ModelInput
from tinker_jax.types.errors import BadRequestError, RequestFailedError, UnprocessableEntityError

LORA = LoraConfig(rank=4, seed=0)
STEP = AdamParams(learning_rate=1e-2)
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2544929920 bytes.")


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory):
    engine = Engine(str(checkpoint("qwen3")), EngineConfig(home=tmp_path_factory.mktemp("home")))
    engine.info().result(120)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared):
    plan = shared._trainer._plan
    for name in ("calm", "tried"):
        shared.create_adapter(name, LORA).result(120)
    yield shared
    shared._trainer._plan = plan


def data(seed, lengths=(500, 480, 512, 490), weight=1.0):
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        tokens = rng.integers(2, tiny.VOCAB, n + 1).tolist()
        out.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [weight] * n}))
    return out


def forward_backward(engine, name, seed, **changes):
    return engine.forward_backward(name, data(seed, **changes), "cross_entropy", None, backward=True)


def rounds(engine, name):
    """Two optimiser steps, the first on gradients of two calls; all queued at once."""
    futures = []
    for seeds in ((0, 1), (2,)):
        futures += [forward_backward(engine, name, seed) for seed in seeds]
        futures.append(engine.optim_step(name, STEP))
    return futures


def results(futures):
    """Losses, log-probabilities and gradient norms, in order."""
    values = []
    for future in futures:
        result = future.result(120)
        values += [out["logprobs"].to_numpy() for out in getattr(result, "loss_fn_outputs", ())]
        values.append(np.asarray([value for name, value in result.metrics.items() if name in ("loss:sum", "grad_norm:mean")]))
    return np.concatenate(values)


def adapter(engine, name):
    """Parameters and optimiser state, each array divided by its largest value."""
    state = engine._adapters[name]
    arrays = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt))]
    return np.concatenate([np.ravel(x / max(1, np.abs(x).max())) for x in arrays])


def failing(function, calls, error=OUT_OF_MEMORY):
    """`function`, but the calls of these numbers raise."""
    count = iter(range(10**6))

    def call(*args, **kwargs):
        if next(count) in calls:
            raise error
        return function(*args, **kwargs)

    call.prepare = getattr(function, "prepare", None)
    return call


def test_queued_steps_are_dispatched_before_the_first_is_read_and_give_the_same_values(engine, monkeypatch):
    calm = results(rounds(engine, "calm"))
    trainer, read, dispatched, gate = engine._trainer, jax.device_get, [], threading.Event()

    def recording(owner, name):
        program = getattr(owner, name)

        def call(*args, **kwargs):
            dispatched.append(name)
            return program(*args, **kwargs)

        call.prepare = getattr(program, "prepare", None)
        return call

    def wait_and_read(arrays):
        assert gate.wait(60)
        return read(arrays)

    with monkeypatch.context() as patch:
        for owner, name in ((trainer._model, "run"), (trainer, "_update")):
            patch.setattr(owner, name, recording(owner, name))
        patch.setattr(jax, "device_get", wait_and_read)
        futures = rounds(engine, "tried")
        end = time.monotonic() + 60
        while len(dispatched) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        assert dispatched == ["run", "run", "_update", "run"] and not any(future.done() for future in futures)
        gate.set()
        np.testing.assert_array_equal(results(futures), calm)
    np.testing.assert_array_equal(adapter(engine, "tried"), adapter(engine, "calm"))


def test_a_loss_that_is_not_finite_is_refused_and_leaves_the_later_steps_as_if_it_had_not_been(engine):
    calm = results(rounds(engine, "calm"))
    refused = forward_backward(engine, "tried", 9, weight=3e38)
    futures = rounds(engine, "tried")
    with pytest.raises(UnprocessableEntityError, match="the loss is not finite"):
        refused.result(120)
    np.testing.assert_array_equal(results(futures), calm)
    np.testing.assert_array_equal(adapter(engine, "tried"), adapter(engine, "calm"))


def test_a_refused_step_under_way_leaves_the_later_ones_as_if_it_had_not_been(engine):
    calm = results(rounds(engine, "calm"))
    forward_backward(engine, "tried", 9, weight=1e30)
    refused = engine.optim_step("tried", STEP)
    futures = rounds(engine, "tried")
    with pytest.raises(UnprocessableEntityError, match="not finite"):
        refused.result(120)
    np.testing.assert_array_equal(results(futures), calm)
    np.testing.assert_array_equal(adapter(engine, "tried"), adapter(engine, "calm"))


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_out_of_memory_leaves_a_micro_batch_alone_then_halves_it_and_loses_nothing(engine, monkeypatch, caplog, where, call):
    calm = results(rounds(engine, "calm"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="tinker_jax"):
        if where == "dispatch":
            patch.setattr(engine._trainer._model, "run", failing(engine._trainer._model.run, {call, call + 1}))
        else:
            reads = {0: 0, 1: 1, 2: 3}  # the optimiser's is between
            patch.setattr(jax, "device_get", failing(jax.device_get, {reads[call]}))
        values = results(rounds(engine, "tried"))
    np.testing.assert_allclose(values, calm, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(adapter(engine, "tried"), adapter(engine, "calm"), atol=1e-5)
    before, tokens = "out of memory on 1 x 1024 tokens: micro-batches of 1024 tokens, remat none, become ", [1024, 512]
    warnings = [f"{before}{n} tokens, remat none, one at a time" for n in tokens[: 2 if where == "dispatch" else 1]]
    assert [record.getMessage() for record in caplog.records] == warnings


@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_an_optimiser_out_of_memory_runs_again_and_gives_the_same_bits(engine, monkeypatch, where):
    calm, plan = results(rounds(engine, "calm")), engine._trainer._plan
    with monkeypatch.context() as patch:
        if where == "dispatch":
            patch.setattr(engine._trainer, "_update", failing(engine._trainer._update, {0}))
        else:
            patch.setattr(jax, "device_get", failing(jax.device_get, {2}))
        np.testing.assert_array_equal(results(rounds(engine, "tried")), calm)
    np.testing.assert_array_equal(adapter(engine, "tried"), adapter(engine, "calm"))
    assert engine._trainer._plan is plan


def test_a_call_that_does_not_fit_in_any_way_is_refused_and_changes_nothing(engine, monkeypatch, caplog):
    calm = results(rounds(engine, "calm"))
    first = forward_backward(engine, "tried", 0)
    first.result(120)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="tinker_jax"):
        patch.setattr(engine._trainer._model, "run", failing(engine._trainer._model.run, range(100)))
        with pytest.raises(UnprocessableEntityError) as refused:
            forward_backward(engine, "tried", 7).result(120)
    assert refused.match(r"a row of 512 tokens, with every layer recomputed, does not fit into a device of .* GiB")
    assert refused.match(".*Shorten the longest sequence, lower the LoRA rank, or cut the model over more devices")
    ends = [record.getMessage().rpartition(" become ")[2] for record in caplog.records]
    alone, halved = (f"{tokens} tokens, remat none, one at a time" for tokens in (1024, 512))
    assert ends == [alone, halved, "512 tokens, remat attention", "512 tokens, remat full"]
    rest = [forward_backward(engine, "tried", 1), engine.optim_step("tried", STEP)]
    rest += [forward_backward(engine, "tried", 2), engine.optim_step("tried", STEP)]
    np.testing.assert_allclose(results([first, *rest]), calm, atol=1e-5, rtol=1e-5)


def test_an_optimiser_step_that_does_not_fit_is_refused_and_keeps_the_gradients(engine, monkeypatch):
    calm = results([forward_backward(engine, "calm", 0), engine.optim_step("calm", STEP)])
    gradients = forward_backward(engine, "tried", 0)
    with monkeypatch.context() as patch:
        patch.setattr(engine._trainer, "_update", failing(engine._trainer._update, range(100)))
        with pytest.raises(UnprocessableEntityError, match="optim_step does not fit into a device"):
            engine.optim_step("tried", STEP).result(120)
    np.testing.assert_array_equal(results([gradients, engine.optim_step("tried", STEP)]), calm)


def test_the_gradients_of_an_optimiser_step_that_broke_are_there_for_the_next_one(engine, monkeypatch):
    calm = results([forward_backward(engine, "calm", 0), engine.optim_step("calm", STEP)])
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", failing(jax.device_get, {1}, jax.errors.JaxRuntimeError("INTERNAL: broken")))
        gradients, *steps = forward_backward(engine, "tried", 0), *(engine.optim_step("tried", STEP) for _ in range(2))
        with pytest.raises(RequestFailedError, match="INTERNAL: broken"):
            steps[0].result(120)
        np.testing.assert_array_equal(results([gradients, steps[1]]), calm)


def test_another_failure_on_the_device_takes_its_own_step_along_and_no_other(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", failing(jax.device_get, {0}, jax.errors.JaxRuntimeError("INTERNAL: broken")))
        futures = [forward_backward(engine, "tried", 5), engine.optim_step("tried", STEP), *rounds(engine, "tried")]
        with pytest.raises(RequestFailedError, match="INTERNAL: broken"):
            futures[0].result(120)
        with pytest.raises(BadRequestError, match="optim_step without gradients"):
            futures[1].result(120)
        np.testing.assert_array_equal(results(futures[2:]), results(rounds(engine, "calm")))


@pytest.mark.parametrize("call", [0, 1])
def test_a_custom_loss_recovers_in_either_direction(engine, monkeypatch, call):
    def gradient(logprobs):
        return float(-sum(lp.sum() for lp in logprobs)), {}, [-np.ones_like(lp) for lp in logprobs]

    ends = []
    for name in ("calm", "tried"):
        with monkeypatch.context() as patch:
            if name == "tried":
                patch.setattr(jax, "device_get", failing(jax.device_get, {call}))
            _, loss, _ = engine.forward_backward_custom(name, data(3), gradient).result(120)
            ends.append((loss, engine.optim_step(name, STEP).result(120).metrics["grad_norm:mean"]))
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


REAL = """
import dataclasses, logging, resource, sys
import numpy as np
from tinker_jax import sharding
from tinker_jax.engine.config import EngineConfig
from tinker_jax.engine.engine import Engine
from tinker_jax.types import AdamParams, Datum, LoraConfig, ModelInput

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
# As on accelerators, one program whose memory is one piece: many refusals of small ones, XLA's compiler does not survive.
sharding.on_default_cpu = lambda mesh: False
engine = Engine(sys.argv[1], EngineConfig(home=sys.argv[2]))
engine.info().result(300)
rng = np.random.default_rng(0)
tokens = rng.integers(2, 300, (256, 511)).tolist()  # take 0.8 GB or more when computed at once
data = [Datum(ModelInput.from_ints(row), {"target_tokens": row}) for row in tokens]

def run(name):
    engine.create_adapter(name, LoraConfig(rank=4, seed=0))
    batches = (data[:8], data)
    futures = [engine.forward_backward(name, batch, "cross_entropy", None, backward=True) for batch in batches]
    norm = engine.optim_step(name, AdamParams())
    losses = [future.result(300).metrics["loss:sum"] for future in futures]
    return [*losses, norm.result(300).metrics["grad_norm:mean"]]

trainer = engine._trainer
trainer._plan = dataclasses.replace(trainer._plan, token_budget=1 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20),) * 2)
tried = run("tried")
assert trainer._plan.token_budget < 1 << 20
np.testing.assert_array_equal(tried, run("calm"))
print("recovered")
engine.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory, and reads it in /proc")
def test_a_real_out_of_memory_is_recovered_from(checkpoint, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", REAL, str(checkpoint("qwen3")), str(tmp_path)]
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    *warnings, last = done.stdout.splitlines()
    assert last == "recovered"
    assert warnings and all(line.startswith("out of memory on ") for line in warnings), done.stdout
