"""Checkpoints in the layouts of other tools: PEFT adapters, merged Hugging Face models, Tinker's own adapters.

All three write to a temporary directory beside the target and rename it when complete.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tinker_jax.checkpoints import tensor_files
from tinker_jax.checkpoints.hf_import import check_names
from tinker_jax.checkpoints.hub import EMBEDDED_PREFIX, FILES, is_hub_id, local_directory, read_json, resolve, verify_download
from tinker_jax.checkpoints.records import CheckpointRecord
from tinker_jax.checkpoints.state import read_adapter, read_meta
from tinker_jax.checkpoints.store import Store
from tinker_jax.checkpoints.stored import quantization, stored_tensors
from tinker_jax.checkpoints.tensor_files import TensorEntry
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.types.errors import (
    BadRequestError,
    ConflictError,
    StorageError,
    TinkerError,
    UnprocessableEntityError,
)

_EMBEDDING = "model.embed_tokens"
_HEAD = "lm_head"
_TINKER_HEAD = "model.unembed_tokens"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
#: Elements of a weight that are merged at once; bounds the float32 scratch space.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class _Factors:
    """The update of one linear as Hugging Face sees it: ΔW = (alpha / r) · B A, A [r, in], B [out, r], float32."""

    A: np.ndarray
    B: np.ndarray


@dataclass(frozen=True)
class _Checkpoint:
    """An adapter together with the base model that it belongs to."""

    record: CheckpointRecord
    home: epath.Path
    base: str
    directory: Path
    config: dict[str, Any]
    alpha: float
    factors: Mapping[str, _Factors]  # by Hugging Face module path, e.g. "model.layers.0.self_attn.q_proj"
    modules: Sequence[str]  # e.g. ["q_proj", …, "lm_head"]


def export_peft(
    path: str, directory: str | os.PathLike[str], *, home: str | os.PathLike[str] | None = None, base_model: str | None = None
) -> Path:
    """Writes a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors` (float32).

    Load it with `peft.PeftModel.from_pretrained(model, directory)`. The files name the base model by its hub id or embedded
    name; one from a local directory by the hub id that its config.json tells, else by the directory's own name.

    An adapter of the unembedding changes the unembedding only, also where it shares the embedding's matrix; don't merge such
    an adapter in PEFT, use `export_merged`.

    Args:
        path: `tinker://` path of weights or sampler weights.
        directory: does not exist, or is empty.
        home: directory of the store; default `$TINKER_JAX_HOME`, else `~/.tinker_jax`.
        base_model: where the base model is, if no longer where it was trained from.

    Returns:
        The directory.

    Raises:
        BadRequestError, NotFoundError: the path.
        ConflictError: the directory holds something.
        UnprocessableEntityError: the base model has other shapes than the adapter, or the adapter holds NaN or infinity.
        StorageError: something cannot be read or written, or is damaged.
    """
    checkpoint = _open(path, home, base_model)
    with _new_directory(directory) as target:
        _write_adapter(target, checkpoint, _HEAD)
    return Path(directory)


def export_tinker(
    path: str, directory: str | os.PathLike[str], *, home: str | os.PathLike[str] | None = None, base_model: str | None = None
) -> Path:
    """Writes an adapter in Tinker's own layout, as `tinker_cookbook.weights` reads it.

    It differs from PEFT's in one name: the unembedding is `unembed_tokens`. Where the unembedding shares the embedding's
    matrix those tools put its update on the embedding too; use `export_merged` for an exact model.

    Args, Returns, Raises: as `export_peft`.
    """
    checkpoint = _open(path, home, base_model)
    with _new_directory(directory) as target:
        _write_adapter(target, checkpoint, _TINKER_HEAD)
    return Path(directory)


def export_merged(
    path: str,
    directory: str | os.PathLike[str],
    *,
    home: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes a complete Hugging Face model with the adapter merged in, tokenizer and generation config included.

    Each weight becomes W + (alpha / r) · B A, computed in float32 and rounded to the stored dtype; all other tensors are
    copied bit for bit. Tensors stream through one at a time. A trained unembedding that shared the embedding's matrix gets
    its own (`lm_head.weight`, `tie_word_embeddings: false`).

    Args:
        path, directory, home, base_model: as `export_peft`.
        max_shard_size: bytes of a file at most, as a number or like `"5GB"`, `"500MB"`, `"2GiB"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"` converts every tensor; None keeps what the base model stores.
        progress: show a progress bar.

    Returns, Raises: as `export_peft`.
    """
    from tqdm import tqdm

    limit = _parse_size(max_shard_size)
    target_dtype = _parse_dtype(dtype)
    checkpoint = _open(path, home, base_model)
    entries = tensor_files.read_index(checkpoint.directory)
    cfg = parse(checkpoint.config)
    check_names(checkpoint.directory, stored_tensors(entries, quantization(checkpoint.config)), weights(cfg))
    verify_download(checkpoint.directory, checkpoint.home / "verified", progress)
    config = dict(checkpoint.config)
    sources = dict(entries)
    if _HEAD in checkpoint.factors and cfg.tied:
        sources[f"{_HEAD}.weight"] = entries[f"{_EMBEDDING}.weight"]
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # transformers 4's name for it

    def out_dtype(entry: TensorEntry) -> np.dtype:
        return entry.stored_dtype if target_dtype is None else target_dtype

    plans = [tensor_files.plan(name, out_dtype(entry), entry.shape) for name, entry in sources.items()]
    groups = tensor_files.shards(plans, limit)
    total = sum(one.nbytes for one in plans)
    with (
        _new_directory(directory) as target,
        tqdm(total=total, unit="B", unit_scale=True, desc="Merging", delay=0.5, disable=not progress) as bar,
    ):

        def merged(group: Sequence[tensor_files.Plan]) -> Iterator[np.ndarray]:
            for one in group:
                entry = sources[one.name]
                yield _merge(entry, checkpoint.factors.get(one.name.removesuffix(".weight")), checkpoint, out_dtype(entry))
                bar.update(one.nbytes)

        names = {}
        for number, group in enumerate(groups, 1):
            whole = len(groups) == 1
            file = tensor_files.SINGLE_FILE if whole else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensor_files.write(target / file, group, merged(group))
            names |= {one.name: file for one in group}
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (target / tensor_files.INDEX_FILE).write_text(json.dumps(index, indent=2))
        _copy_companions(checkpoint.directory, target)
        (target / "config.json").write_text(json.dumps(config, indent=2))
    return Path(directory)


