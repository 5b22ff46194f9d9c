"""A trained mixture of experts through the public clients: it learns, samples, and its adapters stand side by side."""

import numpy as np
import pytest

from tinker_jax import AdamParams, Datum, EngineConfig, ModelInput, SamplingParams, ServiceClient
from tinker_jax.sampling.model_runner import STEPS

MODEL = "tinker-jax/tiny-moe"
RANK = 4  # fewer than its eight experts
ANSWERS = "plum umplay", "school oolschay", "tiger igertay", "apple appleway"
SHIFTED = "plum qmvn", "school tdippm", "tiger ujhfs", "apple bqqmf"
ASKED = "plum"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with ServiceClient(engine=EngineConfig(home=tmp_path_factory.mktemp("home"))) as service:
        yield service


class Trained:
    """A client after some steps on pairs of a word and its answer, and a sampler of it."""

    def __init__(self, service, pairs, seed):
        self.client = service.create_lora_training_client(MODEL, rank=RANK, seed=seed).result()
        self.tokenizer = self.client.get_tokenizer()
        data = [self.datum(*pair.split()) for pair in pairs]
        self.untrained, self.outputs = self.client.save_weights_and_get_sampling_client().result(), []
        for _ in range(20):
            self.outputs.append(self.client.forward_backward(data, "cross_entropy"))
            self.client.optim_step(AdamParams(learning_rate=5e-3))
        self.sampler = self.client.save_weights_and_get_sampling_client().result()

    def prompt(self, word):
        chat = [{"role": "user", "content": f"Change {word}."}]
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def datum(self, word, answer):
        asked, said = self.prompt(word), [*self.tokenizer.encode(answer), self.tokenizer.eos_token_id]
        tokens, weights = asked + said, [0.0] * len(asked) + [1.0] * len(said)
        inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
        return Datum(ModelInput.from_ints(tokens[:-1]), inputs)

    def answer(self, sampler):
        """Greedy text."""
        params = SamplingParams(max_tokens=16, temperature=0.0, stop=[self.tokenizer.eos_token_id])
        drawn = sampler.sample(ModelInput.from_ints(self.prompt(ASKED)), 1, params).result().sequences[0].tokens
        return self.tokenizer.decode(drawn, skip_special_tokens=True)

    def draw(self):
        """Greedy tokens that end nowhere: three chunks of decoding."""
        params = SamplingParams(max_tokens=3 * STEPS, temperature=0.0, stop=[])
        return self.sampler.sample(ModelInput.from_ints(self.prompt(ASKED)), 1, params)


@pytest.fixture(scope="module")
def trained(service):
    return Trained(service, ANSWERS, seed=0)


def test_the_loss_falls_and_metrics_tell_how_experts_are_loaded(trained):
    metrics = [output.result().metrics for output in trained.outputs]
    assert metrics[-1]["loss:sum"] < 0.3 * metrics[0]["loss:sum"]
    for step in metrics:
        assert 0 < step["e_frac_with_tokens:mean"] <= 1 and 0 < step["e_frac_oversubscribed:mean"] < 1
        assert step["e_max_violation:max"] >= step["e_max_violation:mean"] > 0 > step["e_min_violation:mean"] >= -1


def test_training_changes_what_the_model_says(trained):
    """A fresh adapter changes nothing, and shares its programs with the trained one."""
    assert trained.answer(trained.sampler) == "umplay" != trained.answer(trained.untrained)


def test_adapters_in_one_decode_batch_say_what_each_says_alone(service, trained, monkeypatch):
    other = Trained(service, SHIFTED, seed=1)
    alone = [each.draw().result().sequences[0] for each in (trained, other)]
    runner, adapters = trained.client._engine._sampler._runner, []
    real = runner.decode

    def decode(adapter, rows, options):
        adapters.append(len(np.unique(np.asarray(rows.slots)[np.asarray(rows.live)], axis=0)))
        return real(adapter, rows, options)

    monkeypatch.setattr(runner, "decode", decode)
    futures = [each.draw() for each in (trained, other)]
    together = [future.result().sequences[0] for future in futures]
    assert 2 in adapters
    assert alone[0].tokens != alone[1].tokens
    for one, beside in zip(alone, together, strict=True):
        assert beside.tokens == one.tokens
        assert beside.logprobs == pytest.approx(one.logprobs, abs=1e-4)
