"""Which sequences run, on which rows and pages, and which are preempted.

Pure bookkeeping on the host; no device is touched here.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Iterable

from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.lora import Adapter
from tinker_jax.sampling.adapter_slots import AdapterSlots
from tinker_jax.sampling.drawing import STOP_IDS, Rows
from tinker_jax.sampling.model_runner import STEPS
from tinker_jax.sampling.page_pool import PagePool, pages_for
from tinker_jax.sampling.sequence import Sequence, SequenceGroup


class Scheduler:
    """Running sequences and their pages.

    Args:
        pages: that the sequences of one part of the rows may hold.
        parts: of the rows, each with pages of its own.
        most_rows: sequences that run in one part at once.
        deterministic: see `tinker_jax.sampling.sampler.Sampler`.
        slots: for the adapters of the running sequences.

    Attributes:
        running: sequences that hold pages.
        preempted: sequences whose pages were taken, to be admitted again; oldest first.
        most_rows: as given; those that run already stay when it falls.
    """

    def __init__(self, pages: int, parts: int, most_rows: int, deterministic: bool, slots: AdapterSlots) -> None:
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.slots = slots
        self._pages, self._parts, self.most_rows = pages, parts, most_rows
        self._deterministic = deterministic
        self._pools = [PagePool(pages) for _ in range(parts)]
        self._admitted = 0  # sequences that were ever admitted
        self._turns = itertools.count()
        self._changes: collections.Counter[Hashable] = collections.Counter()  # of the values that go by a name

    @property
    def room(self) -> int:
        """Rows that are free."""
        return self.most_rows * self._parts - len(self.running)

    @property
    def held_pages(self) -> int:
        """Pages that sequences hold."""
        return sum(pool.held for pool in self._pools)

    def by_part(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Those of each part of the rows."""
        return [[s for s in sequences if s.part == part] for part in range(self._parts)]

    def forget(self, pages: int) -> None:
        """Forgets every page; running sequences are preempted. There are so many pages from now on."""
        for sequence in list(self.running):
            self.preempt(sequence)
        self._pages = pages
        self._pools = [PagePool(pages) for _ in self._pools]

    def replace(self, weights: Hashable, adapter: Adapter) -> None:
        """New values under an old name: no page computed under the old ones will be shared again."""
        self._changes[weights] += 1
        self.slots.replace(weights, adapter)

    def admit(self, sequence: Sequence, copies: list[tuple[int, int, int]]) -> bool | None:
        """Gives a sequence its pages, those that are known already among them.

        Returns:
            True; False when a running prefill will soon make pages that it can share; None when there is no room.
        """
        if not self._may_join(sequence.group):
            return None
        tried = (self._admit_to(*choice, sequence, copies) for choice in self._choices(sequence))
        return next((admitted for admitted in tried if admitted is not None), None)

    def _admit_to(
        self, part: int, shared: list[int], parent: Hashable, sequence: Sequence, copies: list[tuple[int, int, int]]
    ) -> bool | None:
        group, end = sequence.group, sequence.length - 1
        pool, rows = self._pools[part], self._rows_of(part)
        twin = None if sequence.drawn else next((s for s in self.running if s.group is group and s.part == part), None)
        if (twin and twin.computed < end) or self._coming(part, sequence, len(shared), parent):
            return False
        own = pages_for(group.request.need if self._deterministic else sequence.length) - len(shared)
        pool.hold(shared)
        # One page is left for each running row, which will need it soon.
        if rows >= self.most_rows or pool.available < own + rows * (not self._deterministic):
            pool.release(shared)
            return None
        sequence.part, sequence.pages, sequence.computed = part, [*shared, *pool.take(own)], PAGE * len(shared)
        sequence.known, sequence.parent = len(shared), parent
        if twin and len(shared) == end // PAGE and end % PAGE:
            copies.append((part, twin.pages[len(shared)], sequence.pages[len(shared)]))
            sequence.computed = end
        if sequence.order < 0:
            sequence.order, self._admitted = self._admitted, self._admitted + 1
            if not sequence.index:
                group.hits = sequence.computed
        sequence.turn = self.next_turn()
        self.slots.join(group.weights, group.adapter)
        self.running.append(sequence)
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        return True

    def next_turn(self) -> int:
        """A place behind all others in the order of prefills."""
        return next(self._turns)

    def _may_join(self, group: SequenceGroup) -> bool:
        """Can its rows be computed beside the running ones?"""
        if self._deterministic and self.running:
            other = self.running[0].group
            return group.kind == other.kind
        return self.slots.fits(group.weights, group.adapter)

    def _choices(self, sequence: Sequence) -> list[tuple[int, list[int], Hashable]]:
        """Parts of the rows, best first, the pages of a sequence that are known there, and what stands for the last of them.

        Those with few rows come first, and among them the one that knows most.
        """
        rows = [self._rows_of(part) for part in range(self._parts)]
        few = min(rows) + self.most_rows // 8
        found = [(part, *self._known(part, sequence)) for part in range(self._parts)]
        return sorted(found, key=lambda choice: (rows[choice[0]] > few, -len(choice[1]), rows[choice[0]]))

    def _known(self, part: int, sequence: Sequence) -> tuple[list[int], Hashable]:
        """Pages that hold the beginning of a sequence, and what stands for the last of them in a key."""
        group, pool = sequence.group, self._pools[part]
        parent, pages, end = (group.weights, self._changes[group.weights]), [], _shareable(sequence)
        while (len(pages) + 1) * PAGE <= end and (page := pool.find(_key(sequence, len(pages), parent))):
            pages.append(page)
            parent = pool.identity(page)
        return pages, parent

    def _coming(self, part: int, sequence: Sequence, known: int, parent: Hashable) -> bool:
        """Is the first page that a sequence lacks being computed for another?"""
        if (known + 1) * PAGE > _shareable(sequence):
            return False
        key = _key(sequence, known, parent)
        others = (s for s in self.running if not s.ready and s.part == part and s.known == known)
        return any(_key(other, known, other.parent) == key for other in others)

    def _rows_of(self, part: int) -> int:
        return sum(sequence.part == part for sequence in self.running)

    def grow(self, sequence: Sequence) -> None:
        """Pages for the next chunk; preempts the youngest sequences when too few are left."""
        pool = self._pools[sequence.part]
        lack = pages_for(sequence.computed + min(STEPS, sequence.remaining)) - len(sequence.pages)
        while sequence.pages and lack > pool.available:
            self.preempt(max((s for s in self.running if s.part == sequence.part), key=lambda s: s.order))
        if sequence.pages and lack > 0:
            sequence.pages += pool.take(lack)

    def grow_together(self, sequences: Iterable[Sequence], tokens: int) -> bool:
        """Pages for so many tokens more of each, if all of them are free; else nothing changes."""
        lacks = {s: max(0, pages_for(s.computed + min(tokens, s.remaining)) - len(s.pages)) for s in sequences}
        for part, pool in enumerate(self._pools):
            if sum(lack for s, lack in lacks.items() if s.part == part) > pool.available:
                return False
        for sequence, lack in lacks.items():
            sequence.pages += self._pools[sequence.part].take(lack)
        return True

    def remember(self, sequence: Sequence) -> None:
        """Tells the pool what a sequence's full pages hold."""
        end = sequence.computed
        if self._deterministic:  # what decoding computes differs in the last bit from what a prefill does
            end = min(end, len(sequence.group.request.prompt) - 1)
        pool = self._pools[sequence.part]
        while (sequence.known + 1) * PAGE <= end:
            key = _key(sequence, sequence.known, sequence.parent)
            sequence.parent = pool.identity(pool.remember(sequence.pages[sequence.known], key))
            sequence.known += 1

    def put(self, rows: Rows, place: int, sequence: Sequence) -> None:
        """Describes a sequence that is ready to be decoded in a row of the decode batch."""
        request = sequence.group.request
        rows.token[place] = sequence.drawn[-1] if sequence.drawn else request.prompt[-1]
        rows.position[place] = sequence.computed
        rows.remaining[place] = sequence.remaining
        rows.live[place] = True
        rows.temperature[place] = request.temperature
        rows.top_k[place] = request.top_k
        rows.top_p[place] = request.top_p
        rows.seed[place] = request.seed
        rows.sample[place] = sequence.index
        if len(request.stop.ids) <= STOP_IDS:
            rows.stop_ids[place, : len(request.stop.ids)] = request.stop.ids
        rows.slots[place] = self.slots.span(sequence.group.weights)
        rows.table[place, : len(sequence.pages)] = sequence.pages

    def remove(self, sequence: Sequence) -> None:
        """Frees a sequence's row and pages."""
        self.running.remove(sequence)
        self.slots.leave(sequence.group.weights)
        self._pools[sequence.part].release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def preempt(self, sequence: Sequence) -> None:
        """Frees a sequence's row and pages until there is room again; what it drew stays."""
        self.remove(sequence)
        self.preempted.append(sequence)
        self.preempted.sort(key=lambda sequence: sequence.order)


def _shareable(sequence: Sequence) -> int:
    """Tokens at the front whose keys and values may come from another prefill: those whose hidden states nobody reads."""
    group, end = sequence.group, sequence.length - 1
    scores = not sequence.index and group.scored < len(group.request.prompt) - 1
    return min(end, group.scored) if scores else end


def _key(sequence: Sequence, page: int, parent: Hashable) -> tuple[Hashable, bytes]:
    """What a page of a sequence holds, see `tinker_jax.sampling.page_pool.Key`."""
    return parent, sequence.tokens(page * PAGE, (page + 1) * PAGE).tobytes()
