"""Experts cut over a mesh compute what one device does, and their costs are what they should be."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinker_jax import lora, memory, sharding
from tinker_jax.models import experts
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.training.pending import complete
from tinker_jax.training.trainer import PerExpertLora, Trainer
from tinker_jax.training.whole_model import WholeModel
from tinker_jax.types import Datum, LoraConfig, ModelInput


def config(**changes):
    cfg, _ = tiny.base_params("qwen3_moe", tiny.model("qwen3_moe"))
    return dataclasses.replace(cfg, L=2, E=8, **changes)


def random_params(cfg, mesh):
    rng = np.random.default_rng(0)
    values = {w.name: rng.normal(size=w.full_shape).astype(np.float32) * 0.2 for w in weights(cfg)}
    return {w.name: jax.device_put(values[w.name], sharding.named(mesh, w.full_axes)) for w in weights(cfg)}


def train(cfg, axes, lora_config):
    mesh = sharding.make_mesh(axes)
    trainer = Trainer(cfg, random_params(cfg, mesh), mesh, memory.plan(cfg, 4, 8 << 30, mesh.shape, "cpu"))
    state, rng = trainer.new_adapter(lora_config, 0), np.random.default_rng(1)
    stored = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(state.stored()[0]))
    state = trainer.place(state.lora, stored, None)
    rows = [rng.integers(0, tiny.VOCAB, n + 1) for n in (70, 33, 1, 150, 90, 20, 64, 5)]
    data = [Datum(ModelInput.from_ints(row[:-1].tolist()), {"target_tokens": row[1:]}) for row in rows]
    logprobs, metrics = complete(trainer.forward_backward(state, data, "cross_entropy", None, backward=True)).finish()
    return logprobs, metrics, jax.device_get(lora.trim(state.grads, 4))


@pytest.mark.parametrize(
    ("axes", "form"),
    [
        ({"expert": 8}, LoraConfig),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, LoraConfig),
        pytest.param({"data": 2, "tensor": 4}, LoraConfig, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "fsdp": 2, "tensor": 2}, PerExpertLora, marks=pytest.mark.slow),
    ],
)
def test_experts_cut_over_a_mesh_train_as_one_device_does(axes, form):
    expected, metrics, gradients = train(config(), None, form(rank=4))
    logprobs, cut, ours = train(config(), axes, form(rank=4))
    for a, b in zip(logprobs, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert cut == pytest.approx(metrics, rel=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())), err_msg=str(path))


def test_a_layer_gathers_tokens_over_the_expert_axis_and_scatters_their_sums():
    cfg, axes = config(), {"expert": 8}
    mesh = sharding.make_mesh(axes)
    adapter = lora.abstract(lora_targets(cfg), 8, ("attn", "mlp"))
    model = WholeModel(cfg, random_params(cfg, mesh), mesh, lambda trained: None, None)
    numbers = {key: jax.ShapeDtypeStruct((8, 128), jnp.int32) for key in ("tokens", "positions", "segments", "sequences")}
    rows = sharding.named(mesh, ("rows", None))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), numbers)
    batch["target_tokens"] = batch["tokens"]
    static = {"loss_fn": "cross_entropy", "backward": False, "remat": "none", "trained": ("attn", "mlp")}
    step = jax.jit(model.step, static_argnames=tuple(static))
    text = step.lower(adapter, np.float32(1), random_params(cfg, mesh), batch, {}, **static).compile().as_text()
    kernels = [",".join(map(str, w.shape)) for w in weights(cfg) if w.experts]
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert not any(f"[{shape}]" in line for line in gathered for shape in kernels), "no device gathers experts"
    # x, weights, ids and the adapter's z; what experts made, and z of down. One body for all layers.
    assert len(gathered) <= 5, gathered
    assert len(re.findall(r" (?:reduce-scatter|all-reduce)\(", text)) <= 6


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rows_sorted_by_expert_as_on_accelerators_give_what_the_loop_over_experts_gives(family, monkeypatch):
    """Forward and backward, under adapters of both forms at once, each token's numbers limited to its own."""
    cfg, _ = tiny.base_params(family, tiny.model(family))
    mlp: Any = next(stack.block.mlp for group in cfg.groups for stack in group)
    M, R, rng = 40, 4, np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    params = {w.name: draw(*w.shape) for w in mlp.weights()}
    D, F, E = mlp.D, mlp.F, mlp.E
    factors = {
        "gate_up_experts": {"a": draw(D, R), "b": draw(2, E, R, F)},
        "down_experts": {"a": draw(E, F, R), "b": draw(R, D)},
        "gate_up_per_expert": {"a": draw(2, E, D, R), "b": draw(2, E, R, F)},
        "down_per_expert": {"a": draw(E, F, R), "b": draw(E, R, D)},
    }
    x_MD, g_MD, slots_MR = draw(M, D), draw(M, D), jnp.asarray(rng.random((M, R)) < 0.5)
    tokens: Any = SimpleNamespace(mesh=None, kept=False, real_M=jnp.arange(M) < 33)

    def out(x_MD, factors):
        return mlp(params, x_MD, tokens, factors)[0]

    def step(x_MD, factors):
        out_MD, pull = jax.vjp(out, x_MD, factors)
        return out_MD, pull(g_MD)

    def both_ways():
        tokens.slots_MR = slots_MR
        limited_MD = jax.jit(lambda *args: out(*args))(x_MD, factors)
        tokens.slots_MR = None
        return limited_MD, *jax.jit(lambda *args: step(*args))(x_MD, factors)

    loop = both_ways()
    monkeypatch.setattr(experts, "goes_over_experts", lambda mesh: False)
    sorted_rows = both_ways()
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(sorted_rows), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())), err_msg=str(path))
    assert np.abs(loop[0] - loop[1]).max() > 0.1, "slots limit something"
