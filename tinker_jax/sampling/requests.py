"""A sample request: checked against the model, defaults resolved, arrays ready."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_jax.models.config import ModelConfig
from tinker_jax.sampling.drawing import device_temperature, seed_words
from tinker_jax.sampling.stops import StopRule, stop_rule
from tinker_jax.types.errors import BadRequestError, UnsupportedError

if TYPE_CHECKING:
    from tinker_jax.types.sampling import SampleRequest
    from tinker_jax.types.tensor_data import TensorData

MOST_PER_POSITION = 1024
"""Most top-k entries, targets or alternatives that one position reports."""


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request.

    Attributes:
        prompt: int32 [P], P ≥ 1.
        num_samples: sequences to draw.
        max_tokens: most tokens of each; never more than the context holds, and where the caller gave none, than the cache.
        temperature, top_k, top_p, seed: as `tinker_jax.sampling.drawing.Rows` wants them.
        stop: what ends a sequence.
        sample_top: likeliest tokens to report for each drawn token.
        prompt_logprobs: score the prompt's own tokens.
        prompt_top: likeliest tokens to report at each prompt position.
        last_n: prompt tokens that are scored, counted from the end; P - 1 is all that can be.
        targets: the caller's tensor of ids to score, or None.
        target_ids: the same, dense int64 [P - 1, K], -1 for nothing.
        alternatives: draws at each prompt position after the first.
    """

    prompt: np.ndarray
    num_samples: int
    max_tokens: int
    temperature: np.float32
    top_k: int
    top_p: float
    seed: np.ndarray
    stop: StopRule
    sample_top: int
    prompt_logprobs: bool
    prompt_top: int
    last_n: int
    targets: TensorData | None
    target_ids: np.ndarray | None
    alternatives: int

    @property
    def filtered(self) -> bool:
        """Do `top_k` or `top_p` leave tokens out?"""
        return bool(self.temperature > 0) and (self.top_k > 0 or self.top_p < 1)

    @property
    def need(self) -> int:
        """Tokens of the sequence that the cache holds at most: the last token drawn is never fed back."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def read_from(self) -> int:
        """First prompt token whose hidden state is asked for; P - 1, which is never prefilled, when none is."""
        if self.targets is not None or self.alternatives:
            return 0
        scored = self.prompt_logprobs or self.prompt_top
        return len(self.prompt) - 1 - min(self.last_n, len(self.prompt) - 1) * bool(scored)


def parse(request: SampleRequest, cfg: ModelConfig, eos_ids: Sequence[int], cache_tokens: int) -> Request:
    """Checks a request against the model.

    `max_tokens` beyond the context is clipped to it (the sequence then ends with reason `"length"`); None is all that context
    and cache hold. A prompt as long as the context still has one token to give, since its own logits exist.

    Args:
        request: whose own fields agree with each other.
        cfg: shape of the model.
        eos_ids: its end-of-sequence tokens.
        cache_tokens: tokens of one sequence that the cache can hold.

    Raises:
        BadRequestError: an empty or too long prompt, a token id outside the vocabulary, more entries per position than
            the vocabulary or `MOST_PER_POSITION`.
        UnsupportedError: a chunk that is not text.
    """
    params = request.sampling_params
    prompt = _prompt(request, cfg)
    room = cfg.context_length - len(prompt) + 1
    if params.max_tokens is None:
        # The last token drawn is never fed back. A prompt that the cache has no room for at all is the sampler's to refuse.
        max_tokens = max(1, min(room, cache_tokens - len(prompt) + 1))
    else:
        max_tokens = min(params.max_tokens, room)
    target_ids = _targets(request.target_prompt_logprobs, cfg.V)
    for name in ("topk_sample_logprobs", "topk_prompt_logprobs", "prompt_alt_tokens_k"):
        most = MOST_PER_POSITION if name == "prompt_alt_tokens_k" else min(cfg.V, MOST_PER_POSITION)
        if getattr(request, name) > most:
            raise BadRequestError(f"{name}: expected at most {most} for this model, got {getattr(request, name)}.")
    return Request(
        prompt=prompt,
        num_samples=request.num_samples,
        max_tokens=max_tokens,
        temperature=device_temperature(params.temperature),
        top_k=min(params.top_k, cfg.V),
        top_p=params.top_p,
        seed=seed_words(secrets.randbits(64) if params.seed is None else params.seed),
        stop=stop_rule(params.stop, eos_ids, cfg.V),
        sample_top=request.topk_sample_logprobs,
        prompt_logprobs=bool(request.prompt_logprobs),
        prompt_top=request.topk_prompt_logprobs,
        last_n=request.prompt_logprobs_last_n or len(prompt) - 1,
        targets=request.target_prompt_logprobs,
        target_ids=target_ids,
        alternatives=request.prompt_alt_tokens_k,
    )


def _prompt(request: SampleRequest, cfg: ModelConfig) -> np.ndarray:
    for i, chunk in enumerate(request.prompt.chunks):
        if chunk.type != "encoded_text":
            raise UnsupportedError(
                f"prompt.chunks[{i}] is {type(chunk).__name__}, but {cfg.model_type} is a text model; send text tokens only."
            )
    tokens = np.asarray(request.prompt.to_ints(), np.int64)
    if not tokens.size:
        raise BadRequestError("prompt: expected at least one token, got none.")
    outside = np.flatnonzero((tokens < 0) | (tokens >= cfg.V))
    if outside.size:
        i = outside[0]
        raise BadRequestError(f"prompt: token {i} is {tokens[i]}, outside the model's vocabulary of {cfg.V}.")
    if len(tokens) > cfg.context_length:
        raise BadRequestError(
            f"prompt: {len(tokens)} tokens exceed the model's context length of {cfg.context_length}; shorten the prompt."
        )
    return tokens.astype(np.int32)


def _targets(targets: TensorData | None, V: int) -> np.ndarray | None:
    if targets is None:
        return None
    columns = (targets.shape or targets.to_numpy().shape)[1]
    if columns > MOST_PER_POSITION:  # before a sparse tensor takes the memory of a dense one
        raise BadRequestError(f"target_prompt_logprobs: expected at most {MOST_PER_POSITION} columns, got {columns}.")
    ids = targets.to_numpy(pad_value=-1)
    wrong = np.argwhere((ids < -1) | (ids >= V))
    if wrong.size:
        i, j = wrong[0]
        raise BadRequestError(
            f"target_prompt_logprobs[{i}, {j}]: expected a token id below {V}, or -1 for nothing, got {ids[i, j]}."
        )
    return ids
