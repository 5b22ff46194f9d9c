"""`forward_backward_custom`: from the caller's loss to its gradient with respect to the log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Literal, TypeAlias

import numpy as np

from tinker_jax.types import ForwardBackwardOutput, _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, MissingPackageError
from tinker_jax.types.training import CustomLossInput

if TYPE_CHECKING:
    import torch

CustomLossBackend = Literal["torch", "jax"]
CustomLossFn: TypeAlias = Callable[[list[Any], list[Any]], tuple[Any, Mapping[str, Any]]]
PerDatumLossFn: TypeAlias = Callable[Concatenate["torch.Tensor", ...], tuple["torch.Tensor", Mapping[str, "torch.Tensor"]]]
GradFn: TypeAlias = Callable[[list[np.ndarray]], tuple[float, dict[str, float], list[np.ndarray]]]


@dataclass(frozen=True)
class LossHandle:
    """A loss uploaded with `ServiceClient.create_custom_loss`, which in process has nowhere to be uploaded to. The class
    is here for `isinstance` and annotations; `forward_backward_custom` takes a callable."""

    name: str
    inputs: tuple[CustomLossInput, ...]
    session_id: str
    graph: Any
    loss_id: str | None = None


def grad_fn(loss_fn: CustomLossFn, data: Sequence[Any], backend: CustomLossBackend) -> GradFn:
    """The function the engine calls between the forward and the backward pass.

    Args:
        loss_fn: `(data, logprobs) -> (scalar loss, metrics)`, over torch tensors or JAX arrays.
        data: what the caller passed, handed to `loss_fn` as it is.
        backend: which of the two `loss_fn` is written in.

    Returns:
        A function from float32 log-probabilities, one array a datum in the shape of its `target_tokens`, to the loss, the
        metrics and the gradients, in the same shapes.
    """
    _check.one_of(backend, ("torch", "jax"), "backend")
    differentiate = _torch_gradients if backend == "torch" else _jax_gradients
    if not callable(loss_fn):
        raise BadRequestError(f"loss_fn: expected a callable (data, logprobs), got {type(loss_fn).__name__}")
    if backend == "torch":
        _import_torch()
    data = list(data)

    def run(logprobs: list[np.ndarray]) -> tuple[float, dict[str, float], list[np.ndarray]]:
        loss, metrics, grads = differentiate(loss_fn, data, logprobs)
        for i, grad in enumerate(grads):
            if not np.all(np.isfinite(grad)):
                raise BadRequestError(f"data[{i}]: the custom loss has a gradient that is not finite")
        return loss, {name: _number(name, value) for name, value in metrics.items()}, grads

    return run


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingPackageError("a torch loss needs PyTorch installed; or write it in JAX and pass backend='jax'") from None
    return torch


def _torch_gradients(loss_fn: CustomLossFn, data: list[Any], logprobs: list[np.ndarray]) -> tuple[float, Any, list]:
    torch = _import_torch()
    tensors = [torch.tensor(values, dtype=torch.float32).requires_grad_(True) for values in logprobs]
    with torch.enable_grad():
        loss, metrics = _unpack(loss_fn(data, tensors))
        if not isinstance(loss, torch.Tensor):
            raise BadRequestError(f"the custom loss must be a torch tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise BadRequestError(f"the custom loss must be one number, got shape {list(loss.shape)}; sum it")
        if not loss.requires_grad:
            raise BadRequestError("the custom loss does not depend on the logprobs, so it has no gradient")
        loss.backward()
    for i, tensor in enumerate(tensors):
        if tensor.grad is None:
            raise BadRequestError(
                f"data[{i}]: No gradient computed for logprob tensor; the loss must depend on every datum's logprobs"
            )
    return float(loss.detach().sum()), metrics, [tensor.grad.numpy() for tensor in tensors]


def _jax_gradients(loss_fn: CustomLossFn, data: list[Any], logprobs: list[np.ndarray]) -> tuple[float, Any, list]:
    import jax
    import jax.numpy as jnp

    def loss_of(arrays: list[jax.Array]) -> tuple[jax.Array, Any]:
        loss, metrics = _unpack(loss_fn(data, arrays))
        if jnp.shape(loss) != ():
            raise BadRequestError(f"the custom loss must be one number, got shape {list(jnp.shape(loss))}; sum it")
        return loss, metrics

    arrays = [jnp.asarray(values, dtype=jnp.float32) for values in logprobs]
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(arrays)
    return float(loss), metrics, [np.asarray(grad) for grad in grads]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise BadRequestError(f"metric {name!r} of the custom loss: expected a number, got {brief(value)}") from None


def _unpack(returned: Any) -> tuple[Any, Any]:
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise BadRequestError(f"the custom loss must return (loss, metrics dict), got {type(returned).__name__}")
    return returned


def with_custom_metrics(output: ForwardBackwardOutput, loss: float, metrics: dict[str, float]) -> ForwardBackwardOutput:
    """The backward pass's output under the custom loss's name: the loss that was differentiated, a linear stand-in whose
    gradient is the custom one, moves to `surrogate_loss:sum`."""
    own = dict(output.metrics)
    surrogate = {"surrogate_loss:sum": own.pop("loss:sum")} if "loss:sum" in own else {}
    return ForwardBackwardOutput(
        loss_fn_output_type=output.loss_fn_output_type,
        loss_fn_outputs=output.loss_fn_outputs,
        metrics={**own, **surrogate, **metrics, "loss:sum": loss},
    )
