"""Sampling speed and memory side by side with transformers' `generate` and PEFT, on the same CPU in one run.

Unmerged LoRA adapters on all linears of the layers, those of experts as in `train.py`, of rank 32 on the tiny random Qwen3 and
16 on the other models of `_models.py`; float32 unless the case says otherwise; temperature 1, no stops, prefill included:

    uniform          tiny, 16 prompts of 64 tokens, 128 new tokens each
    mixed            tiny, 64 requests, prompts of 16–512 and outputs of 16–256 tokens, all different
    group            tiny, 8 prompts of 256 tokens, 16 samples of 128 tokens each
    adapters         tiny, 64 requests of `uniform`'s shape, which 4 adapters take in turns
    real 1           SmolLM2-135M-Instruct, 1 prompt of 64 tokens, 32 new ones
    real 8, real 16  SmolLM2-135M-Instruct, 8 and 16 prompts of 64 tokens, 64 new ones each
    real mixed       SmolLM2-135M-Instruct, the requests of `mixed`
    real group       SmolLM2-135M-Instruct, the requests of `group`
    qwen3-0.6b       Qwen3-0.6B's shape, 4 prompts of 64 tokens, 32 new ones each
    qwen3-0.6b bf16  the same in bfloat16
    moe8, moe64      random Qwen3-MoE with 8 and 64 experts, 16 prompts of 64 tokens, 128 new ones each

Without `--cases` all run but those of Qwen3-0.6B's shape. Those on the real model are passed over where `make real-model` has
not built it.

Tokens/s counts the new tokens asked for. Every run has prompts of its own, so that none is in a prefix cache. Ours gets all
requests of a case at once. `generate` gets batches, padded on the left, and computes every row until the longest output of the
batch is there, whatever its stopping criteria say of the others. It does so in the fastest of a case's ways, found in a process
of its own: prompts of a batch, and order of the requests (to sort by output length is a favour, no server knows it beforehand).
A batch of several adapters goes through PEFT's `adapter_names`, one of a single adapter through `set_adapter`.

A single row's decode step is (time of the case − time of its prompt with one new token) / (new tokens − 1). Its share of the
memory's rate is the bytes of the base weights over that time and over the rate of reading 1 GiB, measured before the cases.

*First token cold* is a one-token request of the case's first prompt in a process that has just loaded the model and finds no
compiled program. *Other rows*: half of the case's requests (two where it has one), for the first time after the case's own
runs, and again; the difference is what a number of rows costs that has not occurred before.

The latency of a first token is that of a one-token request beside the case's load, as the API does not stream. 20 of them, with
prompts of the case's lengths, are spread evenly over the time that the load takes alone. `group` also draws single samples of
the prompts that a group had just before, which a prefix cache then holds: as many rows without the prefill.

The sides run in turns, each in a process of its own (torch's threads spin and would starve the other), and the medians of all
turns are compared. Each turn starts with an empty compilation cache. Peak memory is what the second run of a case adds at most
to the resident set of a process that has loaded the model; programs come from the cache.

    python benchmarks/sample.py [--cases uniform,mixed] [--turns 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _models
import _sides
import numpy as np

PROBES = 20


class Way(NamedTuple):
    """How `generate` takes requests: so many at a time, in an order of `ORDERS`."""

    batch: int
    order: str = "as given"

    def __str__(self) -> str:
        return f"{self.batch} {self.order}"


@dataclass(frozen=True)
class Case:
    """Requests: lengths of prompts and outputs, samples of each, adapters that take turns; timed runs a process; the model."""

    prompts: tuple[int, ...]
    new: tuple[int, ...]
    ways: tuple[Way, ...]
    samples: int = 1
    adapters: int = 1
    repeats: int = 3
    model: str = "tiny"
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return self.samples * sum(self.new)

    @property
    def rows(self) -> int:
        """Sequences of all requests."""
        return self.samples * len(self.new)


ORDERS: dict[str, Callable[[Case, int], int]] = {
    "as given": lambda case, i: i,
    "by prompt": lambda case, i: case.prompts[i],
    "by output": lambda case, i: case.new[i],
    "by adapter": lambda case, i: i % case.adapters,
}


def spread(seed: int, count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """`count` different lengths, evenly spread, in random order."""
    lengths = np.linspace(shortest, longest, count).round().astype(int)
    return tuple(np.random.default_rng(seed).permutation(lengths).tolist())


CASES = {
    "uniform": Case((64,) * 16, (128,) * 16, (Way(16),)),
    "mixed": Case(
        spread(0, 64, 16, 512),
        spread(1, 64, 16, 256),
        (Way(64), *itertools.starmap(Way, itertools.product((16, 32), ("as given", "by prompt", "by output")))),
    ),
    "group": Case((256,) * 8, (128,) * 8, (Way(8), Way(4), Way(2), Way(1)), samples=16),
    "adapters": Case((64,) * 64, (128,) * 64, (Way(64), Way(16, "by adapter")), adapters=4),
}
CASES |= {
    "real 1": Case((64,), (32,), (Way(1),), model="real"),
    "real 8": Case((64,) * 8, (64,) * 8, (Way(8),), model="real"),
    "real 16": Case((64,) * 16, (64,) * 16, (Way(16),), model="real"),
    "real mixed": replace(CASES["mixed"], ways=(Way(16), Way(16, "by output")), repeats=1, model="real"),
    "real group": replace(CASES["group"], ways=(Way(4),), repeats=1, model="real"),
    "qwen3-0.6b": Case((64,) * 4, (32,) * 4, (Way(4),), model="qwen3-0.6b"),
    "qwen3-0.6b bf16": Case((64,) * 4, (32,) * 4, (Way(4),), model="qwen3-0.6b", dtype="bfloat16"),
    "moe8": replace(CASES["uniform"], model="moe8"),
    "moe64": replace(CASES["uniform"], model="moe64"),
}


def quick(case: Case) -> Case:
    """The case at toy size, to see that it runs."""
    shorter = lambda lengths: tuple(-(-n // 32) for n in lengths)  # noqa: E731
    return replace(
        case,
        prompts=shorter(case.prompts),
        new=tuple(1 + n for n in shorter(case.new)),
        samples=min(case.samples, 2),
        ways=case.ways[:2],
        repeats=1,
    )


def prompts(case: Case, run: int) -> list[list[int]]:
    """The case's prompts, other ones in every run."""
    return _sides.sequences(run, case.prompts)


