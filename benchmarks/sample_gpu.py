"""Sampling from published shapes on an accelerator: tokens/s, share of the memory bandwidth, memory, compile time; torch's too.

Random bfloat16 weights are made on the device, nothing is read or fetched. Unmerged LoRA of rank 16 on all linears of the
layers, those of experts in Tinker's parametrisation; random prompts of 128 tokens, 1,024 new tokens each (`--new`) at
temperature 1, no stops. Ours goes through the sampler, which gets all requests of a batch at once, and room for twice their
keys and values or three fifths of what the weights leave, whichever is less. Torch is transformers' `generate` (sdpa, bfloat16)
with PEFT, which keeps adapters in float32. Models with experts (30B-A3B: 61 GB of weights; gpt-oss-20B: 42 GB) run when
`--models` names them, ours alone.

    tokens/s      new tokens over the time of the whole call, prefill included
    decode step   (time for all new tokens − time for half of them) / half of them: what is done once for each request falls out
    bandwidth     bytes that a step reads at least, over its time and the card's bytes/s
                  bytes = 2 · N_read + 4 · N_adapter + rows · the sum over layers of context · 4 · K · H
                  N_read: all parameters, without the embedding where the head has weights of its own; of E experts, k for a
                  token, E · (1 − (1 − k / E)^rows), what rows choose if they do so independently and evenly; of their
                  adapters likewise
                  context: tokens of a row in the middle of the span timed (128 + 768), or those in the window
    compile       first call − a later one

If rows must wait for memory, a decode step is the time in which each row gets a token, and its bytes are counted once. Peak
memory is the allocator's, for ours that of all batches up to the one shown. The card's bandwidth comes from a table of data
sheets (H100 SXM 3.35 TB/s, H200 4.8, A100 SXM 80 GB 2.04) or `--bandwidth`.

    python benchmarks/sample_gpu.py [--models 8B,0.6B] [--batches 1,64,256] [--new 1024] [--minutes 10] [--json out.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _shapes
import _sides

from tinker_jax import lora, memory
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import in_order
from tinker_jax.models.dense import DenseConfig
from tinker_jax.models.weights import lora_targets, weights

RANK, ITEMSIZE = 16, 2
GROUPS = lora.groups(train_attn=True, train_mlp=True, train_unembed=False)
MODELS = {name: _shapes.MODELS[name] for name in ("8B", "0.6B", "30B-A3B", "gpt-oss-20B")}
BATCHES = (1, 64, 256)
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA A100-SXM4-80GB": 2.04e12}


class Work(NamedTuple):
    """Tokens of a prompt, new tokens, timed calls of ours."""

    prompt: int = 128
    new: int = 1024
    repeats: int = 2


SMOKE = Work(32, 64, 1)


def work_of(args: argparse.Namespace) -> Work:
    """What the command line asks for."""
    return SMOKE if args.smoke else Work(new=args.new)


# ---- arithmetic ----


def bytes_per_step(cfg: ModelConfig, rows: int, work: Work) -> float:
    """Bytes that a decode step reads at least, by the formula at the top of this file."""
    share = 1 - (1 - _shapes.chosen(cfg)) ** rows
    embedding = 0 if cfg.tied else cfg.V * cfg.D
    adapter = sum(
        RANK * target.stacked * width * math.prod(size * (share if axis == "experts" else 1) for size, axis in lead)
        for target in lora_targets(cfg)
        if not set(GROUPS).isdisjoint(target.groups)
        for width, lead in ((target.fan_in, target.a_lead), (target.fan_out, target.b_lead))
    )
    context = work.prompt + (work.new // 2 + work.new) / 2
    mixers = [stack.block.attn for stack, _ in in_order(cfg)]
    cache = rows * sum(min(context, attn.window or context) * attn.cached.cached() for attn in mixers)
    return ITEMSIZE * (_shapes.parameters(weights(cfg), share) - embedding + cache) + 4 * adapter


# ---- sides, each in a child ----

Draw = Callable[[int, int], None]
"""Draws so many tokens for each of so many rows."""


def timed(draw: Draw, rows: int, work: Work, repeats: int) -> dict[str, float]:
    """Median seconds of a whole call, and from it tokens/s and the time of a decode step."""
    half = work.new // 2
    draw(rows, half)
    whole_s, half_s = (
        statistics.median(_sides.seconds(partial(draw, rows, new)) for _ in range(repeats)) for new in (work.new, half)
    )
    return {"whole_s": whole_s, "tokens_per_s": rows * work.new / whole_s, "step_s": (whole_s - half_s) / (work.new - half)}


def ours(cfg: ModelConfig, batches: Sequence[int], work: Work) -> Iterator[dict[str, Any]]:
    """Results of the batches, one by one."""
    import jax
    import jax.numpy as jnp

    from tinker_jax import sharding
    from tinker_jax.sampling.sampler import Sampler
    from tinker_jax.types import ModelInput, SampleRequest, SamplingParams

    mesh = sharding.make_mesh()
    plan = memory.plan(cfg, ITEMSIZE, memory.device_bytes(), mesh.shape, mesh.devices.flat[0].platform)
    free = plan.memory - memory.base_bytes(cfg, ITEMSIZE)
    sampler = Sampler(
        cfg,
        _shapes.random_weights(cfg, mesh),
        mesh=mesh,
        dtype=jnp.bfloat16,
        kv_bytes=min(free * 3 // 5, 2 * max(batches) * (work.prompt + work.new) * memory.token_bytes(cfg, ITEMSIZE)),
        unstack=plan.unstack,
        stop_ids=(),
        decode_text=lambda ids: "",
    )
    adapter = lora.pad(lora.init(0, lora_targets(cfg), RANK, GROUPS))
    adapter = jax.device_put(lora.scaled(adapter, lora.scale(RANK)), sharding.replicated(mesh))
    seeds = itertools.count()

    def draw(rows: int, new: int) -> None:
        params, futures = SamplingParams(max_tokens=new, temperature=1.0, stop=[]), [Future() for _ in range(rows)]
        for future, row in zip(futures, _sides.sequences(next(seeds), [work.prompt] * rows, cfg.V), strict=True):
            request = SampleRequest(prompt=ModelInput.from_ints(row), sampling_params=params)
            sampler.submit(request, "adapter", adapter, future)
        while sampler.step():
            pass
        assert all(len(future.result().sequences[0].tokens) == new for future in futures)

    for rows in batches:
        first = _sides.seconds(partial(draw, rows, work.new))
        result = timed(draw, rows, work, work.repeats)
        stats = jax.local_devices()[0].memory_stats() or {}
        yield {
            "rows": rows,
            "device": jax.devices()[0].device_kind,
            **result,
            "compile_s": first - result["whole_s"],
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "programs": sampler.programs,
        }


def peft(cfg: ModelConfig, batches: Sequence[int], work: Work) -> Iterator[dict[str, Any]]:
    """The same with torch, on CUDA, or on the CPU for a smoke run; dense models alone, and nothing without torch and PEFT."""
    here = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
    if not here or not isinstance(cfg, DenseConfig):
        return
    import torch

    if work != SMOKE and not torch.cuda.is_available():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _sides.with_lora(_shapes.torch_model(cfg, device), RANK)[0].eval()
    seeds = itertools.count()

    def draw(rows: int, new: int) -> None:
        prompts = _sides.sequences(next(seeds), [work.prompt] * rows, cfg.V)
        _sides.torch_generate(model, prompts, new, device)

    for rows in batches:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = timed(draw, rows, work, 1)
        yield {"rows": rows, **result, "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}


SIDES = {"ours": ours, "torch": peft}


# ---- in the parent ----


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every model on every side, ours first."""
    deadline = time.monotonic() + 60 * args.minutes
    results: dict[str, dict[str, Any]] = {name: {} for name in args.models}
    with tempfile.TemporaryDirectory() as cache:
        # Of the card's memory JAX takes three quarters unless told otherwise; torch takes what it needs.
        env = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
        for side, name in itertools.product(args.sides, args.models):
            arguments = ["--sides", side, "--child", name, "--batches", ",".join(map(str, args.batches))]
            arguments += ["--smoke"] if args.smoke else ["--new", str(args.new)]
            lines, stopped = _sides.child_until(__file__, arguments, env, deadline - time.monotonic())
            results[name][side] = {"batches": {str(line.pop("rows")): line for line in lines}, "stopped": stopped}
            print(f"{name}: {side} {stopped or 'done'}", file=sys.stderr)
    return results


