"""Reinforcement learning on sums: sample answers in groups, reward the right ones, learn from the advantages."""

import argparse
import random
import re
import statistics

import tinker_jax as tinker

SUMS = [(a, b) for a in range(10, 100) for b in range(10, 100)]
random.Random(0).shuffle(SUMS)
HELD_OUT, TRAIN = SUMS[:128], SUMS[128:]


def prompt(tokenizer, a: int, b: int) -> list[int]:
    question = f"What is {a} + {b}?"
    if tokenizer.chat_template is None:
        return tokenizer.encode(question + "\n")
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.encode(text, add_special_tokens=False)


def reward(text: str, a: int, b: int) -> float:
    """1 if the last number of the answer is the sum, else 0."""
    return float(re.findall(r"\d+", text)[-1:] == [str(a + b)])


def rollouts(client, tokenizer, sums: list[tuple[int, int]], samples: int, max_tokens: int) -> list[dict]:
    """Groups of answers, one group for each sum, from the client's present weights."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=max_tokens, temperature=1.0, stop=[tokenizer.eos_token_id])
    groups = [{"sum": pair, "prompt": prompt(tokenizer, *pair)} for pair in sums]
    futures = [sampler.sample(tinker.ModelInput.from_ints(g["prompt"]), samples, params) for g in groups]
    for group, future in zip(groups, futures, strict=True):
        group["answers"] = future.result().sequences
        group["texts"] = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group["answers"]]
        group["rewards"] = [reward(text, *group["sum"]) for text in group["texts"]]
    return groups


def mean_reward(groups: list[dict]) -> float:
    return statistics.mean(r for group in groups for r in group["rewards"])


def policy_gradient(group: dict) -> list[tinker.Datum]:
    """One datum an answer; its advantage is its reward above the group's mean."""
    mean, silent, data = mean_reward([group]), [0.0] * (len(group["prompt"]) - 1), []
    for answer, r in zip(group["answers"], group["rewards"], strict=True):
        tokens = group["prompt"] + list(answer.tokens)
        inputs = {"target_tokens": tokens[1:], "logprobs": silent + list(answer.logprobs)}
        inputs["advantages"] = silent + [r - mean] * len(answer.tokens)
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


def run(model: str, steps=60, sums=24, samples=8, max_tokens=8, learning_rate=4e-3, report=print) -> dict:
    """Trains; returns the mean reward of each step and the held-out groups before and after."""
    client = tinker.ServiceClient().create_lora_training_client(base_model=model, rank=32).result()
    tokenizer, rng, rewards = client.get_tokenizer(), random.Random(0), []
    before = rollouts(client, tokenizer, HELD_OUT, 4, max_tokens)
    for step in range(steps):
        groups = rollouts(client, tokenizer, rng.sample(TRAIN, sums), samples, max_tokens)
        client.forward_backward([d for group in groups for d in policy_gradient(group)], "importance_sampling")
        client.optim_step(tinker.AdamParams(learning_rate=learning_rate * (1 - step / steps)))
        rewards.append(mean_reward(groups))
        report(f"step {step + 1:3d}/{steps}  reward {rewards[-1]:.2f}")
    return {"rewards": rewards, "before": before, "after": rollouts(client, tokenizer, HELD_OUT, 4, max_tokens)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reinforcement learning on sums")
    parser.add_argument("--model", default="tinker-jax/tiny-qwen3", help="a hub id or a local directory")
    parser.add_argument("--max-tokens", type=int, default=8, help="room for an answer; a chatty model wants 64")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="4e-3 for the embedded model, 1e-3 for one of 135M")
    args = parser.parse_args()
    result = run(args.model, max_tokens=args.max_tokens, learning_rate=args.learning_rate)
    print(f"held-out reward: {mean_reward(result['before']):.2f} before, {mean_reward(result['after']):.2f} after")
