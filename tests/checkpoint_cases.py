"""Runs and adapters that several tests of checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import quantised
import tiny

from tinker_jax import lora
from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.checkpoints.records import Kind, RunRecord
from tinker_jax.checkpoints.state import load_adapter, save_adapter
from tinker_jax.checkpoints.store import Store
from tinker_jax.checkpoints.stored import quantization
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import Decoder, unembedding
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import lora_targets, weights

ALL = ("attn", "mlp", "unembed")

RUN = "sess-1:train:0"


def run_record(run_id: str = RUN, created: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> RunRecord:
    return RunRecord(
        run_id=run_id,
        session_id="sess-1",
        base_model="tinker-jax/nano",
        lora_rank=8,
        train_mlp=True,
        train_attn=True,
        train_unembed=False,
        seed=3,
        user_metadata={"who": "me"},
        created=created,
        last_request_time=created,
    )


META = {"base_model": "tinker-jax/nano", "lora_rank": 4, "seed": None}


def adapter(seed: int, rank: int = 4) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "layers": {"q_proj": {"a": draw(3, 16, rank), "b": draw(3, rank, 32)}},
        "lm_head": {"a": draw(16, rank), "b": draw(rank, 64)},
    }


def optimizer(seed: int, rank: int = 4) -> dict:
    return {"mu": adapter(seed + 1, rank), "nu": adapter(seed + 2, rank), "count": jnp.int32(17)}


def read_config(directory: Path) -> ModelConfig:
    return parse(json.loads((directory / "config.json").read_text()))


def load(directory: Path, dtype=jnp.float32, **kwargs) -> dict[str, jax.Array]:
    """The base weights of a directory, read as an engine reads them."""
    cfg, encoding = read_config(directory), quantization(json.loads((directory / "config.json").read_text()))
    names = cfg.file_names.unused
    return load_base(directory, weights(cfg), dtype, progress=False, quantization=encoding, unused=names, **kwargs)


def trained(
    home: Path, base: Path, *, kind: Kind = "weights", rank: int = 4, groups: Sequence[str] = ALL, name: str = "a"
) -> str:
    """A checkpoint of a random adapter of `base`, every factor far from its start; returns its tinker:// path."""
    rng = np.random.default_rng(7)
    shapes = lora.abstract(lora_targets(read_config(base)), rank, groups)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.1, jnp.float32), shapes)
    store = Store(home)
    run = run_record()
    if not store.list_runs():
        flags = {"train_attn": "attn" in groups, "train_mlp": "mlp" in groups, "train_unembed": "unembed" in groups}
        store.create_run(replace(run, base_model=str(base), lora_rank=rank, **flags))
    return store.write(RUN, kind, "a", lambda d: save_adapter(d, weights, None, META), has_optimizer=False).path


#: A family that the hub has in the encoding, and widths that are whole blocks or groups of it.
QUANTISED = {
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 96}),
    "fp8": ("deepseek_v3", {}),
    "int4": ("deepseek_v3", {"moe_intermediate_size": 48}),
}


def quantised_case(encoding: str, directory: Path) -> tuple[Path, Path]:
    """Directories of a quantised tiny checkpoint, and of one in bfloat16 with the same weights."""
    family, widths = QUANTISED[encoding]
    return quantised.save(tiny.save(family, directory / "source", **widths), encoding, directory)


def fuse(family: str, directory: Path) -> Path:
    """A checkpoint whose files have the experts of a layer in one tensor."""
    tiny.save(family, directory)
    tiny.model(family).save_pretrained(directory, save_original_format=False)
    return directory


def our_logits(home: Path, path: str, base: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of `tokens` [B, T], by our model with the checkpoint's adapter."""
    cfg = read_config(base)
    params = load(base)
    record = Store(home).get(path)
    groups = [group for group in ALL if getattr(record, f"train_{group}")]
    factors, _ = load_adapter(record.directory, lora.abstract(lora_targets(cfg), record.lora_rank, groups))
    factors = lora.scaled(factors, lora.scale(record.lora_rank))
    B, T = tokens.shape

    @jax.jit
    def run(params, factors, tokens):
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        segments = jnp.broadcast_to(1 + jnp.arange(B)[:, None], (B, T))
        h, _ = Decoder(cfg, params).forward(tokens, positions, segments, factors)
        logits = h @ unembedding(cfg, params).T
        (update,) = lora.updates(h, [factors.get("lm_head")])
        return logits if update is None else logits + update

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, factors, jnp.asarray(tokens))).reshape(B, T, -1)
