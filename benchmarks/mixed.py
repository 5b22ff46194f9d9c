"""Sampling and training on one engine at once, on a CPU in one process.

    beside   one training client's calls and another client's samples, each alone and both together: tokens/s of either, and the
             latency of a one-token request, which is sent every `--every` seconds
    rounds   an RL loop of groups of 8: rollouts, and a training step on those of the round before. Fixed alternations run one
             after the other: all rollouts and then the step ("whole"), or halves and quarters of both in turn. "At once" queues
             both together and leaves the turns to the engine. Rounds/s; the sides take turns, and medians are compared

Temperature 1, no stops, rank as in `_models.py`; prompts of 64 tokens, outputs of 64, training sequences of 128. Programs are
compiled before anything is timed.

    python benchmarks/mixed.py [--model tiny|real] [--turns 3] [--seconds 30] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import _models
import _sides

PROMPT, NEW, TRAINED, GROUP = 64, 64, 128, 8
GROUPS = {"tiny": 8, "real": 2}
SAMPLED_WITH = {"tiny": 16, "real": 8}
"""Requests that are always under way in `beside`."""
DATA = {"tiny": 256, "real": 32}
"""Sequences of one training call in `beside`."""
PARTS = {"whole": 1, "halves": 2, "quarters": 4}


class Clients:
    """A client in training, a sampler of another one, and data for both."""

    def __init__(self, directory: str, model: str) -> None:
        rank = _models.RANKS[model]
        self.model, self.vocab = model, _models.shape_of(Path(directory)).V
        self.training = _sides.our_side(directory, rank)
        self.sampler = _sides.our_side(directory, rank, seed=1).save_weights_and_get_sampling_client().result()
        self._seed = 0

    def rows(self, count: int, length: int) -> list[list[int]]:
        """New random sequences."""
        self._seed += 1
        return _sides.sequences(self._seed, [length] * count, self.vocab)

    def ask(self, row: Sequence[int], new: int = NEW, samples: int = 1) -> Future[Any]:
        """A request's future."""
        import tinker_jax as tinker

        params = tinker.SamplingParams(max_tokens=new, temperature=1.0, stop=[])
        return self.sampler.sample(tinker.ModelInput.from_ints(list(row)), samples, params)

    def step(self, count: int) -> Callable[[], None]:
        """Queues forward_backward and optim_step; what waits for them."""
        import tinker_jax as tinker

        data = _sides.datums(self.rows(count, TRAINED + 1))
        step = self.training.forward_backward(data, "cross_entropy")
        update = self.training.optim_step(tinker.AdamParams(learning_rate=1e-5))

        def wait() -> None:
            step.result(), update.result()

        return wait


# ---- beside ----


def beside(clients: Clients, seconds: float, every: float, *, train: bool, sample: bool) -> dict[str, Any]:
    """Tokens/s of what runs, and the latencies of one-token requests, while both sides are kept busy."""
    end, counts, latencies = time.perf_counter() + seconds, {"trained": 0, "sampled": 0}, []

    def training() -> None:
        while time.perf_counter() < end:
            clients.step(DATA[clients.model])()
            counts["trained"] += DATA[clients.model] * TRAINED

    def sampling(prompts: Sequence[Sequence[int]]) -> None:
        for row in prompts:
            if time.perf_counter() > end:
                return
            clients.ask(row).result()
            counts["sampled"] += NEW

    def probing() -> None:
        for row in clients.rows(10_000, PROMPT):
            if time.perf_counter() > end:
                return
            start = time.perf_counter()
            clients.ask(row, 1).result()
            latencies.append(time.perf_counter() - start)
            time.sleep(every)

    threads = [threading.Thread(target=training)] * train
    threads += [threading.Thread(target=probing)]
    for _ in range(SAMPLED_WITH[clients.model] * sample):
        threads.append(threading.Thread(target=sampling, args=(clients.rows(1000, PROMPT),)))
    took = _sides.seconds(lambda: ([t.start() for t in threads], [t.join() for t in threads]))
    rates = {name: tokens / took for name, tokens in counts.items()}
    return {**rates, "latencies_s": latencies}


