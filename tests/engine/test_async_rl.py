"""Training and sampling at once, through the public clients: both go on, neither changes the other, nothing is left behind."""

import asyncio
import dataclasses
import itertools
import time

import numpy as np
import pytest
import tiny

from tinker_jax import EngineConfig, ServiceClient
from tinker_jax.sampling.model_runner import STEPS
from tinker_jax.types import AdamParams, Datum, ModelInput, SamplingParams


@pytest.fixture(scope="module")
def service(checkpoint, tmp_path_factory):
    service = ServiceClient(engine=EngineConfig(home=tmp_path_factory.mktemp("home")))
    service.model = str(checkpoint("qwen3"))
    return service


def new_training(service):
    """Every one begins with the same weights."""
    return service.create_lora_training_client(service.model, rank=4, seed=0).result()


def sampler_of(client):
    return client._engine._sampler


def data(seed, lengths=(20, 33)):
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        tokens = rng.integers(2, tiny.VOCAB, n + 1).tolist()
        out.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]}))
    return out


def prompt(length, seed=0):
    return ModelInput.from_ints(np.random.default_rng([seed, length]).integers(2, tiny.VOCAB, length).tolist())


async def train(client, steps, learning_rate=1e-2, between=None):
    """Every log-probability and gradient norm of some training steps."""
    seen = []
    for step in steps:
        forward = await client.forward_backward_async(data(step), "cross_entropy")
        update = await client.optim_step_async(AdamParams(learning_rate=learning_rate))
        if between:
            await between(step)
        output = await forward
        seen += [x["logprobs"].to_numpy() for x in output.loss_fn_outputs]
        seen.append(np.asarray([(await update).metrics["grad_norm:mean"]], np.float32))
    return np.concatenate(seen)


def wait_until_idle(client):
    """What was cancelled is given back at the sampler's next step."""
    sampler, deadline = sampler_of(client), time.monotonic() + 60
    while sampler.running or sampler.waiting or sampler.held_pages:
        assert time.monotonic() < deadline, (sampler.running, sampler.waiting, sampler.held_pages)
        time.sleep(0.01)
    assert not sampler._scheduler.slots.names


def test_a_sample_of_64_tokens_beside_a_long_training_call_ends_in_a_twentieth_of_it(service, monkeypatch):
    """Both counted in dispatched work: micro-batches on one side, prefills and decode chunks on the other."""
    client = new_training(service)
    engine, sampler = client._engine, client.save_weights_and_get_sampling_client()
    params, dispatched, micro_batches = SamplingParams(max_tokens=4 * STEPS, stop=[], seed=0), [], 128
    calm = sampler.sample(prompt(20), 1, params).result()
    assert len(calm.sequences[0].tokens) == 64

    def record(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: dispatched.append(what) or real(*args, **options))

    record(engine._trainer._model, "_micro_batch", "train")
    record(engine._sampler._runner, "prefill", "sample")
    record(engine._sampler._runner, "decode", "sample")
    monkeypatch.setattr(engine._trainer, "_plan", dataclasses.replace(engine._trainer._plan, token_budget=256))
    batch = data(1, [250] * micro_batches)
    client.forward_backward(batch[:2], "cross_entropy").result()  # compiles
    dispatched.clear()
    training = client.forward_backward(batch, "cross_entropy")
    while len(dispatched) < micro_batches // 4:
        time.sleep(0.001)
    before = len(dispatched)
    response = sampler.sample(prompt(20, seed=1), 1, params).result()
    meanwhile = dispatched[before:]
    assert dispatched.count("train") < micro_batches
    assert meanwhile.count("train") <= 0.05 * micro_batches
    training.result()
    assert dispatched.count("train") == micro_batches and dispatched.count("sample") <= 0.15 * micro_batches
    assert len(response.sequences[0].tokens) == 64


def test_300_requests_some_cancelled_while_a_loop_trains(service):
    """Everything resolves, nothing leaks, what finished is what it is alone, and training never noticed."""
    calm, busy = new_training(service), new_training(service)
    expected = asyncio.run(train(calm, range(8)))
    rng = np.random.default_rng(0)
    samplers = [service.create_sampling_client(base_model=service.model).result()]
    samplers += [new_training(service).save_weights_and_get_sampling_client() for _ in range(2)]
    kinds = [(s, n, k) for s, n, k in itertools.product(range(3), (3, 20, 70), (1, 3))]

    def draw(kind):
        s, length, samples = kind
        params = SamplingParams(max_tokens=5 + length % 30, seed=length, stop=[])
        return samplers[s].sample_async(prompt(length), samples, params)

    async def main():
        alone = {kind: [x.tokens for x in (await draw(kind)).sequences] for kind in kinds}
        chosen = [kinds[i] for i in rng.integers(len(kinds), size=300)]
        tasks = [asyncio.ensure_future(draw(kind)) for kind in chosen]
        doomed = rng.permutation(300)[:100].tolist()
        for i in doomed[:20]:
            tasks[i].cancel()

        async def cancel_some(step):
            await asyncio.sleep(0)
            for i in doomed[20 + 10 * step : 30 + 10 * step]:
                tasks[i].cancel()

        trained = await train(busy, range(8), between=cancel_some)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, (kind, result) in enumerate(zip(chosen, results, strict=True)):
            if isinstance(result, asyncio.CancelledError):
                assert i in doomed
            else:
                assert [x.tokens for x in result.sequences] == alone[kind]
        return trained, sum(isinstance(result, asyncio.CancelledError) for result in results)

    trained, cancelled = asyncio.run(main())
    np.testing.assert_array_equal(trained, expected)
    assert cancelled >= 20
    wait_until_idle(busy)


