"""Runs and adapters that several tests of checkpoints share."""

from __future__ import annotations

from datetime import UTC, datetime

import jax.numpy as jnp
import numpy as np

from tinker_jax.checkpoints.records import RunRecord

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
