"""`EngineConfig(deterministic=True)` through the public clients: what is the same bit for bit, in which company.

|           | alone              | among 63 others | in another order      | among others of other lengths |
|-----------|--------------------|-----------------|-----------------------|-------------------------------|
| sampling  | a repeated request | of one length   | all of these reversed | 3 to 200 tokens               |
| forward   | …                  | …               | …                     | …                             |
| gradients | …                  | …               | …                     | …                             |

And samples have the log-probabilities of training: on-policy every ratio is 1, and every estimate of the divergence 0.
"""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
import tiny
from sampler_cases import failing

import tinker_jax as tinker
from tinker_jax import Datum, EngineConfig, ModelInput, SamplingParams, ServiceClient


def asking(num_samples, max_tokens, seed, **settings):
    params = SamplingParams(max_tokens=max_tokens, seed=seed, stop=[], **settings)
    return {"num_samples": num_samples, "sampling_params": params}


REQUESTS = {  # by the length of the sequence that begins with the prompt
    2: asking(2, 20, 1),
    18: asking(2, 30, 2, temperature=0.7, top_k=20, top_p=0.9),
    101: {**asking(1, 40, 3), "include_prompt_logprobs": True},
    251: asking(3, 10, 4),
}


def tokens_of(length, seed):
    return np.random.default_rng([seed, length]).integers(2, tiny.VOCAB, length).tolist()


def datum(tokens, **inputs):
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], **inputs})


def logprobs_of(future):
    return [output["logprobs"].to_numpy() for output in future.result().loss_fn_outputs]


class Clients:
    """A deterministic engine, an adapter after two steps, a sampler of it."""

    def __init__(self, model, home, dtype):
        self.model = str(model)
        self.service = ServiceClient(engine=EngineConfig(home=home, dtype=dtype, deterministic=True))
        self.training = self.service.create_lora_training_client(self.model, rank=4, seed=0).result()
        for seed in range(2):
            self.training.forward_backward([datum(tokens_of(60, seed))], "cross_entropy")
            self.training.optim_step(tinker.AdamParams(learning_rate=0.03)).result()
        self.sampler = self.training.save_weights_and_get_sampling_client().result()

    @property
    def state(self):
        return self.training._engine._adapters[self.training.model_id]

    def forward(self, tokens):
        return logprobs_of(self.training.forward([datum(tokens)], "cross_entropy"))[0]


@pytest.fixture(scope="module")
def clients(checkpoint, tmp_path_factory):
    return Clients(checkpoint("qwen3"), tmp_path_factory.mktemp("home"), "float32")


@pytest.fixture(scope="module")
def experts(checkpoint, tmp_path_factory):
    return Clients(checkpoint("qwen3_moe"), tmp_path_factory.mktemp("home"), "float32")


# ---- the table ----


def sampling(clients, rows, ours):
    sampler = clients.training.save_weights_and_get_sampling_client().result()  # nothing is cached for it
    settings = [REQUESTS[len(row)] if i in ours else asking(1, 10, i) for i, row in enumerate(rows)]
    futures = [sampler.sample(ModelInput.from_ints(row[:-1]), **kind) for row, kind in zip(rows, settings, strict=True)]
    return [numbers_of(futures[i].result()) for i in ours]


def numbers_of(response):
    drawn = [x for sequence in response.sequences for x in (np.asarray(sequence.tokens), sequence.logprobs_np)]
    return drawn if response.prompt_logprobs_np is None else [*drawn, response.prompt_logprobs_np]


def forward(clients, rows, ours):
    logprobs = logprobs_of(clients.training.forward([datum(row) for row in rows], "cross_entropy"))
    return [[logprobs[i]] for i in ours]


def gradients(clients, rows, ours):
    """The weights of all other sequences are zero, and so is what they add."""
    numbers = []
    for one in ours:
        data = [datum(row, weights=np.full(len(row) - 1, float(i == one), np.float32)) for i, row in enumerate(rows)]
        clients.training.forward_backward(data, "cross_entropy").result()
        numbers.append([np.asarray(x) for x in jax.tree.leaves(clients.state.grads)])
        clients.state.grads = None
    return numbers


OTHER = np.random.default_rng(0).integers(3, 200, 63).tolist()
COMPANY = {"alone": [], "among 63 others": [100] * 63, "in another order": [100] * 63, "among others of other lengths": OTHER}
OURS_OF = {sampling: REQUESTS, forward: REQUESTS, gradients: [18, 251]}


