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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tinker_jax import lora
from tinker_jax.checkpoints import tensor_files
from tinker_jax.checkpoints.hf_import import check_names
from tinker_jax.checkpoints.hub import EMBEDDED_PREFIX, FILES, is_hub_id, local_directory, read_json, resolve, verify_download
from tinker_jax.checkpoints.records import CheckpointRecord
from tinker_jax.checkpoints.state import read_adapter, read_meta
from tinker_jax.checkpoints.store import Store
from tinker_jax.checkpoints.stored import StoredTensor, quantization, stored_tensors
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import LoraTarget, Weight, lora_targets, weights
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
_TINKER_EXPERTS = {"gate_experts": "w1", "up_experts": "w3", "down_experts": "w2"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
#: Elements of a weight that are merged at once; bounds the float32 scratch space.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class _Update:
    """The update of a weight of one layer as Hugging Face sees it: ΔW = (alpha / r) · B A, float32.

    Attributes:
        weight: its row of the table, of this layer alone.
        A, B: [r, in] and [out, r]. Those of experts have an axis in front: its length is 1 where all experts share the factor.
    """

    weight: Weight
    A: np.ndarray
    B: np.ndarray

    @property
    def module(self) -> str:
        """Its path, e.g. `"model.layers.0.self_attn.q_proj"`; an expert's with `{expert}`."""
        return self.weight.hf.removesuffix(".weight")

    def of_expert(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """A and B of one expert."""
        A, B = (factor[expert if len(factor) > 1 else 0] for factor in (self.A, self.B))
        return A, B


class _Tensor(NamedTuple):
    """A tensor to be written; `make` gives its value."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Checkpoint:
    """An adapter together with the base model that it belongs to."""

    record: CheckpointRecord
    home: epath.Path
    base: str
    directory: Path
    config: dict[str, Any]
    cfg: ModelConfig
    alpha: float
    updates: Sequence[_Update]


def export_peft(
    path: str, directory: str | os.PathLike[str], *, home: str | os.PathLike[str] | None = None, base_model: str | None = None
) -> Path:
    """Writes a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors` (float32).

    Experts are written in the form that PEFT and vLLM both read. Where the family's files name each expert (Qwen3-MoE,
    DeepSeek-V3), each has its own pair of matrices, which PEFT turns into its form for fused experts when it loads them. Where
    they do not (gpt-oss), a layer's experts lie side by side along the rank: A [experts · r, in], experts slowest, and
    B [out, r · experts], experts fastest. In either form factors that experts share are repeated for each. Gate and up are one
    tensor there, with one A: where they have an A each, that tensor has the rank 2 r.

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
    modules = [update.module for update in checkpoint.updates if not _is_packed(update.weight)]
    parameters, apart = _peft_parameters(checkpoint.updates), _apart(checkpoint.updates)
    with _new_directory(directory) as target:
        _write_adapter(target, checkpoint, _peft_tensors(checkpoint.updates, apart), modules, parameters, apart)
    return Path(directory)


def export_tinker(
    path: str, directory: str | os.PathLike[str], *, home: str | os.PathLike[str] | None = None, base_model: str | None = None
) -> Path:
    """Writes an adapter in Tinker's own layout, as `tinker_cookbook.weights` reads it.

    It differs from PEFT's in some names: the unembedding is `unembed_tokens`, attention of gpt-oss is `attn`. Experts are
    `experts.w1` (gate), `w3` (up) and `w2` (down) with factors A [experts, r, in] and B [experts, out, r]; the one that all
    experts share has 1 in place of `experts`. Where the unembedding shares the embedding's matrix those tools put its update
    on the embedding too; use `export_merged` for an exact model.

    Args, Returns, Raises: as `export_peft`.
    """
    checkpoint = _open(path, home, base_model)
    tensors = _tinker_tensors(checkpoint)
    with _new_directory(directory) as target:
        _write_adapter(target, checkpoint, tensors, [tensor.name.removesuffix(".lora_A.weight") for tensor in tensors[::2]])
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
    copied bit for bit, also those that the model does not use, such as layers of multi-token prediction. Names and shapes are
    the base model's. Of a quantised base model the quantised tensors are written in bfloat16 under the names and shapes of the
    bf16 checkpoint, and config.json loses its `quantization_config`. Tensors stream through one at a time, and of fused experts
    one expert. A trained unembedding that shared the embedding's matrix gets its own (`lm_head.weight`,
    `tie_word_embeddings: false`).

    Args:
        path, directory, home, base_model: as `export_peft`.
        max_shard_size: bytes of a file at most, as a number or like `"5GB"`, `"500MB"`, `"2GiB"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"` converts every tensor, those aside that models keep in float32 (biases
            that steer routers); None keeps what the base model stores.
        progress: show a progress bar.

    Returns, Raises: as `export_peft`.
    """
    from tqdm import tqdm

    limit = _parse_size(max_shard_size)
    target_dtype = _parse_dtype(dtype)
    checkpoint = _open(path, home, base_model)
    cfg, table, config = checkpoint.cfg, weights(checkpoint.cfg), _plain_config(checkpoint.config)
    tensors = stored_tensors(tensor_files.read_index(checkpoint.directory), quantization(checkpoint.config))
    check_names(checkpoint.directory, tensors, table, cfg.file_names.unused)
    verify_download(checkpoint.directory, checkpoint.home / "verified", progress)
    if cfg.tied and any(update.module == _HEAD for update in checkpoint.updates):
        tensors[f"{_HEAD}.weight"] = tensors[f"{_EMBEDDING}.weight"]
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # transformers 4's name for it

    exact = {weight.hf.format(layer=layer) for weight in table if weight.exact for layer in weight.layers}

    def out_dtype(name: str) -> np.dtype:
        return tensors[name].dtype if target_dtype is None or name in exact else target_dtype

    updates = _by_tensor(checkpoint.updates, tensors)
    scale = np.float32(checkpoint.alpha / checkpoint.record.lora_rank)
    plans = [tensor_files.plan(name, out_dtype(name), tensor.shape) for name, tensor in tensors.items()]
    groups = tensor_files.shards(plans, limit)
    total = sum(one.nbytes for one in plans)
    with (
        _new_directory(directory) as target,
        tqdm(total=total, unit="B", unit_scale=True, desc="Merging", delay=0.5, disable=not progress) as bar,
    ):

        def merged(group: Sequence[tensor_files.Plan]) -> Iterator[Iterator[bytes | np.ndarray]]:
            for one in group:
                yield _merge(tensors[one.name], updates.get(one.name, ()), scale, out_dtype(one.name))
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
    adapter = read_adapter(record.directory)
    updates: list[_Update] = []
    for target in lora_targets(cfg):
        prefix = f"{target.stack}.{target.module}" if target.stack else target.module
        if f"{prefix}.a" not in adapter:
            continue
        factors = {name: adapter.pop(f"{prefix}.{name}") for name in ("a", "b")}
        for name, factor in factors.items():
            if factor.shape != (expected := lora.shape(target, name, record.lora_rank)):
                raise UnprocessableEntityError(
                    f"adapter tensor '{prefix}.{name}' of {path}: base model {base!r} needs shape {list(expected)}, "
                    f"the checkpoint has {list(factor.shape)}. It was trained on {record.base_model!r}."
                )
        if not target.stacked:
            updates.append(_Update(target.weights[0], factors["a"].T, factors["b"].T))
        for at in range(target.stacked):
            updates += _updates_of_layer(target, at, factors["a"][at], factors["b"][at])
    if adapter:
        raise UnprocessableEntityError(
            f"adapter tensor {min(adapter)!r} of {path} has no place in base model {base!r}. "
            f"It was trained on {record.base_model!r}."
        )
    return _Checkpoint(record, store.home, base, directory, config, cfg, read_meta(record.directory)["lora_alpha"], updates)


def _updates_of_layer(target: LoraTarget, at: int, a: np.ndarray, b: np.ndarray) -> Iterator[_Update]:
    """The updates that a target's factors make in one of its layers, the `at`-th."""
    for number, row in enumerate(target.weights):
        A, B = target.of_weight(number, a, b)
        yield _Update(row.of_layer(row.layers[at]), A.swapaxes(-1, -2), B.swapaxes(-1, -2))


def _is_packed(weight: Weight) -> bool:
    """Are experts told apart by their place in a tensor, since the family's files have no name for each?"""
    return bool(weight.experts) and "{expert}" not in weight.hf


def _peft_parameters(updates: Sequence[_Update]) -> list[str]:
    """What PEFT has to be told by the name of the parameter, below the layer: packed experts, and linears called like a matrix
    of an expert, since it takes the name among `target_modules` for that of the experts alone."""
    matrices = {update.module.rpartition(".")[2] for update in updates if update.weight.experts}

    def is_wanted(update: _Update) -> bool:
        return _is_packed(update.weight) or (not update.weight.experts and update.module.rpartition(".")[2] in matrices)

    return [update.weight.hf.split(".", 3)[3] for update in updates if is_wanted(update)]


def _apart(updates: Sequence[_Update]) -> list[str]:
    """Names of packed parameters whose weights, gate and up, have an A each, each in its own part of the rank."""
    first: dict[str, np.ndarray] = {}
    packed = [update for update in updates if _is_packed(update.weight)]
    names = [
        update.module.rpartition(".")[2]
        for update in packed
        if not np.array_equal(first.setdefault(update.module, update.A), update.A)
    ]
    return list(dict.fromkeys(names))


def _peft_tensors(updates: Sequence[_Update], apart: Sequence[str]) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    packed: dict[str, dict[str, list[_Update]]] = {}
    for update in updates:
        name, experts = f"base_model.model.{update.module}", update.weight.experts
        if _is_packed(update.weight):
            module = name.rpartition(".")[0]
            packed.setdefault(module, {}).setdefault(name, []).append(update)
        elif experts:
            for expert in range(experts):
                tensors += _pair(name.format(expert=expert), *update.of_expert(expert))
        else:
            tensors += _pair(name, update.A, update.B)
    for module, parameters in packed.items():
        # PEFT wraps a module once for each of its parameters, the first innermost.
        for depth, (name, own) in enumerate(reversed(parameters.items())):
            tensors += _packed_pair(module + ".base_layer" * depth, own, name.rpartition(".")[2] in apart)
    return tensors


def _pair(name: str, A: np.ndarray, B: np.ndarray) -> tuple[_Tensor, _Tensor]:
    return _Tensor(f"{name}.lora_A.weight", A.shape, lambda: A), _Tensor(f"{name}.lora_B.weight", B.shape, lambda: B)


def _packed_pair(name: str, updates: Sequence[_Update], apart: bool) -> tuple[_Tensor, _Tensor]:
    """The factors of one parameter that holds all experts, and gate and up: on one `A`, or `apart`, each on its own."""
    weight, own_A = updates[0].weight, [update.A for update in (updates if apart else updates[:1])]
    assert weight.fused is not None
    E, (r, fan_in), fan_out = weight.experts, own_A[0].shape[-2:], weight.fused.shape[1 + weight.fused.axis]
    width = r * len(own_A)

    def packed_A() -> np.ndarray:
        return np.concatenate([np.broadcast_to(A, (E, r, fan_in)) for A in own_A], axis=1).reshape(E * width, fan_in)

    def packed_B() -> np.ndarray:
        whole = np.zeros((fan_out, width, E), np.float32)
        for number, update in enumerate(updates):
            assert update.weight.fused is not None
            part = slice(r * number, r * (number + 1)) if apart else slice(None)
            whole[update.weight.fused.span(update.weight.shape[1]), part] = update.B.transpose(1, 2, 0)
        return whole.reshape(fan_out, width * E)

    return (
        _Tensor(f"{name}.lora_A.weight", (E * width, fan_in), packed_A),
        _Tensor(f"{name}.lora_B.weight", (fan_out, width * E), packed_B),
    )


def _tinker_tensors(checkpoint: _Checkpoint) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    for update in checkpoint.updates:
        name, weight = update.module, update.weight
        if name == _HEAD:
            name = _TINKER_HEAD
        elif weight.fused is not None:
            name = f"{weight.fused.hf.rpartition('.')[0]}.{_TINKER_EXPERTS[weight.module]}"
        for ours, theirs in checkpoint.cfg.file_names.tinker:
            name = name.replace(ours, theirs)
        tensors += _pair(f"base_model.model.{name}", update.A, update.B)
    return tensors


def _write_adapter(
    directory: Path,
    checkpoint: _Checkpoint,
    tensors: Sequence[_Tensor],
    modules: Iterable[str],
    parameters: Sequence[str] = (),
    apart: Sequence[str] = (),
) -> None:
    """Writes tensors and configuration; `modules` and `parameters` are those that have factors, as paths, `apart` names of
    parameters of twice the rank."""
    plans = [tensor_files.plan(tensor.name, np.float32, tensor.shape) for tensor in tensors]
    tensor_files.write(directory / "adapter_model.safetensors", plans, (tensor.make() for tensor in tensors))
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
        "target_modules": list(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
    }
    if parameters:
        config["target_parameters"] = list(dict.fromkeys(parameters))
    for key, value in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")) if apart else ():
        config[key] = {rf".*\.{name}": 2 * config[value] for name in apart}
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


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of weights that are not quantised."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    text = plain.get("text_config")
    return plain | {"text_config": _plain_config(text)} if isinstance(text, Mapping) else plain


def _by_tensor(updates: Sequence[_Update], tensors: Mapping[str, StoredTensor]) -> dict[str, list[tuple[_Update, int | None]]]:
    """What is added to each tensor of the file; of an expert's own tensor with the number of the expert."""
    found: dict[str, list[tuple[_Update, int | None]]] = {}
    for update in updates:
        weight = update.weight
        if weight.fused is not None and weight.fused.hf in tensors:
            found.setdefault(weight.fused.hf, []).append((update, None))
        elif weight.experts:
            found |= {weight.hf.format(expert=expert): [(update, expert)] for expert in range(weight.experts)}
        else:
            found[weight.hf] = [(update, None)]
    return found


def _merge(
    tensor: StoredTensor, updates: Sequence[tuple[_Update, int | None]], scale: np.float32, dtype: np.dtype
) -> Iterator[bytes | np.ndarray]:
    """The tensor plus its updates, in `dtype`, in pieces."""
    if not updates and not tensor.is_encoded and tensor.dtype == dtype:
        yield from tensor.sources[0].blocks()
    elif len(tensor.shape) == 3:
        for expert in range(tensor.shape[0]):
            part = tensor.part(expert)
            out = part.astype(dtype)
            for update, _ in updates:
                update.weight.put(out, _sum(update.weight.cut(part), *update.of_expert(expert), scale, dtype))
            yield out
    elif updates:
        ((update, expert),) = updates
        A, B = (update.A, update.B) if expert is None else update.of_expert(expert)
        yield _sum(tensor.read(), A, B, scale, dtype)
    else:
        yield tensor.read().astype(dtype, copy=False)


def _sum(W: np.ndarray, A: np.ndarray, B: np.ndarray, scale: np.float32, dtype: np.dtype) -> np.ndarray:
    """W + scale · B A in `dtype`; blocks of rows keep the float32 scratch space small."""
    out = np.empty(W.shape, dtype)
    rows = max(1, _BLOCK // W.shape[1])
    for start in range(0, W.shape[0], rows):
        block = slice(start, start + rows)
        out[block] = (W[block].astype(np.float32) + scale * (B[block] @ A)).astype(dtype)
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
