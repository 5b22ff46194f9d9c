"""JAX's private module of cuDNN attention: packed and paged attention have no public function."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import jax


def private(function: str, parameters: Iterable[str], least: int, optional: Iterable[str] = ()) -> Any:
    """The module, if it still has what is relied on (so in jax 0.10.2, 0.11.2, 0.12.0 and 0.12.0.1).

    Args:
        function: of the module.
        parameters: it must have.
        least: version of cuDNN that knows the operation, 90600 for 9.6.
        optional: parameters that it may have; any other must have a default.

    Raises:
        NotImplementedError: it does not, or there is no cuDNN; the text says why.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        found = inspect.signature(getattr(module, function)).parameters
        version = module.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotImplementedError(f"jax {jax.__version__} offers no cuDNN attention here: {error}") from error
    if missing := set(parameters) - set(found):
        raise NotImplementedError(f"jax {jax.__version__} changed its private cuDNN attention: no {', '.join(sorted(missing))}")
    required = {name for name, parameter in found.items() if parameter.default is parameter.empty}
    if surplus := required - {*parameters, *optional}:
        wanted = ", ".join(sorted(surplus))
        raise NotImplementedError(f"jax {jax.__version__} changed its private cuDNN attention: it wants {wanted}")
    if version < least:
        needed = f"{least // 10_000}.{least // 100 % 100}"
        raise NotImplementedError(f"this attention needs cuDNN {needed}, found {version}")
    return module
