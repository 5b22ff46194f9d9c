"""What an engine reads beside the weights from a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_jax.checkpoints.hub import load_tokenizer, read_json
from tinker_jax.checkpoints.stored import Quantization, quantization
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.registry import parse
from tinker_jax.types import _check

_MOST_ID = 2**31 - 1  # token ids are int32


def read_config(directory: Path) -> ModelConfig:
    """Shape of the model, from config.json.

    Raises:
        NotFoundError: there is none.
        StorageError: it is damaged.
        BadRequestError, UnsupportedError: a value; see `parse`.
    """
    return parse(read_json(directory / "config.json"))


def read_quantization(directory: Path) -> Quantization | None:
    """How the weights may be encoded, from config.json; raises as `read_config`."""
    return quantization(read_json(directory / "config.json"))


def stop_ids(directory: Path) -> tuple[int, ...]:
    """The model's end-of-sequence ids: generation_config.json, else config.json.

    Raises:
        StorageError: a file is damaged.
        BadRequestError: `eos_token_id` is no token id, and no list of these.
    """
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists() and (eos := read_json(directory / name).get("eos_token_id")) is not None:
            ids = eos if isinstance(eos, list) else [eos]
            return tuple(_check.integer(i, f"{name}: eos_token_id", minimum=0, maximum=_MOST_ID) for i in ids)
    return ()


class Text:
    """Token ids → text, for stop strings. The tokenizer, whose import takes seconds, is loaded by `load`, or at the first use.

    Attributes:
        loaded: it is there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Any = None
        self.loaded = False

    def load(self) -> None:
        """Loads the tokenizer; on any thread, and again without harm.

        Raises:
            NotFoundError: there is none that transformers can load.
        """
        self._tokenizer = load_tokenizer(self._directory)
        self.loaded = True

    def __call__(self, tokens: Sequence[int]) -> str:
        if not self.loaded:
            self.load()
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
