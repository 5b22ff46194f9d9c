"""The sampler: continuous batching over a fixed set of cache slots.

A request's prompt is prefilled once, all but its last token; its keys and values are copied into one slot for each sample.
Decoding starts by feeding the last prompt token, so a first token is drawn like every other. Several steps run on the device
between two visits of Python (a chunk), after which rows that ended make room for those that wait.

One decode batch serves requests of the same weights. Others wait for their turn; a turn admits what was submitted before it
began, and later requests of its weights only while nobody else waits ahead of them, so that no client starves.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import sharding
from tinker_jax.engine.asks import Ask, parse
from tinker_jax.engine.decode_batch import STEPS, DecodeBatch
from tinker_jax.engine.jobs import Job, Sample
from tinker_jax.engine.sampling import STOP_IDS, Drawn
from tinker_jax.engine.scoring import Scorer, needs, nothing_to_score, width
from tinker_jax.engine.slots import SLOTS, Budget, CacheShape, power_of_two
from tinker_jax.engine.stops import first_stop
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.types.errors import BadRequestError, InternalServerError
from tinker_jax.types.sampling import SampleRequest, SampleResponse

_MIN_PREFILL = 16
_PREFILL_ROWS = (1, 4, 16)
_PREFILL_TOKENS = 4096  # prompts are prefilled together up to so many positions; a longer one goes alone


class Sampler:
    """Draws tokens for many requests at once. One thread owns it and drives it with `step`.

    The noise of a token is a function of (seed, number of the sample, position, token id) alone: a seeded request draws the
    same tokens whatever else runs. Reported log-probabilities are those of softmax(logits / temperature) over the whole
    vocabulary, whatever the filters left; at temperature 0 those of temperature 1. Scores of the prompt are at temperature 1.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh.
        mesh: where the weights lie.
        dtype: of the cache.
        kv_bytes: bytes of each device that all caches of one moment may take.
        stop_ids: end-of-sequence tokens of the model.
        decode_text: tokens to text, for string stops. Special tokens count as text.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        params: Mapping[str, jax.Array],
        *,
        mesh: Mesh,
        dtype: Any,
        kv_bytes: int,
        stop_ids: Sequence[int],
        decode_text: Callable[[Sequence[int]], str],
    ) -> None:
        self._cfg, self._stop_ids, self._decode_text = cfg, tuple(stop_ids), decode_text
        dtype = jnp.dtype(dtype)
        heads = cfg.K if cfg.K % (parts := sharding.parts(mesh, "kv_heads")) else cfg.K // parts
        token_bytes = 2 * cfg.L * heads * cfg.H * dtype.itemsize
        self._budget = Budget(token_bytes, kv_bytes, cfg.context_length, sharding.parts(mesh, "rows"))
        self._batch = DecodeBatch(cfg, params, mesh, dtype)
        self._scorer = Scorer(cfg, params)
        self._waiting: collections.deque[Job] = collections.deque()
        self._submitted = 0
        self._weights: Hashable = None
        self._turn = 0  # requests submitted before this one may overtake those of other weights

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._batch.programs + self._scorer.programs

    @property
    def live_slots(self) -> int:
        """Rows that are drawing tokens."""
        return len(self._batch.slots.live)

    @property
    def waiting(self) -> int:
        """Requests with samples that have no slot yet."""
        return len(self._waiting)

    def parse(self, request: SampleRequest) -> Ask:
        """Checks a request; touches nothing, so any thread may call it.

        Raises:
            BadRequestError: see `tinker_jax.engine.asks.parse`; or a single row would never fit the cache's memory.
            UnsupportedError: a chunk that is not text.
        """
        ask = parse(request, self._cfg, self._stop_ids)
        scratch = self._scratch(ask)
        if self._budget.fit(None, 1, len(ask.prompt), ask.need, scratch) is None:
            want = self._budget.bytes(CacheShape(1, self._budget.capacity(ask.need))) + scratch
            raise BadRequestError(
                f"A prompt of {len(ask.prompt)} tokens with max_tokens={ask.max_tokens} needs {want:,} bytes of key/value "
                f"cache, but the engine has {self._budget.limit:,}; lower max_tokens, shorten the prompt or raise its memory."
            )
        return ask

    def submit(
        self,
        request: SampleRequest | Ask,
        weights: Hashable,
        adapter: Adapter | None,
        future: Future[SampleResponse],
    ) -> None:
        """Queues a request; `step` resolves its future.

        Args:
            request: what to draw, or what `parse` made of it.
            weights: names the adapter's exact values; rows of equal weights are drawn together.
            adapter: scaled adapter (`tinker_jax.lora.scaled`), or None for the base model.
            future: gets a `SampleResponse`. Cancelling it frees the request's slots at the next step.

        Raises:
            BadRequestError, UnsupportedError: see `parse`; nothing has changed then.
        """
        ask = request if isinstance(request, Ask) else self.parse(request)
        self._waiting.append(Job(ask, weights, adapter, future, self._submitted))
        self._submitted += 1

    def step(self) -> bool:
        """Admits requests that wait, draws one chunk, resolves what is finished.

        A failure on the device fails the requests it served and no other.

        Returns:
            Whether work is left.
        """
        self._discard(job for job in self._jobs() if job.future.cancelled())
        self._admit()
        if self.live_slots:
            self._draw()
        busy = bool(self.live_slots or self._waiting)
        if not busy:
            self._batch.release()  # an idle sampler leaves the memory to training
        return busy

    def fail(self, error: Exception) -> None:
        """Fails every request and starts afresh."""
        self._fail(self._jobs(), error)
        self._batch.release()

    def close(self) -> None:
        """Cancels every request and gives the memory back."""
        for job in self._jobs():
            job.future.cancel()
        self._discard(self._jobs())
        self._batch.release()

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots to waiting requests and prefills their prompts."""
        if not self.live_slots and self._waiting and not any(job.samples for job in self._waiting):
            self._weights, self._turn = self._waiting[0].weights, self._submitted
            self._batch.use(self._waiting[0].adapter)
        jobs = self._admissible()
        try:
            if jobs and jobs[0].samples:
                self._continue(jobs[0])
        except Exception as error:
            self._lose_cache(error)
            return
        shape, jobs = self._plan([job for job in jobs if job.pending])
        try:
            if shape is not None:
                self._batch.move(shape)
                self._start(jobs)
        except Exception as error:
            self._lose_cache(error, jobs)
        self._waiting = collections.deque(job for job in self._waiting if job.pending)

    def _admissible(self) -> list[Job]:
        """Requests that may join now, oldest first; a partly admitted one is always among the first."""
        jobs, rows, others = [], 0, False
        for job in self._waiting:
            if job.weights != self._weights:
                others = True
            elif others and job.order >= self._turn:
                break
            else:
                jobs.append(job)
                rows += job.pending
                if rows >= SLOTS[-1]:
                    break
        return jobs

    def _continue(self, job: Job) -> None:
        """Seats more samples of a request whose prompt lies in some slot.

        There is always such a slot: while samples are pending, freed slots go to them before anything else.
        """
        slots = self._batch.slots
        home = slots.owned_by(job)
        free = sorted(slots.free, key=lambda slot: slot not in home)[: job.pending]
        self._seat(job, free)
        if copies := [(slot, home[0]) for slot in free if slot not in home]:
            self._batch.fork(copies)

    def _plan(self, jobs: list[Job]) -> tuple[CacheShape | None, list[Job]]:
        """The cache to use, and the requests to admit: as many as memory allows, in order."""
        slots = self._batch.slots
        live, (now, reserve) = slots.live, slots.places(STEPS)
        current = slots.shape if live else None
        rows, scratch, shape, admitted = len(live), 0, None, []
        for job in jobs:
            ask = job.ask
            now, reserve = max(now, min(len(ask.prompt) + STEPS - 1, ask.need)), max(reserve, ask.need)
            scratch = max(scratch, self._scratch(ask))
            fits = self._budget.fit(current, rows + job.pending, now, reserve, scratch)
            if fits is None and not admitted:  # some of its samples now, the others later
                fewer = (s for s in reversed(SLOTS) if len(live) < s < rows + job.pending)
                fits = next(filter(None, (self._budget.fit(current, s, now, reserve, scratch) for s in fewer)), None)
                return fits, [job]
            if fits is None:
                break
            shape, rows = fits, rows + job.pending
            admitted.append(job)
        return shape, admitted

    def _start(self, jobs: list[Job]) -> None:
        """Seats requests and prefills the new prompts, those of one length and one kind together."""
        slots = self._batch.slots
        groups: dict[Any, list[Job]] = {}
        for job in jobs:
            if job.samples:
                self._continue(job)
                continue
            self._seat(job, slots.free[: job.pending])
            if len(job.ask.prompt) == 1:
                job.prompt_fields = nothing_to_score(job.ask)
            else:
                groups.setdefault((self._prefill_length(job.ask), needs(job.ask, self._cfg.V)), []).append(job)
        spare = self._budget.limit - self._budget.bytes(slots.shape)
        for (T, _), group in groups.items():
            most = min(_PREFILL_TOKENS // T, spare // (T * self._budget.token_bytes))
            most = max((B for B in _PREFILL_ROWS if B <= most), default=1)
            for first in range(0, len(group), most):
                self._prefill(group[first : first + most], T)

    def _prefill(self, jobs: Sequence[Job], T: int) -> None:
        slots = self._batch.slots
        asks = [job.ask for job in jobs]
        B = next(B for B in _PREFILL_ROWS if B >= len(jobs))
        try:
            h_BTD, prefilled = self._batch.prefill([ask.prompt[:-1] for ask in asks], B, T)
            if any(needs(asks[0], self._cfg.V)):
                scored = self._scorer.score(asks, self._batch.adapter, h_BTD, self._batch.rank)
                for job, fields in zip(jobs, scored, strict=True):
                    job.prompt_fields = fields
        except Exception as error:
            self._fail(jobs, error)
            return
        self._batch.insert(prefilled, [(slot, b) for b, job in enumerate(jobs) for slot in slots.owned_by(job)])

    def _seat(self, job: Job, free: Iterable[int]) -> None:
        ask, slots = job.ask, self._batch.slots
        stop_ids = np.full(STOP_IDS, -1, np.int32)
        if len(ask.stop.ids) <= STOP_IDS:
            stop_ids[: len(ask.stop.ids)] = ask.stop.ids
        for slot in free:
            slots.seat(
                slot,
                job,
                token=ask.prompt[-1],
                position=len(ask.prompt) - 1,
                remaining=ask.max_tokens,
                temperature=ask.temperature,
                top_k=ask.top_k,
                top_p=ask.top_p,
                seed=ask.seed,
                sample=len(job.samples),
                stop_ids=stop_ids,
            )
            job.samples.append(Sample())

    def _prefill_length(self, ask: Ask) -> int:
        return power_of_two(len(ask.prompt) - 1, _MIN_PREFILL, self._cfg.context_length)

    def _scratch(self, ask: Ask) -> int:
        """Bytes of the prompt's keys and values before they are copied into slots."""
        return self._prefill_length(ask) * self._budget.token_bytes if len(ask.prompt) > 1 else 0

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """One chunk, and what follows from it."""
        slots = self._batch.slots
        now, reserve = slots.places(STEPS)
        S, C = slots.shape
        try:
            self._batch.move(CacheShape(S, self._budget.capacities(now, reserve, C)[0]))
            slots = self._batch.slots
            top = width(max(slots.owner[slot].ask.sample_top for slot in slots.live), self._cfg.V)
            drawn = self._batch.draw(top)
        except Exception as error:
            self._lose_cache(error)
            return
        for slot in slots.live:
            if slots.rows.live[slot]:  # a sibling's failure ends the request's other rows
                self._harvest(slot, drawn)

    def _harvest(self, slot: int, drawn: Drawn) -> None:
        """Takes a row's new tokens; ends the row where its stop rule or its budget says so."""
        slots = self._batch.slots
        job, rows, n = slots.owner[slot], slots.rows, int(drawn.count[slot])
        index = int(rows.sample[slot])
        sample, top = job.samples[index], job.ask.sample_top
        start = len(sample.tokens)
        sample.tokens += drawn.tokens[slot, :n].tolist()
        sample.parts.append((drawn.logprobs[slot, :n], drawn.top_ids[slot, :n, :top], drawn.top_logprobs[slot, :n, :top]))
        rows.token[slot] = sample.tokens[-1]
        rows.position[slot] += n
        rows.remaining[slot] -= n
        try:
            if not np.isfinite(drawn.logprobs[slot, :n]).all():
                raise InternalServerError("the model gave logits that are not finite; check the weights and the adapter.")
            end = first_stop(sample.tokens, start, job.ask.stop, self._decode_text)
        except Exception as error:
            self._fail([job], error)
            return
        if end is not None or rows.remaining[slot] == 0:
            slots.release(slot)
            job.end(index, end)

    # -- endings -----------------------------------------------------------------------------------------------------

    def _jobs(self) -> list[Job]:
        """Requests that wait or have live rows."""
        slots = self._batch.slots
        return list(dict.fromkeys([*self._waiting, *(slots.owner[slot] for slot in slots.live)]))

    def _discard(self, jobs: Iterable[Job]) -> None:
        """Takes requests out of the queue and frees their slots."""
        gone, slots = set(jobs), self._batch.slots
        if not gone:
            return
        self._waiting = collections.deque(job for job in self._waiting if job not in gone)
        for slot in slots.live:
            if slots.owner[slot] in gone:
                slots.release(slot)

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        jobs = list(jobs)
        self._discard(jobs)
        for job in jobs:
            job.fail(error)

    def _lose_cache(self, error: Exception, jobs: Iterable[Job] = ()) -> None:
        """Fails every request that has rows in the cache, and `jobs`; the rest of the queue starts on a new cache.

        Programs get the cache donated, so after a failure of one nothing in it can be trusted.
        """
        self._fail({*jobs, *(job for job in self._jobs() if job.samples)}, error)
        self._batch.release()