# ---- in the child ----

Sample = Callable[..., object]  # of prompts, and of lengths of their outputs if not the case's


def torch_sampler(directory: str, case: Case, way: Way) -> Sample:
    """What draws the case's samples of given prompts."""
    model = _sides.torch_side(directory, _models.RANKS[case.model], case.dtype)[0]
    names = [*model.peft_config, *(f"adapter{n}" for n in range(1, case.adapters))]
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    model.eval()
    order = sorted(range(len(case.prompts)), key=partial(ORDERS[way.order], case))
    batches = [order[at : at + way.batch] for at in range(0, len(order), way.batch)]

    def sample(rows: Sequence[Sequence[int]], lengths: Sequence[int] = case.new) -> None:
        for batch in batches:
            adapters, options = [names[i % case.adapters] for i in batch], {}
            if len(set(adapters)) == 1:
                model.set_adapter(adapters[0])
            else:
                options["adapter_names"] = adapters
            new = max(lengths[i] for i in batch)
            _sides.torch_generate(model, [rows[i] for i in batch], new, samples=case.samples, **options)

    return sample


def our_clients(directory: str, case: Case) -> list[Any]:
    """A sampling client of each adapter."""
    rank = _models.RANKS[case.model]
    trained = [_sides.our_side(directory, rank, case.dtype, seed) for seed in range(case.adapters)]
    return [client.save_weights_and_get_sampling_client().result() for client in trained]


def ask(client: Any, row: Sequence[int], new: int, samples: int = 1) -> Any:
    """The future of one request."""
    import tinker_jax as tinker

    params = tinker.SamplingParams(max_tokens=new, temperature=1.0, stop=[])
    return client.sample(tinker.ModelInput.from_ints(list(row)), num_samples=samples, sampling_params=params)


def ask_all(clients: Sequence[Any], case: Case, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Any]:
    """The futures of a case's requests."""
    turns = zip(itertools.cycle(clients), rows, lengths, strict=False)
    return [ask(client, row, new, case.samples) for client, row, new in turns]


