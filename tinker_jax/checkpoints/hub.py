"""Where a base model's files are: shipped with the package, in a local directory, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_jax.checkpoints.digests import sha256
from tinker_jax.checkpoints.json_files import read_object
from tinker_jax.types._show import brief
from tinker_jax.types.errors import (
    APIConnectionError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)

if TYPE_CHECKING:
    from etils import epath
    from transformers import PreTrainedTokenizerBase

EMBEDDED_PREFIX = "tinker-jax/"
#: What to do about a damaged file of a model.
DOWNLOAD_AGAIN = "Download it again."
#: Weights, configuration, tokenizer and chat template; nothing in subfolders (original checkpoints, onnx, …).
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MOST_HUB_ID = 96  # as the hub counts
_SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(base_model: str) -> Path:
    """The directory that holds `config.json`, weights and tokenizer of a base model; downloads it if need be.

    Args:
        base_model: `"tinker-jax/<name>"` for an embedded model, a local directory, or a hub id such as `"Qwen/Qwen3-0.6B"`.
            `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` count as always.

    Raises:
        BadRequestError: no name at all.
        NotFoundError: nothing there; says what was tried.
        PermissionDeniedError: the hub wants a login or an accepted licence.
        APIConnectionError: the hub failed otherwise.
        StorageError: the cache cannot be written.
    """
    if not isinstance(base_model, str):
        raise BadRequestError(f"base model: expected a hub id, a directory or an embedded model, got {brief(base_model)}.")
    if base_model.startswith(EMBEDDED_PREFIX):
        return _embedded(base_model)
    local = local_directory(base_model)
    if local is not None:
        if not (local / "config.json").is_file():
            raise NotFoundError(f"directory {local} has no config.json, so it is no Hugging Face model directory.")
        return local.absolute()
    if not is_hub_id(base_model):
        raise NotFoundError(
            f"base model {brief(base_model)} is neither an existing directory nor a hub id of the form 'owner/name'; "
            f"embedded models are {_embedded_names()}."
        )
    return _download(base_model)


def local_directory(name: str) -> Path | None:
    """The directory that a base model's name means, `~` expanded; None where there is none."""
    try:
        path = os.path.expanduser(name)
    except ValueError:  # `~` and a user's name that no system can have
        return None
    return Path(path) if name and os.path.isdir(path) else None


def canonical(base_model: str) -> str:
    """One name for what has two: the hub id, of the directory in the hub's cache that it would be loaded from."""
    path = Path(base_model)
    repository, main = path.parent.parent, path.parent.parent / "refs" / "main"
    if path.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return base_model
    from huggingface_hub import constants

    try:
        same_cache = repository.parent.resolve() == Path(constants.HF_HUB_CACHE).resolve()
        current = same_cache and main.read_text().strip() == path.name
    except (OSError, ValueError):
        return base_model
    return repository.name.removeprefix("models--").replace("--", "/") if current else base_model


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id: `name` or `owner/name`."""
    return len(name) <= _MOST_HUB_ID and _HUB_ID.fullmatch(name) is not None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
        NotFoundError: no such file.
        StorageError: it cannot be read, is not UTF-8, not JSON, or holds no object.
    """
    try:
        return read_object(file, DOWNLOAD_AGAIN)
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist; is {file.parent} a Hugging Face model directory?") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}.") from error


def verify_download(directory: Path, remember: epath.Path, progress: bool = True) -> None:
    """Holds weight files of the hub's cache against their SHA-256.

    The cache keeps a large file under its SHA-256 as name, with a link in the snapshot. Reading 16 GB only for this takes tens
    of seconds, so a file that was found whole is not read again until its size or its time of change is another. Other files,
    those of a local directory among them, have no digest to hold them against.

    Args:
        directory: of a model, as `resolve` returns it.
        remember: directory for a small file for each file that was found whole.
        progress: show a progress bar.

    Raises:
        StorageError: a file has another digest, or cannot be read.
    """
    from tqdm import tqdm

    unknown = []
    for file in sorted(directory.glob("*.safetensors")):
        blob = Path(os.path.realpath(file))
        if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
            continue
        with _reading(blob):
            stamp = f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
        if _recall(remember / blob.name) != stamp:
            unknown.append((file, blob, stamp))
    for file, blob, stamp in tqdm(unknown, desc="Verifying", unit="file", delay=0.5, disable=not progress):
        with _reading(blob):
            digest = sha256(blob)
        if digest != blob.name:
            raise StorageError(
                f"{file} is damaged: the SHA-256 of {blob} is {digest}. Remove {blob}, and it is downloaded again."
            )
        with contextlib.suppress(OSError):  # then it is read again the next time
            remember.mkdir(parents=True, exist_ok=True)
            (remember / blob.name).write_text(stamp)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}.") from error


def _recall(file: epath.Path) -> str | None:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return None


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


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(EMBEDDED_PREFIX + file.parent.name for file in _embedded_root().glob("*/config.json"))


def _embedded_names() -> str:
    return ", ".join(embedded_models()) or "none"


def _embedded(base_model: str) -> Path:
    name = base_model.removeprefix(EMBEDDED_PREFIX)
    directory = _embedded_root() / name
    if os.path.basename(name) != name or not os.path.isfile(directory / "config.json"):
        raise NotFoundError(f"embedded model {brief(base_model)} does not exist; embedded models are {_embedded_names()}.")
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
