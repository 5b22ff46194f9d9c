"""Training speed and memory side by side with PyTorch + transformers + PEFT, doing the same work on the same CPU in one run.

LoRA on all linears of the layers, of rank 32 on the tiny random Qwen3 and 16 on the other models of `_models.py`; float32
unless the case says otherwise; a step is forward, backward and AdamW. PEFT has no adapter of experts in Tinker's
parametrisation: that is written in torch (`_torch_experts.py`). Only real tokens count, on both sides.

    uniform          tiny, 8 sequences of 512
    ragged           tiny, 32 sequences of log-normal lengths (median 300, sigma 0.9, clipped to 64–2048)
    vocab            tiny, 8 × 512 with a vocabulary of 151,936
    long             tiny, 1 sequence of 8,192
    real             SmolLM2-135M-Instruct, 8 × 256
    real ragged      SmolLM2-135M-Instruct, 32 sequences of log-normal lengths clipped to 64–1024
    qwen3-0.6b       Qwen3-0.6B's shape, 4 × 256
    qwen3-0.6b bf16  the same in bfloat16
    moe8, moe64      random Qwen3-MoE with 8 and 64 experts, 8 × 256
    overhead         ours alone: what the API adds to a call, on the embedded tiny model with one sequence of 16 tokens

Without `--cases` all run but those of Qwen3-0.6B's shape. Those on the real model are passed over where `make real-model` has
not built it.

PEFT's user splits a batch into micro-batches of 8 (`real ragged`: 4) in the order given, pads each to its longest sequence,
masks the padding and accumulates gradients. The sides run in turns, each in a process of its own (torch's threads spin and
would starve the other), and the medians of all turns are compared. Ours runs three times: with an empty compilation cache
(speed and cold first call), with that cache filled (warm first call), and for memory. Peak memory is what two steps add at
most to the resident set of a process that has loaded the model and run one short sequence; compilation is left out of it, the
cache has the programs.

The share of the machine's product rate is model FLOPs (`train_gpu.flops_per_token`: 4 · N_matmul a token and attention) over
time and the rate of a float32 product of 2,048 × 2,048 matrices, measured before the cases.

    python benchmarks/train.py [--cases uniform,ragged] [--turns 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _models
import _sides
import numpy as np
from train_gpu import flops_per_token

EMBEDDED_MODEL, SHORT = "tinker-jax/tiny-qwen3", 16


@dataclass(frozen=True)
class Case:
    """A batch: lengths of its sequences, what token ids are drawn from, timed steps; model and dtype; torch's micro-batch."""

    lengths: tuple[int, ...]
    vocab: int = _sides.VOCAB
    repeats: int = 5
    model: str = "tiny"
    dtype: str = "float32"
    micro_batch: int = 8


def ragged_lengths(count: int, longest: int = 2048) -> tuple[int, ...]:
    """Log-normal lengths, the same in every run."""
    lengths = np.random.default_rng(0).lognormal(np.log(300), 0.9, count)
    return tuple(int(n) for n in np.clip(np.round(lengths), 64, longest))


CASES = {
    "uniform": Case((512,) * 8),
    "ragged": Case(ragged_lengths(32), repeats=3),
    "vocab": Case((512,) * 8, vocab=151_936, repeats=3),
    "long": Case((8192,), repeats=3),
    "real": Case((256,) * 8, repeats=3, model="real"),
    "real ragged": Case(ragged_lengths(32, 1024), repeats=1, model="real", micro_batch=4),  # 8 take more than 24 GiB
    "qwen3-0.6b": Case((256,) * 4, repeats=2, model="qwen3-0.6b"),
    "qwen3-0.6b bf16": Case((256,) * 4, repeats=2, model="qwen3-0.6b", dtype="bfloat16"),
    "moe8": Case((256,) * 8, repeats=3, model="moe8"),
    "moe64": Case((256,) * 8, repeats=3, model="moe64"),
}


