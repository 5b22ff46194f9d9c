"""PEFT adapters from elsewhere become checkpoints of the store."""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinker_jax import lora
from tinker_jax.checkpoints.hub import EMBEDDED_PREFIX, canonical, local_directory, read_json, resolve
from tinker_jax.checkpoints.records import RunRecord
from tinker_jax.checkpoints.state import save_adapter
from tinker_jax.checkpoints.store import Store
from tinker_jax.checkpoints.stored import quantization, stored_tensors
from tinker_jax.checkpoints.tensor_files import TensorEntry, read_header, read_index
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import LoraTarget, Weight, lora_targets
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, NotFoundError, UnprocessableEntityError, UnsupportedError

T = TypeVar("T")

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SEED = 0
#: Keys that, unless they are false, empty or absent, make an adapter something else than factors A and B of some linears.
_OTHER_THAN_LORA = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
#: Values of `init_lora_weights` that leave the base weights alone.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def import_peft(
    directory: str | os.PathLike[str], *, home: str | os.PathLike[str] | None = None, base_model: str | None = None
) -> str:
    """Makes a checkpoint of a PEFT adapter, in a run of its own.

    It holds weights and no optimiser state: `create_training_client_from_state` and `load_state` begin with moments of zero
    and a step count of 0, as for a fresh adapter. What PEFT's configuration says of training alone (dropout, which modules are
    targeted) has no effect.

    Its rank is the largest in the files; factors of a lower one are padded with zeros, which training leaves at zero. The
    scale here is 32 / rank, and B takes what another `lora_alpha`, `use_rslora`, `rank_pattern` or `alpha_pattern` makes of it.
    Attention, MLP and unembedding are trained where the files have factors of any of their linears; the linears without get
    the factors of a fresh adapter, which change nothing.

    Experts share factors here (see `tinker_jax.lora`). Files whose experts do, bit for bit, become such an adapter; in any
    other, each expert keeps its own factors, in training, sampling and export, at the price of their memory. Experts are read
    under names of their own (`experts.3.up_proj`), or side by side as PEFT has them for `target_parameters`.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        home: directory of the store; default `$TINKER_JAX_HOME`, else `~/.tinker_jax`.
        base_model: where the base model is, if not where `adapter_config.json` says.

    Returns:
        The checkpoint's `tinker://` path.

    Raises:
        NotFoundError: a file or the base model is missing.
        UnsupportedError: the adapter is something else than factors A and B of linears (DoRA, biases, whole modules, …), or is
            stored in a dtype other than F32, F16 and BF16.
        UnprocessableEntityError: a value of the configuration is wrong, or a tensor has no place in the base model, another
            shape, or holds NaN or infinity.
        BadRequestError: no base model is named.
        StorageError: something cannot be read or written, or is damaged.
    """
    source = Path(os.path.expanduser(directory)).absolute()
    if not (source / _CONFIG).is_file():
        raise NotFoundError(f"{source} has no {_CONFIG}, so it is no PEFT adapter.")
    if not (source / _TENSORS).is_file():
        torch_only = " Convert adapter_model.bin to safetensors." if (source / "adapter_model.bin").is_file() else ""
        raise NotFoundError(f"{source} has no {_TENSORS}.{torch_only}")
    settings = _Settings(source / _CONFIG, read_json(source / _CONFIG))
    base = _name(base_model or settings.base_model)
    model = resolve(base)
    cfg = parse(read_json(model / "config.json"))
    targets = lora_targets(cfg)
    files = _Files(source / _TENSORS, settings, base, targets)
    files.refuse_others(model, cfg.tied)
    rank, trained = files.rank, files.groups(targets)
    adapter = lora.init(_SEED, targets, rank, trained)
    for target in targets:
        node = adapter.get(target.stack, {}) if target.stack else adapter
        if target.module in node:
            _fill(target, node[target.module], files, rank)
    session, now = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}", datetime.now(UTC)
    store, run_id = Store(home), f"{session}:import:0"
    store.create_run(
        RunRecord(
            run_id=run_id,
            session_id=session,
            base_model=base,
            lora_rank=rank,
            train_mlp=not {"mlp", lora.PER_EXPERT}.isdisjoint(trained),
            train_attn="attn" in trained,
            train_unembed="unembed" in trained,
            seed=None,
            user_metadata=None,
            created=now,
            last_request_time=now,
        )
    )
    meta = {"base_model": base, "rank": rank, "groups": list(trained)}
    record = store.write(
        run_id, "weights", "imported", lambda data: save_adapter(data, adapter, None, meta), has_optimizer=False
    )
    return record.path


