"""The sampler: continuous batching over pages of keys and values.

A request's sequences are admitted in the order of submission, as rows and pages allow. Prompts are prefilled in chunks, many
prompts in one call, between chunks of decode steps, so that a long prompt holds nobody up. All but a prompt's last token are
prefilled; decoding starts by feeding that one, so a first token is drawn like every other. Rows under different adapters of
the base model, and under none, are decoded together.

Pages fill as sequences grow. When none is left, the youngest sequence gives its pages up and comes back later, to where it was.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.lora import Adapter
from tinker_jax.memory import token_bytes
from tinker_jax.models.config import DecoderConfig
from tinker_jax.sampling.drawing import Drawn, Rows
from tinker_jax.sampling.model_runner import Chunk, DecodeBatch
from tinker_jax.sampling.requests import Ask, parse
from tinker_jax.sampling.scheduler import Seats, pages_for
from tinker_jax.sampling.scoring import PromptScores, Scorer, needs, width
from tinker_jax.sampling.sequence import Job, Sequence
from tinker_jax.sampling.stops import first_stop
from tinker_jax.types.errors import BadRequestError, InternalServerError
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.sampling import SampleRequest, SampleResponse, SamplingParams

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows a decode program is compiled for. Fewer counts on accelerators, which wait for the weights whatever the rows."""
_ROWS_ACCELERATOR = (8, 32, 128, 256)
_ROWS_DETERMINISTIC = (64,)