@cache
def alone(clients, what):
    return [what(clients, [tokens_of(length, seed=1)], [0])[0] for length in OURS_OF[what]]


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("what", [sampling, forward, gradients])
def test_numbers_are_the_same_bit_for_bit(clients, what, company):
    ours = [tokens_of(length, seed=1) for length in OURS_OF[what]]
    expected = alone(clients, what)
    if company == "alone":
        again = [what(clients, [row], [0])[0] for row in ours]
    else:
        rows = [tokens_of(length, seed=100 + i) for i, length in enumerate(COMPANY[company])]
        for place, row in zip((0, 13, 40, 66), ours, strict=False):
            rows.insert(place, row)
        rows = rows[::-1] if company == "in another order" else rows
        again = what(clients, rows, [rows.index(row) for row in ours])
    for row, numbers, others in zip(ours, again, expected, strict=True):
        assert len(numbers) == len(others) > 0, len(row)
        for x, y in zip(numbers, others, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("what", [pytest.param(sampling, marks=pytest.mark.slow), forward, gradients])
def test_numbers_of_a_mixture_of_experts_are_the_same_too(experts, what):
    test_numbers_are_the_same_bit_for_bit(experts, what, "among others of other lengths")


# ---- sampling and training agree ----


@pytest.fixture(scope="module")
def narrow(checkpoint, tmp_path_factory):
    return Clients(checkpoint("qwen3"), tmp_path_factory.mktemp("home"), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_have_the_log_probabilities_of_training_and_every_ratio_is_1(dtype, request):
    clients = request.getfixturevalue("clients" if dtype == "float32" else "narrow")
    other = clients.service.create_lora_training_client(clients.model, rank=4).result()
    other = other.save_weights_and_get_sampling_client().result()
    asked = []
    for seed, length in enumerate((1, 5, 60, 120, 128, 200) if dtype == "float32" else (5, 124)):
        prompt = tokens_of(length, seed)
        asked.append((prompt, clients.sampler.sample(ModelInput.from_ints(prompt), **asking(3, 9, seed))))
        other.sample(ModelInput.from_ints(prompt), **asking(1, 5, seed))
    data = []
    for prompt, future in asked:
        for sequence in future.result().sequences:
            tokens = [*prompt, *sequence.tokens]
            expected = clients.forward(tokens)
            np.testing.assert_array_equal(sequence.logprobs_np, expected[len(prompt) - 1 :])
            padding = [0.0] * (len(prompt) - 1)
            data.append(datum(tokens, logprobs=[*padding, *sequence.logprobs], advantages=[*padding, *[1.5] * 9]))
        np.testing.assert_array_equal(clients.sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:], expected)
    metrics = clients.training.forward_backward(data, "importance_sampling").result().metrics
    clients.state.grads = None
    assert metrics["ratio:min"] == metrics["ratio:mean"] == metrics["ratio:max"] == 1
    assert metrics["kl_sampler_k1:mean"] == metrics["kl_sampler_k3:mean"] == 0


def test_what_is_reported_of_temperature_1_and_0_is_computed_anew_and_no_token_is_drawn_another_way(clients, monkeypatch):
    prompt, settings = ModelInput.from_ints(tokens_of(40, 5)), {"num_samples": 4}
    params = {t: SamplingParams(max_tokens=30, seed=7, stop=[], temperature=t) for t in (0.0, 0.7, 1.0)}
    ours = {t: clients.sampler.sample(prompt, sampling_params=p, **settings).result().sequences for t, p in params.items()}
    held, name = clients.training._engine._samplers, clients.sampler._sampler_id
    monkeypatch.setitem(held, name, dataclasses.replace(held[name], score=None))
    drawn = {t: clients.sampler.sample(prompt, sampling_params=p, **settings).result().sequences for t, p in params.items()}
    for temperature in params:
        for reported, decoded in zip(ours[temperature], drawn[temperature], strict=True):
            assert reported.tokens == decoded.tokens
            np.testing.assert_allclose(reported.logprobs_np, decoded.logprobs_np, atol=1e-5)
            assert np.array_equal(reported.logprobs_np, decoded.logprobs_np) == (temperature == 0.7)


def test_memory_that_is_missing_once_when_a_sample_is_scored_changes_nothing(clients, monkeypatch):
    prompt = ModelInput.from_ints(tokens_of(7, 0))
    params = SamplingParams(max_tokens=9, seed=0, stop=[])
    expected = clients.sampler.sample(prompt, 2, params).result()
    with monkeypatch.context() as patch:
        count = failing(patch, "log-probabilities", {0})
        response = clients.sampler.sample(prompt, 2, params).result()
    assert count[0] == 3
    for ours, theirs in zip(response.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(ours.logprobs_np, theirs.logprobs_np)


def test_a_sampler_of_a_checkpoint_and_one_of_the_base_model_agree_with_training_too(clients):
    tokens = tokens_of(90, 3)
    path = clients.training.save_weights_for_sampler("agree").result().path
    loaded = clients.service.create_sampling_client(model_path=path).result()
    base = clients.service.create_sampling_client(base_model=clients.model).result()
    fresh = clients.service.create_lora_training_client(clients.model, rank=4).result()  # adds nothing to the base model
    untrained = logprobs_of(fresh.forward([datum(tokens)], "cross_entropy"))[0]
    for sampler, expected in ((loaded, clients.forward(tokens)), (base, untrained)):
        np.testing.assert_array_equal(sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:], expected)
