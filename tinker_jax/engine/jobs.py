"""A sample request on its way: the sequences as they grow, and how its future ends."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinker_jax.engine.asks import Ask
from tinker_jax.lora import Adapter
from tinker_jax.types.errors import RequestFailedError, TinkerError
from tinker_jax.types.sampling import SampledSequence, SampleResponse, TopkLogprobs


@dataclass
class Sample:
    """One sequence as it grows.

    Attributes:
        tokens: all ids so far.
        parts: of each chunk the log-probabilities [n], top ids [n, k] and top log-probabilities [n, k].
    """

    tokens: list[int] = field(default_factory=list)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        ask: what it wants.
        weights: names the adapter's exact values.
        adapter: scaled, or None.
        future: cancelled by the user at any moment.
        order: number of the request, by submission.
        samples: sequences that got a slot.
        done: sequences that ended, by number.
        prompt_fields: fields of the response about the prompt.
    """

    ask: Ask
    weights: Hashable
    adapter: Adapter | None
    future: Future[SampleResponse]
    order: int
    samples: list[Sample] = field(default_factory=list)
    done: dict[int, SampledSequence] = field(default_factory=dict)
    prompt_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """Samples that have no slot yet."""
        return self.ask.num_samples - len(self.samples)

    def end(self, index: int, length: int | None) -> None:
        """Ends a sequence, and with the last of them the request.

        Args:
            index: number of the sequence.
            length: tokens that belong to it where a stop rule ended it; None: all, its budget is spent.
        """
        sample, top = self.samples[index], self.ask.sample_top
        logprobs, ids, values = (np.concatenate(parts)[:length] for parts in zip(*sample.parts, strict=True))
        self.done[index] = SampledSequence(
            stop_reason="length" if length is None else "stop",
            sequence_id=uuid.uuid4().hex,
            tokens_np=np.asarray(sample.tokens[:length], np.int32),
            logprobs_np=logprobs,
            topk_logprobs_np=TopkLogprobs(ids, values) if top else None,
        )
        if len(self.done) == self.ask.num_samples:
            sequences = [self.done[i] for i in range(self.ask.num_samples)]
            with contextlib.suppress(InvalidStateError):  # cancelled while the last chunk ran
                self.future.set_result(SampleResponse(sequences=sequences, **self.prompt_fields))

    def fail(self, error: Exception) -> None:
        """Ends the request with an error; one that is not ours is wrapped and stays its cause."""
        if not isinstance(error, TinkerError):
            failure = RequestFailedError(f"sampling failed: {type(error).__name__}: {error}", category="server")
            failure.__cause__ = error
            error = failure
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
