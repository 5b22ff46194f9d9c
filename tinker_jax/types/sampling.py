"""What `sample` takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from tinker_jax.types import _check
from tinker_jax.types._arrays import as_numpy
from tinker_jax.types._show import listing
from tinker_jax.types.coerce import coerce
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.tensor_data import TensorData

StopReason: TypeAlias = Literal["length", "stop"]
SamplingClientKind: TypeAlias = Literal["snapshot", "inflight"]

# Fills the slots of a top-k row that holds fewer than k tokens, together with token id 0.
MASK_LOGPROB = -99999.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens.

    Attributes:
        max_tokens: most tokens to draw; None: until a stop or the end of what fits, the context or the engine's cache.
        seed: makes the draw reproducible, 64 bits; None: different each time.
        stop: None stops at the model's end-of-sequence token; `[]` never stops; otherwise strings or token ids, the
            end-of-sequence token not among them unless listed. What stops a sequence is part of its tokens.
        temperature: >= 0; 0 is greedy.
        top_k: draw among the k likeliest; -1: all.
        top_p: draw among the likeliest that together reach this probability, in (0, 1].
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.max_tokens is not None:
            put(self, "max_tokens", _check.integer(self.max_tokens, "SamplingParams.max_tokens", minimum=1))
        if self.seed is not None:
            put(self, "seed", _check.seed(self.seed, "SamplingParams.seed"))
        put(self, "stop", _as_stop(self.stop))
        put(self, "temperature", _check.real(self.temperature, "SamplingParams.temperature", minimum=0))
        put(self, "top_p", _check.real(self.top_p, "SamplingParams.top_p", above=0, maximum=1))
        top_k = _check.integer(self.top_k, "SamplingParams.top_k", minimum=-1)
        if top_k == 0:
            raise _check.refuse("SamplingParams.top_k", "-1 (all tokens) or an integer >= 1", top_k)
        put(self, "top_k", top_k)


def _as_stop(stop: Any) -> str | list[str] | list[int] | None:
    expected = "None, a string, a list of strings or a list of token ids"
    if stop is None:
        return None
    if isinstance(stop, str):
        return _check.text(stop, "SamplingParams.stop")
    array = as_numpy(stop, "SamplingParams.stop")
    stop = stop if array is None else array.tolist()
    if not _check.is_list(stop):
        raise _check.refuse("SamplingParams.stop", expected, stop)
    if len(stop) and all(isinstance(item, str) for item in stop):
        return [_check.text(item, f"SamplingParams.stop[{i}]") for i, item in enumerate(stop)]
    if any(isinstance(item, str) for item in stop):
        raise _check.refuse("SamplingParams.stop", f"{expected}, not a mixture", stop)
    return [_check.integer(item, f"SamplingParams.stop[{i}]", minimum=0) for i, item in enumerate(stop)]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One call of `SamplingClient.sample`.

    Attributes:
        num_samples: sequences to draw from the one prompt.
        prompt_logprobs: also score the prompt.
        topk_prompt_logprobs, topk_sample_logprobs: how many of the likeliest tokens to report at each position.
        target_prompt_logprobs: int64 `[len(prompt) - 1, K]`, dense or CSR: token ids to score at position i + 1; -1
            asks for nothing.
        prompt_alt_tokens_k: independent draws to make at each prompt position after the first.
        prompt_logprobs_last_n: score only the end of the prompt.
    """

    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "prompt", coerce(ModelInput, self.prompt, "prompt"))
        put(self, "sampling_params", coerce(SamplingParams, self.sampling_params, "sampling_params"))
        put(self, "num_samples", _check.integer(self.num_samples, "num_samples", minimum=1))
        for name in ("base_model", "model_path", "sampling_session_id"):
            _check.optional_text(getattr(self, name), name)
        for name in ("prompt_logprobs", "record_stability_info"):
            if getattr(self, name) is not None:
                put(self, name, _check.boolean(getattr(self, name), name))
        if self.seq_id is not None:
            put(self, "seq_id", _check.integer(self.seq_id, "seq_id", minimum=0))
        _check.one_of(self.type, ("sample",), "type")
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            put(self, name, _check.integer(getattr(self, name), name, minimum=0))
        self._check_prompt_scoring()

    def _check_prompt_scoring(self) -> None:
        positions = self.prompt.length - 1
        if self.prompt_logprobs_last_n is not None:
            last_n = _check.integer(self.prompt_logprobs_last_n, "prompt_logprobs_last_n", minimum=1)
            object.__setattr__(self, "prompt_logprobs_last_n", last_n)
            if not self.prompt_logprobs:
                raise _check.refuse("include_prompt_logprobs", "True with prompt_logprobs_last_n", False)
            if last_n > positions:
                raise _check.refuse("prompt_logprobs_last_n", f"at most len(prompt) - 1 = {positions}", last_n)
        if self.target_prompt_logprobs is None:
            return
        targets = coerce(TensorData, self.target_prompt_logprobs, "target_prompt_logprobs")
        object.__setattr__(self, "target_prompt_logprobs", targets)
        if targets.dtype != "int64":
            raise _check.refuse("target_prompt_logprobs.dtype", "'int64'", targets.dtype)
        shape = targets.shape or list(targets.to_numpy().shape)
        if len(shape) != 2 or shape[0] != positions:
            raise _check.refuse("target_prompt_logprobs.shape", f"[len(prompt) - 1 = {positions}, K]", shape)


