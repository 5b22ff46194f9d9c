"""Training and sampling speed side by side with PyTorch + transformers + PEFT, on the same CPU in one run.

A random Qwen3 (hidden 256, 4 layers, 8 heads, 4 key/value heads of width 32, feed-forward 768, vocabulary 2048, float32) with
LoRA rank 32 on the seven projections:

    train   forward, backward and AdamW step on 8 × 512 tokens → tokens/s
    sample  16 prompts of 64 tokens, 128 new tokens each at temperature 1, adapter unmerged, prefill included → new tokens/s

The two sides run in turns, each in a process of its own (torch's threads spin and would starve the other), and the medians of
all turns are compared. First calls, which compile, are reported apart.

    python benchmarks/baseline.py [--turns 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROWS, LENGTH, RANK = 8, 512, 32
PROMPTS, PROMPT, NEW = 16, 64, 128
VOCAB = 2048
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(directory: Path) -> None:
    """The random model both sides load."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(directory)


def measure(run: Callable[[], object], units: int, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first call, and units per second of `repeats` later ones."""
    rates = []
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    run()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        rates.append(units / (time.perf_counter() - start))
    return first, rates


def batch(seed: int, rows: int, length: int) -> list[list[int]]:
    """Token ids, the same on both sides."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).tolist()


def run_torch(directory: str) -> dict[str, object]:
    import peft
    import torch
    import torch.nn.functional as F
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=PROJECTIONS)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    ids = torch.tensor(batch(1, ROWS, LENGTH + 1))

    def train() -> None:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    first_train, train_rates = measure(train, ROWS * LENGTH, 5)
    model.eval()
    prompts = torch.tensor(batch(2, PROMPTS, PROMPT))

    def sample() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )

    first_sample, sample_rates = measure(sample, PROMPTS * NEW, 3)
    return {"train": train_rates, "sample": sample_rates, "first_train_s": first_train, "first_sample_s": first_sample}


def run_ours(directory: str) -> dict[str, object]:
    import tinker_jax as tinker

    service = tinker.ServiceClient()
    client = service.create_lora_training_client(base_model=directory, rank=RANK, seed=0, train_unembed=False).result()
    data = [
        tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1]), loss_fn_inputs={"target_tokens": row[1:]})
        for row in batch(1, ROWS, LENGTH + 1)
    ]

    def train() -> None:
        step = client.forward_backward(data, "cross_entropy")
        update = client.optim_step(tinker.AdamParams(learning_rate=1e-4))
        step.result(), update.result()

    first_train, train_rates = measure(train, ROWS * LENGTH, 5)
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [tinker.ModelInput.from_ints(row) for row in batch(2, PROMPTS, PROMPT)]
    params = tinker.SamplingParams(max_tokens=NEW, temperature=1.0, stop=[])

    def sample() -> None:
        for future in [sampler.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]:
            future.result()

    first_sample, sample_rates = measure(sample, PROMPTS * NEW, 3)
    return {"train": train_rates, "sample": sample_rates, "first_train_s": first_train, "first_sample_s": first_sample}


SIDES = {"torch": run_torch, "tinker_jax": run_ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        logging.disable(logging.WARNING)
        print(json.dumps(SIDES[args.side](args.model)))
        return
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        for turn in range(args.turns):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--model", directory]
                # Compilation is measured too, so each turn starts with an empty persistent cache.
                env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{directory}/cache{turn}", "HF_HUB_OFFLINE": "1"}
                out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
                results[side].append(json.loads(out.strip().splitlines()[-1]))
                print(f"turn {turn + 1}: {side} done", file=sys.stderr)
    report: dict[str, object] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": load}
    medians = {
        work: {side: statistics.median(rate for turn in turns for rate in turn[work]) for side, turns in results.items()}
        for work in ("train", "sample")
    }
    print("| work | torch + PEFT tokens/s | tinker_jax tokens/s | ratio | first call torch / ours |")
    print("|---|---|---|---|---|")
    for work, by_side in medians.items():
        first = {side: statistics.median(turn[f"first_{work}_s"] for turn in turns) for side, turns in results.items()}
        ratio = by_side["tinker_jax"] / by_side["torch"]
        times = f"{first['torch']:.1f} s / {first['tinker_jax']:.1f} s"
        print(f"| {work} | {by_side['torch']:.0f} | {by_side['tinker_jax']:.0f} | {ratio:.2f} | {times} |")
        report[work] = {**by_side, "ratio": ratio, "first_call_s": first}
    print(f"\nload average before the run: {load:.2f} (a busy machine slows torch most; repeat on a quiet one)")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
