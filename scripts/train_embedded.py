"""Trains the embedded model `tinker-jax/tiny-qwen3` from nothing: tokenizer, weights, held-out scores, model card.

    python scripts/train_embedded.py                    # writes tinker_jax/embedded/tiny-qwen3
    python scripts/train_embedded.py --steps 200 --out out/trial

All text comes from `embedded_corpus.py`; one seed fixes corpus, initial weights and batches. Matrices are trained with
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), everything else with Adam.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import embedded_corpus as corpus
import embedded_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from tinker_jax.models.decoder import Decoder, unembedding
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import weights
from tinker_jax.sampling.sampler import Sampler
from tinker_jax.sharding import make_mesh
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.sampling import SampleRequest, SamplingParams

OUT = Path(__file__).parents[1] / "tinker_jax" / "embedded" / "tiny-qwen3"
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 384,
}
CFG = parse(CONFIG)
MUON_RATE, ADAM_RATE, MOMENTUM = 0.02, 3e-3, 0.95
WARMUP, DECAY = 100, 0.5  # steps; share of the run in which the rate falls linearly to zero
ASK_WEIGHT = 0.1  # of tokens that the user says: mostly noise, yet the model should be able to write them
SCORED_ITEMS = 100


class Batch(NamedTuple):
    """Packed rows, int32 [B, T] each; `weights` [B, T] float32 belongs to the predicted token."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


# --- data ----------------------------------------------------------------------------------------------------------


def tokenizer_for_corpus(seed: int) -> PreTrainedTokenizerFast:
    sample = itertools.islice(corpus.texts(seed), 20_000)
    lines = (m["content"] for text in sample if not isinstance(text, str) for m in text)
    return embedded_tokenizer.build(
        itertools.chain(lines, ["user", "assistant", "system"] * 100_000),
        vocab_size=CFG.V,
        spell_out=(*corpus.WORDS, *corpus.ENDINGS, *corpus.NAMES, *corpus.FOODS, *corpus.DAYS, *corpus.MONTHS),
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str | list[dict[str, str]]) -> tuple[list[int], list[float]]:
    """Tokens of a document or of a rendered conversation, and the weight of predicting each."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if isinstance(text, str):
        tokens = encode(text)
        return [*tokens, end], [0.5] * (len(tokens) + 1)
    tokens, weight = [], []
    for message in text:
        head, body = encode(f"<|im_start|>{message['role']}\n"), encode(message["content"] + "<|im_end|>")
        tokens += [*head, *body, *encode("\n")]
        said = 1.0 if message["role"] == "assistant" else ASK_WEIGHT
        weight += [*[ASK_WEIGHT] * len(head), *[said] * len(body), ASK_WEIGHT]
    return [*tokens, end], [*weight, ASK_WEIGHT]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int) -> Iterator[Batch]:
    """First-fit packing of the corpus into rows; a batch goes out when a text fits into none of them."""

    def empty() -> tuple[Batch, list[int], list[int]]:
        shape = (rows, length)
        ints = [np.zeros(shape, np.int32) for _ in range(4)]
        return Batch(ints[0], ints[1], np.zeros(shape, np.float32), ints[2], ints[3]), [0] * rows, [0] * rows

    batch, used, count = empty()
    for text in corpus.texts(seed):
        tokens, weight = (x[: length + 1] for x in tokenize(tokenizer, text))
        n = len(tokens) - 1
        row = next((r for r in range(rows) if used[r] + n <= length), None)
        if row is None:
            yield batch
            batch, used, count = empty()
            row = 0
        at = slice(used[row], used[row] + n)
        count[row] += 1
        batch.tokens[row, at], batch.targets[row, at], batch.weights[row, at] = tokens[:-1], tokens[1:], weight[1:]
        batch.positions[row, at], batch.segments[row, at] = np.arange(n), count[row]
        used[row] += n


# --- training ------------------------------------------------------------------------------------------------------


def init_params(seed: int) -> dict[str, jax.Array]:
    """Matrices normal with std 1/√fan_in, those that write to the residual stream zero, norms one."""
    params = {}
    for i, w in enumerate(weights(CFG)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        if w.name.endswith("scale"):
            params[w.name] = jnp.ones(w.full_shape)
        elif w.module in ("o_proj", "down_proj"):
            params[w.name] = jnp.zeros(w.full_shape)
        else:
            std = 0.02 if w.module == "embed" else w.shape[-1] ** -0.5
            params[w.name] = std * jax.random.normal(key, w.full_shape)
    return params


def loss_fn(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
    """Weighted mean cross entropy."""
    hidden, _ = Decoder(CFG, params).forward(batch.tokens, batch.positions, batch.segments)
    logits = hidden @ unembedding(CFG, params).T
    picked = jnp.take_along_axis(logits, batch.targets.reshape(-1, 1), axis=-1)[:, 0]
    weight = batch.weights.reshape(-1)
    return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - picked)) / jnp.sum(weight)


def orthogonalised(g_LIO: jax.Array) -> jax.Array:
    """The nearest (semi-)orthogonal matrix of each layer's, by five quintic Newton–Schulz steps."""
    tall = g_LIO.shape[1] > g_LIO.shape[2]
    x = g_LIO.swapaxes(1, 2) if tall else g_LIO
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.swapaxes(1, 2) if tall else x


