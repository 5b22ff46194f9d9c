"""LoRA training of published shapes on an accelerator: tokens/s, utilisation, memory, compile time; beside torch + PEFT there.

Random bfloat16 weights are made on the device, nothing is read or fetched. LoRA rank 16 on all linears of the layers, those of
experts in Tinker's parametrisation, AdamW; a step is 8 rows, each model in layouts

    2048     one document of 2,048 tokens a row
    packed   the same number of tokens in documents of 64 to 1,024, which fill rows of 2,048 exactly
    4096     one document of 4,096 tokens a row

Ours goes through the trainer under the memory planner's micro-batches and rematerialisation. Torch takes 2 rows × 4
micro-batches with sdpa under bfloat16 autocast, without gradient checkpointing or, where that does not fit, with it; packed
documents are full rows to it, so its `2048` figure stands for both. Models with experts (30B-A3B: 61 GB of weights;
gpt-oss-20B: 42 GB) run when `--models` names them, ours alone: PEFT has no such adapter of experts.

FLOPs a token (LoRA has no gradients of frozen weights to compute, so a product costs 4 and not 6 of its parameters' number):

    model     4 · N_matmul + 3 · A     N_matmul: parameters of the layers' linears, of experts those that a token chooses,
                                       and of the head, embedding left out
                                       A: forward attention, the sum over layers of 4 · N · H · mean number of tokens
                                       that a token attends to: itself and all before it, or those in the window
    hardware  model + A / 2 (scores are computed again) + what rematerialisation
              repeats: with `attention` and `full` 2 · N of the layers' linears but `down`; with `full`, and where cuDNN attends
              (on a GPU, without sinks and windows), whose results cannot be kept, A. `none` repeats elementwise work and the
              router's product only, which are not counted

MFU is model FLOPs over time and the chip's dense bfloat16 peak (`--peak`), hardware utilisation the same with hardware FLOPs;
the adapter's own products, a hundredth or two, are not counted. Peak memory is the allocator's, for ours that of all layouts up
to the one shown.

    python benchmarks/train_gpu.py [--models 8B,0.6B] [--minutes 10] [--json out.json] [--profile DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _shapes
import _sides
from _shapes import MODELS

from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import in_order
from tinker_jax.models.dense import DenseConfig
from tinker_jax.models.weights import weights

RANK, ROWS, TORCH_ROWS, STEPS = 16, 8, 2, 5
DOCUMENTS = (1024, 512, 256, 128, 64, 64)  # of a packed row of 2,048


LAYOUTS = {"2048": (2048,) * ROWS, "packed": DOCUMENTS * ROWS, "4096": (4096,) * ROWS}


def documents(layout: str, smoke: bool) -> tuple[int, ...]:
    """Lengths of a step's documents."""
    return tuple(-(-n // 32) for n in LAYOUTS[layout]) if smoke else LAYOUTS[layout]


# ---- arithmetic ----


def flops_per_token(cfg: ModelConfig, lengths: Sequence[int], remat: str | None = None, platform: str = "gpu") -> float:
    """Floating-point operations of LoRA training by the formula at the top of this file.

    Args:
        cfg: shape of the model.
        lengths: tokens of each document.
        remat: policy whose hardware FLOPs are wanted; None: model FLOPs.
        platform: where it ran.
    """
    kernels = [w for w in weights(cfg) if w.layers and w.name.endswith("kernel")]
    linear, down = (
        _shapes.parameters(own, _shapes.chosen(cfg)) for own in (kernels, [w for w in kernels if w.module.startswith("down")])
    )
    mixers = [stack.block.attn for stack, _ in in_order(cfg)]
    per_pair = ((2 * attn.heads.N * (attn.heads.H + attn.heads.V), attn.window) for attn in mixers)
    attention = sum(flops * sum(pairs(n, window) for n in lengths) for flops, window in per_pair) / sum(lengths)
    model = 4 * (linear + cfg.V * cfg.D) + 3 * attention
    if remat is None:
        return model
    cudnn = platform == "gpu" and not any(attn.sinks or attn.window for attn in mixers)
    return model + attention / 2 + 2 * (linear - down) * (remat != "none") + attention * (remat == "full" or cudnn)


def pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, in a document."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


# ---- sides, each in a child ----


def ours(cfg: ModelConfig, layouts: Sequence[str], smoke: bool, profile: str | None = None) -> Iterator[dict[str, Any]]:
    """Results of the layouts, one by one."""
    import jax

    from tinker_jax import memory, sharding
    from tinker_jax.training.trainer import Trainer
    from tinker_jax.types import LoraConfig

    mesh = sharding.make_mesh()
    platform = mesh.devices.flat[0].platform
    plan = memory.plan(cfg, 2, memory.device_bytes(), mesh.shape, platform)
    trainer = Trainer(cfg, _shapes.random_weights(cfg, mesh), mesh, plan)
    for layout in layouts:
        lengths = documents(layout, smoke)
        data = _sides.datums(_sides.sequences(1, [n + 1 for n in lengths], cfg.V))
        adapter = trainer.new_adapter(LoraConfig(rank=RANK, train_unembed=False), 0)
        step = partial(_sides.trainer_step, trainer, adapter, data)
        first, later = timed(step)
        stats = jax.local_devices()[0].memory_stats() or {}
        yield {
            "layout": layout,
            "device": jax.devices()[0].device_kind,
            "platform": platform,
            "tokens_per_s": sum(lengths) / later,
            "first_step_s": first,
            "step_s": later,
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "remat": plan.remat,
            "token_budget": plan.token_budget,
            "programs": trainer.programs,
        }
        if profile:
            with jax.profiler.trace(str(Path(profile, layout))):
                step()


def peft(cfg: ModelConfig, layouts: Sequence[str], smoke: bool, profile: str | None = None) -> Iterator[dict[str, Any]]:
    """The same with torch, on CUDA, or on the CPU for a smoke run, `packed` left out; nothing without torch and PEFT, and of
    models with experts."""
    if not isinstance(cfg, DenseConfig) or not all(importlib.util.find_spec(name) for name in ("torch", "peft")):
        return
    import torch

    if not smoke and not torch.cuda.is_available():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, optimizer = _sides.with_lora(_shapes.torch_model(cfg, device), RANK)

    def step(rows: Sequence[Sequence[int]]) -> None:
        for at in range(0, len(rows), TORCH_ROWS):
            with torch.autocast(device, torch.bfloat16):
                _sides.torch_backward(model, rows[at : at + TORCH_ROWS], device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    def attempt(step: Callable[[], object]) -> tuple[float, float] | None:
        try:
            return timed(step)
        except torch.OutOfMemoryError:  # whose traceback holds the memory until this function is left
            return None

    checkpointing = False
    for layout in layouts:
        if layout == "packed":
            continue
        lengths = documents(layout, smoke)
        rows = _sides.sequences(1, [n + 1 for n in lengths], cfg.V)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        measured = attempt(partial(step, rows))
        if measured is None:
            checkpointing = True
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
            measured = timed(partial(step, rows))
        first, later = measured
        yield {
            "layout": layout,
            "tokens_per_s": sum(lengths) / later,
            "first_step_s": first,
            "step_s": later,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "gradient_checkpointing": checkpointing,
        }


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step, and the median of later ones after one more that is not timed."""
    first, rates = _sides.measure(step, 1, STEPS)
    return first, 1 / statistics.median(rates)


SIDES = {"ours": ours, "torch": peft}


# ---- in the parent ----


def run_side(
    name: str, side: str, layouts: Sequence[str], args: argparse.Namespace, limit: float, cache: str
) -> dict[str, Any]:
    """One model on one side; running out of time or memory leaves what was finished before."""
    arguments = ["--side", side, "--models", name, "--layouts", ",".join(layouts)]
    arguments += ["--smoke"] if args.smoke else []
    arguments += ["--profile", f"{args.profile}/{name}"] if args.profile and side == "ours" else []
    lines, stopped = _sides.child_until(__file__, arguments, {"JAX_COMPILATION_CACHE_DIR": cache}, limit)
    print(f"{name}: {side} {stopped or 'done'}", file=sys.stderr)
    return {"layouts": {line.pop("layout"): line for line in lines}, "stopped": stopped}


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every model on every side, what matters most first: ours, torch, then ours again with the cache of the first time."""
    deadline = time.monotonic() + 60 * args.minutes
    results: dict[str, dict[str, Any]] = {name: {} for name in args.models}
    passes = {"ours": ("ours", args.layouts), "torch": ("torch", args.layouts), "warm": ("ours", args.layouts[:1])}
    with tempfile.TemporaryDirectory() as cache:
        for kind, (side, layouts) in passes.items():
            for name in args.models:
                limit = min(args.seconds, deadline - time.monotonic())
                results[name][kind] = run_side(name, side, layouts, args, limit, cache)
    return results


HEADER = [
    "model",
    "layout",
    "tokens/s",
    "MFU",
    "hardware",
    "peak memory",
    "first step cold / warm",
    "remat, micro-batch",
    "torch + PEFT tokens/s",
    "ratio",
    "torch peak memory",
]


def rows(name: str, cfg: DenseConfig, result: dict[str, Any], args: argparse.Namespace) -> Iterator[list[str]]:
    """A model's lines of the table; a dash is what did not run."""
    for layout in args.layouts:
        ran, warm = (result[kind]["layouts"].get(layout, {}) for kind in ("ours", "warm"))
        theirs = result["torch"]["layouts"].get("2048" if layout == "packed" else layout, {})
        if not ran:
            yield [name, layout, result["ours"]["stopped"] or "–", *["–"] * (len(HEADER) - 3)]
            continue
        lengths, rate = documents(layout, args.smoke), ran["tokens_per_s"]
        flops = flops_per_token(cfg, lengths), flops_per_token(cfg, lengths, ran["remat"], ran["platform"])
        use = [100 * rate * x / (1e12 * args.peak) for x in flops]
        warm_s = f"{warm['first_step_s']:.1f} s" if warm else "–"
        yield [
            name,
            layout,
            f"{rate:,.0f}",
            *(f"{percent:.1f} %" for percent in use),
            _sides.gib(ran["peak_bytes"]),
            f"{ran['first_step_s']:.1f} s / {warm_s}",
            f"{ran['remat']}, {ran['token_budget']}",
            *against(rate, theirs),
        ]


def against(rate: float, theirs: dict[str, Any]) -> list[str]:
    """Torch's columns."""
    if not theirs:
        return ["–"] * 3
    checkpointing = " (checkpointing)" if theirs["gradient_checkpointing"] else ""
    ratio = rate / theirs["tokens_per_s"]
    return [f"{theirs['tokens_per_s']:,.0f}{checkpointing}", f"{ratio:.2f}", _sides.gib(theirs["peak_bytes"])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=split, default=list(_shapes.DENSE), help="of " + ", ".join(MODELS))
    parser.add_argument("--layouts", type=split, default=list(LAYOUTS), help="of " + ", ".join(LAYOUTS))
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the chip (H100 and H200: 989)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run")
    parser.add_argument("--seconds", type=float, default=150.0, help="of one model on one side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", help="directory for a jax.profiler trace of one step of each of ours")
    parser.add_argument("--smoke", action="store_true", help="a toy model on any device: shows that the script runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for given, known in ((args.models, MODELS), (args.layouts, LAYOUTS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
    models = {name: (_shapes.SMOKE if args.smoke else MODELS)[name] for name in args.models}
    if args.side:
        logging.disable(logging.WARNING)
        for line in SIDES[args.side](models[args.models[0]], args.layouts, args.smoke, args.profile):
            _sides.report_result(line)
        return

    report = _sides.environment()
    results = run(args)
    if args.json:
        args.json.write_text(json.dumps({**report, "peak_tflops": args.peak, "models": results}, indent=1) + "\n")
    print(_sides.describe(report), end="\n\n")
    print(_sides.table(HEADER, [row for name, cfg in models.items() for row in rows(name, cfg, results[name], args)]))
    if not any(result["torch"]["layouts"] for result in results.values()):
        print("\ntorch with CUDA, or PEFT, is not here: not run")


if __name__ == "__main__":
    main()
