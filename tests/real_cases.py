"""What tests of the real model ask of us, each in a process of its own: one device, and programs optimised as usual.

python real_cases.py CASE MODEL DIRECTORY   prints a JSON object
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tinker_jax as tinker
from tinker_jax.cli.main import main as command

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import rl_arithmetic
import sft_pig_latin

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours of the rainbow.",
    "Why do leaves fall in autumn? Answer briefly.",
]
NEW = 32


def chat(tokenizer: Any, question: str) -> list[int]:
    """A question as the model's chat template writes it."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def report(line: str) -> None:
    """Progress beside the result."""
    print(line, time.strftime("%X"), file=sys.stderr, flush=True)


def training_client(model: str) -> Any:
    service = tinker.ServiceClient(engine=tinker.EngineConfig(dtype="float32"))
    return service.create_lora_training_client(base_model=model, rank=16).result()


def greedy(sampler: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Tokens of each answer with the model's own stops, which is what no `stop` means."""
    params = tinker.SamplingParams(max_tokens=new, temperature=0.0)
    futures = [sampler.sample(tinker.ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    return [list(future.result().sequences[0].tokens) for future in futures]


def base(model: str, directory: Path) -> dict[str, Any]:
    """Greedy answers of the untrained model and log-probabilities of its prompts."""
    client = training_client(model)
    tokenizer, sampler = client.get_tokenizer(), client.save_weights_and_get_sampling_client().result()
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    answers = greedy(sampler, prompts, NEW)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    futures = [sampler.compute_logprobs(tinker.ModelInput.from_ints(text)) for text in texts]
    return {"prompts": prompts, "answers": answers, "logprobs": [list(future.result()) for future in futures]}


def held_out_loss(client: Any, tokenizer: Any) -> float:
    """Nats a token of the answers to words that no step has seen."""
    data = [sft_pig_latin.datum(tokenizer, word) for word in sft_pig_latin.HELD_OUT]
    tokens = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)
    return client.forward(data, "cross_entropy").result().metrics["loss:sum"] / tokens


def sft(model: str, directory: Path) -> dict[str, Any]:
    """Pig Latin by the example's own loop, held-out losses and answers around it; the adapter is exported to `directory`."""
    losses, clients, ask = [], [], sft_pig_latin.ask

    def ask_and_score(client: Any, tokenizer: Any, words: list[str]) -> list[str]:
        losses.append(held_out_loss(client, tokenizer))
        clients.append(client)
        return ask(client, tokenizer, words)

    sft_pig_latin.ask = ask_and_score
    result = sft_pig_latin.run(model, steps=60, batch=8, learning_rate=2e-3, report=report)
    client, tokenizer = clients[-1], clients[-1].get_tokenizer()
    saved = client.save_weights_for_sampler(name="pig-latin").result()
    command(["export", "peft", saved.path, str(directory)])
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [sft_pig_latin.prompt(tokenizer, word) for word in sft_pig_latin.HELD_OUT[:8]]
    right = [sft_pig_latin.right(result[when]) for when in ("before", "after")]
    return {"losses": losses, "right": right, "prompts": prompts, "answers": greedy(sampler, prompts, 16)}


def share_of_digits(text: str, *_: int) -> float:
    """A reward that every group has differences in; right sums are too rare for a short loop."""
    return sum(map(str.isdigit, text)) / max(1, len(text))


def rl(model: str, directory: Path) -> dict[str, Any]:
    """Terse answers to sums by the example's own loop, on fewer held-out ones."""
    rl_arithmetic.HELD_OUT = rl_arithmetic.HELD_OUT[:16]
    rl_arithmetic.reward = share_of_digits
    result = rl_arithmetic.run(model, steps=10, sums=6, samples=6, max_tokens=20, learning_rate=1e-3, report=report)
    held_out = [rl_arithmetic.mean_reward(result[when]) for when in ("before", "after")]
    return {"rewards": result["rewards"], "held_out": held_out}


if __name__ == "__main__":
    case, model, directory = sys.argv[1:]
    print(json.dumps({"base": base, "sft": sft, "rl": rl}[case](model, Path(directory))))
