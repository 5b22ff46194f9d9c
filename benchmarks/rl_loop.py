"""A short loop of reinforcement learning whose batches differ from step to step: wall time, and how much of it is compilation.

Ten steps like those of `examples/rl_arithmetic.py`, which takes 24 prompts, 8 samples of each and 8 new tokens: here every step
has another number of prompts and samples, other lengths of prompts and another limit of tokens. `--small` takes a sixth of the
work. A cold process finds no compiled program, a warm one after it finds those of the first. It waits for the compiler while a
thread that wants to run a program waits until that is compiled or read from the cache; what is compiled meanwhile on other
threads shares the cores, but makes nobody wait. Samples are seeded, so that both processes meet the same shapes.

    python benchmarks/rl_loop.py [--model DIRECTORY] [--steps 10] [--small] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _models
import _sides

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import rl_arithmetic

import tinker_jax as tinker
from tinker_jax.programs import Program

#: Prompts, samples of each, sums worked out before the question, most new tokens.
STEPS = [(24, 8, 0, 8), (16, 4, 1, 16), (32, 4, 0, 12), (12, 8, 2, 8), (20, 6, 1, 10)]
STEPS += [(28, 5, 0, 16), (8, 12, 3, 8), (24, 4, 1, 12), (16, 8, 0, 16), (10, 10, 2, 8)]
SMALL = [(4, 4, 0, 16), (8, 2, 1, 24), (2, 8, 4, 12), (6, 4, 2, 20), (3, 3, 6, 32)]
SMALL += [(5, 6, 0, 24), (8, 4, 3, 16), (1, 12, 8, 20), (7, 3, 1, 28), (4, 6, 5, 16)]


Spans = list[tuple[float, float]]


def record_waits() -> Spans:
    """From now on, when threads began and ceased to wait for a program that they want to run."""
    spans, real = [], Program._compile_here

    def compile_here(program: Program, *args: Any) -> None:
        start = time.perf_counter()
        try:
            real(program, *args)
        finally:
            spans.append((start, time.perf_counter()))

    Program._compile_here = compile_here
    return spans


def covered(spans: Spans) -> float:
    """Seconds that lie in at least one of the spans."""
    total = end = 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def rollouts(client: Any, tokenizer: Any, step: int, count: int, samples: int, worked: int, new: int) -> list[dict[str, Any]]:
    """`rl_arithmetic.rollouts` with `worked` sums before each question."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=new, temperature=1.0, stop=[tokenizer.eos_token_id], seed=step)
    before = tokenizer.encode("".join(f"{a} + {b} = {a + b}\n" for a, b in rl_arithmetic.TRAIN[:worked]))
    sums = rl_arithmetic.TRAIN[100 + 10 * step :][:count]
    groups = [{"sum": pair, "prompt": before + rl_arithmetic.prompt(tokenizer, *pair)} for pair in sums]
    futures = [sampler.sample(tinker.ModelInput.from_ints(group["prompt"]), samples, params) for group in groups]
    for group, future in zip(groups, futures, strict=True):
        group["answers"] = future.result().sequences
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in group["answers"]]
        group["rewards"] = [rl_arithmetic.reward(text, *group["sum"]) for text in texts]
    return groups


def loop(model: str, steps: Sequence[tuple[int, int, int, int]]) -> dict[str, Any]:
    """Seconds of each step after loading, and of those that it waited for programs."""
    spans = record_waits()
    client = tinker.ServiceClient().create_lora_training_client(base_model=model, rank=_models.RANKS["real"]).result()
    tokenizer, times, waits = client.get_tokenizer(), [], []
    for n, sizes in enumerate(steps):
        start, before = time.perf_counter(), len(spans)
        groups = rollouts(client, tokenizer, n, *sizes)
        data = [datum for group in groups for datum in rl_arithmetic.policy_gradient(group)]
        step = client.forward_backward(data, "importance_sampling")
        update = client.optim_step(tinker.AdamParams(learning_rate=1e-4))
        step.result(), update.result()
        times.append(time.perf_counter() - start)
        waits.append(covered(spans[before:]))
    return {"step_s": times, "wait_s": waits, "waits": len(spans)}


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    wall, waited, slowest = sum(result["step_s"]), sum(result["wait_s"]), max(result["step_s"])
    times = [f"{seconds:.1f} s" for seconds in (wall, waited, slowest)]
    return [name, *times, f"{100 * waited / wall:.0f} %", str(result["waits"])]


HEADER = ["process", "wall time", "of it waiting for the compiler", "slowest step", "share of waiting", "waits"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local directory; default: what `make real-model` builds")
    parser.add_argument("--steps", type=int, default=len(STEPS))
    parser.add_argument("--small", action="store_true", help="a sixth of the work")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return _sides.report_result(loop(args.model, (SMALL if args.small else STEPS)[: args.steps]))
    if args.model is None and not _models.real_model.built():
        return print(f"rl_loop: skipped, {_models.ABSENT}")
    model = args.model or str(_models.real_model.directory())
    report, results, options = _sides.environment(), {}, ["--child", *["--small"] * args.small]
    with tempfile.TemporaryDirectory() as directory:
        env = {"JAX_PLATFORMS": "cpu", "TINKER_JAX_HOME": directory, "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled"}
        for name in ("cold", "warm"):
            [results[name]] = _sides.child(__file__, [*options, "--model", model, "--steps", str(args.steps)], env)
    if args.json:
        args.json.write_text(json.dumps({**report, "model": model, "processes": results}, indent=1) + "\n")
    print(_sides.describe(report), end="\n\n")
    print(_sides.table(HEADER, [row(name, result) for name, result in results.items()]))


if __name__ == "__main__":
    main()
