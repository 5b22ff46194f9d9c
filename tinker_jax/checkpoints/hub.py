"""Where a base model's files are: shipped with the package, in a local directory, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_jax.types.errors import APIConnectionError, NotFoundError, PermissionDeniedError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_PREFIX = "tinker-jax/"
#: Weights, configuration, tokenizer and chat template; nothing in subfolders (original checkpoints, onnx, …).
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve(base_model: str) -> Path:
    """The directory that holds `config.json`, weights and tokenizer of a base model; downloads it if need be.

    Args:
        base_model: `"tinker-jax/<name>"` for an embedded model, a local directory, or a hub id such as `"Qwen/Qwen3-0.6B"`.
            `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` count as always.

    Raises:
        NotFoundError: nothing there; says what was tried.
        PermissionDeniedError: the hub wants a login or an accepted licence.
        APIConnectionError: the hub failed otherwise.
        StorageError: the cache cannot be written.
    """
    if base_model.startswith(EMBEDDED_PREFIX):
        return _embedded(base_model)
    local = Path(base_model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise NotFoundError(f"directory {local} has no config.json, so it is no Hugging Face model directory.")
        return local.absolute()
    if not _HUB_ID.fullmatch(base_model):
        raise NotFoundError(
            f"base model {base_model!r} is neither an existing directory nor a hub id of the form 'owner/name'; "
            f"embedded models are {_embedded_names()}."
        )
    return _download(base_model)


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory.

    Raises:
        NotFoundError: there is none that transformers can load.
    """
    # Its advice to install PyTorch is wrong here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    # transformers makes up an empty tokenizer where the files are missing.
    if not any(file.name in _VOCABULARIES for file in Path(directory).glob("*")):
        raise NotFoundError(f"{directory} has no tokenizer: none of {', '.join(_VOCABULARIES)}. Copy the model's there.")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # what is raised for a missing or damaged file changes from version to version
        why = str(error).partition("\n")[0]
        raise NotFoundError(
            f"{directory} has no tokenizer that transformers can load: {type(error).__name__}: {why}"
        ) from error


def _embedded_root() -> Path:
    return Path(__file__).parent.parent / "embedded"


def _embedded_names() -> str:
    names = sorted(EMBEDDED_PREFIX + file.parent.name for file in _embedded_root().glob("*/config.json"))
    return ", ".join(names) or "none"


def _embedded(base_model: str) -> Path:
    name = base_model.removeprefix(EMBEDDED_PREFIX)
    directory = _embedded_root() / name
    if os.path.basename(name) != name or not (directory / "config.json").is_file():
        raise NotFoundError(f"embedded model {base_model!r} does not exist; embedded models are {_embedded_names()}.")
    return directory


def _download(base_model: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    tried = f"base model {base_model!r}: no directory of that name"
    try:
        return Path(snapshot_download(base_model, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise PermissionDeniedError(
            f"{tried}; on the hub it is gated. Accept its licence at {constants.ENDPOINT}/{base_model} and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{tried}, and the hub has no such repository. Check the spelling; a private one needs HF_TOKEN. "
            f"Embedded models are {_embedded_names()}."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        raise NotFoundError(
            f"{tried}; it is not in the cache {constants.HF_HUB_CACHE}, and {why}. Download it first on a machine with network "
            f"(hf download {base_model}), give a local directory, or use an embedded model: {_embedded_names()}."
        ) from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{tried}, and it is no valid hub id: {error}") from error
    except errors.HfHubHTTPError as error:
        raise APIConnectionError(f"{tried}; the hub refused: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot download {base_model} to {constants.HF_HUB_CACHE}: {error.strerror or error}.") from error
