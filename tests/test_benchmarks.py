"""The benchmarks run, and their arithmetic is right."""

import argparse
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import train
import train_gpu
from jaxprs import equations

from tinker_jax import lora
from tinker_jax.engine.memory import base_bytes
from tinker_jax.kernels.linear_cross_entropy import linear_cross_entropy
from tinker_jax.models import dense
from tinker_jax.models.weights import lora_targets, weights

BENCHMARKS = Path(train.__file__).parent


@pytest.mark.parametrize(("name", "billions"), [("0.6B", 0.596), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19)])
def test_the_shapes_have_the_published_number_of_parameters(name, billions):
    assert base_bytes(train_gpu.MODELS[name], 1) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(("name", "gflop"), [("0.6B", 3.8), ("1.7B", 8.3), ("4B", 19.7), ("8B", 33.9)])
def test_the_flops_of_a_token_are_those_computed_by_hand(name, gflop):
    assert train_gpu.flops_per_token(train_gpu.MODELS[name], [4096]) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_the_flops_of_a_small_model_are_those_written_out():
    cfg = train_gpu.SMOKE_MODEL  # V 512, D 64, F 96, L 2, N 4, K 2, H 16
    qkvo, mlp = 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 96
    linear, head = 2 * (qkvo + mlp), 512 * 64
    scores_and_values = 2 * 2 * (2 * 4 * 16) * (10 * 11 // 2 + 30 * 31 // 2) / 40  # layers × two products × 2 N H × pairs
    model = 4 * (linear + head) + 3 * scores_and_values
    assert train_gpu.flops_per_token(cfg, [10, 30]) == model
    none = model + 2 * head + scores_and_values / 2
    again = 2 * (linear - 2 * 64 * 96)
    assert train_gpu.flops_per_token(cfg, [10, 30], "none", "tpu") == none
    assert train_gpu.flops_per_token(cfg, [10, 30], "attention", "tpu") == none + again
    assert train_gpu.flops_per_token(cfg, [10, 30], "full", "tpu") == none + again + scores_and_values
    for remat, more in (("none", 0), ("attention", again), ("full", again)):
        assert train_gpu.flops_per_token(cfg, [10, 30], remat, "gpu") == none + more + scores_and_values


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_the_hardware_flops_of_frozen_products_are_those_of_the_traced_step(remat):
    cfg, M = train_gpu.SMOKE_MODEL, 256
    params = {w.name: jax.ShapeDtypeStruct(w.full_shape, jnp.float32) for w in weights(cfg)}
    decoder_and_head = jax.make_jaxpr(jax.grad(partial(loss_of, cfg=cfg, remat=remat), argnums=1))
    adapter = lora.abstract(lora_targets(cfg), 8, ("attn", "mlp"))
    ids = jax.ShapeDtypeStruct((1, M), jnp.int32)
    ranks, frozen = {8, 16, 24}, 0  # linears that read the same tokens share one product with their adapters
    for equation in equations(decoder_and_head(params, adapter, ids)):
        shapes = [x.aval.shape for x in equation.invars]
        if equation.primitive.name == "dot_general" and all(len(s) == 2 and not ranks & {*s} for s in shapes):
            ((contracted, _), _), (result,) = equation.params["dimension_numbers"], equation.outvars
            in_layer = cfg.V not in (*shapes[0], *shapes[1])
            frozen += 2 * math.prod((*result.aval.shape, shapes[0][contracted[0]])) * (cfg.L if in_layer else 1)
    scores_and_values = 2 * cfg.L * cfg.N * cfg.H * (M + 1)
    attention = (3.5 + (remat == "full")) * scores_and_values
    assert frozen / M == train_gpu.flops_per_token(cfg, [M], remat, "tpu") - attention


def loss_of(params, adapter, ids, *, cfg, remat):
    decoder = dense.Decoder(cfg, params)
    h_MD, _ = decoder.forward(ids, ids, ids, adapter, remat=remat)
    return jnp.sum(linear_cross_entropy(h_MD, dense.unembedding(cfg, params), ids.reshape(-1, 1)).logprobs_MK)


def test_packed_documents_fill_their_rows():
    assert sum(train_gpu.DOCUMENTS) == 2048
    assert sum(train_gpu.LAYOUTS["packed"]) == sum(train_gpu.LAYOUTS["2048"])


def test_both_sides_of_the_accelerator_benchmark_run_at_toy_size(tmp_path):
    layouts = ["packed", "4096"]
    cfg = train_gpu.SMOKE_MODEL
    ran = {"ours": train_gpu.ours(cfg, layouts, True, str(tmp_path)), "torch": train_gpu.peft(cfg, layouts, True)}
    result = {kind: {"layouts": {line.pop("layout"): line for line in lines}} for kind, lines in ran.items()}
    assert list(result["ours"]["layouts"]) == layouts and list(result["torch"]["layouts"]) == ["4096"]
    assert all((tmp_path / layout).exists() for layout in layouts)
    assert result["ours"]["layouts"]["4096"]["token_budget"] == 2048  # the plan is one for this platform
    result["warm"] = {"layouts": {}}
    args = argparse.Namespace(layouts=layouts, smoke=True, peak=1e-3)
    packed, full = train_gpu.rows("toy", cfg, result, args)
    assert len(packed) == len(full) == len(train_gpu.HEADER)
    assert packed[-1] == "–" and float(full[-2]) > 0


def test_ragged_lengths_are_spread_over_the_stated_range():
    lengths = train.ragged_lengths(1000)
    assert (min(lengths), max(lengths)) == (64, 2048)
    assert 270 < sorted(lengths)[500] < 330
    assert train.CASES["ragged"].lengths == lengths[:32]


def run(script, *arguments):
    path = f"{BENCHMARKS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_cpu_benchmark_runs_at_toy_size(tmp_path):
    out = run("train.py", "--quick", "--turns", "1", "--cases", "ragged,overhead", "--json", str(tmp_path / "out.json"))
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases["ragged"]["ratio"] > 0 and cases["ragged"]["programs"] >= 1 and 0 < cases["ragged"]["packing"] <= 1
    assert all(size > 0 for size in cases["ragged"]["peak_bytes"].values())
    assert "| ragged |" in out and "API overhead: " in out


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_at_toy_size(tmp_path):
    out = run("train_gpu.py", "--smoke", "--models", "8B,0.6B", "--json", str(tmp_path / "out.json"))
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [result[kind]["stopped"] for result in models.values() for kind in result] == [None] * 6
    assert "| 8B | packed |" in out