def our_sampler(clients: Sequence[Any], case: Case) -> Sample:
    """What draws the case's samples of given prompts."""

    def sample(rows: Sequence[Sequence[int]], lengths: Sequence[int] = case.new) -> None:
        responses = [future.result() for future in ask_all(clients, case, rows, lengths)]
        drawn = sum(len(sequence.tokens) for response in responses for sequence in response.sequences)
        assert drawn == case.samples * sum(lengths)

    return sample


def measured(sample: Sample, case: Case, runs: itertools.count) -> dict[str, Any]:
    """Seconds of the first run, tokens/s of later ones after one more that is not timed, and a single row's decode step."""

    def run(lengths: Sequence[int] = case.new) -> float:
        rows = prompts(case, next(runs))
        return _sides.seconds(lambda: sample(rows, lengths))

    first, _, *times = (run() for _ in range(case.repeats + 2))
    result: dict[str, Any] = {"first_s": first, "rates": [case.tokens / seconds for seconds in times]}
    if case.rows == 1:
        _, *prefills = (run((1,)) for _ in range(case.repeats + 1))
        result["step_s"] = (statistics.median(times) - statistics.median(prefills)) / (case.tokens - 1)
    return result


def torch_speed(directory: str, case: Case, way: Way) -> dict[str, Any]:
    """`measured`."""
    return measured(torch_sampler(directory, case, way), case, itertools.count())


def torch_ways(directory: str, case: Case, way: Way) -> dict[str, Any]:
    """Tokens/s of every way, in the second of two runs; cases whose runs take minutes (`repeats` of 1) have one."""
    rates = {}
    for way in case.ways:
        sample = torch_sampler(directory, case, way)
        if case.repeats > 1:
            sample(prompts(case, 0))
        rates[str(way)] = case.tokens / _sides.seconds(partial(sample, prompts(case, 1)))
    return rates


def our_speed(directory: str, case: Case, way: Way) -> dict[str, Any]:
    """`measured`, number of programs, other rows, latencies beside the load; of groups also the times of cached prompts."""
    from tinker_jax.engine.engine import loaded_engines

    clients, runs = our_clients(directory, case), itertools.count()
    sample = our_sampler(clients, case)
    result = measured(sample, case, runs)
    result["programs"] = sum(engine._sampler.programs for engine in loaded_engines())
    result["other_rows_s"] = other_rows(clients, case, runs)
    span = case.tokens / statistics.median(result["rates"])
    lengths = list(itertools.islice(itertools.cycle(case.prompts), PROBES))
    result["latencies_s"] = []
    for repeat in range(case.repeats + 1):  # the first compiles
        rows, probes = prompts(case, next(runs)), _sides.sequences(next(runs), lengths)
        latencies = asyncio.run(first_tokens(clients, case, rows, probes, span))
        result["latencies_s"] += latencies if repeat else []
    if case.samples > 1:
        result["cached"] = [cached(clients[0], sample, case, prompts(case, next(runs))) for _ in range(case.repeats + 1)][1:]
    return result


def other_rows(clients: Sequence[Any], case: Case, runs: itertools.count) -> list[float]:
    """Seconds of half of the case's requests, or of two where it has one, and the same again."""
    count = len(case.prompts) // 2 or 2
    other = replace(case, prompts=(case.prompts * 2)[:count], new=(case.new * 2)[:count])
    sample = our_sampler(clients, other)
    return [_sides.seconds(partial(sample, prompts(other, next(runs)))) for _ in range(2)]


def our_first_token(directory: str, case: Case, way: Way) -> dict[str, Any]:
    """Seconds of a one-token request, the first in this process."""
    client, *_ = our_clients(directory, replace(case, adapters=1))
    return {"first_token_s": _sides.seconds(ask(client, prompts(case, 0)[0], 1).result)}


async def first_tokens(
    clients: Sequence[Any], case: Case, rows: Sequence[Sequence[int]], probes: Sequence[Sequence[int]], span: float
) -> list[float]:
    """Seconds of one-token requests, sent evenly over `span` seconds from the moment when the load was handed in."""

    async def probe(n: int) -> float:
        await asyncio.sleep(n * span / len(probes))
        start = time.perf_counter()
        await ask(clients[n % len(clients)], probes[n], 1)
        return time.perf_counter() - start

    load = ask_all(clients, case, rows, case.new)
    latencies = await asyncio.gather(*(probe(n) for n in range(len(probes))))
    for future in load:
        await future
    return latencies