# ---- rounds ----


def alternating(clients: Clients, parts: int) -> None:
    """A round, one after the other: a part of the rollouts, then a step on as many sequences of the round before."""
    groups = GROUPS[clients.model]
    for _ in range(parts):
        share = max(1, groups // parts)
        for future in [clients.ask(row, samples=GROUP) for row in clients.rows(share, PROMPT)]:
            future.result()
        clients.step(share * GROUP)()


def at_once(clients: Clients, parts: int = 1) -> None:
    """A round, rollouts and step together."""
    groups = GROUPS[clients.model]
    rollouts = [clients.ask(row, samples=GROUP) for row in clients.rows(groups, PROMPT)]
    step = clients.step(groups * GROUP)
    for future in rollouts:
        future.result()
    step()


def rounds(clients: Clients, turns: int) -> dict[str, list[float]]:
    """Seconds of each round, by side."""
    groups = GROUPS[clients.model]
    sides = {name: (alternating, parts) for name, parts in PARTS.items() if parts <= groups} | {"at once": (at_once, 1)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):  # the first compiles
        for name, (side, parts) in sides.items():
            took = _sides.seconds(lambda side=side, parts=parts: side(clients, parts))
            times[name] += [took] if turn else []
    return times


# ---- report ----


def run(directory: str, model: str, turns: int, seconds: float, every: float) -> dict[str, Any]:
    """Everything, in this process."""
    clients = Clients(directory, model)
    at_once(clients), at_once(clients)
    modes = {"sampling alone": (False, True), "training alone": (True, False), "both": (True, True)}
    results: dict[str, Any] = {}
    for name in ("warm-up", *modes):
        train, sample = modes.get(name, (True, True))
        results[name] = beside(clients, seconds, every, train=train, sample=sample)
    del results["warm-up"]
    return {"beside": results, "rounds": rounds(clients, turns)}


def p95(values: Sequence[float]) -> float:
    """The value that 19 of 20 do not exceed."""
    return sorted(values)[max(0, -(-19 * len(values) // 20) - 1)]


def tables(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = []
    for name, side in result["beside"].items():
        seen = side["latencies_s"]
        latency = [f"{1000 * statistics.median(seen):.0f} ms", f"{1000 * p95(seen):.0f} ms"]
        lines.append([name, *(f"{side[key]:.0f}" if side[key] else "–" for key in ("sampled", "trained")), *latency])
    header = ["", "sampled tokens/s", "trained tokens/s", "first token, median", "95 %"]
    medians = {name: statistics.median(times) for name, times in result["rounds"].items()}
    best = min(seconds for name, seconds in medians.items() if name != "at once")
    of_rounds = [[name, f"{seconds:.2f} s", f"{100 * best / seconds:.0f} %"] for name, seconds in medians.items()]
    return "\n\n".join(
        [_sides.table(header, lines), _sides.table(["round", "median", "throughput of the best alternation"], of_rounds)]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(GROUPS), default="tiny")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=0.5)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that the script runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return _sides.report_result(run(args.child, args.model, args.turns, args.seconds, args.every))
    report = _sides.environment()
    with tempfile.TemporaryDirectory() as root:
        directory = _models.locate(Path(root), args.model, quick=args.quick)
        if directory is None:
            return print(f"mixed: skipped, {_models.ABSENT}")
        env = {"JAX_PLATFORMS": "cpu", "TINKER_JAX_HOME": root}
        options = [f"--{name}={getattr(args, name)}" for name in ("model", "turns", "seconds", "every")]
        [result] = _sides.child(__file__, ["--child", str(directory), *options], env)
    if args.json:
        args.json.write_text(json.dumps({**report, "model": args.model, **result}, indent=1) + "\n")
    print(_sides.describe(report), end="\n\n")
    print(tables(result))


if __name__ == "__main__":
    main()
