"""Where base models come from, and what a wrong name is told."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub import errors

from tinker_jax.checkpoints import hub
from tinker_jax.types.errors import (
    APIConnectionError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    (tmp_path / "embedded" / "nano").mkdir(parents=True)
    (tmp_path / "embedded" / "nano" / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "_embedded_root", lambda: tmp_path / "embedded")
    return tmp_path / "embedded"


def test_embedded_models_come_with_the_package(embedded):
    assert hub.resolve("tinker-jax/nano") == embedded / "nano"


@pytest.mark.parametrize("name", ["tinker-jax/other", "tinker-jax/", "tinker-jax/../embedded/nano", "tinker-jax/.."])
def test_an_unknown_embedded_model_lists_those_there_are(embedded, name):
    with pytest.raises(NotFoundError, match=r"does not exist; embedded models are tinker-jax/nano\."):
        hub.resolve(name)


def test_a_local_directory_is_taken_as_it_is(checkpoint, monkeypatch):
    directory = checkpoint("qwen3")
    assert hub.resolve(str(directory)) == directory
    monkeypatch.chdir(directory.parent)
    assert hub.resolve("./qwen3") == directory
    monkeypatch.setenv("HOME", str(directory.parent))
    assert hub.resolve("~/qwen3") == directory


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"has no config\.json, so it is no Hugging Face model directory"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/directory", "./nowhere", "a/b/c", "", "two words"])
def test_what_is_neither_directory_nor_hub_id_is_refused_without_asking_the_hub(embedded, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(embedded)
    with pytest.raises(NotFoundError, match=r"no"):
        hub.resolve(name)


def test_a_hub_id_that_is_not_cached_says_what_to_do_offline():
    with pytest.raises(NotFoundError) as error:
        hub.resolve("nobody/no-such-model")
    text = str(error.value)
    assert "base model 'nobody/no-such-model': no directory of that name" in text
    assert "HF_HUB_OFFLINE is set" in text and "hf download nobody/no-such-model" in text


def test_only_the_files_that_are_needed_are_downloaded(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/name") == Path(tmp_path)
    assert asked["repo"] == "owner/name"
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
            "pytorch_model.bin",
            "original/consolidated.safetensors",
            "README.md",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert set(kept) == {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    }


def fake(kind, text="refused"):
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (fake(errors.GatedRepoError), PermissionDeniedError, "it is gated. Accept its licence at "),
        (fake(errors.RepositoryNotFoundError), NotFoundError, "the hub has no such repository"),
        (fake(errors.HfHubHTTPError), APIConnectionError, "the hub refused"),
        (errors.HFValidationError("bad"), NotFoundError, "it is no valid hub id: bad"),
        (OSError(28, "No space left on device"), StorageError, "cannot download owner/name to "),
    ],
)
def test_failures_of_the_hub_become_typed_errors(monkeypatch, raised, expected, text):
    def snapshot_download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(expected) as error:
        hub.resolve("owner/name")
    assert text in str(error.value)


def test_a_missing_or_damaged_tokenizer_is_an_error(checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), model)
    assert hub.load_tokenizer(model).decode(hub.load_tokenizer(model).encode("the cat")) == "the cat"
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(NotFoundError, match="model has no tokenizer that transformers can load"):
        hub.load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"model has no tokenizer: none of tokenizer.json, .*Copy the model's there"):
        hub.load_tokenizer(model)


@pytest.mark.parametrize("name", [None, 3, b"owner/name", Path("model")])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(BadRequestError, match=r"base model: expected a hub id, a directory or an embedded model, got "):
        hub.resolve(name)


@pytest.fixture
def snapshot(tmp_path):
    """A model in the layout of the hub's cache: files named by their SHA-256, and links to them."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number in (1, 2):
        content = b"weights" * number
        (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)
        (snapshot / f"model-{number}.safetensors").symlink_to(blobs / hashlib.sha256(content).hexdigest())
    (snapshot / "other.safetensors").write_bytes(b"no link, so no digest")
    return snapshot


def test_a_file_of_the_hubs_cache_is_held_against_its_digest_once(snapshot, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(hub, "sha256", lambda file: read.append(file.name) or hashlib.sha256(file.read_bytes()).hexdigest())
    for _ in range(2):
        hub.verify_download(snapshot, epath.Path(tmp_path / "verified"), progress=False)
    assert sorted(read) == sorted(blob.name for blob in (snapshot.parents[1] / "blobs").iterdir())
    blob = Path(os.path.realpath(snapshot / "model-2.safetensors"))
    blob.write_bytes(b"weightsweights"[::-1])
    os.utime(blob, ns=(0, 0))
    with pytest.raises(StorageError, match=rf"model-2\.safetensors is damaged: the SHA-256 of .* Remove .*{blob.name}"):
        hub.verify_download(snapshot, epath.Path(tmp_path / "verified"), progress=False)


def test_a_place_that_cannot_be_written_means_only_that_files_are_read_again(snapshot, tmp_path):
    (tmp_path / "file").write_text("in the way")
    hub.verify_download(snapshot, epath.Path(tmp_path / "file" / "verified"), progress=False)


def test_a_link_to_nothing_is_a_storage_error(snapshot, tmp_path):
    Path(os.path.realpath(snapshot / "model-1.safetensors")).unlink()
    with pytest.raises(StorageError, match=r"cannot read .*: No such file"):
        hub.verify_download(snapshot, epath.Path(tmp_path / "verified"), progress=False)