def cached(client: Any, sample: Sample, case: Case, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds of a group, then of as many single samples of the same prompts, and the share of those that came from a cache."""

    def singles() -> None:
        asked = [ask(client, row, new) for row, new in zip(rows, case.new, strict=True) for _ in range(case.samples)]
        hits.extend(future.result().prompt_cache_hit_tokens for future in asked)

    hits: list[int] = []
    group_s, single_s = _sides.seconds(lambda: sample(rows)), _sides.seconds(singles)
    return {"group_s": group_s, "singles_s": single_s, "hit_share": sum(hits) / (case.samples * sum(case.prompts))}


def peak(sample: Sample, case: Case) -> dict[str, Any]:
    """Bytes that the second of two runs adds at most to the resident set as it is now."""
    before = _sides.resident_bytes()
    sample(prompts(case, 0))
    return {"peak_bytes": _sides.peak_bytes(partial(sample, prompts(case, 1))) - before}


PURPOSES: dict[tuple[str, str], Callable[[str, Case, Way], dict[str, Any]]] = {
    ("torch", "ways"): torch_ways,
    ("torch", "speed"): torch_speed,
    ("tinker_jax", "speed"): our_speed,
    ("tinker_jax", "first"): our_first_token,
    ("torch", "memory"): lambda directory, case, way: peak(torch_sampler(directory, case, way), case),
    ("tinker_jax", "memory"): lambda directory, case, way: peak(our_sampler(our_clients(directory, case), case), case),
}


# ---- in the parent ----


def run_case(
    name: str, case: Case, turns: int, options: list[str], directory: Path, model: Path, machine: dict[str, float]
) -> dict[str, Any]:
    """All turns of a case, and what the report says of it."""
    ran: dict[tuple[str, str], list[dict]] = {}

    def run(side: str, purpose: str, turn: int, way: Way) -> None:
        cache = str(directory / f"cache-{name}-{turn}{'-first' * (purpose == 'first')}")
        arguments = ["--case", name, "--side", side, "--purpose", purpose, "--way", str(case.ways.index(way))]
        env = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "TINKER_JAX_HOME": str(directory / "home")}
        results = _sides.child(__file__, [*arguments, "--model", str(model), *options], env)
        ran.setdefault((side, purpose), []).extend(results)
        print(f"{name}: turn {turn + 1}, {side} {purpose} done", file=sys.stderr)

    way, ways = case.ways[0], {}
    if len(case.ways) > 1:
        run("torch", "ways", 0, way)
        [ways] = ran["torch", "ways"]
        way = max(case.ways, key=lambda way: ways[str(way)])
    for turn in range(turns):
        run("torch", "speed", turn, way)
        run("tinker_jax", "speed", turn, way)
        run("tinker_jax", "first", turn, way)
    run("torch", "memory", 0, way)
    run("tinker_jax", "memory", 0, way)

    def median(side: str, purpose: str, key: str) -> float:
        return statistics.median(result[key] for result in ran[side, purpose])

    sides, ours = ("torch", "tinker_jax"), ran["tinker_jax", "speed"]
    rate = {side: statistics.median(r for result in ran[side, "speed"] for r in result["rates"]) for side in sides}
    latencies = np.array([seconds for result in ours for seconds in result["latencies_s"]])
    report = {
        "model": case.model,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "tokens_per_s": rate,
        "ratio": rate["tinker_jax"] / rate["torch"],
        "torch_way": str(way),
        "torch_ways": ways,
        "first_token_s": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 95)},
        "first_call_s": {side: median(side, "speed", "first_s") for side in sides},
        "first_token_cold_s": median("tinker_jax", "first", "first_token_s"),
        "other_rows_s": [
            statistics.median(column) for column in zip(*(result["other_rows_s"] for result in ours), strict=True)
        ],
        "programs": int(median("tinker_jax", "speed", "programs")),
        "peak_bytes": {side: median(side, "memory", "peak_bytes") for side in sides},
        "all_rates": {side: [result["rates"] for result in ran[side, "speed"]] for side in sides},
    }
    if case.rows == 1:
        size = _models.weight_bytes(_models.shape_of(model), case.dtype)
        steps = {side: median(side, "speed", "step_s") for side in sides}
        shares = {side: size / seconds / machine["bytes_per_s"] for side, seconds in steps.items()}
        report |= {"weight_bytes": size, "decode_step_s": steps, "share_of_memory_rate": shares}
    if cached := [times for result in ours for times in result.get("cached", ())]:
        report["cached"] = {key: statistics.median(times[key] for times in cached) for key in cached[0]}
        report["cached"]["ratio"] = statistics.median(times["group_s"] / times["singles_s"] for times in cached)
    return report


HEADER = [
    "case",
    "torch + PEFT tokens/s",
    "tinker_jax tokens/s",
    "ratio",
    "first token p50 / p95",
    "first token cold",
    "first call torch / ours",
    "other rows first / again",
    "share of memory rate torch / ours",
    "programs",
    "peak memory torch / ours",
    "torch's way",
]


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A case's line of the table."""
    rate, peak = result["tokens_per_s"], result["peak_bytes"]
    shares = result.get("share_of_memory_rate", {}).values()
    return [
        name,
        f"{rate['torch']:,.0f}",
        f"{rate['tinker_jax']:,.0f}",
        f"{result['ratio']:.2f}",
        " / ".join(f"{1e3 * seconds:.0f}" for seconds in result["first_token_s"].values()) + " ms",
        f"{result['first_token_cold_s']:.1f} s",
        " / ".join(f"{seconds:.1f}" for seconds in result["first_call_s"].values()) + " s",
        " / ".join(f"{seconds:.1f}" for seconds in result["other_rows_s"]) + " s",
        " / ".join(f"{100 * share:.0f}" for share in shares) + " %" if shares else "–",
        str(result["programs"]),
        f"{peak['torch'] / 2**30:.2f} / {peak['tinker_jax'] / 2**30:.2f} GiB",
        result["torch_way"],
    ]


def remarks(name: str, result: dict[str, Any]) -> list[str]:
    """What a case has to say beside its line."""
    lines = []
    if result["torch_ways"]:
        rates = ", ".join(f"{way}: {rate:,.0f}" for way, rate in result["torch_ways"].items())
        lines.append(f"{name}: torch's ways, tokens/s: {rates}")
    if "decode_step_s" in result:
        steps = " / ".join(f"{1e3 * seconds:.1f}" for seconds in result["decode_step_s"].values())
        lines.append(
            f"{name}: a decode step takes torch / ours {steps} ms and reads {result['weight_bytes'] / 1e6:,.0f} MB of weights"
        )
    if "cached" in result:
        times = result["cached"]
        lines.append(
            f"{name}: {times['group_s']:.2f} s, single samples of the same prompts {times['singles_s']:.2f} s "
            f"with {100 * times['hit_share']:.0f} % of their prompt tokens cached: ratio {times['ratio']:.2f}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CASES if not name.startswith("qwen3")]
    parser.add_argument("--cases", default=",".join(usual), help=f"of {', '.join(CASES)}; default: {', '.join(usual)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that the script runs, measures nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    for hidden in ("--case", "--side", "--purpose", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = {name: quick(case) for name, case in CASES.items()} if args.quick else CASES
    if args.case:
        logging.disable(logging.WARNING)
        case = cases[args.case]
        return _sides.report_result(PURPOSES[args.side, args.purpose](args.model, case, case.ways[args.way]))

    chosen = args.cases.split(",")
    if unknown := [name for name in chosen if name not in cases]:
        parser.error(f"unknown case {unknown[0]!r}; known are {', '.join(cases)}")
    report = _sides.environment()
    options = ["--quick"] if args.quick else []
    results: dict[str, Any] = {}
    skipped, machine = [], _models.machine()
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen:
            model = _models.locate(Path(directory), cases[name].model, quick=args.quick)
            if model is None:
                skipped.append(name)
                continue
            results[name] = run_case(name, cases[name], args.turns, options, Path(directory), model, machine)
    if args.json:
        args.json.write_text(json.dumps({**report, "machine": machine, "turns": args.turns, "cases": results}, indent=1) + "\n")
    print(_sides.describe(report), _models.describe(machine), sep="\n", end="\n\n")
    if results:
        print(_sides.table(HEADER, [row(name, result) for name, result in results.items()]), end="\n\n")
    for name in skipped:
        print(f"{name}: skipped, {_models.ABSENT}")
    print(*(line for name, result in results.items() for line in remarks(name, result)), sep="\n")


if __name__ == "__main__":
    main()