def test_a_sampler_of_step_3_says_the_same_throughout_and_training_goes_on_as_if_nobody_had_sampled(service):
    calm, watched = new_training(service), new_training(service)
    expected = asyncio.run(train(calm, range(20), learning_rate=0.1))
    text, seen = prompt(150), []

    async def main():
        before = await train(watched, range(3), learning_rate=0.1)
        snapshot = await watched.save_weights_and_get_sampling_client_async()
        path = (await watched.save_weights_for_sampler("three")).path
        stored = await watched.create_sampling_client_async(path)

        async def score(step):
            for client in (snapshot, stored):
                seen.append(np.asarray((await client.compute_logprobs_async(text))[1:], np.float32))
                await client.sample_async(prompt(9), 2, SamplingParams(max_tokens=5, stop=[]))

        await score(3)
        await score(3)
        for compiled in list(sampler_of(snapshot)._runner._model._layers._compiled.values()):
            compiled.result(120)  # until then another number of rows may serve, which rounds another way
        seen.clear()
        await score(3)
        after = await train(watched, range(3, 20), learning_rate=0.1, between=score)
        await score(20)
        return np.concatenate([before, after])

    np.testing.assert_array_equal(asyncio.run(main()), expected)
    assert len(seen) == 38
    for logprobs in seen:
        np.testing.assert_array_equal(logprobs, seen[0])
    now = watched.save_weights_and_get_sampling_client().compute_logprobs(text).result()
    assert np.abs(np.asarray(now[1:]) - seen[0]).max() > 0.5, "training moved the weights"
    wait_until_idle(watched)


def test_a_cancelled_future_frees_its_rows_within_one_chunk(service, monkeypatch):
    client = service.create_sampling_client(base_model=service.model).result()
    sampler, rows = sampler_of(client), []
    step = sampler.step

    def counted():
        more = step()
        rows.append(sampler.running)
        return more

    monkeypatch.setattr(client._engine._worker, "_background", counted)
    stays = client.sample(prompt(5), 1, SamplingParams(max_tokens=480, stop=[]))
    goes = client.sample(prompt(6), 7, SamplingParams(max_tokens=480, stop=[]))
    while not rows or rows[-1] < 8:
        time.sleep(0.001)
    at = len(rows)
    assert goes.future().cancel()
    stays.result()
    assert at <= 480 // STEPS - 4, "too late to see anything"
    assert set(rows[at + 2 : -1]) == {1}  # one step may have been under way
    wait_until_idle(client)


def test_sampling_finishes_while_training_requests_keep_coming(service):
    training, client = new_training(service), service.create_sampling_client(base_model=service.model).result()
    client.sample(prompt(5), 1, SamplingParams(max_tokens=4)).result()
    training.forward_backward(data(0), "cross_entropy").result()
    order, futures = [], []
    for i in range(60):
        futures.append(training.forward_backward(data(i), "cross_entropy"))
        if i == 5:
            futures.append(client.sample(prompt(5), 2, SamplingParams(max_tokens=4 * STEPS, stop=[])))
        futures[-1].future().add_done_callback(lambda _, i=i: order.append("sample" if i == 5 else i))
    for future in futures:
        future.result()
    assert "sample" in order and order.index("sample") < 40
    wait_until_idle(client)


def test_training_finishes_while_sampling_requests_keep_coming(service):
    training, client = new_training(service), service.create_sampling_client(base_model=service.model).result()
    training.forward_backward(data(0), "cross_entropy").result()
    training.optim_step(AdamParams(learning_rate=0.0)).result()
    samples = [client.sample(prompt(5 + i), 2, SamplingParams(max_tokens=450, stop=[])) for i in range(20)]
    steps = []
    for i in range(5):
        steps += [training.forward_backward(data(i), "cross_entropy"), training.optim_step(AdamParams(learning_rate=1e-3))]
    for step in steps:
        step.result()
    assert not all(sample.future().done() for sample in samples)
    for sample in samples[1:]:
        sample.future().cancel()
    assert len(samples[0].result().sequences) == 2
    wait_until_idle(client)
