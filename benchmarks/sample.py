"""Sampling speed side by side with PyTorch + transformers + PEFT, on the same CPU in one run.

16 prompts of 64 tokens, 128 new tokens each at temperature 1 from the random Qwen3 of `_sides.write_model`, adapter unmerged,
prefill included. The two sides run in turns, each in a process of its own (torch's threads spin and would starve the other),
and the medians of all turns are compared. First calls, which compile, are reported apart.

    python benchmarks/sample.py [--turns 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path

import _sides

PROMPTS, PROMPT, NEW = 16, 64, 128


def run_torch(directory: str) -> dict[str, object]:
    import torch

    model = _sides.torch_side(directory)[0].eval()
    prompts = torch.tensor(_sides.sequences(2, [PROMPT] * PROMPTS))

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

    first, rates = _sides.measure(sample, PROMPTS * NEW, 3)
    return {"first_s": first, "rates": rates}


def run_ours(directory: str) -> dict[str, object]:
    import tinker_jax as tinker

    client = _sides.our_side(directory)
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [tinker.ModelInput.from_ints(row) for row in _sides.sequences(2, [PROMPT] * PROMPTS)]
    params = tinker.SamplingParams(max_tokens=NEW, temperature=1.0, stop=[])

    def sample() -> None:
        for future in [sampler.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]:
            future.result()

    first, rates = _sides.measure(sample, PROMPTS * NEW, 3)
    return {"first_s": first, "rates": rates}


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
        _sides.report_result(SIDES[args.side](args.model))
        return
    report = _sides.environment()
    turns: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        _sides.write_model(Path(directory, "model"))
        for turn in range(args.turns):
            for side in SIDES:
                # Compilation is measured too, so each turn starts with an empty persistent cache.
                env = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{directory}/cache{turn}"}
                turns[side] += _sides.child(__file__, ["--side", side, "--model", f"{directory}/model"], env)
    rate = {side: statistics.median(rate for turn in ran for rate in turn["rates"]) for side, ran in turns.items()}
    first = {side: statistics.median(turn["first_s"] for turn in ran) for side, ran in turns.items()}
    ratio = rate["tinker_jax"] / rate["torch"]
    row = ["sample", f"{rate['torch']:.0f}", f"{rate['tinker_jax']:.0f}", f"{ratio:.2f}"]
    row.append(f"{first['torch']:.1f} s / {first['tinker_jax']:.1f} s")
    print(_sides.table(["work", "torch + PEFT tokens/s", "tinker_jax tokens/s", "ratio", "first call torch / ours"], [row]))
    print(f"\n{_sides.describe(report)}")
    if args.json:
        report["sample"] = {"tokens_per_s": rate, "ratio": ratio, "first_call_s": first}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
