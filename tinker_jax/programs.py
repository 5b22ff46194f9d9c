"""Jitted functions that say when they compile."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

logger = logging.getLogger("tinker_jax")


def keep_compiled(home: str | os.PathLike[str]) -> None:
    """Keeps what compiles for longer than a moment in `home/compiled`, for the processes to come.

    JAX's own settings go first: `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=false` none.
    """
    config: Any = jax.config  # its options are attributes that no type checker sees
    if config.jax_compilation_cache_dir is None and config.jax_enable_compilation_cache:
        config.update("jax_compilation_cache_dir", os.path.join(home, "compiled"))


class Program:
    """`jax.jit` of a pure function; each new combination of shapes is logged once, with the seconds it took, and counted.

    Args:
        fn: pure function over pytrees.
        name: for the log.
        static: names of arguments that are compile-time constants (passed by keyword).
        donate: positions of arguments whose buffers the program may reuse.
    """

    def __init__(self, fn: Callable[..., Any], name: str, *, static: Sequence[str] = (), donate: Sequence[int] = ()) -> None:
        self._jit = jax.jit(fn, static_argnames=tuple(static), donate_argnums=tuple(donate))
        self._seen: set[Any] = set()
        self.name = name

    def __call__(self, *args: Any, shape: str, **static: Any) -> Any:
        """Runs the program.

        Args:
            *args: array arguments.
            shape: names the combination of shapes; equal strings must mean equal shapes.
            **static: compile-time constants.
        """
        key = (shape, tuple(sorted(static.items())))
        if key in self._seen:
            return self._jit(*args, **static)
        start = time.perf_counter()
        out = self._jit(*args, **static)
        self._seen.add(key)
        logger.info("compiled %s %s in %.1f s", self.name, shape, time.perf_counter() - start)
        return out

    @property
    def count(self) -> int:
        """Number of compiled variants."""
        return len(self._seen)
