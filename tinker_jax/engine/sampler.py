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
from tinker_jax.engine.asks import Ask, parse
from tinker_jax.engine.decode_batch import STEPS, Chunk, DecodeBatch
from tinker_jax.engine.jobs import Job, Sequence
from tinker_jax.engine.lanes import Lanes
from tinker_jax.engine.pages import PagePool
from tinker_jax.engine.sampling import STOP_IDS, Drawn, Rows
from tinker_jax.engine.scoring import PromptScores, Scorer, needs, width
from tinker_jax.engine.stops import first_stop
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.types.errors import BadRequestError, InternalServerError
from tinker_jax.types.sampling import SampleRequest, SampleResponse

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows a decode program is compiled for. On accelerators, which wait for the weights whatever the rows, only every other."""
_ROWS_ACCELERATOR = (8, 32, 128, 256)
_ROWS_DETERMINISTIC = (64,)

_CHUNK, _CHUNK_ACCELERATOR = 64, 256  # prompt tokens a row of a prefill computes
_CHUNKS, _CHUNKS_ACCELERATOR, _CHUNKS_DETERMINISTIC = (1, 2, 4, 8), (1, 8), (8,)  # rows a prefill is compiled for
_MOST_PREFILLS = 8  # calls between two decode chunks, while fewer rows decode than wait to


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


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
        deterministic: bool = False,
    ) -> None:
        self._cfg, self._stop_ids, self._decode_text = cfg, tuple(stop_ids), decode_text
        self._deterministic = deterministic
        cpu = mesh.devices.flat[0].platform == "cpu"
        self._parts = parts = sharding.parts(mesh, "rows")
        rows, chunks = (ROWS, _CHUNKS) if cpu else (_ROWS_ACCELERATOR, _CHUNKS_ACCELERATOR)
        if deterministic:
            rows, chunks = _ROWS_DETERMINISTIC, _CHUNKS_DETERMINISTIC
        self._rows = sorted({-(-n // parts) for n in rows})  # of each part
        self._chunks = sorted({-(-n // parts) for n in chunks})
        self._chunk = _CHUNK if cpu else _CHUNK_ACCELERATOR
        dtype = jnp.dtype(dtype)
        heads = cfg.K if cfg.K % (cut := sharding.parts(mesh, "kv_heads")) else cfg.K // cut
        self._page_bytes = 2 * cfg.L * heads * cfg.H * dtype.itemsize * PAGE
        self._most_pages = pages_for(cfg.context_length)
        size = min(kv_bytes // self._page_bytes - 1, self._rows[-1] * self._most_pages)
        self._kv_bytes = kv_bytes
        self._pools = [PagePool(max(0, size)) for _ in range(parts)]
        self._batch = DecodeBatch(cfg, params, mesh, dtype, max(0, size) + 1)
        self._lanes = Lanes()
        self._scorer = Scorer(cfg, params)
        self._waiting: collections.deque[Job] = collections.deque()
        self._paused: list[Sequence] = []  # gave their pages up; oldest first
        self._working: list[Sequence] = []  # hold pages; oldest first
        self._seated = 0  # sequences that ever got a place

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._batch.programs + self._scorer.programs + self._lanes.programs

    @property
    def live_rows(self) -> int:
        """Sequences that hold pages."""
        return len(self._working)

    @property
    def waiting(self) -> int:
        """Requests and sequences that wait for rows or pages."""
        return len(self._waiting) + len(self._paused)

    @property
    def held_pages(self) -> int:
        """Pages that sequences hold."""
        return sum(pool.held for pool in self._pools)

    def parse(self, request: SampleRequest) -> Ask:
        """Checks a request; touches nothing, so any thread may call it.

        Raises:
            BadRequestError: see `tinker_jax.engine.asks.parse`; or a single sequence would never fit the cache's memory.
            UnsupportedError: a chunk that is not text.
        """
        ask = parse(request, self._cfg, self._stop_ids)
        if pages_for(ask.need) > self._pools[0].size:
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
        job = Job(ask, weights, adapter, future)
        if any(needs(ask, self._cfg.V)):
            job.scores = PromptScores(ask)
        job.scored = ask.read_from
        self._waiting.append(job)

    def replace(self, weights: Hashable, adapter: Adapter) -> None:
        """New values under the name of old ones: requests that wait or run go on with them, on the keys and values there are."""
        for job in self._jobs():
            if job.weights == weights:
                job.adapter = adapter
        self._lanes.replace(weights, adapter)

    def step(self) -> bool:
        """Admits what waits, prefills, draws one chunk, resolves what is finished.

        A failure on the device fails the requests it served and no other.

        Returns:
            Whether work is left.
        """
        self._discard(job for job in self._jobs() if job.future.cancelled())
        for call in range(_MOST_PREFILLS):
            self._admit()
            unready = [sequence for sequence in self._working if not sequence.ready]
            # While rows decode, one call: they shall not wait for a long prompt. A crowd that begins goes first.
            if not unready or (call and 2 * len(unready) <= len(self._working)):
                break
            self._prefill(unready)
        else:
            self._admit()
        self._draw()
        return bool(self._working or self.waiting)

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
        room = self._rows[-1] * self._parts - len(self._working)
        copies: list[tuple[int, int, int]] = []
        try:
            self._admit_into(room, copies)
            if copies:
                self._batch.copy(copies)
        except Exception as error:
            self._lose_cache(error, {sequence.job for sequence in self._working})
        self._waiting = collections.deque(job for job in self._waiting if job.pending)

    def _admit_into(self, room: int, copies: list[tuple[int, int, int]]) -> None:
        for sequence in list(self._paused):
            if room <= 0 or (seated := self._seat(sequence, copies)) is None:
                return
            if seated:
                self._paused.remove(sequence)
                room -= 1
        for job in list(self._waiting):
            seated = True
            while seated and job.pending and room > 0:
                sequence = Sequence(job, len(job.sequences))
                seated = self._seat(sequence, copies)
                if seated:
                    job.sequences.append(sequence)
                    room -= 1
            room -= job.pending  # what is left of it comes before anybody younger
            if seated is None or room <= 0:
                return

    def _seat(self, sequence: Sequence, copies: list[tuple[int, int, int]]) -> bool | None:
        """Gives a sequence its pages, those that are known already among them.

        Returns:
            True; False when a prefill under way will soon make pages that it can share; None when there is no room.
        """
        job, end = sequence.job, sequence.length - 1
        if not self._may_join(job):
            return None
        if not self._sound(job):
            return False
        part, shared, parent = self._choose(sequence)
        pool, rows = self._pools[part], self._rows_of(part)
        twin = None if sequence.drawn else next((s for s in job.sequences if s.pages and s.part == part), None)
        if (twin and twin.computed < end) or self._coming(part, sequence, len(shared), parent):
            return False
        own = pages_for(job.ask.need if self._deterministic else sequence.length) - len(shared)
        pool.hold(shared)
        # One page for each row at work: it will want it soon.
        if rows >= self._rows[-1] or pool.available < own + rows * (not self._deterministic):
            pool.release(shared)
            return None
        sequence.part, sequence.pages, sequence.computed = part, [*shared, *pool.take(own)], PAGE * len(shared)
        sequence.known, sequence.parent = len(shared), parent
        if twin and len(shared) == end // PAGE and end % PAGE:
            copies.append((part, twin.pages[len(shared)], sequence.pages[len(shared)]))
            sequence.computed = end
        if sequence.order < 0:
            sequence.order, self._seated = self._seated, self._seated + 1
            if not sequence.index:
                job.hits = sequence.computed
        self._lanes.join(job.weights, job.adapter)
        self._working.append(sequence)
        return True

    def _may_join(self, job: Job) -> bool:
        """Can its rows be computed beside those at work?"""
        if self._deterministic and self._working:
            other = self._working[0].job
            return (job.weights, self._top(job)) == (other.weights, self._top(other))
        return self._lanes.fits(job.weights, job.adapter)

    def _sound(self, job: Job) -> bool:
        """Fails a request whose adapter is not finite."""
        if job.adapter is None or job.weights in self._lanes.names or self._lanes.finite(job.adapter):
            return True
        self._fail([job], InternalServerError(_NOT_FINITE))
        return False

    def _choose(self, sequence: Sequence) -> tuple[int, list[int], Hashable]:
        """Part of the rows for a sequence, the pages of it that are known there, and what stands for the last of them.

        Among the parts with few rows, the one that knows most.
        """
        rows = [self._rows_of(part) for part in range(self._parts)]
        few = min(rows) + self._rows[-1] // 8
        found = {part: self._known(part, sequence) for part in range(self._parts) if rows[part] <= few}
        part = max(found, key=lambda part: (len(found[part][0]), -rows[part]))
        return part, *found[part]

    def _known(self, part: int, sequence: Sequence) -> tuple[list[int], Hashable]:
        """Pages that hold the beginning of a sequence, and what stands for the last of them in a key."""
        job, pool = sequence.job, self._pools[part]
        parent, pages, end = job.weights, [], sequence.length - 1
        if not sequence.index:
            end = min(end, job.scored) if job.scored < len(job.ask.prompt) - 1 else end
        while (len(pages) + 1) * PAGE <= end and (page := pool.find(_key(sequence, len(pages), parent))):
            pages.append(page)
            parent = pool.identity(page)
        return pages, parent

    def _coming(self, part: int, sequence: Sequence, known: int, parent: Hashable) -> bool:
        """Is the first page that a sequence lacks about to be made for another?"""
        if (known + 1) * PAGE > sequence.length - 1:
            return False
        key = _key(sequence, known, parent)
        others = (s for s in self._working if not s.ready and s.part == part and s.known == known)
        return any(_key(other, known, other.parent) == key for other in others)

    def _rows_of(self, part: int) -> int:
        return sum(sequence.part == part for sequence in self._working)

    def _top(self, job: Job) -> int:
        return width(job.ask.sample_top, self._cfg.V)

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _prefill(self, unready: list[Sequence]) -> None:
        """One call: the next tokens of the oldest prompts."""
        T = self._chunk
        planned: list[list[tuple[Sequence, int]]] = [[] for _ in range(self._parts)]
        for sequence in unready:
            rows = planned[sequence.part]
            starts = range(sequence.computed, sequence.length - 1, T)
            rows += [(sequence, start) for start in starts[: self._chunks[-1] - len(rows)]]
        R = _smallest(self._chunks, max(map(len, planned)))
        placed = [row for rows in planned for row in (*rows, *[None] * (R - len(rows)))]
        try:
            adapter = self._lanes.tree()
            h_RTD = self._batch.prefill(adapter, [row and self._chunk_of(*row) for row in placed], T)
            self._score(placed, h_RTD)
        except Exception as error:
            self._lose_cache(error, {row[0].job for row in placed if row})
            return
        for sequence, start in filter(None, placed):
            sequence.computed = min(start + T, sequence.length - 1)
            self._remember(sequence)

    def _chunk_of(self, sequence: Sequence, start: int) -> Chunk:
        tokens = sequence.tokens(start, min(start + self._chunk, sequence.length - 1))
        return Chunk(tokens, start, self._table(sequence), self._lanes.span(sequence.job.weights))

    def _table(self, sequence: Sequence) -> np.ndarray:
        table = np.zeros(self._most_pages, np.int32)
        table[: len(sequence.pages)] = sequence.pages
        return table

    def _score(self, placed: list[tuple[Sequence, int] | None], h_RTD: jax.Array) -> None:
        """Reads the prompts' numbers off a prefill's hidden states, prompts of one adapter and one kind together."""
        groups: dict[Any, list[int]] = {}
        for r, row in enumerate(placed):
            if row and not row[0].index and row[0].job.scored < len(row[0].job.ask.prompt) - 1:
                job = row[0].job
                if job.scores and job.scored < row[1] + self._chunk:
                    groups.setdefault((job.weights, needs(job.ask, self._cfg.V)), []).append(r)
        for members in groups.values():
            mine = {r: placed[r] for r in members}
            asks = [(row[0].job.ask, row[1]) if (row := mine.get(r)) else None for r in range(len(placed))]
            job = mine[members[0]][0].job
            scored = self._scorer.score(asks, job.adapter, h_RTD)
            for r, (sequence, start) in mine.items():
                job = sequence.job
                n = min(self._chunk, len(job.ask.prompt) - 1 - start)
                job.scores.put(start, n, scored, r)
                job.scored = max(job.scored, start + n)

    def _remember(self, sequence: Sequence) -> None:
        """Tells the pool what a sequence's full pages hold."""
        end = sequence.computed
        if self._deterministic:  # what decoding computes differs in the last bit from what a prefill does
            end = min(end, len(sequence.job.ask.prompt) - 1)
        pool = self._pools[sequence.part]
        while (sequence.known + 1) * PAGE <= end:
            key = _key(sequence, sequence.known, sequence.parent)
            sequence.parent = pool.identity(pool.remember(sequence.pages[sequence.known], key))
            sequence.known += 1

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """One chunk of decode steps for every row that is ready, and what follows from it."""
        for sequence in list(self._working):
            if sequence.ready:
                self._grow(sequence)
        ready = [sequence for sequence in self._working if sequence.ready]
        if not ready:
            return
        # Long rows beside long ones: attention works through a few rows at once, as far as the longest reaches.
        ready.sort(key=lambda sequence: -sequence.computed)
        of_part = [[s for s in ready if s.part == part] for part in range(self._parts)]
        S = _smallest(self._rows, max(map(len, of_part)))
        places = {part * S + i: sequence for part, rows in enumerate(of_part) for i, sequence in enumerate(rows)}
        try:
            adapter = self._lanes.tree()
            rows = Rows.empty(S * self._parts, self._most_pages)
            for place, sequence in places.items():
                self._describe(rows, place, sequence)
            drawn = self._batch.draw(adapter, rows, max(self._top(s.job) for s in ready))
        except Exception as error:
            self._lose_cache(error, {sequence.job for sequence in ready})
            return
        for place, sequence in places.items():
            if sequence.pages:  # a sibling's failure ends the request's other rows
                self._harvest(sequence, place, drawn)

    def _grow(self, sequence: Sequence) -> None:
        """Pages for the next chunk, if need be from younger sequences."""
        pool = self._pools[sequence.part]
        lack = pages_for(sequence.computed + min(STEPS, sequence.remaining)) - len(sequence.pages)
        while sequence.pages and lack > pool.available:
            self._pause(max((s for s in self._working if s.part == sequence.part), key=lambda s: s.order))
        if sequence.pages and lack > 0:
            sequence.pages += pool.take(lack)

    def _describe(self, rows: Rows, place: int, sequence: Sequence) -> None:
        ask = sequence.job.ask
        rows.token[place] = sequence.drawn[-1] if sequence.drawn else ask.prompt[-1]
        rows.position[place] = sequence.computed
        rows.remaining[place] = sequence.remaining
        rows.live[place] = True
        rows.temperature[place] = ask.temperature
        rows.top_k[place] = ask.top_k
        rows.top_p[place] = ask.top_p
        rows.seed[place] = ask.seed
        rows.sample[place] = sequence.index
        if len(ask.stop.ids) <= STOP_IDS:
            rows.stop_ids[place, : len(ask.stop.ids)] = ask.stop.ids
        rows.lanes[place] = self._lanes.span(sequence.job.weights)
        rows.table[place] = self._table(sequence)

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
        self._remember(sequence)
        if end is not None or not sequence.remaining:
            self._leave(sequence)
            job.end(sequence, end)

    # -- endings -----------------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence's row and pages."""
        self._working.remove(sequence)
        self._lanes.leave(sequence.job.weights)
        self._pools[sequence.part].release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _pause(self, sequence: Sequence) -> None:
        """Takes a sequence's row and pages until there is room again; what it drew stays."""
        self._leave(sequence)
        self._paused.append(sequence)
        self._paused.sort(key=lambda sequence: sequence.order)

    def _jobs(self) -> list[Job]:
        """Requests that wait or are at work."""
        sequences = (*self._working, *self._paused)
        return list(dict.fromkeys([*self._waiting, *(sequence.job for sequence in sequences)]))

    def _discard(self, jobs: Iterable[Job]) -> None:
        """Takes requests out of the queue and frees their rows and pages."""
        gone = set(jobs)
        if not gone:
            return
        self._waiting = collections.deque(job for job in self._waiting if job not in gone)
        self._paused = [sequence for sequence in self._paused if sequence.job not in gone]
        for sequence in [sequence for sequence in self._working if sequence.job in gone]:
            self._leave(sequence)

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
        for sequence in list(self._working):
            self._pause(sequence)
        self._pools = [PagePool(pool.size) for pool in self._pools]
        self._batch.release()


_NOT_FINITE = "the model gave logits that are not finite; check the weights and the adapter."


def _key(sequence: Sequence, page: int, parent: Hashable) -> tuple[Hashable, bytes]:
    """What a page of a sequence holds, see `tinker_jax.engine.pages.Key`."""
    return parent, sequence.tokens(page * PAGE, (page + 1) * PAGE).tobytes()


def _smallest(sizes: list[int], n: int) -> int:
    return next(size for size in sizes if size >= n)
