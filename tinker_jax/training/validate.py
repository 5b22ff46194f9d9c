"""Checks of what a caller hands to `forward` and `forward_backward`, before anything is queued or changed.

Every refusal is one error that names the datum and field, what was expected, what was got and what to do. Loads no jax, so
that it can run at the call. Objects of the `tinker` package pass as ours do: only their attributes are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, UnsupportedError
from tinker_jax.types.loss_specs import LOSS_SPECS, LossInput, LossSpec

_CLIP_LOW, _CLIP_HIGH = "clip_low_threshold", "clip_high_threshold"
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def check_data(
    data: Sequence[Any],
    loss_fn: str,
    config: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
) -> None:
    """Check everything that can be known without the model: data, loss and its configuration.

    Args:
        data: `Datum`s.
        loss_fn: the loss they are meant for.
        config: its configuration, or None.
        vocab_size: token ids must be below it; None checks only that they are not negative.
        context_length: most tokens of a datum; None checks no upper bound.

    Raises:
        BadRequestError: anything malformed. The first problem found is reported.
        UnsupportedError: image or audio chunks.
    """
    spec = check_loss(loss_fn, config)
    if len(data) == 0:
        raise BadRequestError("data: expected at least one Datum, got none")
    thresholds = {**spec.config, **(config or {})}
    for index, datum in enumerate(data):
        where = f"data[{index}]"
        if not hasattr(datum, "model_input") or not hasattr(datum, "loss_fn_inputs"):
            raise BadRequestError(f"{where}: expected a Datum, got {type(datum).__name__}")
        length = _check_model_input(datum.model_input, f"{where}.model_input", vocab_size, context_length)
        _check_inputs(datum.loss_fn_inputs, f"{where}.loss_fn_inputs", spec, length, vocab_size, thresholds)


def check_loss(loss_fn: str, config: Mapping[str, Any] | None = None) -> LossSpec:
    """The table's row of `loss_fn`, once its configuration is known to be sound.

    Raises:
        BadRequestError: unknown loss, unknown key, a value that is not a finite number, bounds that cross.
    """
    if not isinstance(loss_fn, str) or loss_fn not in LOSS_SPECS:
        raise BadRequestError(f"loss_fn: unknown loss {brief(loss_fn)}; known: {', '.join(LOSS_SPECS)}")
    spec = LOSS_SPECS[loss_fn]
    if config is not None and not isinstance(config, Mapping):
        raise BadRequestError(f"loss_fn_config: expected a dict or None, got {type(config).__name__}")
    for key, value in (config or {}).items():
        if key not in spec.config:
            known = ", ".join(f"{name} (default {default:g})" for name, default in spec.config.items())
            raise BadRequestError(f"loss_fn_config: {loss_fn} has no key {brief(key)}; known: {known or 'none'}")
        if not isinstance(value, int | float | np.integer | np.floating) or not _is_float32(value):
            raise BadRequestError(f"loss_fn_config[{key!r}]: expected a finite number, got {brief(value)}")
    values = {**spec.config, **(config or {})}
    if _CLIP_LOW in values and values[_CLIP_LOW] > values[_CLIP_HIGH]:
        raise BadRequestError(
            f"loss_fn_config: expected clip_low_threshold <= clip_high_threshold, got {values[_CLIP_LOW]} and "
            f"{values[_CLIP_HIGH]}; both bound the ratio itself, such as 0.8 and 1.2"
        )
    return spec


def _check_model_input(model_input: Any, where: str, vocab_size: int | None, context_length: int | None) -> int:
    """The number of tokens."""
    length = 0
    for index, chunk in enumerate(model_input.chunks):
        if getattr(chunk, "type", None) != "encoded_text":
            raise UnsupportedError(
                f"{where}.chunks[{index}]: {type(chunk).__name__} needs a model that reads images or audio; this one "
                "reads text only. Pass EncodedTextChunk"
            )
        tokens = np.asarray(chunk.tokens)
        if tokens.size:
            _check_tokens(tokens, f"{where}.chunks[{index}].tokens", vocab_size)
        length += tokens.size
    if length == 0:
        raise BadRequestError(f"{where}: expected at least one token, got an empty sequence; leave the datum out")
    if context_length is not None and length > context_length:
        raise BadRequestError(
            f"{where}: {length} tokens exceed the model's context of {context_length}; truncate or split the sequence"
        )
    return length


def _check_inputs(
    inputs: Mapping[str, Any],
    where: str,
    spec: LossSpec,
    length: int,
    vocab_size: int | None,
    thresholds: Mapping[str, float],
) -> None:
    for key in inputs:
        if key not in spec.inputs:
            raise BadRequestError(
                f"{where}: {spec.name} takes no input {key!r}; it takes {', '.join(spec.inputs)}. Remove it, or check loss_fn"
            )
    missing = [key for key, declared in spec.inputs.items() if declared.required and key not in inputs]
    if missing:
        raise BadRequestError(f"{where}: {spec.name} needs {missing[0]!r}, got {', '.join(sorted(inputs)) or 'nothing'}")

    targets = _array(inputs["target_tokens"], f"{where}['target_tokens']", spec.inputs["target_tokens"])
    _check_target_shape(targets.shape, f"{where}['target_tokens']", spec, length)
    _check_tokens(targets, f"{where}['target_tokens']", vocab_size)
    arrays = {}
    for key, tensor in inputs.items():
        if key == "target_tokens":
            continue
        array = _array(tensor, f"{where}[{key!r}]", spec.inputs[key])
        if array.shape != targets.shape:
            raise BadRequestError(f"{where}[{key!r}]: expected the shape of target_tokens, {targets.shape}, got {array.shape}")
        if not np.isfinite(array).all():
            at = _first(~np.isfinite(array))
            raise BadRequestError(f"{where}[{key!r}]: expected finite numbers, got {array[at]} at {_show(at)}")
        arrays[key] = array
    _check_bounds(arrays, where, thresholds)


def _check_target_shape(shape: tuple[int, ...], where: str, spec: LossSpec, length: int) -> None:
    fits = shape == (length,) or (spec.top_k_targets and len(shape) == 2 and shape[0] == length and shape[1] > 0)
    if not fits:
        expected = f"({length},)" + (f" or ({length}, K)" if spec.top_k_targets else "")
        raise BadRequestError(
            f"{where}: expected shape {expected}, one target for each token of model_input, got {shape}. The target of "
            "position i is the token after it"
        )


def _check_tokens(tokens: np.ndarray, where: str, vocab_size: int | None) -> None:
    if tokens.dtype.kind not in "iu":
        raise BadRequestError(f"{where}: expected integer token ids, got {tokens.dtype}")
    wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        at = _first(wrong)
        expected = "at least 0" if vocab_size is None else f"in [0, {vocab_size}), the model's vocabulary"
        hint = "; there is no ignore index, give the position a weight or advantage of 0" if tokens[at] < 0 else ""
        raise BadRequestError(f"{where}: expected ids {expected}, got {tokens[at]} at {_show(at)}{hint}")


def _check_bounds(arrays: Mapping[str, np.ndarray], where: str, thresholds: Mapping[str, float]) -> None:
    """Where positions bring clip bounds of their own, they must not cross those of the configuration either."""
    if not {_CLIP_LOW, _CLIP_HIGH} & arrays.keys() or _CLIP_LOW not in thresholds:
        return
    low, high = (arrays.get(key, np.float32(thresholds[key])) for key in (_CLIP_LOW, _CLIP_HIGH))
    crossed = np.asarray(low > high)
    if crossed.any():
        at = _first(crossed)
        low, high = (np.broadcast_to(bound, crossed.shape)[at] for bound in (low, high))
        raise BadRequestError(
            f"{where}: expected clip_low_threshold <= clip_high_threshold, got {low:g} and {high:g} at {_show(at)}"
        )


def _array(tensor: Any, where: str, declared: LossInput) -> np.ndarray:
    if not hasattr(tensor, "to_numpy") or not hasattr(tensor, "dtype"):
        raise BadRequestError(f"{where}: expected TensorData, got {type(tensor).__name__}")
    if tensor.dtype != declared.dtype:
        kind = "integers" if declared.dtype == "int64" else "floats"
        raise BadRequestError(f"{where}: expected dtype {declared.dtype}, got {tensor.dtype}; pass {kind}")
    try:
        return np.asarray(tensor.to_numpy())
    # A foreign CSR tensor is unchecked; memory may be short for any.
    except (AssertionError, RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise BadRequestError(f"{where}: the sparse indices do not describe a tensor: {error}") from error


def _is_float32(value: Any) -> bool:
    number = _check.number(value, "loss_fn_config")
    try:
        return number is not None and abs(float(number)) <= _FLOAT32_MAX  # false for NaN
    except OverflowError:
        return False


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _show(at: tuple[int, ...]) -> str:
    return f"position {at[0]}" if len(at) == 1 else f"position {list(at)}"