def _open(path: str, home: str | os.PathLike[str] | None, base_model: str | None) -> _Checkpoint:
    store = Store(home)
    record = store.get(path)
    base = base_model or record.base_model
    directory = resolve(base)
    config = read_json(directory / "config.json")
    cfg = parse(config)
    places = {w.module: w.hf.removesuffix(".weight") for w in weights(cfg) if w.lora} | {_HEAD: _HEAD}
    adapter = read_adapter(record.directory)
    factors: dict[str, _Factors] = {}
    modules = []
    for target in lora_targets(cfg):
        prefix = f"{target.stack}.{target.module}" if target.stack else target.module
        if f"{prefix}.a" not in adapter:
            continue
        a, b = adapter.pop(f"{prefix}.a"), adapter.pop(f"{prefix}.b")
        lead = (target.stacked,) if target.stacked else ()
        for name, got, expected in (
            ("a", a.shape, (*lead, target.fan_in, record.lora_rank)),
            ("b", b.shape, (*lead, record.lora_rank, target.fan_out)),
        ):
            if got != expected:
                raise UnprocessableEntityError(
                    f"adapter tensor '{prefix}.{name}' of {path}: base model {base!r} needs shape {list(expected)}, "
                    f"the checkpoint has {list(got)}. It was trained on {record.base_model!r}."
                )
        modules.append(target.module)
        for layer in range(target.stacked or 1):
            A, B = (a[layer].T, b[layer].T) if target.stacked else (a.T, b.T)
            factors[places[target.module].format(layer=layer)] = _Factors(np.ascontiguousarray(A), np.ascontiguousarray(B))
    if adapter:
        raise UnprocessableEntityError(
            f"adapter tensor {min(adapter)!r} of {path} has no place in base model {base!r}. "
            f"It was trained on {record.base_model!r}."
        )
    return _Checkpoint(record, store.home, base, directory, config, read_meta(record.directory)["lora_alpha"], factors, modules)


def _write_adapter(directory: Path, checkpoint: _Checkpoint, head: str) -> None:
    tensors = {}
    for module, factors in checkpoint.factors.items():
        name = f"base_model.model.{head if module == _HEAD else module}"
        tensors[f"{name}.lora_A.weight"] = factors.A
        tensors[f"{name}.lora_B.weight"] = factors.B
    plans = [tensor_files.plan(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    tensor_files.write(directory / "adapter_model.safetensors", plans, tensors.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _public_name(checkpoint),
        "inference_mode": True,
        "r": checkpoint.record.lora_rank,
        "lora_alpha": _whole(checkpoint.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": [head.rpartition(".")[2] if module == _HEAD else module for module in checkpoint.modules],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _public_name(checkpoint: _Checkpoint) -> str:
    """What the base model is called on any machine: its hub id or embedded name, never a path."""
    base, directory = checkpoint.base, checkpoint.directory
    if base.startswith(EMBEDDED_PREFIX) or local_directory(base) is None:
        return base
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")  # a directory of the hub's cache
    origin = checkpoint.config.get("_name_or_path")
    if isinstance(origin, str) and "/" in origin and is_hub_id(origin):
        return origin
    return directory.resolve().name


def _merge(entry: TensorEntry, factors: _Factors | None, checkpoint: _Checkpoint, dtype: np.dtype) -> np.ndarray:
    """The tensor plus its update, in `dtype`; blocks of rows keep the float32 scratch space small."""
    stored = entry.read()
    if factors is None:
        return stored.astype(dtype, copy=False)
    scale = np.float32(checkpoint.alpha / checkpoint.record.lora_rank)
    out = np.empty(stored.shape, dtype)
    rows = max(1, _BLOCK // stored.shape[1])
    for start in range(0, stored.shape[0], rows):
        block = slice(start, start + rows)
        out[block] = (stored[block].astype(np.float32) + scale * (factors.B[block] @ factors.A)).astype(dtype)
    return out


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation config: whatever lies beside the weights."""
    patterns = [pattern for pattern in FILES if pattern != "*.safetensors"]
    for file in source.iterdir():
        wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
        if file.is_file() and wanted and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def _new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory that becomes `directory` when the body succeeds, and vanishes when not."""
    final = Path(os.path.expanduser(directory)).absolute()
    temporary = final.parent / f".{final.name}.{uuid.uuid4().hex}.tmp"
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise ConflictError(f"{final} exists and is not an empty directory; choose another one.")
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            final.rmdir()
        temporary.rename(final)
    except TinkerError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value <= 0:
        raise BadRequestError(f"max_shard_size={size!r} is not a size; give bytes, or a text like '5GB', '500MB' or '2GiB'.")
    return value


def _parse_dtype(dtype: str | None) -> np.dtype | None:
    known = {str(d): d for d in tensor_files.DTYPES.values()}
    if dtype is not None and dtype not in known:
        raise BadRequestError(f"dtype={dtype!r} is not supported; choose {', '.join(known)}, or None for what is stored.")
    return known[dtype] if dtype else None


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
