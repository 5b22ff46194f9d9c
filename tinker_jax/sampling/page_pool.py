"""Pages of the key/value cache on the host: which sequences hold them, and the prefix cache.

A page holds the keys and values of `PAGE` consecutive tokens of one sequence. Sequences that begin alike under the same
weights hold the same pages. A released page keeps its content until it is needed for another, oldest first, so that a prompt
that extends an earlier one finds it. Pure bookkeeping; no device is touched here.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any

from tinker_jax.kernels.decode_attention import PAGE

_NARROWEST = 128  # pages: most models' requests never need more than one width

#: What a page holds: (identity of the page before it, or the weights in front of the first one; its tokens).
Key = tuple[Hashable, bytes]


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


def table_widths(most: int) -> list[int]:
    """Pages that a row's table may have room for, rising: programs are compiled for these alone."""
    widths = [most]
    narrow = _NARROWEST
    while 2 * narrow <= most:
        widths.insert(-1, narrow)
        narrow *= 4
    return widths


class PagePool:
    """Pages 1 … size of one shard of the cache; page 0 belongs to no sequence.

    Args:
        size: pages that sequences may hold.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size, 0, -1))
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by no sequence; oldest first
        self._page_of: dict[Key, int] = {}
        self._known: dict[int, tuple[Key, int]] = {}  # page → its key and its identity
        self._identities = itertools.count()

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return len(self._holders)

    def take(self, n: int) -> list[int]:
        """Gives n pages away, forgetting what the oldest idle ones hold; there must be that many."""
        assert n <= self.available
        pages = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                key, _ = self._known.pop(page)
                del self._page_of[key]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more sequence holds each of these pages."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """A sequence releases its pages, given in the order of its tokens: the first of them are remembered longest."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._known:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, key: Key) -> int | None:
        """The page that holds this, if any does."""
        return self._page_of.get(key)

    def identity(self, page: int) -> Any:
        """What stands for the page in the key of the one after it."""
        return self._known[page][1]

    def remember(self, page: int, key: Key) -> int:
        """Says what a held page holds; returns the page that is known for it: an older one, where there is one."""
        known = self._page_of.setdefault(key, page)
        if known == page and page not in self._known:
            self._known[page] = (key, next(self._identities))
        return known
