"""What a prefill reports about the prompts themselves: log-probabilities, top-k, targets, alternative draws.

Everything comes from the hidden states of the prefill's chunks through the tiled head; `[tokens, vocab]` logits never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.linear_cross_entropy import default_tile, head_logits, linear_cross_entropy, linear_top_k
from tinker_jax.lora import Adapter
from tinker_jax.models.block import Params
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import unembedding
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import describe
from tinker_jax.sampling.drawing import noise, tempered_logprobs
from tinker_jax.sampling.requests import MOST_PER_POSITION, Request
from tinker_jax.types.sampling import MASK_LOGPROB, PromptAltTokens, TopkLogprobs
from tinker_jax.types.tensor_data import TensorData

_WIDTHS = (1, 8, 64, MOST_PER_POSITION + 1)  # one more column, for the prompt's own tokens


def width(k: int, most: int = _WIDTHS[-1]) -> int:
    """The compiled width for k entries a position; 0 stays 0."""
    return min(next(w for w in _WIDTHS if w >= k), most) if k else 0


class Needs(NamedTuple):
    """Compiled widths of what a prompt is asked for; prompts of equal needs are prefilled together."""

    targets: int
    top: int
    alternatives: int


def needs(request: Request, V: int) -> Needs:
    """What the request asks about its prompt."""
    return Needs(width(_count(request)), width(request.prompt_top, V), width(request.alternatives))


class PromptScores:
    """The numbers about one prompt, filled chunk by chunk. Row t speaks of prompt token t + 1."""

    def __init__(self, request: Request) -> None:
        self._request, n = request, len(request.prompt) - 1
        self._logprobs = np.zeros((n, _count(request)), np.float32)
        self._top = np.zeros((n, request.prompt_top), np.int32), np.zeros((n, request.prompt_top), np.float32)
        self._drawn = np.zeros((n, request.alternatives), np.int32), np.zeros((n, request.alternatives), np.float32)

    def put(self, start: int, n: int, scored: Scored, row: int) -> None:
        """Takes the first n positions of a row of `Scorer.score`, which begins with prompt token `start`."""
        ours = (self._logprobs, *self._top, *self._drawn)
        theirs = (scored.logprobs, *scored.top, *scored.drawn)
        for target, source in zip(ours, theirs, strict=True):
            target[start : start + n] = source[row, :n, : target.shape[1]]

    def replace_own(self, logprobs: np.ndarray) -> None:
        """Other numbers [P - 1] for the log-probabilities of the prompt's own tokens, which were asked for."""
        self._logprobs[:, 0] = logprobs

    def fields(self) -> dict[str, Any]:
        """Fields of `SampleResponse` about the prompt."""
        return _fields(self._request, self._logprobs, self._top, self._drawn)


class Scored(NamedTuple):
    """Arrays [R, T, …] of a chunk: log-probabilities of the columns asked for, top ids and values, draws and theirs."""

    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray]
    drawn: tuple[np.ndarray, np.ndarray]


