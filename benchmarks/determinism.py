"""How far log-probabilities of the same tokens are apart, with and without `EngineConfig(deterministic=True)`, and its cost.

One adapter of rank 16 after two steps at a learning rate of 1e-3, 24 sequences of 20 to 199 random tokens, on a CPU:

    company   `forward` of 8 of the sequences, each alone, against the same among all 24
    sampler   what `sample` reports (the 24 sequences as prompts, two samples of 16 tokens, temperature 1, all at once) against
              `forward` of prompt and sample, alone

Of both the largest absolute difference and the share of tokens that are not equal bit for bit; of the sampler also the mean of
(sampler − forward), an estimate of KL(sampler ‖ trainer). The times are those of `forward_backward` of the 24 sequences and of
1 and 64 requests; both modes run in one process and in turns, and their medians are compared. "Scored" is the share of
training's forward pass in sampling: the time of `forward` of the same samples over that of the 64 requests.

    python benchmarks/determinism.py [--model DIRECTORY] [--dtypes float32,bfloat16] [--turns 3] [--json out.json]

Without `--model` the embedded model and SmolLM2-135M-Instruct, which is passed over where `make real-model` has not built it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _models
import _sides
import numpy as np

import tinker_jax as tinker

EMBEDDED = "tinker-jax/tiny-qwen3"
DTYPES = ("float32", "bfloat16")
MODES = ("default", "deterministic")
NEW = 16


class Clients:
    """A client in training after two steps, and a sampler of it."""

    def __init__(self, model: str, dtype: Any, mode: str) -> None:
        service = tinker.ServiceClient(engine=tinker.EngineConfig(dtype=dtype, deterministic=mode == "deterministic"))
        self.training = service.create_lora_training_client(base_model=model, rank=16, seed=0).result()
        vocab = _models.shape_of(Path(self.training.get_info().model_data.tokenizer_id)).V
        self.rows = _sides.sequences(0, np.random.default_rng(0).integers(21, 201, 24).tolist(), vocab)
        for _ in range(2):
            self.training.forward_backward(_sides.datums(self.rows[:8]), "cross_entropy")
            self.training.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        self.sampler = self.training.save_weights_and_get_sampling_client().result()

    def forward(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities of all tokens of each row but its first."""
        outputs = self.training.forward(_sides.datums(rows), "cross_entropy").result().loss_fn_outputs
        return [output["logprobs"].to_numpy() for output in outputs]

    def backward(self) -> None:
        """The timed call of training."""
        self.training.forward_backward(_sides.datums(self.rows), "cross_entropy").result()

    def sample(self, count: int, samples: int = 1) -> list[tuple[list[int], Any]]:
        """(prompt, sample) of so many requests at once, which take the rows as prompts in turn."""
        params = tinker.SamplingParams(max_tokens=NEW, stop=[])
        prompts = [self.rows[i % len(self.rows)] for i in range(count)]
        futures = [self.sampler.sample(tinker.ModelInput.from_ints(prompt), samples, params) for prompt in prompts]
        return [(p, sequence) for p, future in zip(prompts, futures, strict=True) for sequence in future.result().sequences]

    def differences(self) -> dict[str, Any]:
        """Of the company, and of sampler and trainer."""
        together = self.forward(self.rows)[:8]
        company = np.concatenate([a - b for row, b in zip(self.rows, together, strict=False) for a in self.forward([row])])
        apart = []
        for prompt, sequence in self.sample(len(self.rows), 2):
            (logprobs,) = self.forward([[*prompt, *sequence.tokens]])
            apart.append(np.asarray(sequence.logprobs, np.float32) - logprobs[len(prompt) - 1 :])
        sampler = np.concatenate(apart)
        return {
            name: {"most": float(np.abs(x).max()), "share": float(np.mean(x != 0)), "mean": float(x.mean())}
            for name, x in (("company", company), ("sampler", sampler))
        }

    def times(self) -> dict[str, float]:
        """Seconds of each timed call."""
        answers: list[Any] = []
        seconds = {
            "backward": _sides.seconds(self.backward),
            "sample 1": _sides.seconds(lambda: self.sample(1)),
            "sample 64": _sides.seconds(lambda: answers.extend(self.sample(64))),
        }
        scored = [[*prompt, *sequence.tokens] for prompt, sequence in answers]
        return {**seconds, "score 64": _sides.seconds(lambda: self.forward(scored))}


def run(model: str, dtype: str, turns: int) -> dict[str, Any]:
    """Differences of both modes, and the medians of their times."""
    clients = {mode: Clients(model, dtype, mode) for mode in MODES}
    result: dict[str, Any] = {mode: own.differences() for mode, own in clients.items()}
    taken: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(turns + 1):  # the first compiles
        for mode, own in clients.items():
            taken[mode].append(own.times())
    for mode, times in taken.items():
        result[mode]["seconds"] = {name: statistics.median(each[name] for each in times[1:]) for name in times[0]}
    return result


def lines(model: str, dtype: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Of the table of differences."""
    out = []
    for mode in MODES:
        company, sampler = result[mode]["company"], result[mode]["sampler"]
        cells = [f"{x['most']:.1e} ({100 * x['share']:.3g} %)" if x["most"] else "0" for x in (company, sampler)]
        out.append([model, dtype, mode, *cells, f"{sampler['mean']:.1e}" if sampler["mean"] else "0"])
    return out


def cost(model: str, dtype: str, result: Mapping[str, Any]) -> list[str]:
    """The line of the table of times: deterministic over default."""
    default, exact = (result[mode]["seconds"] for mode in MODES)
    ratios = [f"{exact[name] / default[name]:.2f}" for name in ("backward", "sample 1", "sample 64")]
    return [model, dtype, *ratios, f"{100 * exact['score 64'] / exact['sample 64']:.0f} %"]


HEADER = ["model", "dtype", "mode", "`forward` alone − among 24", "sampler − trainer", "mean of the latter"]
COST = ["model", "dtype", "`forward_backward`", "1 request", "64 requests", "of which scored"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a local directory")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return _sides.report_result(run(args.model, args.child, args.turns))
    models = {"embedded": EMBEDDED} if args.model is None else {args.model: args.model}
    if args.model is None and _models.real_model.built():
        models["SmolLM2-135M"] = str(_models.real_model.directory())
    elif args.model is None:
        print(f"SmolLM2-135M: skipped, {_models.ABSENT}")
    report, results = _sides.environment(), {}
    with tempfile.TemporaryDirectory() as directory:
        env = {"JAX_PLATFORMS": "cpu", "TINKER_JAX_HOME": directory, "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled"}
        for name, model in models.items():
            for dtype in args.dtypes.split(","):
                options = ["--child", dtype, "--model", model, "--turns", str(args.turns)]
                [results[name, dtype]] = _sides.child(__file__, options, env)
    if args.json:
        named = {f"{name} {dtype}": result for (name, dtype), result in results.items()}
        args.json.write_text(json.dumps({**report, "results": named}, indent=1) + "\n")
    print(_sides.describe(report), end="\n\n")
    print(_sides.table(HEADER, [line for key, result in results.items() for line in lines(*key, result)]), end="\n\n")
    print(_sides.table(COST, [cost(*key, result) for key, result in results.items()]))


if __name__ == "__main__":
    main()
