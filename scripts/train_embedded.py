"""Trains an embedded model: tokenizer, weights, held-out scores, model card.

    python scripts/train_embedded.py tiny-qwen3                         # 45 minutes
    python scripts/train_embedded.py tiny-moe --rows 8 --steps 600      # 10 minutes
    python scripts/train_embedded.py tiny-moe --steps 200 --out out/trial

Writes tinker_jax/embedded/<model>; times are those of two busy CPU cores. `tiny-qwen3` starts from random weights.
`tiny-moe` starts from `tiny-qwen3`, whose feed-forward layers become experts of an eighth of their width: it has to learn the
routing, and needs less training (Komatsuzaki et al., Sparse Upcycling, arXiv:2212.05055, copy whole layers instead).

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import embedded_corpus as corpus
import embedded_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Decoder, unembedding
from tinker_jax.models.experts import Experts
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import weights
from tinker_jax.programs import end_compilers
from tinker_jax.sampling.sampler import Sampler
from tinker_jax.sharding import make_mesh
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.sampling import SampleRequest, SamplingParams

OUT = Path(__file__).parents[1] / "tinker_jax" / "embedded"
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
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
MOE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
}
FIRST = "tiny-qwen3"
CONFIGS: dict[str, dict[str, Any]] = {
    FIRST: COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "tiny-moe": COMMON | MOE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
}
MUON_RATE, ADAM_RATE, MOMENTUM = 0.02, 3e-3, 0.95
BALANCE = MOE["router_aux_loss_coef"]
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


def tokenizer_for_corpus(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    sample = itertools.islice(corpus.texts(seed), 20_000)
    lines = (m["content"] for text in sample if not isinstance(text, str) for m in text)
    return embedded_tokenizer.build(
        itertools.chain(lines, ["user", "assistant", "system"] * 100_000),
        vocab_size=vocab_size,
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


def random_params(cfg: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Matrices normal with std 1/√fan_in, those that write to the residual stream zero, norms one."""
    params = {}
    for i, w in enumerate(weights(cfg)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        if w.name.endswith("scale"):
            params[w.name] = jnp.ones(w.full_shape)
        elif w.module in ("o_proj", "down_proj"):
            params[w.name] = jnp.zeros(w.full_shape)
        else:
            std = 0.02 if w.module == "embed" else w.shape[-1] ** -0.5
            params[w.name] = std * jax.random.normal(key, w.full_shape)
    return params


def init_params(name: str, seed: int) -> dict[str, jax.Array]:
    """Random weights; those of the first model where it has them, its feed-forward width cut into experts."""
    params = random_params(parse(CONFIGS[name]), seed)
    if name == FIRST:
        return params
    params |= load_base(OUT / FIRST, weights(parse(CONFIGS[FIRST])), jnp.float32, progress=False)
    E, k = CONFIGS[name]["num_experts"], CONFIGS[name]["num_experts_per_tok"]
    for matrix in ("gate", "up", "down"):
        whole = params.pop(f"layers.{matrix}_proj.kernel")
        parts = jnp.stack(jnp.split(whole, E, axis=2 if matrix == "down" else 1), axis=1)
        # The weights of a token's experts sum to one: times k, an expert adds what its part of the layer did.
        params[f"layers.{matrix}_experts.kernel"] = parts * (k if matrix == "down" else 1)
    return params


@dataclass(frozen=True)
class TrainableExperts(Experts):
    """The same function with gradients of the experts' matrices, and with the router's load-balancing loss.

    Every expert computes every token, which costs a small model less than sorting tokens by expert.
    """

    def __call__(self, params, x_MD, tokens, lora):
        """Its part of the layer, [M, D], and `"balance"` = E · Σ_e f_e P_e, which is 1 where experts are loaded evenly.

        f_e is the share of choices that went to expert e, P_e the mean of its probability (Fedus et al., arXiv:2101.03961,
        equation 4).
        """
        logits_ME = x_MD @ params["router.kernel"].T
        weights_MK, ids_MK = self.router(params, logits_ME)
        chosen_MKE = jax.nn.one_hot(ids_MK, self.E)
        weight_ME = jnp.einsum("MK,MKE->ME", weights_MK, chosen_MKE)
        gate, up = (jnp.einsum("MD,EFD->MEF", x_MD, params[f"{name}_experts.kernel"]) for name in ("gate", "up"))
        h_MEF = self.act(gate, up) * weight_ME[:, :, None]
        mean_M = tokens.real_M / tokens.real_M.sum()
        share_E = jnp.einsum("M,MKE->E", mean_M, chosen_MKE) / self.router.k
        probability_E = mean_M @ jax.nn.softmax(logits_ME)
        out_MD = jnp.einsum("MEF,EDF->MD", h_MEF, params["down_experts.kernel"])
        return out_MD, {"balance": self.E * share_E @ probability_E}


def trainable(cfg: ModelConfig) -> Any:
    """What `Decoder.forward` reads of the configuration, with `TrainableExperts` for experts."""

    def mlp(own: Any) -> Any:
        return TrainableExperts(**{f.name: getattr(own, f.name) for f in fields(own)}) if isinstance(own, Experts) else own

    groups = tuple(
        tuple(replace(stack, block=replace(stack.block, mlp=mlp(stack.block.mlp))) for stack in group) for group in cfg.groups
    )
    return SimpleNamespace(groups=groups, norm_eps=cfg.norm_eps, tied=cfg.tied)


def loss_fn(params: dict[str, jax.Array], batch: Batch, cfg: Any) -> tuple[jax.Array, jax.Array]:
    """What is minimised, and the weighted mean cross entropy in it."""
    hidden, reports = Decoder(cfg, params).forward(batch.tokens, batch.positions, batch.segments)
    logits = hidden @ unembedding(cfg, params).T
    picked = jnp.take_along_axis(logits, batch.targets.reshape(-1, 1), axis=-1)[:, 0]
    weight = batch.weights.reshape(-1)
    entropy = jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - picked)) / jnp.sum(weight)
    return entropy + BALANCE * sum(report["balance"] for report in reports if report), entropy


