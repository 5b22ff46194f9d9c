"""Watch a small language model learn: Pig Latin from examples, then sums from rewards. Two minutes on two cores.

    python scripts/quickstart.py

Prints progress, answers before and after, and writes the curves to out/quickstart.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
import rl_arithmetic  # noqa: E402
import sft_pig_latin  # noqa: E402


def progress(every: int = 10) -> Callable[[str], None]:
    """Shows the latest line in place on a terminal, each tenth line elsewhere."""
    begun, count = time.monotonic(), 0

    def report(line: str) -> None:
        nonlocal count
        count += 1
        line = f"   {line}   {time.monotonic() - begun:4.0f} s"
        if sys.stdout.isatty():
            print(f"\r{line}\033[K", end="", flush=True)
        elif count == 1 or count % every == 0:
            print(line, flush=True)

    return report


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("   " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ones before it within the window."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(path: Path, model: str, losses: Sequence[float], rewards: Sequence[float]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(model)
    left.plot(range(1, len(losses) + 1), losses, color="tab:blue")
    left.set(title="Pig Latin, supervised", xlabel="step", ylabel="loss, nats a token", yscale="log")
    right.plot(range(1, len(rewards) + 1), rewards, color="tab:orange", alpha=0.35, label="each step")
    right.plot(range(1, len(rewards) + 1), smooth(rewards, 5), color="tab:orange", label="mean of 5")
    right.set(title="Sums, by reinforcement", xlabel="step", ylabel="mean reward", ylim=(0, 1.02))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinker-jax/tiny-qwen3", help="a hub id or a local directory")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quickstart.png", help="where the curves go")
    args = parser.parse_args()
    begun = time.monotonic()

    print("Two examples; on two cores they take about two minutes.\n")
    print(f"1. Pig Latin: {args.model} has never seen it. LoRA of rank 32 on made-up words.")
    sft = sft_pig_latin.run(args.model, report=progress())
    knew, knows = sft_pig_latin.right(sft["before"]), sft_pig_latin.right(sft["after"])
    print("\n   Real words, which it was not trained on:")
    words = list(zip(sft_pig_latin.HELD_OUT, sft["before"], sft["after"], strict=True))[4::7]
    table(("word", "before", "after"), [(word, repr(old), repr(new)) for word, old, new in words])

    print("\n2. Sums: it has learned from careless homework. Now only right answers are rewarded.")
    rl = rl_arithmetic.run(args.model, report=progress())
    was, now = rl_arithmetic.mean_reward(rl["before"]), rl_arithmetic.mean_reward(rl["after"])
    print("\n   Sums it was not trained on, four answers each:")
    pairs = list(zip(rl["before"], rl["after"], strict=True))[:6]
    table(
        ("sum", "before", "after"),
        [("{} + {}".format(*old["sum"]), " ".join(old["texts"]), " ".join(new["texts"])) for old, new in pairs],
    )

    draw(args.out, args.model, sft["losses"], rl["rewards"])
    print()
    table(
        ("held out", "before", "after"),
        [
            ("Pig Latin, exactly right", f"{knew:.0%}", f"{knows:.0%}"),
            ("sums, mean reward", f"{was:.2f}", f"{now:.2f}"),
        ],
    )
    print(f"\nCurves: {args.out}   ({time.monotonic() - begun:.0f} s in all)")


if __name__ == "__main__":
    main()
