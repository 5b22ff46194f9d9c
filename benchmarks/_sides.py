"""What the benchmarks share: the two sides, processes of their own, what a report must state."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 2048
ALPHA = 32


def sequences(seed: int, lengths: Sequence[int], vocab: int = VOCAB) -> list[list[int]]:
    """Random token ids, the same on both sides."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def measure(run: Callable[[], object], units: int, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first call, and units per second of `repeats` later ones, after one more that is not timed."""
    first = seconds(run)
    run()
    return first, [units / seconds(run) for _ in range(repeats)]


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """Resident set of this process."""
    gc.collect()
    return _status_bytes("VmRSS")


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest resident set of this process during a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here: proc(5)
    run()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


# ---- sides ----


def torch_side(directory: str, rank: int, dtype: str = "float32") -> tuple[Any, Any]:
    """(PEFT model, AdamW over its adapter), on every core; `dtype` is that of the base weights."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    return with_lora(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)), rank)


def with_lora(model: Any, rank: int) -> tuple[Any, Any]:
    """(PEFT model with an adapter on all linears of its layers, AdamW over it) of a transformers model. PEFT adapts the
    projections, `_torch_experts` experts."""
    import peft
    import torch

    sparse = hasattr(model.config, "num_experts")
    projections = PROJECTIONS[:4] if sparse else PROJECTIONS
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=projections)).train()
    if sparse:
        from _torch_experts import adapt

        adapt(model.get_base_model(), rank, ALPHA / rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def torch_backward(model: Any, rows: Sequence[Sequence[int]], device: str = "cpu") -> None:
    """Adds the gradient of one micro-batch: rows padded to the longest, masked, padding ignored by the loss."""
    import torch
    import torch.nn.functional as F

    longest = max(map(len, rows)) - 1
    ids = torch.tensor([[*row[:-1], *[0] * (longest + 1 - len(row))] for row in rows], device=device)
    targets = torch.tensor([[*row[1:], *[-100] * (longest + 1 - len(row))] for row in rows], device=device)
    # transformers tells a mask without padding by itself and then takes the plain causal kernel.
    logits = model(input_ids=ids, attention_mask=(targets >= 0).long(), use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum").backward()


def torch_generate(
    model: Any, rows: Sequence[Sequence[int]], new: int, device: str = "cpu", samples: int = 1, **options: Any
) -> None:
    """Draws `new` tokens at temperature 1 for `samples` continuations of every row; shorter rows are padded on the left."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[*[0] * (longest - len(row)), *[1] * len(row)] for row in rows], device=device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        num_return_sequences=samples,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        **options,
    )
    assert out.shape == (samples * len(rows), longest + new), out.shape


def our_side(directory: str, rank: int, dtype: str = "float32", seed: int = 0) -> Any:
    """A training client with the same adapter."""
    import tinker_jax as tinker

    service = tinker.ServiceClient(engine=tinker.EngineConfig(dtype=dtype))
    return service.create_lora_training_client(base_model=directory, rank=rank, seed=seed, train_unembed=False).result()


def datums(rows: Sequence[Sequence[int]]) -> list[Any]:
    """Rows of n + 1 tokens as n inputs with their targets."""
    import tinker_jax as tinker

    return [
        tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1]), loss_fn_inputs={"target_tokens": row[1:]})
        for row in rows
    ]


def our_step(client: Any, data: Sequence[Any]) -> None:
    """forward_backward and optim_step, queued back to back."""
    import tinker_jax as tinker

    step = client.forward_backward(data, "cross_entropy")
    update = client.optim_step(tinker.AdamParams(learning_rate=1e-4))
    step.result(), update.result()


def trainer_step(trainer: Any, adapter: Any, data: Sequence[Any]) -> None:
    """The same asked of the trainer itself: no clients, no threads."""
    import tinker_jax as tinker
    from tinker_jax.training.pending import complete

    step = complete(trainer.forward_backward(adapter, data, "cross_entropy", None, backward=True))
    update = trainer.optim_step(adapter, tinker.AdamParams(learning_rate=1e-4)).finish()
    logprobs, _ = step.finish()
    assert len(logprobs) == len(data) and "grad_norm" in update


# ---- processes ----


def child(
    script: str, arguments: Sequence[str], env: Mapping[str, str] | None = None, limit: float | None = None
) -> list[dict]:
    """Runs `script` in a process of its own and returns the JSON objects that it printed, one a line.

    Args:
        script: path.
        arguments: of the command line.
        env: variables set on top of this process's.
        limit: seconds.

    Raises:
        subprocess.SubprocessError: it failed or took longer; `parse(error.stdout)` is what it had printed.
    """
    command = [sys.executable, script, *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **env}
    return parse(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, timeout=limit).stdout)


def child_until(script: str, arguments: Sequence[str], env: Mapping[str, str], limit: float) -> tuple[list[dict], str | None]:
    """`child`; one that runs out of time or memory leaves what it had finished before.

    Returns:
        The objects, and why there are no more; None: the child ended well.
    """
    if limit <= 0:
        return [], "not started: the time of the whole run was over"
    try:
        return child(script, arguments, env, limit), None
    except subprocess.TimeoutExpired as error:
        return parse(error.stdout), f"stopped after {limit:.0f} s"
    except subprocess.CalledProcessError as error:
        return parse(error.stdout), f"failed with exit status {error.returncode}"


def parse(out: bytes | None) -> list[dict]:
    """JSON objects, one a line, among other output."""
    return [json.loads(line) for line in (out or b"").decode().splitlines() if line.startswith("{")]


def report_result(result: Mapping[str, object]) -> None:
    """Hands a result from a child to its parent, at once."""
    print(json.dumps(result), flush=True)


def environment() -> dict[str, object]:
    """Hardware, versions, date, and the load that was there before the run."""
    versions = {}
    for package in ("jax", "flax", "torch", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = {line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    return {
        "cpu": next(iter(names), platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }


def describe(facts: Mapping[str, Any]) -> str:
    """`environment` in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_GiB']} GiB; {facts['date']}; "
        f"load average before the run {facts['load_before']:.2f}\nPython {facts['python']}, {versions}"
    )


def gib(size: int | None) -> str:
    """A size, unless the device does not tell."""
    return "–" if size is None else f"{size / 2**30:.1f} GiB"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
