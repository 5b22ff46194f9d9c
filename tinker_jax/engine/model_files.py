"""What an engine reads beside the weights from a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_jax.checkpoints.hub import load_tokenizer
from tinker_jax.models.config import DecoderConfig, parse
from tinker_jax.types.errors import BadRequestError, NotFoundError


def read_config(directory: Path) -> DecoderConfig:
    """Shape of the model, from config.json.

    Raises:
        NotFoundError, BadRequestError: there is none, or it is not JSON.
    """
    file = directory / "config.json"
    try:
        return parse(json.loads(file.read_text()))
    except FileNotFoundError:
        raise NotFoundError(f"{directory} has no config.json; is it a Hugging Face model directory?") from None
    except json.JSONDecodeError as error:
        raise BadRequestError(f"{file} is not valid JSON: {error}.") from None


def stop_ids(directory: Path) -> tuple[int, ...]:
    """The model's end-of-sequence ids: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.exists() and (eos := json.loads(file.read_text()).get("eos_token_id")) is not None:
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    return ()


class Text:
    """Token ids → text, for stop strings. Loads the tokenizer at its first use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Any = None

    def __call__(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._directory)
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
