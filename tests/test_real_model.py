"""A trained model of 30 layers, where `make real-model` has built it: transformers and PEFT agree with us, and it learns."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import real_cases
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
import real_model  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    if not real_model.built():
        pytest.skip("make real-model")
    return real_model.directory()


def ask(case, model, directory):
    """The result of a case of `real_cases`."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "XLA_FLAGS": "", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, real_cases.__file__, case, str(model), str(directory)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    return ask("base", model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sft(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sft") / "adapter"
    return {**ask("sft", model, directory), "adapter": directory}


def theirs(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def generate(model, prompt, new):
    """Greedy tokens after a prompt, up to and with the token that ends a turn."""
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_turns_end_with_the_chat_templates_own_token(model):
    config = json.loads((model / "generation_config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ends = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert config["eos_token_id"] == ends["<|im_end|>"]


def test_greedy_answers_are_those_of_transformers(model, base):
    reference = theirs(model)
    assert base["answers"] == [generate(reference, prompt, real_cases.NEW) for prompt in base["prompts"]]
    assert any(len(answer) < real_cases.NEW for answer in base["answers"])  # one ended its turn


def test_prompt_logprobs_are_those_of_transformers(model, base):
    reference = theirs(model)
    for prompt, answer, (first, *logprobs) in zip(base["prompts"], base["answers"], base["logprobs"], strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            expected = torch.log_softmax(reference(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        assert first is None
        np.testing.assert_allclose(logprobs, expected.numpy(), rtol=0, atol=1e-4)


def test_sixty_steps_of_pig_latin_carry_over_to_words_it_has_not_seen(sft):
    before, after = sft["losses"]
    assert after < 0.4 * before
    knew, knows = sft["right"]
    assert knows >= knew + 0.05


def test_peft_loads_the_trained_adapter_and_gives_our_greedy_answers(model, sft):
    adapted = peft.PeftModel.from_pretrained(theirs(model), sft["adapter"]).eval()
    assert sft["answers"] == [generate(adapted, prompt, 16) for prompt in sft["prompts"]]


def test_a_short_loop_of_reinforcement_learning_raises_the_reward(model, tmp_path):
    result = ask("rl", model, tmp_path)
    before, after = result["held_out"]
    assert after > 1.5 * before
    assert math.fsum(result["rewards"][-3:]) > math.fsum(result["rewards"][:3])
