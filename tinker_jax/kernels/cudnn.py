"""JAX's private module of cuDNN attention: packed and paged attention have no public function."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import jax


def private(function: str, parameters: Iterable[str], least: int) -> Any:
    """The module, if it still has what is relied on (so in jax 0.10.2, 0.11.2 and 0.12.0).

    Args:
        function: of the module.
        parameters: it must have.
        least: version of cuDNN that knows the operation, 90600 for 9.6.

    Raises:
        NotImplementedError: it does not, or there is no cuDNN; the text says why.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        missing = set(parameters) - set(inspect.signature(getattr(module, function)).parameters)
        version = module.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotImplementedError(f"jax {jax.__version__} offers no cuDNN attention here: {error}") from error
    if missing:
        raise NotImplementedError(f"jax {jax.__version__} changed its private cuDNN attention: no {', '.join(sorted(missing))}")
    if version < least:
        needed = f"{least // 10_000}.{least // 100 % 100}"
        raise NotImplementedError(f"this attention needs cuDNN {needed}, found {version}")
    return module
