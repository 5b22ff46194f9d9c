"""`Datum`: one training example, and the spans that say where its tokens came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tinker_jax.types import _check
from tinker_jax.types._arrays import as_numpy, is_torch
from tinker_jax.types._show import listing
from tinker_jax.types.coerce import coerce, looks_like
from tinker_jax.types.errors import ArgumentTypeError, BadRequestError, UnknownKeyError, UnpairedSpansError
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.tensor_data import AnyArray, TensorData, TensorDtype

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


def _check_span(span: PromptProvenanceSpan | SampledProvenanceSpan) -> None:
    name = type(span).__name__
    _check.text(span.sequence_id, f"{name}.sequence_id")
    for key in ("offset", "length"):
        object.__setattr__(span, key, _check.integer(getattr(span, key), f"{name}.{key}", minimum=0))


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
            sparse where that saves space), an array of NumPy or JAX, or a list whose dtype follows from its key. A name that
            no loss reads may be kept here, and is refused by `forward_backward`.
        model_input_spans, loss_fn_input_spans: where the tokens came from; set both or neither, best by
            `with_provenance`.

    Raises:
        BadRequestError: ragged lists, non-integral target tokens, an array of another kind of numbers.
        ArgumentTypeError: a value of another type (also a TypeError).
        UnknownKeyError: a list under a key whose dtype is unknown; pass a `TensorData` instead (also a KeyError).
        UnpairedSpansError: one of the two lists of spans (also an AssertionError).
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    if TYPE_CHECKING:
        # What is taken is more than what is kept.
        def __init__(
            self,
            model_input: ModelInput,
            loss_fn_inputs: Mapping[str, TensorData | AnyArray | Sequence[Any]] = ...,
            model_input_spans: ProvenanceSpans | None = None,
            loss_fn_input_spans: ProvenanceSpans | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_input", coerce(ModelInput, self.model_input, "Datum.model_input"))
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise _check.refuse("Datum.loss_fn_inputs", "a dict of tensors", self.loss_fn_inputs)
        tensors = {key: _as_tensor(key, value) for key, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        for name in ("model_input_spans", "loss_fn_input_spans"):
            spans = getattr(self, name)
            object.__setattr__(self, name, None if spans is None else _as_spans(name, spans))
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise UnpairedSpansError(
                "model_input_spans, loss_fn_input_spans: provenance comes as a pair, set both span lists or neither"
            )

    def __repr__(self) -> str:
        spans = "".join(
            f", {name}={listing(getattr(self, name), most=2)}"
            for name in ("model_input_spans", "loss_fn_input_spans")
            if getattr(self, name) is not None
        )
        return f"Datum(model_input={self.model_input}, loss_fn_inputs={self.loss_fn_inputs}{spans})"

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> Datum:
        """A copy that says where its tokens came from.

        Args:
            model_input: runs whose lengths sum to `model_input.length`.
            loss_fn_inputs: runs whose lengths sum to the length of a 1-D `target_tokens`.

        Raises:
            BadRequestError: the runs do not tile their field.
        """
        model_input = _as_spans("with_provenance: model_input", model_input)
        loss_fn_inputs = _as_spans("with_provenance: loss_fn_inputs", loss_fn_inputs)
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


def _as_spans(name: str, spans: Any) -> ProvenanceSpans:
    if not _check.is_list(spans):
        raise _check.refuse(name, "a list of spans", spans)
    for span in spans:
        if not (looks_like(PromptProvenanceSpan, span) or looks_like(SampledProvenanceSpan, span)):
            raise ArgumentTypeError(
                f"{name}: expected PromptProvenanceSpan or SampledProvenanceSpan, got {type(span).__name__}"
            )
    return [
        coerce(SampledProvenanceSpan if looks_like(SampledProvenanceSpan, span) else PromptProvenanceSpan, span, name)
        for span in spans
    ]


def _as_tensor(key: Any, value: Any) -> TensorData:
    if not isinstance(key, str):
        raise _check.refuse("loss_fn_inputs", "names as keys", key)
    where = f"loss_fn_inputs[{key!r}]"
    if isinstance(value, list) and key not in _KEY_DTYPES:
        raise UnknownKeyError(
            f"{where}: the dtype of a list follows from its key, and this key is not one of "
            f"{', '.join(_KEY_DTYPES)}; pass TensorData(data, dtype) or a numpy array"
        )
    try:
        if looks_like(TensorData, value):
            return coerce(TensorData, value, "value")
        if isinstance(value, list):
            tensor = TensorData(value, _KEY_DTYPES[key])
            return replace(tensor, shape=list(tensor.to_numpy().shape))
        if is_torch(value) and value.ndim == 2 and key in _SPARSE_KEYS:
            return TensorData.from_torch_sparse(value)
        array = as_numpy(value, "value")
        if array is not None:
            return TensorData.from_numpy(array)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error.message}") from None
    raise ArgumentTypeError(
        f"{where}: expected TensorData, an array of NumPy, JAX or PyTorch, or a list, got {type(value).__name__}"
    )
