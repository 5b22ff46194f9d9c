"""Tinker's training API in your own process, on JAX.

`import tinker_jax as tinker` and the same loop runs here. Names are loaded when first used, so that importing the package
costs next to nothing and pulls in neither jax nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker_jax import checkpoints, types
    from tinker_jax.api.admin_client import AdminClient
    from tinker_jax.api.custom_loss import LossHandle, PerDatumLossFn
    from tinker_jax.api.futures import APIFuture
    from tinker_jax.api.rest_client import RestClient
    from tinker_jax.api.sampling_client import BackcompatSamplingClientFuture, SamplingClient, warm_up
    from tinker_jax.api.service_client import ServiceClient
    from tinker_jax.api.training_client import BackcompatTrainingClientFuture, TrainingClient
    from tinker_jax.engine.config import EngineConfig
    from tinker_jax.types import (
        AdamOptimizerConfig,
        AdamParams,
        Checkpoint,
        CheckpointType,
        Datum,
        DimuonOptimizerConfig,
        DimuonParams,
        DmelChunk,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelID,
        ModelInput,
        ModelInputChunk,
        OptimParams,
        OptimStepRequest,
        OptimStepResponse,
        ParsedCheckpointTinkerPath,
        PromptProvenanceSpan,
        SampledProvenanceSpan,
        SampledSequence,
        SampleRequest,
        SampleResponse,
        SamplingParams,
        StopReason,
        TensorData,
        TensorDtype,
        TrainingRun,
    )
    from tinker_jax.types.errors import (
        APIConnectionError,
        APIError,
        APIResponseValidationError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        BillingError,
        ConflictError,
        ExperimentalWarning,
        InternalServerError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        RequestFailedError,
        StorageError,
        TinkerError,
        UnprocessableEntityError,
        UnsupportedError,
    )

    __version__: str

# Everything public that is neither a type nor an error.
_HOMES = {
    "APIFuture": "tinker_jax.api.futures",
    "AdminClient": "tinker_jax.api.admin_client",
    "BackcompatSamplingClientFuture": "tinker_jax.api.sampling_client",
    "BackcompatTrainingClientFuture": "tinker_jax.api.training_client",
    "EngineConfig": "tinker_jax.engine.config",
    "LossHandle": "tinker_jax.api.custom_loss",
    "PerDatumLossFn": "tinker_jax.api.custom_loss",
    "RestClient": "tinker_jax.api.rest_client",
    "SamplingClient": "tinker_jax.api.sampling_client",
    "ServiceClient": "tinker_jax.api.service_client",
    "TrainingClient": "tinker_jax.api.training_client",
    "warm_up": "tinker_jax.api.sampling_client",
}

__title__ = "tinker_jax"

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AdminClient",
    "AuthenticationError",
    "BackcompatSamplingClientFuture",
    "BackcompatTrainingClientFuture",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointType",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "EngineConfig",
    "ExperimentalWarning",
    "ForwardBackwardOutput",
    "InternalServerError",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "StorageError",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "UnsupportedError",
    "__title__",
    "__version__",
    "checkpoints",
    "types",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in ("checkpoints", "types"):
        value = importlib.import_module(f"tinker_jax.{name}")
    elif name in __all__:
        errors = importlib.import_module("tinker_jax.types.errors")
        home = errors if hasattr(errors, name) else importlib.import_module(_HOMES.get(name, "tinker_jax.types"))
        value = getattr(home, name)
    else:
        raise AttributeError(f"module 'tinker_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """The version in `pyproject.toml`, by way of the installed package or, in a bare checkout, the file itself."""
    from importlib import metadata

    try:
        return metadata.version("tinker-jax")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
