"""Checkpoints, runs, sessions, and what the queries about them give."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError
from tinker_jax.types.training import AdamOptimizerConfig, OptimizerConfig

CheckpointType: TypeAlias = Literal["training", "sampler", "external"]

_KIND_TO_TYPE: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A stored checkpoint.

    Attributes:
        checkpoint_id: `"weights/<name>"` or `"sampler_weights/<name>"`.
        tinker_path: `"tinker://<run>/<checkpoint_id>"`.
        expires_at: None: never.
    """

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ParsedCheckpointTinkerPath:
    """The parts of `tinker://<run>/<weights|sampler_weights|external_weights>/<name>`."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Parse; ValueError for any other form."""
        scheme = "tinker://"
        text = tinker_path if isinstance(tinker_path, str) else ""
        parts = text.removeprefix(scheme).split("/")
        if not text.startswith(scheme) or len(parts) != 3 or not all(parts) or parts[1] not in _KIND_TO_TYPE:
            raise BadRequestError(
                f"Invalid tinker path: {brief(tinker_path)}; expected tinker://<run>/<{'|'.join(_KIND_TO_TYPE)}>/<name>"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=parts[0],
            checkpoint_type=_KIND_TO_TYPE[parts[1]],
            checkpoint_id="/".join(parts[1:]),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training client's life: its base model, and its latest checkpoints."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Which page of how many."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, kw_only=True)
class CheckpointsListResponse:
    """A page of checkpoints."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRunsResponse:
    """A page of runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class SaveWeightsResponse:
    """Where `save_state` wrote."""

    path: str
    type: Literal["save_weights"] | None = None


@dataclass(frozen=True, kw_only=True)
class SaveWeightsForSamplerResponse:
    """Where `save_weights_for_sampler` wrote."""

    path: str
    type: Literal["save_weights_for_sampler"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadWeightsResponse:
    """What was loaded, and into which model."""

    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelData:
    """The model behind a client.

    Attributes:
        arch: model type, such as `"qwen3"`.
        tokenizer_id: what `transformers.AutoTokenizer.from_pretrained` loads: the model's local directory.
    """

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class GetInfoResponse:
    """What a training client trains."""

    type: Literal["get_info"] | None = None
    model_data: ModelData
    model_id: str
    optimizer_config: OptimizerConfig = field(default_factory=AdamOptimizerConfig)
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsInfoResponse:
    """What a checkpoint holds."""

    base_model: str
    optimizer_config: OptimizerConfig = field(default_factory=AdamOptimizerConfig)
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GetSamplerResponse:
    """What a sampling client samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class SupportedModel:
    """A model that can be used."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GetServerCapabilitiesResponse:
    """The models known by name."""

    supported_models: list[SupportedModel]


@dataclass(frozen=True, kw_only=True)
class GetSessionResponse:
    """One service client's runs and samplers."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class ListSessionsResponse:
    """Session ids, newest first."""

    sessions: list[str]