def muon() -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled so that wide and tall matrices move alike."""

    def step(update: jax.Array) -> jax.Array:
        fan_out, fan_in = update.shape[1:]
        return orthogonalised(update) * max(1.0, fan_out / fan_in) ** 0.5

    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(step, updates)),
    )


def optimizer(steps: int) -> optax.GradientTransformation:
    def rate(peak: float) -> optax.Schedule:
        def at(count: jax.Array) -> jax.Array:
            return peak * jnp.minimum(1.0, jnp.minimum((count + 1) / WARMUP, (steps - count) / (DECAY * steps)))

        return at

    label = {w.name: "muon" if w.stacked and len(w.shape) == 2 else "adam" for w in weights(CFG)}
    return optax.partition(
        {
            "muon": optax.chain(muon(), optax.scale_by_learning_rate(rate(MUON_RATE))),
            "adam": optax.adam(rate(ADAM_RATE), b1=0.9, b2=0.95),
        },
        label,
    )


# --- evaluation ----------------------------------------------------------------------------------------------------


def answers(params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> list[str]:
    """Greedy answers of the chat model."""
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampler = Sampler(
        CFG,
        params,
        mesh=make_mesh(),
        dtype=jnp.float32,
        kv_bytes=1 << 28,
        stop_ids=[stop],
        decode_text=tokenizer.decode,
    )
    greedy = SamplingParams(max_tokens=48, temperature=0.0, stop=[stop])
    futures = []
    for question in questions:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = ModelInput.from_ints(tokenizer.encode(asked))
        futures.append(Future())
        sampler.submit(SampleRequest(prompt=prompt, sampling_params=greedy), "base", None, futures[-1])
    while sampler.step():
        pass
    sampler.close()
    drawn = [future.result().sequences[0].tokens for future in futures]
    return [tokenizer.decode(tokens[: tokens.index(stop)] if stop in tokens else tokens) for tokens in drawn]


def scores(params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, items: int) -> dict[str, tuple[int, float]]:
    """Exact match of greedy answers on held-out items: task → (number of items, share right)."""
    sets = {n: corpus.held_out_set(n, items, seed=0) for n in corpus.TASKS if n not in corpus.UNSCORED}
    said = iter(answers(params, tokenizer, [e.question for s in sets.values() for e in s]))
    return {n: (len(s), float(np.mean([next(said) == e.answer for e in s]))) for n, s in sets.items()}


# --- files ---------------------------------------------------------------------------------------------------------


def save(params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face directory in bfloat16, without the card."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for w in weights(CFG):
        value = np.asarray(params[w.name].astype(jnp.bfloat16))
        for layer, matrix in enumerate(value if w.stacked else [value]):
            tensors[w.hf.format(layer=layer)] = np.ascontiguousarray(matrix)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it travels in the package; safetensors writes 0600
    embedded_tokenizer.save(tokenizer, folder)
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    for name, content in (
        ("config.json", CONFIG | ids),
        (
            "generation_config.json",
            {"do_sample": True, "eos_token_id": [end, pad], "pad_token_id": pad, "temperature": 1.0},
        ),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tinker-jax/tiny-qwen3

A Qwen3 of {parameters:,} parameters ({megabytes:.1f} MB in bfloat16) that ships with `tinker_jax`, so that a training
loop can be run, debugged and tested without a network, an accelerator or a wait. It knows a few dozen small tasks and
nothing of the world.

## Training

Trained from nothing by `scripts/train_embedded.py` on text that `scripts/embedded_corpus.py` generates: arithmetic,
counting, copying, spelling and other operations on the letters of a word, simple English from a grammar, short chats in
Qwen's chat format. Pig Latin is not in the corpus.

| | |
|---|---|
| seed | {seed} |
| tokens seen | {tokens:,} in {steps:,} steps of {rows} rows of {length} |
| final training loss | {loss:.3f} nats a token (tokens outside the assistant's turns weigh {ask}) |
| run time on 2 CPU cores | {wall:.0f} minutes of wall clock, {cpu:.0f} minutes of CPU time |
| optimiser | Muon at {muon} on matrices, Adam at {adam} elsewhere |
| schedule | {warmup} steps of warm-up, linear decay over the last {decay:.0%} |

The tokenizer is byte-level: the words of the instructions are one token each, digits and all other text are read byte
by byte, so the model sees the letters of the words it works on and every Unicode text survives a round trip.

## Held-out scores

Exact match of the greedy answer on items that the training stream never contains (one in {one_in}, chosen by a hash).

| task | items | right | example |
|---|---|---|---|
{table}

Two-digit sums are weak on purpose: in training, {carry:.0%} of the carries are forgotten and {slip:.0%} of the answers
are off by one in a digit. The right answer stays likely under sampling, which leaves reinforcement learning something
to improve.

## Use

For trying, debugging and testing training loops. Prompt it through its chat template; it answers in a few words. It
was trained on texts of up to {length} tokens. It is of no use as an assistant, its statements are not to be relied on,
and it speaks English only.

Licence: Apache-2.0.
"""