def _name(base_model: str) -> str:
    """By which engines know it: a local directory by its absolute path."""
    if base_model.startswith(EMBEDDED_PREFIX) or local_directory(base_model) is None:
        return base_model
    return canonical(os.path.abspath(os.path.expanduser(base_model)))


class _Settings:
    """What `adapter_config.json` says; what an adapter here cannot be is refused."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self._file, self._fields = file, fields
        if fields.get("peft_type") != "LORA":
            raise self._unsupported("peft_type", "expected 'LORA'")
        for key in _OTHER_THAN_LORA:
            if fields.get(key):
                raise self._unsupported(key, "an adapter here is a pair of factors for each linear and nothing else")
        if fields.get("bias", "none") != "none":
            raise self._unsupported("bias", "an adapter here has no biases")
        if fields.get("init_lora_weights") not in _PLAIN_STARTS:
            raise self._unsupported(
                "init_lora_weights", "it changes the base weights; convert the adapter to plain LoRA in PEFT"
            )
        self._rslora = bool(fields.get("use_rslora"))
        self._rank, self._alpha = self._whole("r", fields.get("r")), self._number("lora_alpha", fields.get("lora_alpha"))
        self._ranks = {key: self._whole("rank_pattern", x) for key, x in self._pattern("rank_pattern").items()}
        self._alphas = {key: self._number("alpha_pattern", x) for key, x in self._pattern("alpha_pattern").items()}
        parameters = fields.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
            raise self._wrong("target_parameters", "a list of texts, or null", parameters)
        self._parameters = parameters

    @property
    def base_model(self) -> str:
        """The base model's name as PEFT knew it."""
        name = self._fields.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise BadRequestError(f"{self._file} names no base model; say which one it is (base_model).")
        return name

    def is_parameter(self, name: str) -> bool:
        """Is a parameter of the model targeted by its own name?"""
        return any(name == one or name.endswith(f".{one}") for one in self._parameters)

    def of(self, name: str) -> tuple[int, float]:
        """(r, scale · r) of a module or parameter."""
        r, alpha = self._matching(self._ranks, name, self._rank), self._matching(self._alphas, name, self._alpha)
        return r, alpha * (math.sqrt(r) if self._rslora else 1)

    def _matching(self, pattern: Mapping[str, T], name: str, default: T) -> T:
        """As PEFT has it: the value of the first key that matches the end of the name from a dot on."""
        try:
            return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
        except re.error as error:
            raise self._wrong("rank_pattern or alpha_pattern", "regular expressions as keys", list(pattern)) from error

    def _pattern(self, key: str) -> Mapping[str, Any]:
        value = self._fields.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object, or null", value)
        return value

    def _whole(self, key: str, value: object) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(key, "a whole number from 1", value)
        return value

    def _number(self, key: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return value

    def _wrong(self, key: str, expected: str, got: object) -> UnprocessableEntityError:
        return UnprocessableEntityError(f"{self._file}: {key}: expected {expected}, got {brief(got)}.")

    def _unsupported(self, key: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self._file}: {key}={brief(self._fields.get(key))} cannot be imported: {why}.")


@dataclass(frozen=True)
class _Pair:
    """A and B as they are stored.

    Attributes:
        A, B: [r, in] and [out, r], or of all experts of a layer side by side: [E · r, in], experts slowest, and [out, r · E],
            experts fastest.
        r: rank.
        alpha: times B A / r is the update.
        expert: that it belongs to, or None.
        packed: experts that it holds; 0: it belongs to one weight.
    """

    A: TensorEntry
    B: TensorEntry
    r: int
    alpha: float
    expert: int | None
    packed: int

    def parts(self, row: Weight, rank: int) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
        """(expert, A, B) float32 of a weight that it updates, B such that 32 / rank · B A is the update."""
        A, B = _read(self.A), _read(self.B, self.alpha * rank / (self.r * lora.ALPHA))
        if not self.packed:
            yield self.expert, A, B
            return
        assert row.fused is not None
        A_ERD, B_DRE = A.reshape(self.packed, self.r, -1), B.reshape(-1, self.r, self.packed)
        for expert in range(self.packed):
            yield expert, A_ERD[expert], B_DRE[row.fused.span(row.shape[1]), :, expert]


def _read(entry: TensorEntry, factor: float = 1) -> np.ndarray:
    value = entry.read().astype(np.float32)
    with np.errstate(over="ignore"):
        value = value if factor == 1 else value * np.float32(factor)
    if not np.isfinite(value).all():
        raise UnprocessableEntityError(f"adapter tensor {entry.name!r} of {entry.file} holds values that are NaN or infinite.")
    return value


class _Files:
    """The factors in `adapter_model.safetensors`, by the weight that they update: its name in the table, and its layer's place
    in the stack."""

    def __init__(self, file: Path, settings: _Settings, base: str, targets: Sequence[LoraTarget]) -> None:
        self._file, self._settings, self._base = file, settings, base
        self._left = read_header(file)
        self._pairs: dict[tuple[str, int], list[_Pair]] = {}
        for target in _targets_of_names(targets):
            for at in range(max(1, target.stacked)):
                layer = [row.of_layer(row.layers[at]) if row.layers else row for row in target.weights]
                found = self._packed(layer) or [self._of_row(row) for row in layer]
                for row, pairs in zip(layer, found, strict=True):
                    if pairs:
                        self._pairs[row.name, at] = pairs

    @property
    def rank(self) -> int:
        """The largest of all."""
        return max(pair.r for pairs in self._pairs.values() for pair in pairs)

    def of(self, row: Weight, at: int, rank: int) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
        """See `_Pair.parts`."""
        for pair in self._pairs.get((row.name, at), ()):
            yield from pair.parts(row, rank)

    def groups(self, targets: Sequence[LoraTarget]) -> tuple[str, ...]:
        """Groups of an adapter of these factors."""
        with_factors = [
            t for t in _targets_of_names(targets) if any((w.name, at) in self._pairs for w in t.weights for at in _places(t))
        ]
        own = {f"train_{target.groups[0]}": True for target in with_factors}
        per_expert = any(target.weights[0].experts and not self._is_shared(target) for target in with_factors)
        flags = {f"train_{group}": False for group in ("attn", "mlp", "unembed")} | own
        return lora.groups(**flags, per_expert=per_expert)

    def _is_shared(self, target: LoraTarget) -> bool:
        """Do all experts of each layer have the factor that ours share, bit for bit?"""
        rank, first = self.rank, {}
        factors = (
            (at, A if row.shares == "a" else B)
            for at in _places(target)
            for row in target.weights
            for _, A, B in self.of(row, at, rank)
        )
        return all(np.array_equal(first.setdefault(at, factor), factor) for at, factor in factors)

    def _of_row(self, row: Weight) -> list[_Pair]:
        """The pair of a weight, or those of its experts."""
        name = row.hf.removesuffix(".weight")
        if not row.experts:
            pair = self._pair(name, f"{name}.weight" if self._settings.is_parameter(f"{name}.weight") else name, row.shape)
            return [pair] if pair else []
        if "{expert}" not in name:
            return []
        names = [name.format(expert=expert) for expert in range(row.experts)]
        pairs = [self._pair(one, one, row.shape[1:], expert=expert) for expert, one in enumerate(names)]
        if missing := [one for one, pair in zip(names, pairs, strict=True) if pair is None]:
            if len(missing) == row.experts:
                return []
            raise UnprocessableEntityError(
                f"adapter tensor '{_PREFIX}{missing[0]}.lora_A.weight' is missing in {self._file}, though other experts of the "
                f"layer have theirs; base model {self._base!r} has {row.experts} experts."
            )
        return [pair for pair in pairs if pair]

    def _packed(self, layer: Sequence[Weight]) -> list[list[_Pair]] | None:
        """Of each of a layer's weights that are one tensor of all experts in the model, its pair there; None: there is none."""
        row = layer[0]
        if row.fused is None or not self._settings.is_parameter(row.fused.hf):
            return None
        module, _, parameter = row.fused.hf.rpartition(".")
        # PEFT wraps a module once for each of its parameters: gate and up are the inner one where down is targeted, too.
        is_inner = parameter.startswith("gate_up") and self._settings.is_parameter(f"{module}.down_proj")
        shape = row.fused.shape[1 + row.fused.axis], row.shape[-1]
        pair = self._pair(module + ".base_layer" * is_inner, row.fused.hf, shape, packed=row.experts)
        return [[pair]] * len(layer) if pair else None

    def _pair(self, module: str, key: str, shape: tuple[int, ...], expert: int | None = None, packed: int = 0) -> _Pair | None:
        """The factors under a module's name, `key` for patterns, of a weight of this shape; None: there are none."""
        names = [f"{_PREFIX}{module}.lora_{factor}.weight" for factor in "AB"]
        A, B = (self._left.pop(name, None) for name in names)
        if A is None and B is None:
            return None
        if A is None or B is None:
            raise UnprocessableEntityError(f"adapter tensor {names[0 if A is None else 1]!r} is missing in {self._file}.")
        (r, alpha), (fan_out, fan_in) = self._settings.of(key), shape
        width = r * max(1, packed)
        for entry, expected in ((A, (width, fan_in)), (B, (fan_out, width))):
            if entry.shape != expected:
                raise UnprocessableEntityError(
                    f"adapter tensor {entry.name!r} of {self._file}: base model {self._base!r} and rank {r} need shape "
                    f"{list(expected)}, the file has {list(entry.shape)}."
                )
        return _Pair(A, B, r, alpha, expert, packed)

    def refuse_others(self, model: Path, tied: bool) -> None:
        """Refuses a tensor that no weight takes; a copy of the base model's own embedding, which PEFT adds, is none."""
        if not self._pairs:
            raise UnprocessableEntityError(f"{self._file} holds no factors of any linear of base model {self._base!r}.")
        for name, entry in self._left.items():
            weight = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            if weight not in (_EMBEDDING, _HEAD):
                raise UnprocessableEntityError(
                    f"adapter tensor {brief(name)} of {self._file} has no place in base model {self._base!r}: adapters are on "
                    "linears of attention, MLP and experts, and on the unembedding."
                )
            stored = stored_tensors(read_index(model), quantization(read_json(model / "config.json")))
            own = stored[_EMBEDDING if tied else weight].read()
            if own.shape != entry.shape or not np.array_equal(own.astype(entry.stored_dtype), entry.read()):
                raise UnsupportedError(
                    f"adapter tensor {brief(name)} of {self._file} cannot be imported: it is not the embedding of base model "
                    f"{self._base!r}, and an adapter here replaces no weight."
                )


def _targets_of_names(targets: Sequence[LoraTarget]) -> list[LoraTarget]:
    """Each weight once: experts are targets in two forms."""
    return [target for target in targets if target.groups != (lora.PER_EXPERT,)]


def _places(target: LoraTarget) -> range:
    return range(max(1, target.stacked))


def _fill(target: LoraTarget, factors: Mapping[str, np.ndarray], files: _Files, rank: int) -> None:
    """Writes what the files have over the factors of a fresh adapter."""
    for at in _places(target):
        a, b = (factors[name][at] if target.stacked else factors[name] for name in ("a", "b"))
        for number, row in enumerate(target.weights):
            own = target.of_weight(number, a, b)
            for expert, A, B in files.of(row, at, rank):
                to_a, to_b = own if expert is None else (x[expert if len(x) > 1 else 0] for x in own)
                r = len(A)
                to_a[:, :r], to_a[:, r:] = A.T, 0
                to_b[:r], to_b[r:] = B.T, 0
