"""Compiles the real training step and the sampler's programs for devices that need not be there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from tinker_jax import memory, sharding
from tinker_jax.losses import default_config
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.dense import DenseConfig
from tinker_jax.models.rope import Rope
from tinker_jax.models.weights import Weight, weights
from tinker_jax.sampling.drawing import Rows
from tinker_jax.sampling.model_runner import ModelRunner
from tinker_jax.sampling.page_pool import pages_for
from tinker_jax.training import trainer
from tinker_jax.training.packing import pack
from tinker_jax.types import LoraConfig

QWEN3_8B = DenseConfig("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, Rope(128, 1e6), 1e-6, False, False, True, 40_960)
LORA = LoraConfig(rank=32)
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""What XLA has to know of the card to compile for it."""


def mesh_of(devices, shape: tuple[int, int, int], expert: int = 1) -> Mesh:
    """Mesh of ours over the devices of a topology, in its order; `shape` is that of data, fsdp and tensor."""
    data, fsdp, tensor = shape
    grid = np.asarray(devices).reshape(data, fsdp, expert, tensor)
    return Mesh(grid, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES))


def abstract_params(mesh: Mesh, cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Base weights in bfloat16, nothing allocated."""

    def abstract(w: Weight) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if w.exact else jnp.bfloat16
        return jax.ShapeDtypeStruct(w.full_shape, dtype, sharding=sharding.named(mesh, w.full_axes))

    return {w.name: abstract(w) for w in weights(cfg)}


def lower_step(mesh: Mesh, device_bytes: int, cfg: ModelConfig = QWEN3_8B, length: int = 2048) -> jax.stages.Lowered:
    """A micro-batch of cross-entropy as the planner and the packer make it for full rows, bfloat16, LoRA of rank 32 on all."""
    plan = memory.plan(cfg, 2, device_bytes, mesh.shape)
    params = abstract_params(mesh, cfg)
    train = trainer.Trainer(cfg, params, mesh, plan)
    adapter, _ = train.abstract(LORA)
    count = -(-plan.token_budget // length)
    row = {"target_tokens": np.zeros(length, np.int32), "weights": np.ones(length, np.float32)}
    tokens = [row["target_tokens"]] * count
    full = pack(tokens, [row] * count, token_budget=plan.token_budget, rows=train._row_shards)[0]
    places = train._model.rows_of(full)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[k]) for k, x in full.arrays.items()}
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    static = {"loss_fn": "cross_entropy", "backward": True, "remat": plan.remat, "trained": trainer.groups(LORA)}
    step = jax.jit(train._model.step, static_argnames=tuple(static))
    return step.lower(adapter, scale, params, batch, default_config("cross_entropy", None), **static)


def lower_sampler(
    mesh: Mesh,
    device_bytes: int,
    rows: int = 64,
    tokens: int = 4096,
    cfg: ModelConfig = QWEN3_8B,
    longest: int | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered, int]:
    """A decode chunk of so many rows, and a prefill of chunks of 256 tokens (16, or one for each part of the rows), under an
    adapter of rank 32, over pages that hold so many tokens for each row; and the bytes of the pages on one device. Tables are
    as a row of `longest` tokens wants them; None: of the context."""
    parts = sharding.parts(mesh, "rows")
    params = abstract_params(mesh, cfg)
    plan = memory.plan(cfg, 2, device_bytes, mesh.shape, mesh.devices.flat[0].platform)
    runner = ModelRunner(cfg, params, mesh, jnp.bfloat16, rows // parts * pages_for(tokens) + 1, plan.unstack)
    adapter, _ = trainer.Trainer(cfg, params, mesh, plan).abstract(LORA)
    everywhere = sharding.replicated(mesh)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    kinds, pools = runner._caches.kinds, jax.eval_shape(lambda: runner._empty(runner._pages_each))
    places = [NamedSharding(mesh, kind._pool_spec()) for kind in kinds]
    pool = tuple(
        jax.tree.map(lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), own)
        for own, place in zip(pools, places, strict=True)
    )
    width = next(width for width in runner.widths if width >= pages_for(longest or cfg.context_length))
    state = jax.tree.map(abstract, Rows.empty(rows, width))
    chunk = jax.jit(runner._model.decode_program, static_argnames="top", donate_argnums=2)
    chunks = -(-16 // parts) * parts
    ids, slots, table = (jax.ShapeDtypeStruct((chunks, n), jnp.int32, sharding=everywhere) for n in (256, 2, width))
    prefill = jax.jit(runner._model.prefill_program, donate_argnums=2)
    pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
    split = parts * (1 if kinds[0]._cut()[1] is None else mesh.shape["tensor"])
    return (
        chunk.lower(params, adapter, pool, state, top=0),
        prefill.lower(params, adapter, pool, ids, ids, table, slots),
        pool_bytes // split,
    )


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and temporaries on one device."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