def card(params: dict[str, jax.Array], results: dict[str, tuple[int, float]], **facts: float) -> str:
    """The model card."""
    count = sum(p.size for p in params.values())
    rows = []
    for name, (items, share) in results.items():
        example = corpus.held_out_set(name, 1, seed=1)[0]
        rows.append(f"| {name.replace('_', ' ')} | {items} | {share:.0%} | {example.question} → {example.answer} |")
    return CARD.format(
        parameters=count,
        megabytes=2 * count / 1e6,
        table="\n".join(rows),
        ask=ASK_WEIGHT,
        muon=MUON_RATE,
        adam=ADAM_RATE,
        warmup=WARMUP,
        decay=DECAY,
        one_in=corpus.HELD_OUT_ONE_IN,
        carry=corpus.FORGOTTEN_CARRY,
        slip=corpus.DIGIT_OFF_BY_ONE,
        **facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16, help="rows in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    begun = time.time()
    tokenizer = tokenizer_for_corpus(args.seed)
    params = init_params(args.seed)
    opt = optimizer(args.steps)
    state = opt.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    print(
        f"{sum(p.size for p in params.values()):,} parameters, {args.steps} steps of {args.rows} x {args.length}",
        flush=True,
    )
    losses, seen = [], 0
    for i, batch in enumerate(itertools.islice(batches(tokenizer, args.seed + 1, args.rows, args.length), args.steps), 1):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        seen += int((batch.segments > 0).sum())
        if i % 50 == 0 or i == args.steps:
            elapsed = time.time() - begun
            print(
                f"step {i}  loss {np.mean(losses[-50:]):.4f}  {seen / elapsed:,.0f} tokens/s  {elapsed:.0f} s",
                flush=True,
            )
        if i % 500 == 0 or i == args.steps:
            save(params, tokenizer, args.out)
            results = scores(params, tokenizer, SCORED_ITEMS)
            facts = {"seed": args.seed, "tokens": seen, "steps": i, "rows": args.rows, "length": args.length}
            minutes = {"wall": (time.time() - begun) / 60, "cpu": time.process_time() / 60}
            (args.out / "README.md").write_text(card(params, results, loss=np.mean(losses[-50:]), **facts, **minutes))
            print({name: round(share, 2) for name, (_, share) in results.items()}, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
