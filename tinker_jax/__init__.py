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
    from tinker_jax.api.sampling_client import BackcompatSamplingClientFuture, SamplingClient
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

    __title__: str
    __version__: str

_HOMES = {
    "tinker_jax.api.admin_client": ["AdminClient"],
    "tinker_jax.api.custom_loss": ["LossHandle", "PerDatumLossFn"],
    "tinker_jax.api.futures": ["APIFuture"],
    "tinker_jax.api.rest_client": ["RestClient"],
    "tinker_jax.api.sampling_client": ["BackcompatSamplingClientFuture", "SamplingClient"],
    "tinker_jax.api.service_client": ["ServiceClient"],
    "tinker_jax.api.training_client": ["BackcompatTrainingClientFuture", "TrainingClient"],
    "tinker_jax.engine.config": ["EngineConfig"],
    "tinker_jax.types": [
        "AdamOptimizerConfig",
        "AdamParams",
        "Checkpoint",
        "CheckpointType",
        "Datum",
        "DimuonOptimizerConfig",
        "DimuonParams",
        "DmelChunk",
        "EncodedTextChunk",
        "ForwardBackwardOutput",
        "LoraConfig",
        "ModelID",
        "ModelInput",
        "ModelInputChunk",
        "OptimParams",
        "OptimStepRequest",
        "OptimStepResponse",
        "ParsedCheckpointTinkerPath",
        "PromptProvenanceSpan",
        "SampledProvenanceSpan",
        "SampledSequence",
        "SampleRequest",
        "SampleResponse",
        "SamplingParams",
        "StopReason",
        "TensorData",
        "TensorDtype",
        "TrainingRun",
    ],
    "tinker_jax.types.errors": [
        "APIConnectionError",
        "APIError",
        "APIResponseValidationError",
        "APIStatusError",
        "APITimeoutError",
        "AuthenticationError",
        "BadRequestError",
        "BillingError",
        "ConflictError",
        "ExperimentalWarning",
        "InternalServerError",
        "NotFoundError",
        "PermissionDeniedError",
        "RateLimitError",
        "RequestFailedError",
        "StorageError",
        "TinkerError",
        "UnprocessableEntityError",
        "UnsupportedError",
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("checkpoints", "types")

__all__ = [*sorted(_HOME_OF), "__title__", "__version__", *_SUBMODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"tinker_jax.{name}")
    elif name == "__version__":
        value = _version()
    elif name == "__title__":
        value = "tinker_jax"
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