def orthogonalised(g: jax.Array) -> jax.Array:
    """The nearest (semi-)orthogonal matrix of each [.., O, I], by five quintic Newton–Schulz steps."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def muon() -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, scaled so that wide and tall matrices move alike."""

    def step(update: jax.Array) -> jax.Array:
        fan_out, fan_in = update.shape[-2:]
        return orthogonalised(update) * max(1.0, fan_out / fan_in) ** 0.5

    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(step, updates)),
    )


def optimizer(cfg: ModelConfig, steps: int) -> optax.GradientTransformation:
    def rate(peak: float) -> optax.Schedule:
        def at(count: jax.Array) -> jax.Array:
            return peak * jnp.minimum(1.0, jnp.minimum((count + 1) / WARMUP, (steps - count) / (DECAY * steps)))

        return at

    label = {w.name: "muon" if w.stacked and len(w.shape) > 1 else "adam" for w in weights(cfg)}
    return optax.partition(
        {
            "muon": optax.chain(muon(), optax.scale_by_learning_rate(rate(MUON_RATE))),
            "adam": optax.adam(rate(ADAM_RATE), b1=0.9, b2=0.95),
        },
        label,
    )


# --- evaluation ----------------------------------------------------------------------------------------------------


def answers(
    cfg: ModelConfig, params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]
) -> list[str]:
    """Greedy answers of the chat model."""
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampler = Sampler(
        cfg,
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


def scores(
    cfg: ModelConfig, params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, items: int
) -> dict[str, tuple[int, float]]:
    """Exact match of greedy answers on held-out items: task → (number of items, share right)."""
    sets = {n: corpus.held_out_set(n, items, seed=0) for n in corpus.TASKS if n not in corpus.UNSCORED}
    said = iter(answers(cfg, params, tokenizer, [e.question for s in sets.values() for e in s]))
    return {n: (len(s), float(np.mean([next(said) == e.answer for e in s]))) for n, s in sets.items()}


# --- files ---------------------------------------------------------------------------------------------------------


def save(config: Mapping[str, Any], params: dict[str, jax.Array], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face directory in bfloat16, without the card."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for w in weights(parse(config)):
        value = np.asarray(params[w.name].astype(jnp.bfloat16))
        for layer, own in enumerate(value if w.stacked else [value]):
            for expert, matrix in enumerate(own if w.experts else [own]):
                tensors[w.hf.format(layer=layer, expert=expert)] = np.ascontiguousarray(matrix)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it travels in the package; safetensors writes 0600
    embedded_tokenizer.save(tokenizer, folder)
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    for name, content in (
        ("config.json", dict(sorted(config.items())) | ids),
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

# tinker-jax/{name}

A {family} of {parameters:,} parameters ({megabytes:.1f} MB in bfloat16) that ships with `tinker_jax`, so that a training
loop can be run, debugged and tested without a network, an accelerator or a wait. It knows a few dozen small tasks and
nothing of the world.

## Training

Trained from {start} by `scripts/train_embedded.py`
on text that `scripts/embedded_corpus.py` generates: arithmetic,
counting, copying, spelling and other operations on the letters of a word, simple English from a grammar, short chats in
Qwen's chat format. Pig Latin is not in the corpus.

| | |
|---|---|
| seed | {seed} |
| tokens seen | {tokens:,} in {steps:,} steps of {rows} rows of {length} |
| final training loss | {loss:.3f} nats a token (tokens outside the assistant's turns weigh {ask}) |{experts}
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


def card(name: str, params: dict[str, jax.Array], results: dict[str, tuple[int, float]], **facts: float) -> str:
    """The model card."""
    count, config, start, experts = sum(p.size for p in params.values()), CONFIGS[name], "nothing", ""
    if E := config.get("num_experts"):
        k, start = config["num_experts_per_tok"], f"`{FIRST}`, its feed-forward layers cut into experts,"
        idle = sum(p.size for weight, p in params.items() if "_experts." in weight) * (E - k) // E
        experts = f"\n| experts | {E} a layer, {k} of them for each token, which {count - idle:,} of the parameters compute |"
        experts += f"\n| load balancing | {BALANCE} times Switch Transformers' auxiliary loss in each layer |"
    rows = []
    for task, (items, share) in results.items():
        example = corpus.held_out_set(task, 1, seed=1)[0]
        rows.append(f"| {task.replace('_', ' ')} | {items} | {share:.0%} | {example.question} → {example.answer} |")
    return CARD.format(
        name=name,
        family="Qwen3-MoE" if experts else "Qwen3",
        parameters=count,
        start=start,
        megabytes=2 * count / 1e6,
        experts=experts,
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
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16, help="rows in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: the package's directory of the model")
    args = parser.parse_args()

    begun = time.time()
    config, out = CONFIGS[args.model], args.out or OUT / args.model
    cfg = parse(config)
    tokenizer = tokenizer_for_corpus(args.seed, cfg.V)
    params = init_params(args.model, args.seed)
    opt = optimizer(cfg, args.steps)
    state = opt.init(params)
    gradient = jax.grad(functools.partial(loss_fn, cfg=trainable(cfg)), has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        grads, loss = gradient(params, batch)
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
        if i % 1000 == 0 or i == args.steps:
            save(config, params, tokenizer, out)
            results = scores(cfg, params, tokenizer, SCORED_ITEMS)
            facts = {"seed": args.seed, "tokens": seen, "steps": i, "rows": args.rows, "length": args.length}
            minutes = {"wall": (time.time() - begun) / 60, "cpu": time.process_time() / 60}
            text = card(args.model, params, results, loss=np.mean(losses[-50:]), **facts, **minutes)
            (out / "README.md").write_text(text)
            print({name: round(share, 2) for name, (_, share) in results.items()}, flush=True)
    end_compilers(time.monotonic() + 120)  # the process would crash if it ended while one of them compiles


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