HEADER = [
    "model",
    "rows",
    "tokens/s",
    "decode step",
    "bandwidth",
    "peak memory",
    "compile",
    "programs",
    "torch + PEFT tokens/s",
    "decode step",
    "bandwidth",
    "peak memory",
    "ratio",
]


def lines(name: str, cfg: DenseConfig, result: dict[str, Any], args: argparse.Namespace) -> Iterator[list[str]]:
    """A model's lines of the table; a dash is what did not run or is not known."""
    devices = {ran["device"] for side in result.values() for ran in side["batches"].values() if "device" in ran}
    bandwidth = 1e12 * args.bandwidth if args.bandwidth else next((BANDWIDTH.get(device) for device in devices), None)
    for rows in args.batches:
        mine, theirs = (result.get(side, {"batches": {}})["batches"].get(str(rows)) for side in SIDES)
        size = bytes_per_step(cfg, rows, work_of(args))
        yield [
            name,
            str(rows),
            *speed(mine, size, bandwidth),
            *([f"{mine['compile_s']:.1f} s", str(mine["programs"])] if mine else ["–"] * 2),
            *speed(theirs, size, bandwidth),
            f"{mine['tokens_per_s'] / theirs['tokens_per_s']:.2f}" if mine and theirs else "–",
        ]


def speed(ran: dict[str, Any] | None, size: float, bandwidth: float | None) -> list[str]:
    """A side's columns."""
    if ran is None:
        return ["–"] * 4
    share = f"{100 * size / ran['step_s'] / bandwidth:.1f} %" if bandwidth else "–"
    return [f"{ran['tokens_per_s']:,.0f}", f"{1e3 * ran['step_s']:.2f} ms", share, _sides.gib(ran["peak_bytes"])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=split, default=["8B", "0.6B"], help="of " + ", ".join(MODELS))
    parser.add_argument("--sides", type=split, default=list(SIDES), help="of " + ", ".join(SIDES))
    parser.add_argument("--batches", type=lambda text: [int(n) for n in split(text)], default=list(BATCHES), help="rows")
    parser.add_argument("--new", type=int, default=Work().new, help="new tokens of a row, an even number")
    parser.add_argument("--bandwidth", type=float, help="of the card's memory in TB/s, where the table lacks it")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a toy model on any device: shows that the script runs")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for given, known in ((args.models, MODELS), (args.sides, SIDES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
    models = _shapes.SMOKE if args.smoke else MODELS
    if args.child:
        logging.disable(logging.WARNING)
        for line in SIDES[args.sides[0]](models[args.child], args.batches, work_of(args)):
            _sides.report_result(line)
        return

    report = _sides.environment()
    results = run(args)
    if args.json:
        args.json.write_text(json.dumps({**report, "models": results}, indent=1) + "\n")
    print(_sides.describe(report), end="\n\n")
    print(_sides.table(HEADER, [line for name in args.models for line in lines(name, models[name], results[name], args)]))


if __name__ == "__main__":
    main()