@dataclass(frozen=True, slots=True, eq=False)
class TopkLogprobs:
    """The likeliest tokens at each position, likeliest first; unused slots hold id 0 and log-probability -99999.

    Attributes:
        token_ids: int32 `[length, k]`.
        logprobs: float32 `[length, k]`.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray

    def __repr__(self) -> str:
        shape = list(self.token_ids.shape)
        return f"TopkLogprobs(token_ids={self.token_ids.dtype} {shape}, logprobs={self.logprobs.dtype} {shape})"


def topk_to_lists(topk: TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    """`(token id, logprob)` pairs by position; None where a position reports nothing."""
    length, k = topk.token_ids.shape
    if length == 0 or k == 0:
        return []
    used = (topk.token_ids != 0) | (topk.logprobs != np.float32(MASK_LOGPROB))
    counts = np.where(used[:, 0], k - np.argmax(used[:, ::-1], axis=1), 0).tolist()
    ids, logprobs = topk.token_ids.tolist(), topk.logprobs.tolist()
    return [list(zip(ids[i][:count], logprobs[i][:count], strict=True)) if count else None for i, count in enumerate(counts)]


@dataclass(frozen=True, eq=False)
class PromptAltTokens:
    """Draws made at each prompt position after the first.

    Attributes:
        tokens: int64 `[len(prompt) - 1, k]`.
        logprobs: float32 `[len(prompt) - 1, k]`.
    """

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One drawn sequence. The list properties are converted on first use.

    Attributes:
        stop_reason: `"stop"` if a stop rule ended it, `"length"` if the budget did.
        sequence_id: unique within the process.
        tokens_np: int32 `[n]`, the stopping tokens included.
        logprobs_np: float32 `[n]`, under the temperature, over the whole vocabulary.
        topk_logprobs_np: `[n, k]`, where asked for.
    """

    stop_reason: StopReason
    sequence_id: str
    tokens_np: np.ndarray | None = field(default=None, repr=False)
    logprobs_np: np.ndarray | None = field(default=None, repr=False)
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    _tokens_list: list[int] | None = field(default=None, repr=False)
    _logprobs_list: list[float] | None = field(default=None, repr=False)
    _topk_logprobs_list: list[list[tuple[int, float]] | None] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        tokens = listing(self.tokens, str)
        return f"SampledSequence(stop_reason={self.stop_reason!r}, sequence_id={self.sequence_id!r}, tokens={tokens})"

    @cached_property
    def tokens(self) -> list[int]:
        """Token ids."""
        if self._tokens_list is not None:
            return self._tokens_list
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """Log-probability of each token."""
        if self._logprobs_list is not None:
            return self._logprobs_list
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at each position, where asked for."""
        if self._topk_logprobs_list is not None:
            return self._topk_logprobs_list
        return None if self.topk_logprobs_np is None else topk_to_lists(self.topk_logprobs_np)


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """What one `sample` call gives. The list properties are converted on first use.

    Attributes:
        sequences: `num_samples` of them.
        prompt_logprobs_np: float32 `[len(prompt)]` at temperature 1, NaN where not computed (the first token always).
        topk_prompt_logprobs_np: `[len(prompt), k]`.
        target_prompt_logprobs: float32, laid out as the request; 0 where it said -1.
        prompt_cache_hit_tokens: prompt tokens served from a cache.
        prompt_alt_tokens: the draws asked for by `prompt_alt_tokens_k`.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs_np: np.ndarray | None = field(default=None, repr=False)
    topk_prompt_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None
    _prompt_logprobs_list: list[float | None] | None = field(default=None, repr=False)
    _topk_prompt_logprobs_list: list[list[tuple[int, float]] | None] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        names = ("target_prompt_logprobs", "prompt_cache_hit_tokens", "prompt_alt_tokens")
        rest = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"SampleResponse(sequences={listing(self.sequences, most=4)}{rest})"

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Log-probability of each prompt token; None where not computed."""
        if self._prompt_logprobs_list is not None:
            return self._prompt_logprobs_list
        if self.prompt_logprobs_np is None:
            return None
        return [None if value != value else value for value in self.prompt_logprobs_np.tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at each prompt position; None where not computed."""
        if self._topk_prompt_logprobs_list is not None:
            return self._topk_prompt_logprobs_list
        return None if self.topk_prompt_logprobs_np is None else topk_to_lists(self.topk_prompt_logprobs_np)
