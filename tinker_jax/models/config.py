"""What every family's configuration tells, and checked reading of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, UnsupportedError

if TYPE_CHECKING:
    from tinker_jax.models.block import Group


class FileNames(NamedTuple):
    """What the table of weights does not tell of a family's files.

    Attributes:
        unused: beginnings of names of tensors that files may hold and the model does not use.
        tinker: parts of Hugging Face names, and what stands in their place in Tinker's adapters.
    """

    unused: tuple[str, ...] = ()
    tinker: tuple[tuple[str, str], ...] = ()


class ModelConfig(Protocol):
    """A decoder: an embedding, groups of layers, a final norm, an unembedding.

    Letters as in CONTRIBUTING.md: V vocabulary, D width, L layers.

    Attributes:
        model_type: the family's name in `config.json`.
        norm_eps: of the final norm.
        tied: the unembedding is the embedding's matrix.
        context_length: tokens.
        groups: the layers, in order.
        file_names: beside those in the table of weights.
    """

    @property
    def model_type(self) -> str: ...
    @property
    def V(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def L(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied(self) -> bool: ...
    @property
    def context_length(self) -> int: ...
    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def file_names(self) -> FileNames: ...


#: Indices are int32. Names are made for each layer, and tables for each page of a context, before a file could disagree.
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
_MOST_CONTEXT = 2**27


def size(cfg: Mapping[str, Any], key: str, most: int = _MOST, least: int = 1) -> int:
    """A whole number of `config.json`.

    Raises:
        BadRequestError: it is none, or out of range.
        KeyError: it is not there.
    """
    return _check.integer(cfg[key], f"config.json: {key}", minimum=least, maximum=most)


def number(cfg: Mapping[str, Any], key: str) -> float:
    """A positive number of `config.json`; raises as `size`."""
    return _check.real(cfg[key], f"config.json: {key}", above=0)


class Reader:
    """Values of a `config.json`; a value that no code here is written for is refused by name."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        self.cfg, self.model_type = cfg, cfg["model_type"]

    def need(self, key: str, most: int = _MOST, least: int = 1) -> int:
        """A whole number that must be there."""
        if self.cfg.get(key) is None:
            raise BadRequestError(f"config.json: {key} is missing; a {self.model_type} model needs it.")
        return size(self.cfg, key, most, least)

    def maybe(self, key: str) -> int | None:
        """A whole number, or None where it is missing or null."""
        return None if self.cfg.get(key) is None else size(self.cfg, key)

    def count(self, key: str, most: int = _MOST) -> int:
        """A whole number; 0 where it is missing or null."""
        return 0 if self.cfg.get(key) is None else size(self.cfg, key, most, least=0)

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        return number({key: default, **self.cfg}, key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return _check.boolean(self.cfg.get(key, default), f"config.json: {key}")

    def require(self, key: str, supported: Any, default: Any) -> None:
        """Refuses every value but one."""
        value = self.cfg.get(key, default)
        if value != supported:
            raise UnsupportedError(
                f"config.json: {key}={brief(value)} is not supported for {self.model_type}; only {supported!r} is."
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.need("num_hidden_layers", _MOST_LAYERS)

    @property
    def predictors(self) -> int:
        """Number of layers beyond `layers` that files have for multi-token prediction."""
        return self.count("num_nextn_predict_layers", _MOST_LAYERS)

    @property
    def context_length(self) -> int:
        """Tokens."""
        return size({"max_position_embeddings": 2048, **self.cfg}, "max_position_embeddings", _MOST_CONTEXT)

    def heads(self) -> tuple[int, int]:
        """Numbers of query heads and of key heads."""
        heads = self.need("num_attention_heads")
        kv_heads = self.maybe("num_key_value_heads") or heads
        if heads % kv_heads:
            raise BadRequestError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}.")
        return heads, kv_heads

    def experts(self, *keys: str) -> tuple[int, int]:
        """Numbers of experts and of those that a token goes to.

        Args:
            *keys: under which families keep the first, tried in turn.
        """
        keys = keys or ("num_experts", "num_local_experts")
        key = next((key for key in keys if self.cfg.get(key) is not None), keys[0])
        experts, chosen = self.need(key), self.need("num_experts_per_tok")
        if chosen > experts:
            raise BadRequestError(f"config.json: num_experts_per_tok={chosen} is above {key}={experts}.")
        return experts, chosen

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is missing or null."""
        value = self.cfg.get(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            raise _check.refuse(f"config.json: {key}", "a list of layers", value)
        return tuple(_check.integer(x, f"config.json: {key}[{i}]", minimum=0) for i, x in enumerate(value))

    def head_dim(self, default: int | None = None) -> int:
        """Width of a head; by default `default`, or the model's width divided by the number of heads."""
        width, heads = self.need("hidden_size"), self.need("num_attention_heads")
        head_dim = self.maybe("head_dim") or default
        if head_dim is None:
            if width % heads:
                raise BadRequestError(f"config.json: hidden_size={width} is no multiple of num_attention_heads={heads}.")
            head_dim = width // heads
        if head_dim % 2:
            raise UnsupportedError(f"config.json: head_dim={head_dim} is odd; rotary embedding needs an even width.")
        return head_dim
