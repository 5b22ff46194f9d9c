"""Teaches a model Pig Latin on made-up words with LoRA, then asks it for real words."""

import argparse
import random

import tinker_jax as tinker

STARTS = """
ab ac ad al am ant ap ar at au ea ed el en ep es ev ib id im in is ob oc of or os ou ub ul um un ut b bl br c ch cl cr
d dr f fl fr g gl gr h j k l m n p ph pl pr r s sc sch sh sk sl sm sn sp st str sw t th thr tr v w wh z
"""
ENDS = """
able acket ading ain amber ange arrow atch ead easure ection eeper ender ever ickle iddle ight illow inger itten oad
older onder oom orest ottle ound ower ubber uddle umble unter urden ustice
"""
REAL = """
acorn amber animal apple arrow autumn basket breeze bridge butter camera castle cherry circle cloud dragon eagle
engine escape flower forest garden ghost grape hammer island jungle kitten ladder lemon market melon mirror ocean
orange pepper planet rabbit river rocket school shadow silver stream summer table thunder tiger umbrella window
"""
HELD_OUT = REAL.split()
TRAIN = [start + end for start in STARTS.split() for end in ENDS.split() if start + end not in HELD_OUT]


def pig_latin(word: str) -> str:
    """plum → umplay, apple → appleway."""
    cut = next((i for i, letter in enumerate(word) if letter in "aeiou"), 0)
    return word[cut:] + word[:cut] + ("ay" if cut else "way")


def prompt(tokenizer, word: str) -> list[int]:
    question = f"Write {word} in Pig Latin."
    if tokenizer.chat_template is None:
        return tokenizer.encode(question + "\n")
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.encode(text, add_special_tokens=False)


def datum(tokenizer, word: str) -> tinker.Datum:
    """The loss is that of the answer alone: the question's tokens have weight 0."""
    asked = prompt(tokenizer, word)
    answer = [*tokenizer.encode(pig_latin(word), add_special_tokens=False), tokenizer.eos_token_id]
    tokens, weights = asked + answer, [0.0] * len(asked) + [1.0] * len(answer)
    inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def ask(client, tokenizer, words: list[str]) -> list[str]:
    sampler = client.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=24, temperature=0.0, stop=[tokenizer.eos_token_id])
    futures = [sampler.sample(tinker.ModelInput.from_ints(prompt(tokenizer, w)), 1, params) for w in words]
    return [tokenizer.decode(f.result().sequences[0].tokens, skip_special_tokens=True).strip() for f in futures]


def run(model: str, steps: int = 60, batch: int = 32, learning_rate: float = 5e-3, report=print) -> dict:
    """Trains; returns the losses (nats a token) and the held-out answers before and after."""
    client = tinker.ServiceClient().create_lora_training_client(base_model=model, rank=32).result()
    tokenizer, rng, losses = client.get_tokenizer(), random.Random(0), []
    before = ask(client, tokenizer, HELD_OUT)
    for step in range(steps):
        data = [datum(tokenizer, word) for word in rng.sample(TRAIN, batch)]
        output = client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=learning_rate * (1 - step / steps)))
        tokens = sum(sum(d.loss_fn_inputs["weights"].data) for d in data)
        losses.append(output.result().metrics["loss:sum"] / tokens)
        report(f"step {step + 1:3d}/{steps}  loss {losses[-1]:.3f} nats a token")
    return {"losses": losses, "before": before, "after": ask(client, tokenizer, HELD_OUT)}


def right(said: list[str]) -> float:
    return sum(text == pig_latin(word) for text, word in zip(said, HELD_OUT, strict=True)) / len(HELD_OUT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tinker-jax/tiny-qwen3", help="a hub id or a local directory")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="5e-3 for the embedded model, 2e-3 for one of 135M")
    result = run(**vars(parser.parse_args()))
    print(f"held-out words right: {right(result['before']):.0%} before, {right(result['after']):.0%} after")
