"""The sampler: continuous batching over pages of keys and values.

A request's sequences are admitted in the order of submission, as rows and pages allow. Prompts are prefilled in chunks, many
prompts in one call, between chunks of decode steps, so that a long prompt delays no other row. All but a prompt's last token
are prefilled; decoding starts by feeding that one, so a first token is drawn like every other. Rows under different adapters of
the base model, and under none, are decoded together.

Pages fill as sequences grow. When none is left, the youngest sequence is preempted, and later goes on where it was.
"""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import memory, sharding
from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.lora import Adapter
from tinker_jax.models.config import ModelConfig
from tinker_jax.sampling.adapter_slots import AdapterSlots
from tinker_jax.sampling.drawing import Drawn, DrawOptions, Rows
from tinker_jax.sampling.model_runner import STEPS, Chunk, Decoding, ModelRunner
from tinker_jax.sampling.page_pool import pages_for
from tinker_jax.sampling.requests import Request, parse
from tinker_jax.sampling.scheduler import Scheduler
from tinker_jax.sampling.scoring import PromptScores, Scorer, needs, width
from tinker_jax.sampling.sequence import Score, Sequence, SequenceGroup
from tinker_jax.sampling.stops import first_stop
from tinker_jax.types.errors import BadRequestError, InternalServerError, UnprocessableEntityError
from tinker_jax.types.model_input import ModelInput
from tinker_jax.types.sampling import SampleRequest, SampleResponse, SamplingParams

