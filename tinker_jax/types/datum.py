"""`Datum`: one training example, and the spans that say where its tokens came from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from tinker_jax.types import _check
from tinker_jax.types.coerce import coerce, looks_like
from tinker_jax.types.errors import BadRequestError
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.tensor_data import TensorData, TensorDtype

LossFnInputs: TypeAlias = dict[str, TensorData]

# A Python list carries no dtype of its own; the key decides.
_KEY_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
_SPARSE_KEYS = ("target_tokens", "weights")


def _check_span(span: Any) -> None:
    name = type(span).__name__
    _check.text(span.sequence_id, f"{name}.sequence_id")
    _check.integer(span.offset, f"{name}.offset", minimum=0)
    _check.integer(span.length, f"{name}.length", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan:
    """A run of tokens that were positions `[offset, offset + length)` of a sampled sequence's prompt."""

    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        _check_span(self)


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan:
    """A run of tokens that were positions `[offset, offset + length)` of what a sequence sampled."""

    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        _check_span(self)


ProvenanceSpans: TypeAlias = list[PromptProvenanceSpan | SampledProvenanceSpan]


@dataclass(frozen=True)
class Datum:
    """One example: the input, and the tensors its loss reads.

    Attributes:
        model_input: N positions.
        loss_fn_inputs: tensors by name, kept in a dict of the datum's own, which may be changed in place. Values that
            are not `TensorData` are converted: a torch tensor (a 2-D one under `target_tokens` or `weights` goes
            sparse where that saves space), a numpy array, or a list whose dtype follows from its key.
        model_input_spans, loss_fn_input_spans: where the tokens came from; set both or neither, best by
            `with_provenance`.

    Raises:
        TypeError: a value of another type.
        KeyError: a list under a key whose dtype is unknown; pass a `TensorData` instead.
        BadRequestError: ragged lists, non-integral target tokens.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_input", coerce(ModelInput, self.model_input, "Datum.model_input"))
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise _check.refuse("Datum.loss_fn_inputs", "a dict of tensors", self.loss_fn_inputs)
        tensors = {key: _as_tensor(key, value) for key, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        for name in ("model_input_spans", "loss_fn_input_spans"):
            object.__setattr__(self, name, _as_spans(name, getattr(self, name)))
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise AssertionError("provenance comes as a pair: set both span lists or neither")

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> Datum:
        """A copy that says where its tokens came from.

        Args:
            model_input: runs whose lengths sum to `model_input.length`.
            loss_fn_inputs: runs whose lengths sum to the length of a 1-D `target_tokens`.

        Raises:
            BadRequestError: the runs do not tile their field.
        """
        _check_tiling("model_input", model_input, self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and targets.shape is not None and len(targets.shape) == 1:
            _check_tiling("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        return replace(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)

    def copy(self) -> Datum:
        """The same datum over tensors of its own, for work that outlives the call."""
        return replace(self, loss_fn_inputs={key: _as_tensor(key, v).copy() for key, v in self.loss_fn_inputs.items()})


def _check_tiling(name: str, spans: ProvenanceSpans, length: int) -> None:
    total = sum(span.length for span in spans)
    if total != length:
        raise BadRequestError(f"with_provenance: the {name} spans cover {total} positions, the field has {length}")


def _as_spans(name: str, spans: Any) -> ProvenanceSpans | None:
    if spans is None:
        return None
    for span in spans:
        if not (looks_like(PromptProvenanceSpan, span) or looks_like(SampledProvenanceSpan, span)):
            raise TypeError(f"{name}: expected PromptProvenanceSpan or SampledProvenanceSpan, got {type(span).__name__}")
    return [
        coerce(SampledProvenanceSpan if looks_like(SampledProvenanceSpan, span) else PromptProvenanceSpan, span, name)
        for span in spans
    ]


def _as_tensor(key: str, value: Any) -> TensorData:
    where = f"loss_fn_inputs[{key!r}]"
    if looks_like(TensorData, value):
        return coerce(TensorData, value, where)
    torch = sys.modules.get("torch")  # a torch tensor exists only where torch is loaded
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            sparse = key in _SPARSE_KEYS and value.ndim == 2
            return TensorData.from_torch_sparse(value) if sparse else TensorData.from_torch(value)
        if isinstance(value, np.ndarray):
            return TensorData.from_numpy(value)
        if isinstance(value, list):
            return _list_to_tensor(key, value)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error.message}") from None
    raise TypeError(f"{where}: expected TensorData, a torch tensor, a numpy array or a list, got {type(value).__name__}")


def _list_to_tensor(key: str, value: list[Any]) -> TensorData:
    if key not in _KEY_DTYPES:
        raise KeyError(
            f"loss_fn_inputs[{key!r}]: the dtype of a list follows from its key, and this key is not one of "
            f"{', '.join(_KEY_DTYPES)}; pass TensorData(data, dtype) or a numpy array"
        )
    tensor = TensorData(value, _KEY_DTYPES[key])
    return replace(tensor, shape=list(tensor.to_numpy().shape))