def quick(case: Case) -> Case:
    """The case at toy size, to see that it runs."""
    return replace(case, lengths=tuple(-(-n // 16) for n in case.lengths), vocab=min(case.vocab, 4096), repeats=1)


# ---- in the child ----

Step = Callable[[Sequence[Sequence[int]]], object]


def torch_step(directory: str, case: Case) -> Step:
    model, optimizer = _sides.torch_side(directory, _models.RANKS[case.model], case.dtype)

    def step(rows: Sequence[Sequence[int]]) -> None:
        for at in range(0, len(rows), case.micro_batch):
            _sides.torch_backward(model, rows[at : at + case.micro_batch])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(directory: str, case: Case) -> Step:
    client = _sides.our_side(directory, _models.RANKS[case.model], case.dtype)
    return lambda rows: _sides.our_step(client, _sides.datums(rows))


STEPS = {"torch": torch_step, "tinker_jax": our_step}


def speed(side: str, directory: str, case: Case) -> dict[str, object]:
    """Seconds of the first step and tokens/s of later ones; on our side also programs and packing."""
    rows, tokens = _sides.sequences(1, [n + 1 for n in case.lengths], case.vocab), sum(case.lengths)
    step = STEPS[side](directory, case)
    first, rates = _sides.measure(lambda: step(rows), tokens, case.repeats)
    result: dict[str, object] = {"first_s": first, "rates": rates}
    if side == "tinker_jax":
        with positions_computed() as positions:
            step(rows)
        result |= {"programs": our_trainer().programs, "packing": tokens / sum(positions)}
    return result


def first_call(side: str, directory: str, case: Case) -> dict[str, object]:
    """Seconds of the first step."""
    rows = _sides.sequences(1, [n + 1 for n in case.lengths], case.vocab)
    step = STEPS[side](directory, case)
    return {"first_s": _sides.seconds(lambda: step(rows))}


def memory(side: str, directory: str, case: Case) -> dict[str, object]:
    """Bytes that two steps add at most to the resident set of a process with a loaded model."""
    rows = _sides.sequences(1, [n + 1 for n in case.lengths], case.vocab)
    step = STEPS[side](directory, case)
    step([rows[0][: SHORT + 1]])
    before = _sides.resident_bytes()
    return {"peak_bytes": _sides.peak_bytes(lambda: (step(rows), step(rows))) - before}


def overhead(calls: int) -> dict[str, object]:
    """Median seconds of a step through the clients, and of the same step asked of the trainer itself, in turns."""
    import tinker_jax as tinker

    rank = _models.RANKS["tiny"]
    client = _sides.our_side(EMBEDDED_MODEL, rank)
    data = _sides.datums(_sides.sequences(1, [SHORT + 1], 256))
    trainer = our_trainer()
    adapter = trainer.new_adapter(tinker.LoraConfig(rank=rank, train_unembed=False), 0)
    ways = (lambda: _sides.our_step(client, data), lambda: _sides.trainer_step(trainer, adapter, data))
    times = [[_sides.seconds(way) for way in ways] for _ in range(calls + 10)]
    through, alone = (statistics.median(column) for column in zip(*times[10:], strict=True))
    return {"client_s": through, "trainer_s": alone, "overhead_s": through - alone}


def our_trainer() -> Any:
    from tinker_jax.engine.engine import loaded_engines

    return loaded_engines()[0]._trainer


@contextlib.contextmanager
def positions_computed() -> Iterator[list[int]]:
    """Collects the positions of every micro-batch that is packed meanwhile."""
    from tinker_jax.training import trainer

    real, sizes = trainer.pack, []

    def pack(*args: Any, **options: Any) -> list[Any]:
        batches = list(real(*args, **options))
        sizes.extend(batch.tokens.size for batch in batches)
        return batches

    trainer.pack = pack
    try:
        yield sizes
    finally:
        trainer.pack = real


PURPOSES = {"speed": speed, "first": first_call, "memory": memory}


# ---- in the parent ----


def run_case(
    name: str, case: Case, turns: int, options: list[str], directory: Path, model: Path, machine: dict[str, float]
) -> dict[str, Any]:
    """All turns of a case, and its row of the report."""
    ran: dict[tuple[str, str], list[dict]] = {}

    def run(side: str, purpose: str, turn: int) -> None:
        cache = str(directory / f"cache-{name}-{turn}")
        arguments = ["--case", name, "--side", side, "--purpose", purpose, "--model", str(model), *options]
        env = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "TINKER_JAX_HOME": str(directory / "home")}
        ran.setdefault((side, purpose), []).extend(_sides.child(__file__, arguments, env))
        print(f"{name}: turn {turn + 1}, {side} {purpose} done", file=sys.stderr)

    for turn in range(turns):
        run("torch", "speed", turn)
        run("tinker_jax", "speed", turn)
        run("tinker_jax", "first", turn)
    run("torch", "memory", 0)
    run("tinker_jax", "memory", 0)

    def median(side: str, purpose: str, key: str) -> float:
        return statistics.median(result[key] for result in ran[side, purpose])

    rate = {side: statistics.median(r for result in ran[side, "speed"] for r in result["rates"]) for side in STEPS}
    flops = flops_per_token(_models.shape_of(model), case.lengths)
    return {
        "model": case.model,
        "dtype": case.dtype,
        "tokens": sum(case.lengths),
        "tokens_per_s": rate,
        "ratio": rate["tinker_jax"] / rate["torch"],
        "share_of_product_rate": {side: flops * rate[side] / machine["flops_per_s"] for side in STEPS},
        "peak_bytes": {side: median(side, "memory", "peak_bytes") for side in STEPS},
        "first_call_s": {
            "torch": median("torch", "speed", "first_s"),
            "tinker_jax cold": median("tinker_jax", "speed", "first_s"),
            "tinker_jax warm": median("tinker_jax", "first", "first_s"),
        },
        "programs": int(median("tinker_jax", "speed", "programs")),
        "packing": median("tinker_jax", "speed", "packing"),
        "all_rates": {side: [result["rates"] for result in ran[side, "speed"]] for side in STEPS},
    }


HEADER = [
    "case",
    "torch + PEFT tokens/s",
    "tinker_jax tokens/s",
    "ratio",
    "share of product rate torch / ours",
    "peak memory torch / ours",
    "first call torch / ours cold / warm",
    "programs",
    "real tokens / positions",
]


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A case's line of the table."""
    rate, peak = result["tokens_per_s"], result["peak_bytes"]
    return [
        name,
        f"{rate['torch']:,.0f}",
        f"{rate['tinker_jax']:,.0f}",
        f"{result['ratio']:.2f}",
        " / ".join(f"{100 * share:.0f}" for share in result["share_of_product_rate"].values()) + " %",
        f"{peak['torch'] / 2**30:.2f} / {peak['tinker_jax'] / 2**30:.2f} GiB",
        " / ".join(f"{seconds:.1f}" for seconds in result["first_call_s"].values()) + " s",
        str(result["programs"]),
        f"{result['packing']:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*CASES, "overhead")
    usual = [name for name in names if not name.startswith("qwen3")]
    parser.add_argument("--cases", default=",".join(usual), help=f"of {', '.join(names)}; default: {', '.join(usual)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that the script runs, measures nothing")
    parser.add_argument("--json", type=Path)
    for hidden in ("--case", "--side", "--purpose", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = {name: quick(case) for name, case in CASES.items()} if args.quick else CASES
    if args.case:
        logging.disable(logging.WARNING)
        if args.case == "overhead":
            return _sides.report_result(overhead(10 if args.quick else 300))
        return _sides.report_result(PURPOSES[args.purpose](args.side, args.model, cases[args.case]))

    chosen = args.cases.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"unknown case {unknown[0]!r}; known are {', '.join(names)}")
    report = _sides.environment()
    options = ["--quick"] if args.quick else []
    results: dict[str, Any] = {}
    skipped, machine = [], _models.machine()
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen:
            if name == "overhead":
                [results[name]] = _sides.child(__file__, ["--case", name, *options], {"JAX_PLATFORMS": "cpu"})
                continue
            model = _models.locate(Path(directory), cases[name].model, cases[name].vocab, quick=args.quick)
            if model is None:
                skipped.append(name)
                continue
            results[name] = run_case(name, cases[name], args.turns, options, Path(directory), model, machine)
    if args.json:
        args.json.write_text(json.dumps({**report, "machine": machine, "turns": args.turns, "cases": results}, indent=1) + "\n")
    print(_sides.describe(report), _models.describe(machine), sep="\n", end="\n\n")
    if compared := [row(name, result) for name, result in results.items() if name != "overhead"]:
        print(_sides.table(HEADER, compared))
    for name in skipped:
        print(f"{name}: skipped, {_models.ABSENT}")
    if "overhead" in results:
        way = {key: f"{1e3 * seconds:.2f} ms" for key, seconds in results["overhead"].items()}
        print(f"\na step on the tiny model: {way['client_s']} through the client, {way['trainer_s']} without it")
        print(f"API overhead: {way['overhead_s']} a step")


if __name__ == "__main__":
    main()