_CHUNK, _CHUNK_ACCELERATOR = 64, 256  # prompt tokens a row of a prefill computes
_CHUNKS, _CHUNKS_ACCELERATOR, _CHUNKS_DETERMINISTIC = (1, 2, 4, 8), (1, 8), (8,)  # rows a prefill is compiled for
_MOST_PREFILLS = 8  # calls between two decode chunks: rows soon have company, and none waits for a long prompt


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
        kv_bytes: bytes of each device for keys and values.
        stop_ids: end-of-sequence tokens of the model.
        decode_text: tokens to text, for string stops. Special tokens count as text.
        unstack: decode with a second copy of the layers' weights, see `tinker_jax.memory.plan`.
        deterministic: compute every row in programs of one shape, under one adapter at a time, on keys and values that were
            computed the same way: results are then the same bit for bit whatever else runs. Slower with few rows.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        params: Mapping[str, jax.Array],
        *,
        mesh: Mesh,
        dtype: Any,
        kv_bytes: int,
        stop_ids: Iterable[int],
        decode_text: Callable[[Any], str],
        unstack: bool = True,
        deterministic: bool = False,
    ) -> None:
        self._cfg, self._stop_ids, self._decode_text = cfg, tuple(stop_ids), decode_text
        cpu = mesh.devices.flat[0].platform == "cpu"
        self._parts = parts = sharding.parts(mesh, "rows")
        rows, chunks = (ROWS, _CHUNKS) if cpu else (_ROWS_ACCELERATOR, _CHUNKS_ACCELERATOR)
        if deterministic:
            rows, chunks = _ROWS_DETERMINISTIC, _CHUNKS_DETERMINISTIC
        self._rows = sorted({-(-n // parts) for n in rows})  # of each part
        self._chunks = sorted({-(-n // parts) for n in chunks})
        self._chunk = _CHUNK if cpu else _CHUNK_ACCELERATOR
        dtype = jnp.dtype(dtype)
        self._page_bytes = PAGE * token_bytes(cfg, dtype.itemsize, sharding.parts(mesh, "kv_heads"))
        self._kv_bytes = kv_bytes
        most = self._rows[-1] * pages_for(cfg.context_length)
        self._pages = max(0, min(kv_bytes // self._page_bytes - 1, most))
        self._seats = Seats(self._pages, parts, self._rows[-1], cfg.context_length, deterministic)
        self._batch = DecodeBatch(cfg, params, mesh, dtype, self._pages + 1, unstack)
        self._scorer = Scorer(cfg, params)
        self._waiting: collections.deque[Job] = collections.deque()

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._batch.programs + self._scorer.programs + self._seats.lanes.programs

    @property
    def live_rows(self) -> int:
        """Sequences that hold pages."""
        return len(self._seats.working)

    @property
    def waiting(self) -> int:
        """Requests and sequences that wait for rows or pages."""
        return len(self._waiting) + len(self._seats.paused)

    @property
    def held_pages(self) -> int:
        """Pages that sequences hold."""
        return self._seats.held_pages

    def parse(self, request: SampleRequest) -> Ask:
        """Checks a request; touches nothing, so any thread may call it.

        Raises:
            BadRequestError: see `tinker_jax.sampling.requests.parse`; or a single sequence would never fit the cache's memory.
            UnsupportedError: a chunk that is not text.
        """
        ask = parse(request, self._cfg, self._stop_ids)
        if pages_for(ask.need) > self._pages:
            raise BadRequestError(
                f"A prompt of {len(ask.prompt)} tokens with max_tokens={ask.max_tokens} needs "
                f"{(pages_for(ask.need) + 1) * self._page_bytes:,} bytes of key/value cache, but the engine has "
                f"{self._kv_bytes:,}; lower max_tokens, shorten the prompt or raise its memory."
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
            weights: names the adapter's exact values, or the target that `replace` changes; sequences of equal weights share
                cached prompts.
            adapter: scaled adapter (`tinker_jax.lora.scaled`), or None for the base model.
            future: gets a `SampleResponse`. Cancelling it frees the request's rows and pages at the next step.

        Raises:
            BadRequestError, UnsupportedError: see `parse`; nothing has changed then.
        """
        ask = request if isinstance(request, Ask) else self.parse(request)
        job = Job(ask, weights, adapter, future, width(ask.sample_top, self._cfg.V))
        if any(needs(ask, self._cfg.V)):
            job.scores = PromptScores(ask)
        job.scored = ask.read_from
        self._waiting.append(job)

    def replace(self, weights: Hashable, adapter: Adapter) -> None:
        """New values under the name of old ones; requests under way go on with them, on the keys and values there are.

        A request that begins later computes all of its own.
        """
        jobs = [job for job in self._jobs() if job.weights == weights]
        if jobs and not self._seats.lanes.finite(adapter):
            self._fail(jobs, InternalServerError(_NOT_FINITE))
        for job in jobs:
            job.adapter = adapter
        self._seats.replace(weights, adapter)

    def warm_up(self, adapter: Adapter | None, adapters: int = 1) -> int:
        """Compiles what requests of any length, stop rule, temperature and number of samples can need.

        Args:
            adapter: scaled, of the shape that requests will have; None: the base model alone.
            adapters: of this shape, at most, at work at the same moment.

        Returns:
            Number of compiled programs. Requests that wait or run are not disturbed.
        """
        parts, context = self._parts, pages_for(self._cfg.context_length)
        trees: list[Adapter | None] = [None]
        if adapter is not None:
            trees += self._seats.lanes.warm_up(adapter, adapters)
        two, params = ModelInput.from_ints([0, 0]), SamplingParams(max_tokens=1)
        probe = self.parse(SampleRequest(prompt=two, sampling_params=params, prompt_logprobs=True))
        for tree in trees:
            for rows in self._rows:
                self._batch.draw(tree, Rows.empty(rows * parts, context), 0)
            for chunks in self._chunks:
                nothing = Chunk(np.zeros(0, np.int32), 0, np.zeros(context, np.int32), (0, 0))
                h_RTD = self._batch.prefill(tree, [nothing] * (chunks * parts), self._chunk)
                self._scorer.score([(probe, 0)] + [None] * (chunks * parts - 1), adapter if tree else None, h_RTD)
        self._batch.copy([(0, 0, 0)])
        return self.programs

    def step(self) -> bool:
        """Admits what waits, prefills, draws one chunk, resolves what is finished.

        A failure on the device fails the requests it served and no other.

        Returns:
            Whether work is left.
        """
        self._discard(job for job in self._jobs() if job.future.cancelled())
        self._admit()
        for _ in range(_MOST_PREFILLS):
            unready = [sequence for sequence in self._seats.working if not sequence.ready]
            if not unready:
                break
            self._prefill(unready)
            self._admit()
        self._draw()
        return bool(self._seats.working or self.waiting)

    def fail(self, error: Exception) -> None:
        """Fails every request and starts afresh."""
        self._lose_cache(error, self._jobs())

    def close(self) -> None:
        """Cancels every request and gives the memory back."""
        for job in self._jobs():
            job.future.cancel()
        self._discard(self._jobs())
        self._batch.release()

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives rows and pages to what waits, oldest first, until the first that finds no room."""
        copies: list[tuple[int, int, int]] = []
        try:
            self._admit_with(copies)
            if copies:
                self._batch.copy(copies)
        except Exception as error:
            self._lose_cache(error, {sequence.job for sequence in self._seats.working})
        self._waiting = collections.deque(job for job in self._waiting if job.pending)

    def _admit_with(self, copies: list[tuple[int, int, int]]) -> None:
        seats = self._seats
        for sequence in list(seats.paused):
            if self._sound(sequence.job) and seats.seat(sequence, copies) is None:
                return
        reserved = 0  # rows for what is left of a request come before anybody younger
        for job in list(self._waiting):
            seated = self._sound(job)
            while seated and job.pending and seats.room > reserved:
                seated = seats.seat(Sequence(job, job.begun), copies)
                job.begun += bool(seated)
            reserved += job.pending
            if seated is None or seats.room <= reserved:
                return

    def _sound(self, job: Job) -> bool:
        """Fails a request whose adapter is not finite."""
        if job.sound or job.adapter is None or job.weights in self._seats.lanes.names:
            return True
        error: Exception = InternalServerError(_NOT_FINITE)
        try:
            job.sound = self._seats.lanes.finite(job.adapter)
        except Exception as failure:
            error = failure
        if not job.sound:
            self._fail([job], error)
        return job.sound

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _prefill(self, unready: list[Sequence]) -> None:
        """One call: the next tokens of the oldest prompts."""
        T = self._chunk
        planned = [
            [(s, start) for s in sequences for start in range(s.computed, s.length - 1, T)][: self._chunks[-1]]
            for sequences in self._seats.by_part(unready)
        ]
        R = _smallest(self._chunks, max(map(len, planned)))
        placed = [row for rows in planned for row in (*rows, *[None] * (R - len(rows)))]
        try:
            adapter = self._seats.lanes.tree()
            h_RTD = self._batch.prefill(adapter, [row and self._chunk_of(*row) for row in placed], T)
            self._score(placed, h_RTD)
        except Exception as error:
            self._lose_cache(error, {row[0].job for row in placed if row})
            return
        for sequence, start in filter(None, placed):
            sequence.computed = min(start + T, sequence.length - 1)
            self._seats.remember(sequence)

    def _chunk_of(self, sequence: Sequence, start: int) -> Chunk:
        tokens = sequence.tokens(start, min(start + self._chunk, sequence.length - 1))
        return Chunk(tokens, start, self._seats.table(sequence), self._seats.lanes.span(sequence.job.weights))

    def _score(self, placed: list[tuple[Sequence, int] | None], h_RTD: jax.Array) -> None:
        """Reads the prompts' numbers off a prefill's hidden states, prompts of one adapter and one kind together."""
        groups: dict[Any, list[tuple[int, Job, int]]] = {}
        for r, row in enumerate(placed):
            if row is None or row[0].index:  # the first sample's prefill speaks for all
                continue
            job, start = row[0].job, row[1]
            if job.scores and job.scored < min(len(job.ask.prompt) - 1, start + self._chunk):
                groups.setdefault((job.weights, needs(job.ask, self._cfg.V)), []).append((r, job, start))
        for members in groups.values():
            asks: list[tuple[Ask, int] | None] = [None] * len(placed)
            for r, job, start in members:
                asks[r] = job.ask, start
            scored = self._scorer.score(asks, members[0][1].adapter, h_RTD)
            for r, job, start in members:
                n = min(self._chunk, len(job.ask.prompt) - 1 - start)
                assert job.scores is not None
                job.scores.put(start, n, scored, r)
                job.scored = start + n

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """One chunk of decode steps for every row that is ready, and what follows from it."""
        for sequence in list(self._seats.working):
            if sequence.ready:
                self._seats.grow(sequence)
        ready = [sequence for sequence in self._seats.working if sequence.ready]
        if not ready:
            return
        # Long rows beside long ones: attention works through a few rows at once, as far as the longest reaches.
        ready.sort(key=lambda sequence: -sequence.computed)
        of_part = self._seats.by_part(ready)
        S = _smallest(self._rows, max(map(len, of_part)))
        places = {part * S + i: sequence for part, rows in enumerate(of_part) for i, sequence in enumerate(rows)}
        try:
            adapter = self._seats.lanes.tree()
            rows = Rows.empty(S * len(of_part), pages_for(self._cfg.context_length))
            for place, sequence in places.items():
                self._seats.put(rows, place, sequence)
            drawn = self._batch.draw(adapter, rows, max(s.job.top for s in ready))
        except Exception as error:
            self._lose_cache(error, {sequence.job for sequence in ready})
            return
        for place, sequence in places.items():
            if sequence.pages:  # a sibling's failure ends the request's other rows
                self._harvest(sequence, place, drawn)

    def _harvest(self, sequence: Sequence, place: int, drawn: Drawn) -> None:
        """Takes a row's new tokens; ends the row where its stop rule or its budget says so."""
        job, n = sequence.job, int(drawn.count[place])
        start, top = len(sequence.drawn), job.ask.sample_top
        sequence.drawn += drawn.tokens[place, :n].tolist()
        sequence.parts.append((drawn.logprobs[place, :n], drawn.top_ids[place, :n, :top], drawn.top_logprobs[place, :n, :top]))
        sequence.computed += n
        try:
            if not np.isfinite(drawn.logprobs[place, :n]).all():
                raise InternalServerError(_NOT_FINITE)
            end = first_stop(sequence.drawn, start, job.ask.stop, self._decode_text)
        except Exception as error:
            self._fail([job], error)
            return
        self._seats.remember(sequence)
        if end is not None or not sequence.remaining:
            self._seats.leave(sequence)
            job.end(sequence, end)

    # -- endings -----------------------------------------------------------------------------------------------------

    def _jobs(self) -> list[Job]:
        """Requests that wait or are at work."""
        sequences = (*self._seats.working, *self._seats.paused)
        return list(dict.fromkeys([*self._waiting, *(sequence.job for sequence in sequences)]))

    def _discard(self, jobs: Iterable[Job]) -> None:
        """Takes requests out of the queue and frees their rows and pages."""
        gone = set(jobs)
        if not gone:
            return
        self._waiting = collections.deque(job for job in self._waiting if job not in gone)
        self._seats.paused = [sequence for sequence in self._seats.paused if sequence.job not in gone]
        for sequence in [sequence for sequence in self._seats.working if sequence.job in gone]:
            self._seats.leave(sequence)

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        jobs = list(jobs)
        self._discard(jobs)
        for job in jobs:
            job.fail(error)

    def _lose_cache(self, error: Exception, jobs: Iterable[Job]) -> None:
        """Fails these requests; everybody else comes back to where they were, on a new cache.

        Programs get the pools donated, so after a failure of one nothing in them can be trusted.
        """
        self._fail(jobs, error)
        self._seats.forget()
        self._batch.release()


_NOT_FINITE = "the model gave logits that are not finite; check the weights and the adapter."


def _smallest(sizes: list[int], n: int) -> int:
    return next(size for size in sizes if size >= n)
