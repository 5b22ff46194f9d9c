"""What training calls take and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tinker_jax.types import _check
from tinker_jax.types._show import listing
from tinker_jax.types.coerce import coerce, looks_like
from tinker_jax.types.datum import Datum
from tinker_jax.types.errors import ArgumentTypeError, BadRequestError
from tinker_jax.types.tensor_data import TensorData

ModelID: TypeAlias = str
RequestID: TypeAlias = str
LossFnType: TypeAlias = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"
]
LossFnOutput: TypeAlias = dict[str, TensorData]
CustomLossInputRank: TypeAlias = Literal[0, 1, 2]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter to train. The update of a weight is scaled by 32 / rank.

    Attributes:
        rank: >= 1.
        seed: of the initial adapter, 64 bits; None: drawn anew each time.
        train_unembed, train_mlp, train_attn: which groups of weights carry an adapter; at least one.
    """

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "rank", _check.integer(self.rank, "LoraConfig.rank", minimum=1))
        if self.seed is not None:
            put(self, "seed", _check.seed(self.seed, "LoraConfig.seed"))
        for name in ("train_unembed", "train_mlp", "train_attn"):
            put(self, name, _check.boolean(getattr(self, name), f"LoraConfig.{name}"))
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise BadRequestError("LoraConfig: at least one of train_unembed, train_mlp and train_attn must be True")


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """Hyperparameters of one AdamW step, as in `torch.optim.AdamW`.

    Attributes:
        learning_rate: >= 0.
        beta1, beta2: in [0, 1).
        eps: > 0, added to the square root of the second moment.
        weight_decay: >= 0, decoupled.
        grad_clip_norm: largest global gradient norm; 0 does not clip.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            put(self, name, _check.real(getattr(self, name), f"AdamParams.{name}", minimum=0))
        put(self, "eps", _check.real(self.eps, "AdamParams.eps", above=0))
        for name in ("beta1", "beta2"):
            put(self, name, _check.real(getattr(self, name), f"AdamParams.{name}", minimum=0, below=1))


@dataclass(frozen=True, kw_only=True)
class DimuonParams:
    """Hyperparameters of one Dimuon step. Tinker's optimiser; its mathematics is unpublished, so `optim_step` here
    refuses it."""

    type: Literal["dimuon"] = "dimuon"
    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9

    def __post_init__(self) -> None:
        put = object.__setattr__
        _check.one_of(self.type, ("dimuon",), "DimuonParams.type")
        put(self, "learning_rate", _check.real(self.learning_rate, "DimuonParams.learning_rate", minimum=0))
        put(self, "grad_clip_norm", _check.real(self.grad_clip_norm, "DimuonParams.grad_clip_norm"))
        put(self, "beta1", _check.real(self.beta1, "DimuonParams.beta1", minimum=0, below=1))


OptimParams: TypeAlias = AdamParams | DimuonParams


def as_optim_params(value: Any, what: str = "optim_params") -> OptimParams:
    """`value` as `AdamParams` or `DimuonParams`; ArgumentTypeError for anything else."""
    for cls in (AdamParams, DimuonParams):
        if looks_like(cls, value):
            return coerce(cls, value, what)
    raise ArgumentTypeError(f"{what}: expected AdamParams or DimuonParams, got {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class AdamOptimizerConfig:
    """Chooses AdamW for a new training client."""

    type: Literal["adamw"] = "adamw"

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("adamw",), "AdamOptimizerConfig.type")


@dataclass(frozen=True, kw_only=True)
class DimuonOptimizerConfig:
    """Chooses Dimuon for a new training client, which is refused here."""

    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("dimuon",), "DimuonOptimizerConfig.type")
        _check.one_of(self.version, (1,), "DimuonOptimizerConfig.version")


OptimizerConfig: TypeAlias = AdamOptimizerConfig | DimuonOptimizerConfig


@dataclass(frozen=True)
class ForwardBackwardInput:
    """A batch and its loss."""

    data: list[Datum]
    loss_fn: LossFnType
    loss_fn_config: Mapping[str, float | str] | None = None

    def __post_init__(self) -> None:
        if not _check.is_list(self.data):
            raise _check.refuse("ForwardBackwardInput.data", "a list of Datum", self.data)
        data = [coerce(Datum, datum, f"ForwardBackwardInput.data[{i}]") for i, datum in enumerate(self.data)]
        object.__setattr__(self, "data", data)
        _check.text(self.loss_fn, "ForwardBackwardInput.loss_fn")
        if self.loss_fn_config is not None and not isinstance(self.loss_fn_config, Mapping):
            raise _check.refuse("ForwardBackwardInput.loss_fn_config", "a dict or None", self.loss_fn_config)

    def __repr__(self) -> str:
        rest = f"loss_fn={self.loss_fn!r}, loss_fn_config={self.loss_fn_config}"
        return f"ForwardBackwardInput(data={listing(self.data, most=2)}, {rest})"


def _check_request(request: ForwardBackwardRequest | ForwardRequest, name: str) -> None:
    kind, put = type(request).__name__, object.__setattr__
    put(request, name, coerce(ForwardBackwardInput, getattr(request, name), f"{kind}.{name}"))
    _check.text(request.model_id, f"{kind}.model_id")
    if request.seq_id is not None:
        put(request, "seq_id", _check.integer(request.seq_id, f"{kind}.seq_id", minimum=0))


@dataclass(frozen=True)
class ForwardBackwardRequest:
    """A `forward_backward` call."""

    forward_backward_input: ForwardBackwardInput
    model_id: ModelID
    seq_id: int | None = None

    def __post_init__(self) -> None:
        _check_request(self, "forward_backward_input")


@dataclass(frozen=True)
class ForwardRequest:
    """A `forward` call."""

    forward_input: ForwardBackwardInput
    model_id: ModelID
    seq_id: int | None = None

    def __post_init__(self) -> None:
        _check_request(self, "forward_input")


@dataclass(frozen=True, kw_only=True)
class OptimStepRequest:
    """An `optim_step` call."""

    optim_params: OptimParams
    model_id: ModelID
    seq_id: int | None = None
    type: Literal["optim_step"] = "optim_step"

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("optim_step",), "OptimStepRequest.type")
        _check.text(self.model_id, "OptimStepRequest.model_id")
        if self.seq_id is not None:
            object.__setattr__(self, "seq_id", _check.integer(self.seq_id, "OptimStepRequest.seq_id", minimum=0))
        object.__setattr__(self, "optim_params", as_optim_params(self.optim_params))


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What `forward` and `forward_backward` give.

    Attributes:
        loss_fn_output_type: name of the record type of the outputs.
        loss_fn_outputs: one dict a datum, in order; `"logprobs"` is float32 in the shape of `target_tokens`.
        metrics: values under `name:reduction`; `loss:sum` always.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        outputs = f"loss_fn_outputs={listing(self.loss_fn_outputs, most=2)}, metrics={self.metrics}"
        return f"ForwardBackwardOutput(loss_fn_output_type={self.loss_fn_output_type!r}, {outputs})"


@dataclass(frozen=True, kw_only=True)
class OptimStepResponse:
    """What `optim_step` gives.

    Attributes:
        metrics: values under `name:reduction`, the gradient norm before clipping among them.
    """

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class CustomLossInput:
    """An input that a traced loss reads."""

    name: str
    rank: CustomLossInputRank

    def __post_init__(self) -> None:
        _check.text(self.name, "CustomLossInput.name")
        _check.one_of(self.rank, (0, 1, 2), "CustomLossInput.rank")
