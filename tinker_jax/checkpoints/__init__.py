"""Checkpoints: the store of `tinker://` paths, state on disk, Hugging Face import, and exchange with other tools.

from tinker_jax.checkpoints import export_merged
export_merged("tinker://sess-1:train:0/weights/final", "my-model")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_jax.checkpoints.export import export_merged, export_peft, export_tinker
    from tinker_jax.checkpoints.peft_import import import_peft
    from tinker_jax.checkpoints.store import Store

__all__ = ["Store", "export_merged", "export_peft", "export_tinker", "import_peft"]


def __getattr__(name: str) -> object:
    # Lazy, so that the store can be used without paying for jax.
    if name == "Store":
        from tinker_jax.checkpoints.store import Store

        return Store
    if name == "import_peft":
        from tinker_jax.checkpoints.peft_import import import_peft

        return import_peft
    if name in __all__:
        from tinker_jax.checkpoints import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
