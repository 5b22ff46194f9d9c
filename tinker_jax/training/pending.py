"""Device work under way: dispatched now, read later, and taken back if it failed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tinker_jax.types.errors import TinkerError

T = TypeVar("T")


class Retracted(Exception):
    """Raised by `Pending.read`: the step is refused with `error`; it, and later ones of its lane, are to be undone."""

    def __init__(self, error: TinkerError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, eq=False)
class Pending(Generic[T]):
    """What a training step returns once it is dispatched.

    Attributes:
        read: waits for the device and gives the result; may run on another thread. A `TinkerError` that it raises is the
            step's outcome; `Retracted` holds one, of a step that must be undone. Any other error means that the device failed,
            and that what the step left behind is worthless.
        undo: puts the state back to what it was before the step, whatever later steps made of it.
    """

    read: Callable[[], T]
    undo: Callable[[], None]

    def then(self, change: Callable[[T], Any]) -> Pending[Any]:
        """The same work with `change` of its result."""
        return Pending(lambda: change(self.read()), self.undo)

    def finish(self) -> T:
        """Reads at once, and undoes a step that failed on the device."""
        try:
            return self.read()
        except TinkerError:
            raise
        except BaseException:
            self.undo()
            raise


def complete(work: Generator[None, None, T]) -> T:
    """The result of work that may pause, done without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
