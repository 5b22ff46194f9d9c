"""What the engines of this process have set aside of a device's memory."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping

from tinker_jax.types.errors import UnprocessableEntityError


class Ledger:
    """Bytes by owner and purpose.

    Every mesh begins at the first device, which therefore holds a part of everything: one sum stands for all devices.

    Attributes:
        lock: held by whoever looks and then sets aside; may be taken again by its thread.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finalizer that the garbage collector runs may release
        self._held: dict[Hashable, dict[str, int]] = {}

    @property
    def total(self) -> int:
        """Bytes that are set aside."""
        with self.lock:
            return sum(size for purposes in self._held.values() for size in purposes.values())

    def hold(self, owner: Hashable, sizes: Mapping[str, int], limit: int | None) -> None:
        """Sets bytes aside, each in place of what the owner held for the same purpose.

        Args:
            owner: whose `str` the report shows.
            sizes: bytes of each device, by purpose.
            limit: bytes of a device; None: not known.

        Raises:
            UnprocessableEntityError: there are not so many left; nothing has changed.
        """
        with self.lock:
            own = self._held.get(owner, {})
            others = self.total - sum(own.get(purpose, 0) for purpose in sizes)
            wanted = sum(sizes.values())
            if limit is not None and others + wanted > limit:
                raise UnprocessableEntityError(
                    f"{owner}: {' and '.join(sizes)} would take {gib(wanted)} of a device of {gib(limit)}, of which "
                    f"{gib(max(0, limit - others))} are free: {self.report()}. Close clients that are not needed, or let the "
                    "engines plan with less (EngineConfig.memory)."
                )
            self._held.setdefault(owner, {}).update(sizes)

    def release(self, owner: Hashable, *purposes: str) -> None:
        """Gives back what the owner holds for these purposes, or for all when none is named. Idempotent."""
        with self.lock:
            if not purposes:
                self._held.pop(owner, None)
            for purpose in purposes:
                self._held.get(owner, {}).pop(purpose, None)

    def report(self) -> str:
        """Who holds how much for what, largest first; adapters and samplers in one sum each."""
        lines = []
        with self.lock:
            for owner, purposes in self._held.items():
                kinds: dict[str, int] = {}
                for purpose, size in purposes.items():
                    kind = purpose.partition(" ")[0]
                    kinds[kind] = kinds.get(kind, 0) + size
                shown = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1]))
                lines.append(f"{owner} ({shown})")
        return "; ".join(lines) or "nothing is set aside"


def gib(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.3g} GiB"


LEDGER = Ledger()
"""The process's."""