class Scorer:
    """Scores prompts from the hidden states of a prefill.

    Args:
        cfg: shape of the model.
        params: base weights.
    """

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        self._cfg, self._params = cfg, params
        self._targets = Program(self._score_targets, "prompt logprobs")
        self._top = Program(self._score_top, "prompt top-k", static=["k"])
        self._alternatives = Program(self._draw, "prompt alternatives", static=["k"])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._targets.count + self._top.count + self._alternatives.count

    def score(self, requests: Sequence[tuple[Request, int] | None], adapter: Adapter | None, h_RTD: jax.Array) -> Scored:
        """Scores a chunk of prompts of the same `Needs` under the same adapter.

        Args:
            requests: for each row the request and its chunk's first prompt token, or None where a row is not to be scored.
            adapter: scaled, or None.
            h_RTD: hidden states; column t of a row stands for prompt token start + t and predicts the one after it.
        """
        R, T, _ = h_RTD.shape
        given = [(r, *item) for r, item in enumerate(requests) if item is not None]
        need, head = needs(given[0][1], self._cfg.V), (adapter or {}).get("lm_head")
        shape = f"{R}x{T} {describe({'lm_head': head} if head else None)}"
        empty = np.empty((R, T, 0), np.float32)
        logprobs, top, drawn = empty, (empty, empty), (empty, empty)
        if need.targets:
            ids = np.zeros((R, T, need.targets), np.int32)
            for r, request, start in given:
                columns = _columns(request, start, start + T)
                ids[r, : columns.shape[0], : columns.shape[1]] = np.maximum(columns, 0)
            logprobs = self._targets(self._params, head, h_RTD, ids, shape=f"{shape} K={need.targets}")
        if need.top:
            top = self._top(self._params, head, h_RTD, k=need.top, shape=shape)
        if need.alternatives:
            seed, temperature, first = np.zeros((R, 2), np.uint32), np.ones(R, np.float32), np.zeros(R, np.int32)
            for r, request, start in given:
                seed[r], temperature[r], first[r] = request.seed, request.temperature, start + 1
            drawn = self._alternatives(self._params, head, h_RTD, seed, temperature, first, k=need.alternatives, shape=shape)
        return Scored(*jax.device_get((logprobs, top, drawn)))

    def _score_targets(self, params, head, h_RTD, targets_RTK):
        R, T, K = targets_RTK.shape
        h_MD, targets_MK = h_RTD.reshape(R * T, -1), targets_RTK.reshape(R * T, K)
        out = linear_cross_entropy(h_MD, unembedding(self._cfg, params), targets_MK, lora=head)
        return out.logprobs_MK.reshape(R, T, K)

    def _score_top(self, params, head, h_RTD, *, k):
        R, T, D = h_RTD.shape
        logprobs, ids = linear_top_k(h_RTD.reshape(R * T, D), unembedding(self._cfg, params), k, lora=head)
        return ids.reshape(R, T, k), logprobs.reshape(R, T, k)

    def _draw(self, params, head, h_RTD, seed_R, temperature_R, first_R, *, k):
        """k independent draws at the request's temperature at every position; their logprobs are at temperature 1.

        Draw j at position t takes the noise of sample j at t. That noise is free: samples stand behind the prompt.
        """
        (R, T, D), V, kernel_VD = h_RTD.shape, self._cfg.V, unembedding(self._cfg, params)
        draws_k = jnp.arange(k, dtype=jnp.int32)

        def one(row):
            h_D, seed, temperature, position = row
            logits_1V = head_logits(h_D[None], kernel_VD, head)
            logp_1V = tempered_logprobs(logits_1V, temperature[None])
            noise_kV = noise(jnp.tile(seed[None], (k, 1)), draws_k, jnp.full((k,), position), V)
            scores_kV = jnp.where(temperature > 0, logp_1V + noise_kV, logits_1V)
            ids_k = jnp.argmax(scores_kV, axis=-1).astype(jnp.int32)
            return ids_k, jax.nn.log_softmax(logits_1V[0])[ids_k]

        rows = (
            h_RTD.reshape(R * T, D),
            jnp.repeat(seed_R, T, axis=0),
            jnp.repeat(temperature_R, T),
            (first_R[:, None] + jnp.arange(T, dtype=jnp.int32)[None]).reshape(R * T),
        )
        ids, logprobs = jax.lax.map(one, rows, batch_size=max(1, default_tile(V) // (k + 2)))
        return ids.reshape(R, T, k), logprobs.reshape(R, T, k)


def _count(request: Request) -> int:
    """Columns that are scored: the prompt's own next tokens, if asked for, then the caller's targets."""
    return request.prompt_logprobs + (0 if request.target_ids is None else request.target_ids.shape[1])


def _columns(request: Request, start: int, end: int) -> np.ndarray:
    """int [n, `_count`]: the ids of these positions, of the P - 1 there are."""
    own = request.prompt[1:][start:end, None][:, : request.prompt_logprobs]
    return own if request.target_ids is None else np.concatenate([own, request.target_ids[start:end]], axis=1)


def _fields(
    request: Request, logprobs_TK: np.ndarray, top: tuple[np.ndarray, np.ndarray], drawn: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Fields of the response from row t of each array, which speaks of prompt token t + 1."""
    P = len(request.prompt)
    n, first = P - 1, P - min(request.last_n, P - 1)
    fields: dict[str, Any] = {}
    if request.prompt_logprobs:
        fields["prompt_logprobs_np"] = own = np.full(P, np.nan, np.float32)
        own[first:] = logprobs_TK[first - 1 : n, 0]
    if request.prompt_top:
        ids = np.zeros((P, request.prompt_top), np.int32)
        values = np.full((P, request.prompt_top), MASK_LOGPROB, np.float32)
        ids[first:], values[first:] = (x[first - 1 : n, : request.prompt_top] for x in top)
        fields["topk_prompt_logprobs_np"] = TopkLogprobs(ids, values)
    if request.targets is not None and request.target_ids is not None:
        begin, K = int(request.prompt_logprobs), request.target_ids.shape[1]
        values = np.where(request.target_ids < 0, np.float32(0), logprobs_TK[:n, begin : begin + K])
        fields["target_prompt_logprobs"] = _same_layout(request.targets, values)
    if request.alternatives:
        ids, values = (x[:n, : request.alternatives] for x in drawn)
        fields["prompt_alt_tokens"] = PromptAltTokens(
            TensorData.from_numpy(ids.astype(np.int64)), TensorData.from_numpy(values)
        )
    return fields


def _same_layout(like: TensorData, values: np.ndarray) -> TensorData:
    crow, col = like.sparse_crow_indices, like.sparse_col_indices
    if crow is None or col is None:
        return TensorData(values, "float32", shape=list(values.shape))
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    return TensorData(values[rows, col], "float32", list(values.shape), crow, col)
