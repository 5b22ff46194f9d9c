"""The sequences of one sample request as they grow, and how its future is resolved."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from tinker_jax.lora import Adapter
from tinker_jax.sampling.requests import Request
from tinker_jax.sampling.scoring import PromptScores
from tinker_jax.types.errors import RequestFailedError, TinkerError
from tinker_jax.types.sampling import SampledSequence, SampleResponse, TopkLogprobs

Score = Callable[[np.ndarray], np.ndarray]
"""From tokens [N] to the log-probability of each but the first, float32 [N - 1]."""


@dataclass(eq=False)
class Sequence:
    """One sample as it grows.

    Attributes:
        group: the sequences of its request.
        index: number of the sample.
        drawn: ids drawn so far.
        parts: of each chunk the log-probabilities [n], top ids [n, k] and top log-probabilities [n, k].
        part: which part of the rows, and so which pool, it belongs to.
        pages: that hold its keys and values, in order; empty while it does not run.
        computed: tokens whose keys and values are there.
        known: pages at the front whose content the pool was told.
        parent: in a key, what stands for the last of these; the weights while there is none.
        order: number of the sequence, by the time it was first admitted.
        turn: its place in the order of prefills.
    """

    group: SequenceGroup
    index: int
    drawn: list[int] = field(default_factory=list)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    part: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    known: int = 0
    parent: Hashable = None
    order: int = -1
    turn: int = 0

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's among them."""
        return len(self.group.request.prompt) + len(self.drawn)

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.group.request.max_tokens - len(self.drawn)

    @property
    def ready(self) -> bool:
        """Only the newest token is not in the cache: it can be decoded."""
        return bool(self.pages) and self.computed == self.length - 1

    def tokens(self, start: int, end: int) -> np.ndarray:
        """int32 ids from `start` to before `end`."""
        prompt = self.group.request.prompt
        if end <= len(prompt):
            return prompt[start:end]
        drawn = np.asarray(self.drawn[max(0, start - len(prompt)) : end - len(prompt)], np.int32)
        return np.concatenate([prompt[start:], drawn])


@dataclass(eq=False)
class SequenceGroup:
    """A request and its samples.

    Attributes:
        request: as checked.
        weights: names the adapter's exact values.
        adapter: scaled, or None.
        future: cancelled by the user at any moment.
        top: compiled width of the likeliest tokens that are reported.
        sound: its adapter is known to be finite.
        begun: number of samples that were ever admitted.
        done: those that ended, by number.
        scores: numbers about the prompt, or None when none is asked for.
        scored: so many of the prompt's hidden states have been read, or need not be.
        hits: prompt tokens that the cache held when the prompt was first looked up.
        score: computes what is reported, see `tinker_jax.sampling.sampler.Sampler.submit`.
    """

    request: Request
    weights: Hashable
    adapter: Adapter | None
    future: Future[SampleResponse]
    top: int = 0
    sound: bool = False
    begun: int = 0
    done: dict[int, SampledSequence] = field(default_factory=dict)
    scores: PromptScores | None = None
    scored: int = 0
    hits: int = 0
    score: Score | None = None

    @property
    def kind(self) -> tuple[Hashable, int]:
        """Rows of equal kinds are computed in the very same programs."""
        return self.weights, self.top

    @property
    def pending(self) -> int:
        """Samples that have not begun."""
        return self.request.num_samples - self.begun

    def end(self, sequence: Sequence, length: int | None) -> None:
        """Ends a sequence, and with the last of them the request.

        Args:
            sequence: one of the request's.
            length: tokens that belong to it where a stop rule ended it; None: all, its budget is spent.
        """
        logprobs, ids, values = (np.concatenate(parts)[:length] for parts in zip(*sequence.parts, strict=True))
        tokens, prompt = np.asarray(sequence.drawn[:length], np.int32), self.request.prompt
        if self.score is not None and self.request.temperature in (0, 1):  # of another temperature no training knows
            logprobs = self.score(np.concatenate([prompt, tokens]))[len(prompt) - 1 :]
        self.done[sequence.index] = SampledSequence(
            stop_reason="length" if length is None else "stop",
            sequence_id=uuid.uuid4().hex,
            tokens_np=tokens,
            logprobs_np=logprobs,
            topk_logprobs_np=TopkLogprobs(ids, values) if self.request.sample_top else None,
        )
        if len(self.done) == self.request.num_samples:
            sequences = [self.done[i] for i in range(self.request.num_samples)]
            if self.scores and self.score is not None and self.request.prompt_logprobs and len(prompt) > 1:
                self.scores.replace_own(self.score(prompt))
            about_prompt = self.scores.fields() if self.scores else {}
            with contextlib.suppress(InvalidStateError):  # cancelled while the last chunk ran
                self.future.set_result(SampleResponse(sequences=sequences, prompt_cache_hit_tokens=self.hits, **about_prompt))

    def fail(self, error: Exception) -> None:
        """Ends the request with an error; one that is not ours is wrapped and stays its cause."""
        if not isinstance(error, TinkerError):
            failure = RequestFailedError(f"sampling failed: {type(error).__name__}: {error}", category="server")
            failure.__cause__ = error
            error = failure
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