logger = logging.getLogger("tinker_jax")

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows a decode program is compiled for. Fewer counts on accelerators, which wait for the weights whatever the rows."""
_ROWS_ACCELERATOR = (8, 32, 128, 256)
_ROWS_DETERMINISTIC = (64,)

_CHUNKS = {64: (1, 2, 4, 8), 256: (1, 2), 1024: (1,)}
"""Shapes of a prefill on CPUs: prompt tokens of a row, and the numbers of such rows that programs are compiled for. Long rows
attend at twice the speed, short ones take what is left."""
_CHUNKS_ACCELERATOR = {256: (1, 8)}
_CHUNKS_DETERMINISTIC = {64: (8,)}
_MOST_PREFILLS = 8  # calls between two decode chunks: many rows soon decode together, and none waits for a long prompt


@dataclass(frozen=True)
class _DecodeChunk:
    """Tokens that are being drawn for sequences, by their rows."""

    places: dict[int, Sequence]
    options: DrawOptions
    width: int
    decoding: Decoding


class Sampler:
    """Draws tokens for many requests at once. One thread owns it and drives it with `step`.

    The noise of a token is a function of (seed, number of the sample, position, token id) alone: a seeded request draws the
    same tokens whatever else runs. Reported log-probabilities are those of softmax(logits / temperature) over the whole
    vocabulary, whatever the filters left; at temperature 0 those of temperature 1. Scores of the prompt are at temperature 1.
    A request can bring a function that computes those of temperature 1 anew, see `submit`.

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
        reserve: see `tinker_jax.sampling.adapter_slots.AdapterSlots`. Requests of adapters for which there is no room beside
            those at work wait for these.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Mapping[str, jax.Array],
        *,
        mesh: Mesh,
        dtype: Any,
        kv_bytes: int,
        stop_ids: Iterable[int],
        decode_text: Callable[[Any], str],
        unstack: bool = True,
        deterministic: bool = False,
        reserve: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self._cfg, self._stop_ids, self._decode_text = cfg, tuple(stop_ids), decode_text
        self._deterministic = deterministic
        cpu = mesh.devices.flat[0].platform == "cpu"
        self._parts = parts = sharding.parts(mesh, "rows")
        rows, chunks = (ROWS, _CHUNKS) if cpu else (_ROWS_ACCELERATOR, _CHUNKS_ACCELERATOR)
        if deterministic:
            rows, chunks = _ROWS_DETERMINISTIC, _CHUNKS_DETERMINISTIC
        self._rows = sorted({-(-n // parts) for n in rows})  # of each part
        self._chunks = {
            T: sorted({-(-n // parts) for n in counts}) for T, counts in chunks.items() if T < max(cfg.context_length, 65)
        }
        dtype = jnp.dtype(dtype)
        self._page_bytes = PAGE * memory.token_bytes(cfg, dtype.itemsize, sharding.parts(mesh, "kv_heads"))
        most = self._rows[-1] * pages_for(cfg.context_length)
        self._pages = max(0, min(kv_bytes // self._page_bytes - 1, most))
        self._runner = ModelRunner(cfg, params, mesh, dtype, self._pages + 1, unstack, one_width=deterministic)
        self._rows = sorted({min(rows, self._runner.most_rows_of_a_part) for rows in self._rows})
        self._scheduler = Scheduler(self._pages, parts, self._rows[-1], deterministic, AdapterSlots(reserve))
        self._scorer = Scorer(cfg, params)
        self._waiting: collections.deque[SequenceGroup] = collections.deque()
        self._ahead: _DecodeChunk | None = None  # what the device is drawing while the host looks at what it drew before

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._runner.programs + self._scorer.programs + self._scheduler.slots.programs

    @property
    def running(self) -> int:
        """Sequences that hold pages."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests and sequences that wait for rows or pages."""
        return len(self._waiting) + len(self._scheduler.preempted)

    @property
    def held_pages(self) -> int:
        """Pages that sequences hold."""
        return self._scheduler.held_pages

    @property
    def cache_bytes(self) -> int:
        """Bytes of each device that keys and values take, once they are made."""
        return (self._pages + 1) * self._page_bytes

    def allocate(self) -> None:
        """Makes the cache, smaller where the device has too little room; else that happens at the first request."""
        while True:
            try:
                return self._runner.allocate()
            except Exception as error:
                if not memory.is_out_of_memory(error) or self._pages < 2:
                    raise
                self._pages //= 2
                self._scheduler.forget(self._pages)
                self._runner.resize(self._pages + 1)
                logger.warning("out of memory: the cache becomes %.3g GiB", self.cache_bytes / 2**30)

    def parse(self, request: SampleRequest) -> Request:
        """Checks a request; touches nothing, so any thread may call it.

        Raises:
            BadRequestError: see `tinker_jax.sampling.requests.parse`; or a single sequence would never fit the cache's memory.
            UnsupportedError: a chunk that is not text.
        """
        checked = parse(request, self._cfg, self._stop_ids, self._pages * PAGE)
        if pages_for(checked.need) > self._pages:
            raise BadRequestError(self._too_large(checked))
        return checked

    def submit(
        self,
        request: SampleRequest | Request,
        weights: Hashable,
        adapter: Adapter | None,
        future: Future[SampleResponse],
        score: Score | None = None,
    ) -> None:
        """Queues a request; `step` resolves its future.

        Args:
            request: what to draw, or what `parse` made of it.
            weights: names the adapter's exact values, or the target that `replace` changes; sequences of equal weights share
                cached prompts.
            adapter: scaled adapter (`tinker_jax.lora.scaled`), or None for the base model.
            future: gets a `SampleResponse`. Cancelling it frees the request's rows and pages at the next step.
            score: computes what is reported of a sequence that has ended, and of the prompt's own tokens, where these are
                log-probabilities of temperature 1. None: those that decoding and prefill computed are reported.

        Raises:
            BadRequestError, UnsupportedError: see `parse`; nothing has changed then.
        """
        checked = request if isinstance(request, Request) else self.parse(request)
        group = SequenceGroup(checked, weights, adapter, future, width(checked.sample_top, self._cfg.V), score=score)
        if any(needs(checked, self._cfg.V)):
            group.scores = PromptScores(checked)
        group.scored = checked.read_from
        self._waiting.append(group)

    def replace(self, weights: Hashable, adapter: Adapter, score: Score | None = None) -> None:
        """New values under the name of old ones; running requests continue with them, on the keys and values there are, and
        report the log-probabilities from which they draw: no single adapter has them all.

        A request that begins later computes all of its own.
        """
        groups = [group for group in self._groups() if group.weights == weights]
        if groups and not self._scheduler.slots.finite(adapter):
            self._fail(groups, InternalServerError(_NOT_FINITE))
        for group in groups:
            group.adapter, group.score = adapter, None if group.begun else score
        self._scheduler.replace(weights, adapter)

    def warm_up(self, adapter: Adapter | None, adapters: int = 1) -> int:
        """Compiles what requests of any length, stop rule, filter, temperature and number of samples can need.

        Args:
            adapter: scaled, of the shape that requests will have; None: the base model alone.
            adapters: of this shape, at most, in use at the same moment.

        Returns:
            Number of compiled programs. Requests that wait or run are not disturbed.
        """
        parts = self._parts
        trees: list[Adapter | None] = [None]
        if adapter is not None:
            trees += self._scheduler.slots.warm_up(adapter, adapters)
        two, params = ModelInput.from_ints([0, 0]), SamplingParams(max_tokens=1)
        probe = self.parse(SampleRequest(prompt=two, sampling_params=params, prompt_logprobs=True))
        try:
            for tree, width in itertools.product(trees, self._runner.widths):
                most = self._runner.most_rows(self._sizes(0), width)
                for rows, filters in itertools.product(self._sizes(0), (False, True)):
                    if rows <= most:
                        self._runner.read(self._runner.decode(tree, Rows.empty(rows, width), DrawOptions(filters=filters)))
                for T, count in ((T, count) for T, counts in self._chunks.items() for count in counts):
                    nothing = Chunk(np.zeros(0, np.int32), 0, (), (0, 0))
                    h_RTD = self._runner.prefill(tree, [nothing] * (count * parts), T, width)
                    self._scorer.score([(probe, 0)] + [None] * (count * parts - 1), adapter if tree else None, h_RTD)
            self._runner.copy([(0, 0, 0)])
        except Exception as error:
            self._lose_cache(error, ())
            raise
        return self.programs

    def step(self) -> bool:
        """Admits what waits, prefills, draws one chunk, resolves what is finished.

        A failure on the device fails the requests it served and no other; for want of memory none fails that can still be
        served with fewer rows at once or a smaller cache.

        Returns:
            Whether work is left.
        """
        self._discard(group for group in self._groups() if group.future.cancelled())
        self._admit()
        for _ in range(_MOST_PREFILLS):
            unready = [sequence for sequence in self._scheduler.running if not sequence.ready]
            if not unready:
                break
            self._prefill(unready)
            self._admit()
        self._decode()
        if self._scheduler.running or self.waiting:
            return True
        self._ahead = None
        self._runner.forget_adapter()
        return False

    def fail(self, error: Exception) -> None:
        """Fails every request and starts afresh."""
        self._lose_cache(error, self._groups())

    def close(self) -> None:
        """Cancels every request and gives the memory back."""
        for group in self._groups():
            group.future.cancel()
        self._discard(self._groups())
        self._ahead = None
        self._runner.close()

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives rows and pages to what waits, oldest first, until the first that finds no room."""
        copies: list[tuple[int, int, int]] = []
        try:
            self._admit_with(copies)
            if copies:
                self._runner.copy(copies)
        except Exception as error:
            running = {sequence.group for sequence in self._scheduler.running}
            self._lose_cache(error, running or list(self._waiting)[:1])
        self._waiting = collections.deque(group for group in self._waiting if group.pending)

    def _admit_with(self, copies: list[tuple[int, int, int]]) -> None:
        scheduler = self._scheduler
        for sequence in list(scheduler.preempted):
            if self._sound(sequence.group) and scheduler.admit(sequence, copies) is None:
                return
        reserved = 0  # rows for the rest of a request come before younger requests
        for group in list(self._waiting):
            admitted = self._sound(group)
            while admitted and group.pending and scheduler.room > reserved:
                admitted = scheduler.admit(Sequence(group, group.begun), copies)
                group.begun += bool(admitted)
            reserved += group.pending
            if admitted is None or scheduler.room <= reserved:
                return

    def _sound(self, group: SequenceGroup) -> bool:
        """Fails a request whose adapter is not finite."""
        if group.sound or group.adapter is None or group.weights in self._scheduler.slots.names:
            return True
        error: Exception = InternalServerError(_NOT_FINITE)
        try:
            group.sound = self._scheduler.slots.finite(group.adapter)
        except Exception as failure:
            if memory.is_out_of_memory(failure):
                raise
            error = failure
        if not group.sound:
            self._fail([group], error)
        return group.sound

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _prefill(self, unready: list[Sequence]) -> None:
        """One call: a chunk of each prompt in turn, then further ones of these as far as there are rows.

        The prompt that has waited longest since its last chunk decides how long chunks are. So of w prompts each has one in
        any w calls, however long the others are.
        """
        unready = sorted(unready, key=lambda sequence: sequence.turn)
        first, shortest = unready[0], min(self._chunks)
        T = max((T for T in self._chunks if T < first.length - first.computed), default=shortest)

        def chunks(sequence: Sequence) -> range:
            """Where chunks begin: whole ones alone, unless they are the shortest there are."""
            return range(sequence.computed, sequence.length - (1 if T == shortest else T), T)

        planned = [
            _in_turn([[(sequence, start) for start in chunks(sequence)] for sequence in sequences], self._chunks[T][-1])
            for sequences in self._scheduler.by_part(unready)
        ]
        placed: list[tuple[Sequence, int] | None] = [row for rows in planned for row in rows]
        try:
            adapter = self._scheduler.slots.tree()
            most = _smallest(self._chunks[T], max(map(len, planned)))
            sizes = [R * self._parts for R in self._chunks[T]]
            longest = max(len(row[0].pages) for row in placed if row)
            size, width = self._runner.prefill_shape_to_use(sizes, most * self._parts, longest, T, adapter)
            R = size // self._parts
            placed = [row for rows in planned for row in (*rows[:R], *[None] * (R - len(rows)))]
            batch = next(self._batches(self._scheduler.running))
            then = self._sizes(self._rows_of(batch)), _longest(batch), self._options(batch)
            h_RTD = self._runner.prefill(adapter, [row and self._chunk_of(*row, T) for row in placed], T, width, then)
            self._score(placed, h_RTD)
        except Exception as error:
            self._lose_cache(error, {row[0].group for row in placed if row})
            return
        for sequence, start in filter(None, placed):
            sequence.computed = min(start + T, sequence.length - 1)
            sequence.turn = self._scheduler.next_turn()
            self._scheduler.remember(sequence)

    def _chunk_of(self, sequence: Sequence, start: int, T: int) -> Chunk:
        tokens = sequence.tokens(start, min(start + T, sequence.length - 1))
        return Chunk(tokens, start, sequence.pages, self._scheduler.slots.span(sequence.group.weights))

    def _score(self, placed: list[tuple[Sequence, int] | None], h_RTD: jax.Array) -> None:
        """Reads the prompts' numbers off a prefill's hidden states, prompts of one adapter and one kind together."""
        T = h_RTD.shape[1]
        alike: dict[Any, list[tuple[int, SequenceGroup, int]]] = {}
        for r, row in enumerate(placed):
            if row is None or row[0].index:  # the first sample's prefill is read for all
                continue
            group, start = row[0].group, row[1]
            if group.scores and group.scored < min(len(group.request.prompt) - 1, start + T):
                alike.setdefault((group.weights, needs(group.request, self._cfg.V)), []).append((r, group, start))
        for members in alike.values():
            requests: list[tuple[Request, int] | None] = [None] * len(placed)
            for r, group, start in members:
                requests[r] = group.request, start
            scored = self._scorer.score(requests, members[0][1].adapter, h_RTD)
            for r, group, start in members:
                n = min(T, len(group.request.prompt) - 1 - start)
                assert group.scores is not None
                group.scores.put(start, n, scored, r)
                group.scored = start + n

    def _sizes(self, least: int) -> list[int]:
        """Numbers of rows, rising, that programs are compiled for; those with at least so many rows of each part."""
        return [rows * self._parts for rows in self._rows if rows >= least]

    def _rows_of(self, sequences: list[Sequence]) -> int:
        """Rows of each part that these need."""
        return max(map(len, self._scheduler.by_part(sequences)))

    def _batches(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """Those that are decoded together: all, unless the tables of the longest leave no room for so many."""
        # Long rows beside long ones: attention works through a few rows at once, as far as the longest reaches.
        of_part = self._scheduler.by_part(sorted(sequences, key=lambda sequence: -len(sequence.pages)))
        while any(of_part):
            most = self._runner.most_rows(self._sizes(0), _longest(itertools.chain(*of_part))) // self._parts
            yield [sequence for rows in of_part for sequence in rows[:most]]
            of_part = [rows[most:] for rows in of_part]

    def _options(self, sequences: list[Sequence]) -> DrawOptions:
        """What a program must do that decodes these."""
        top = max(sequence.group.top for sequence in sequences)
        return DrawOptions(top, self._deterministic or any(sequence.group.request.filtered for sequence in sequences))

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One chunk of decode steps for every sequence that is ready, and what follows from it."""
        if not self._ahead:
            for sequence in list(self._scheduler.running):
                if sequence.ready:
                    self._scheduler.grow(sequence)
        ready = [sequence for sequence in self._scheduler.running if sequence.ready]
        chunks = [self._ahead] if self._ahead else filter(None, map(self._begin, self._batches(ready)))
        for chunk in chunks:
            self._ahead = self._begin_next(chunk)
            self._take(chunk)

    def _begin(self, ready: list[Sequence]) -> _DecodeChunk | None:
        """Has the next tokens of these drawn."""
        ready = [sequence for sequence in ready if sequence.pages]  # a batch before this one may have ended it
        if not ready:
            return None
        of_part, options = self._scheduler.by_part(ready), self._options(ready)
        try:
            adapter = self._scheduler.slots.tree()
            sizes, longest = self._sizes(self._rows_of(ready)), _longest(ready)
            size, width = self._runner.shape_to_use(sizes, longest, adapter, options)
            S = size // self._parts
            places = {part * S + i: sequence for part, rows in enumerate(of_part) for i, sequence in enumerate(rows)}
            rows = Rows.empty(size, width)
            for place, sequence in places.items():
                self._scheduler.put(rows, place, sequence)
            return _DecodeChunk(places, options, width, self._runner.decode(adapter, rows, options))
        except Exception as error:
            self._lose_cache(error, {sequence.group for sequence in ready})
            return None

    def _begin_next(self, chunk: _DecodeChunk) -> _DecodeChunk | None:
        """Has the tokens after those of a chunk drawn that is not read yet, so that the device does not wait for the host.

        None where that could not be the next thing to do: something else waits, a sequence has joined, fewer rows would do, or
        pages are scarce. A sequence that ends meanwhile is drawn on for nothing, into pages that nobody was given before that
        was done, or into page 0.
        """
        places = {place: sequence for place, sequence in chunk.places.items() if sequence.pages}
        going = [sequence for sequence in places.values() if sequence.remaining > STEPS]
        if not self._runner.runs_ahead or self.waiting or len(places) < len(self._scheduler.running) or not going:
            return None
        size = len(chunk.decoding.rows.token)
        if self._sizes(self._rows_of(going))[0] < size or not self._scheduler.grow_together(going, 2 * STEPS):
            return None
        try:
            adapter = self._scheduler.slots.tree()
            if adapter is not chunk.decoding.adapter or _longest(going) > chunk.width:
                return None
            table = np.zeros((size, chunk.width), np.int32)
            for place, sequence in places.items():
                table[place, : len(sequence.pages)] = sequence.pages
            rows = chunk.decoding.rows._replace(table=table)
            return _DecodeChunk(places, chunk.options, chunk.width, self._runner.decode(adapter, rows, chunk.options))
        except Exception as error:
            self._lose_cache(error, {sequence.group for sequence in places.values()})
            return None

    def _take(self, chunk: _DecodeChunk) -> None:
        """Waits for the tokens of a chunk and takes them."""
        try:
            drawn = self._runner.read(chunk.decoding)
        except Exception as error:
            self._lose_cache(error, {sequence.group for sequence in chunk.places.values()})
            return
        for place, sequence in chunk.places.items():
            if sequence.pages:  # the failure of one sample ends the request's other rows
                self._take_tokens(sequence, place, drawn)

    def _take_tokens(self, sequence: Sequence, place: int, drawn: Drawn) -> None:
        """Takes a row's new tokens; ends the row where its stop rule or its budget says so."""
        group, n = sequence.group, int(drawn.count[place])
        start, top = len(sequence.drawn), group.request.sample_top
        sequence.drawn += drawn.tokens[place, :n].tolist()
        sequence.parts.append((drawn.logprobs[place, :n], drawn.top_ids[place, :n, :top], drawn.top_logprobs[place, :n, :top]))
        sequence.computed += n
        try:
            if not np.isfinite(drawn.logprobs[place, :n]).all():
                raise InternalServerError(_NOT_FINITE)
            end = first_stop(sequence.drawn, start, group.request.stop, self._decode_text)
        except Exception as error:
            self._fail([group], error)
            return
        self._scheduler.remember(sequence)
        if end is not None or not sequence.remaining:
            self._scheduler.remove(sequence)
            try:
                group.end(sequence, end)
            except Exception as error:  # of its `score`
                self._fail([group], error)

    # -- endings -----------------------------------------------------------------------------------------------------

    def _groups(self) -> list[SequenceGroup]:
        """Requests that wait or run."""
        sequences = (*self._scheduler.running, *self._scheduler.preempted)
        return list(dict.fromkeys([*self._waiting, *(sequence.group for sequence in sequences)]))

    def _discard(self, groups: Iterable[SequenceGroup]) -> None:
        """Takes requests out of the queue and frees their rows and pages."""
        gone = set(groups)
        if not gone:
            return
        self._waiting = collections.deque(group for group in self._waiting if group not in gone)
        self._scheduler.preempted = [sequence for sequence in self._scheduler.preempted if sequence.group not in gone]
        for sequence in [sequence for sequence in self._scheduler.running if sequence.group in gone]:
            self._scheduler.remove(sequence)

    def _fail(self, groups: Iterable[SequenceGroup], error: Exception) -> None:
        groups = list(groups)
        self._discard(groups)
        for group in groups:
            group.fail(error)

    def _lose_cache(self, error: Exception, groups: Iterable[SequenceGroup]) -> None:
        """Fails these requests, unless the device had too little memory and can do with less; all others go on where they
        were, on a new cache.

        Programs get the pools donated, so after a failure of one nothing in them can be trusted.
        """
        pages, self._ahead = self._pages, None
        if not (memory.is_out_of_memory(error) and self._make_room()):
            self._fail(groups, error)
        self._scheduler.forget(self._pages)
        if pages == self._pages:
            self._runner.release()
        else:
            self._runner.resize(self._pages + 1)

    def _make_room(self) -> bool:
        """Half of the sizes of programs, or where there is one alone, half of the pages; what then never fits is refused.

        Returns:
            False: nothing is left to save.
        """
        rows, chunks = _half(self._rows), {T: _half(self._chunks[T]) for T in _half(sorted(self._chunks))}
        if not self._deterministic and (rows, chunks) != (self._rows, self._chunks):
            self._rows, self._chunks, self._scheduler.most_rows = rows, chunks, rows[-1]
        elif self._pages > 1:
            self._pages //= 2
        else:
            return False
        logger.warning(
            "out of memory while sampling: from now on at most %d rows and %d prompt tokens at once, cache %.3g GiB",
            self._rows[-1] * self._parts,
            max(T * counts[-1] for T, counts in self._chunks.items()) * self._parts,
            self.cache_bytes / 2**30,
        )
        for group in [group for group in self._groups() if pages_for(group.request.need) > self._pages]:
            self._fail([group], UnprocessableEntityError(self._too_large(group.request)))
        return True

    def _too_large(self, request: Request) -> str:
        return (
            f"A prompt of {len(request.prompt)} tokens with max_tokens={request.max_tokens} needs "
            f"{(pages_for(request.need) + 1) * self._page_bytes:,} bytes of key/value cache, but the engine has "
            f"{self.cache_bytes:,}; lower max_tokens, shorten the prompt or raise its memory."
        )


_NOT_FINITE = "the model gave logits that are not finite; check the weights and the adapter."


def _in_turn(rows: list[list[Any]], most: int) -> list[Any]:
    """The first of each, then the second of each, and so on."""
    rounds = itertools.zip_longest(*(of_one[:most] for of_one in rows))
    return [row for each in rounds for row in each if row is not None][:most]


def _longest(sequences: Iterable[Sequence]) -> int:
    """Pages of the longest."""
    return max(len(sequence.pages) for sequence in sequences)


def _half(sizes: list[int]) -> list[int]:
    """The smaller half of rising numbers, at least one."""
    return sizes[: -(-len(sizes) // 2)]


def _smallest(sizes: list[int], n: int) -> int:
    return next(size for size in sizes if size >= n)
