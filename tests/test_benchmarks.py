"""The benchmarks run, and their arithmetic is right."""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import _models
import _shapes
import _sides
import determinism
import jax
import jax.numpy as jnp
import mixed
import numpy as np
import pytest
import rl_loop
import sample
import sample_gpu
import torch
import train
import train_gpu
from jaxprs import equations

from tinker_jax import lora
from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.kernels.linear_cross_entropy import linear_cross_entropy
from tinker_jax.memory import base_bytes
from tinker_jax.models.decoder import Decoder, unembedding
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.types import SampleResponse

BENCHMARKS = Path(train.__file__).parent


SHAPES = [("0.6B", 0.596), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19), ("30B-A3B", 30.53), ("gpt-oss-20B", 20.91)]


@pytest.mark.parametrize(("name", "billions"), SHAPES)
def test_the_shapes_have_the_published_number_of_parameters(name, billions):
    assert base_bytes(train_gpu.MODELS[name], 1) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(("name", "billions"), [("8B", 8.19), ("30B-A3B", 3.35), ("gpt-oss-20B", 4.19)])
def test_a_token_meets_the_published_number_of_active_parameters(name, billions):
    """gpt-oss's model card leaves the embedding out: 3.61."""
    cfg = _shapes.MODELS[name]
    assert _shapes.parameters(weights(cfg), _shapes.chosen(cfg)) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(("name", "gflop"), [("0.6B", 3.8), ("1.7B", 8.3), ("4B", 19.7), ("8B", 33.9), ("30B-A3B", 17.0)])
def test_the_flops_of_a_token_are_those_computed_by_hand(name, gflop):
    assert train_gpu.flops_per_token(train_gpu.MODELS[name], [4096]) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_the_flops_of_a_small_model_are_those_written_out():
    cfg = _shapes.SMOKE_MODEL  # V 512, D 64, F 96, L 2, N 4, K 2, H 16
    qkvo, mlp = 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 96
    linear, head = 2 * (qkvo + mlp), 512 * 64
    scores_and_values = 2 * 2 * (2 * 4 * 16) * (10 * 11 // 2 + 30 * 31 // 2) / 40  # layers × two products × 2 N H × pairs
    model = 4 * (linear + head) + 3 * scores_and_values
    assert train_gpu.flops_per_token(cfg, [10, 30]) == model
    none = model + scores_and_values / 2
    again = 2 * (linear - 2 * 64 * 96)
    assert train_gpu.flops_per_token(cfg, [10, 30], "none", "tpu") == none
    assert train_gpu.flops_per_token(cfg, [10, 30], "attention", "tpu") == none + again
    assert train_gpu.flops_per_token(cfg, [10, 30], "full", "tpu") == none + again + scores_and_values
    for remat, more in (("none", 0), ("attention", again), ("full", again)):
        assert train_gpu.flops_per_token(cfg, [10, 30], remat, "gpu") == none + more + scores_and_values


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_the_hardware_flops_of_frozen_products_are_those_of_the_traced_step(remat):
    cfg, M = _shapes.SMOKE_MODEL, 256
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


def test_the_flops_of_experts_are_those_of_the_chosen_ones_within_windows():
    cfg = _shapes.SMOKE["gpt-oss-20B"]  # V 512, D 64, F 32, L 2, N 4, K 2, H 16, E 8, k 2, one layer of two within 8 tokens
    qkvo, router, experts = 64 * 64 + 2 * 64 * 32 + 64 * 64, 8 * 64, 2 * 3 * 64 * 32
    linear = 2 * (qkvo + router + experts)
    within, whole = 8 * 9 // 2 + 2 * 8, 10 * 11 // 2  # pairs in a document of 10 tokens
    scores_and_values = 2 * (2 * 4 * 16) * (within + whole) / 10
    model = 4 * (linear + 512 * 64) + 3 * scores_and_values
    assert train_gpu.flops_per_token(cfg, [10]) == model
    again = 2 * (linear - 2 * 2 * 64 * 32)
    assert train_gpu.flops_per_token(cfg, [10], "attention", "gpu") == model + scores_and_values / 2 + again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["30B-A3B", "gpt-oss-20B"])
def test_models_with_experts_train_and_sample_at_toy_size(name):
    cfg = _shapes.SMOKE[name]
    [trained] = train_gpu.ours(cfg, ["4096"], True)
    [drawn] = sample_gpu.ours(cfg, [2], sample_gpu.SMOKE)
    assert trained["tokens_per_s"] > 0 and drawn["tokens_per_s"] > 0
    assert not [*train_gpu.peft(cfg, ["4096"], True), *sample_gpu.peft(cfg, [2], sample_gpu.SMOKE)]


def test_torch_experts_have_our_logprobs_and_gradients(tmp_path):
    directory, rank, ids = _models.locate(tmp_path, "moe64", quick=True), 4, np.arange(24)[None] * 37 % 500
    cfg = _models.shape_of(directory)
    adapter = lora.init(0, lora_targets(cfg), rank, ("attn", "mlp"))
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)

    def loss(adapter):
        factors = lora.scaled(adapter, lora.scale(rank))
        params = load_base(directory, weights(cfg), jnp.float32, progress=False)
        h_MD, _ = Decoder(cfg, params).forward(ids, np.arange(24)[None], np.ones_like(ids), factors)
        logprobs_MV = jax.nn.log_softmax(h_MD @ unembedding(cfg, params).T)
        return -logprobs_MV[np.arange(23), ids[0, 1:]].sum(), logprobs_MV

    grads, logprobs_MV = jax.grad(loss, has_aux=True)(adapter)

    model, _ = _sides.torch_side(str(directory), rank)
    factors = [
        (torch_factor, place)
        for number, layer in enumerate(model.get_base_model().model.layers)
        for torch_factor, place in torch_factors(layer, number)
    ]
    for (factor, turned), (module, side, number) in factors:
        value = torch.tensor(np.asarray(adapter["layers"][module][side][number]))
        with torch.no_grad():
            factor.copy_(turned(value))
    _sides.torch_backward(model, ids.tolist())
    for (factor, turned), (module, side, number) in factors:
        expected = turned(torch.tensor(np.asarray(grads["layers"][module][side][number])))
        torch.testing.assert_close(factor.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    theirs = model(input_ids=torch.tensor(ids)).logits[0].log_softmax(-1).detach().numpy()
    np.testing.assert_allclose(theirs, logprobs_MV, atol=1e-4)


def torch_factors(layer, number):
    """Torch's factors of a layer, how ours becomes each, and where it is."""
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(layer.self_attn, module)
        for side, factor in (("a", linear.lora_A), ("b", linear.lora_B)):
            yield (factor["default"].weight, torch.t), (module, side, number)
    experts = layer.mlp.experts
    yield (experts.gate_up_a, torch.clone), ("gate_up_experts", "a", number)
    yield (experts.gate_up_b, lambda b: torch.cat((*b,), -1)), ("gate_up_experts", "b", number)
    yield (experts.down_a, torch.clone), ("down_experts", "a", number)
    yield (experts.down_b, torch.clone), ("down_experts", "b", number)


def loss_of(params, adapter, ids, *, cfg, remat):
    decoder = Decoder(cfg, params)
    h_MD, _ = decoder.forward(ids, ids, ids, adapter, remat=remat)
    head = linear_cross_entropy(h_MD, unembedding(cfg, params), ids.reshape(-1, 1), block=cfg.V)
    return jnp.sum(head.logprobs_MK)


def test_packed_documents_fill_their_rows():
    assert sum(train_gpu.DOCUMENTS) == 2048
    assert sum(train_gpu.LAYOUTS["packed"]) == sum(train_gpu.LAYOUTS["2048"])


def test_both_sides_of_the_accelerator_benchmark_run_at_toy_size(tmp_path):
    layouts = ["packed", "4096"]
    cfg = _shapes.SMOKE_MODEL
    ran = {"ours": train_gpu.ours(cfg, layouts, True, str(tmp_path)), "torch": train_gpu.peft(cfg, layouts, True)}
    result = {kind: {"layouts": {line.pop("layout"): line for line in lines}} for kind, lines in ran.items()}
    assert list(result["ours"]["layouts"]) == layouts and list(result["torch"]["layouts"]) == ["4096"]
    assert all((tmp_path / layout).exists() for layout in layouts)
    assert result["ours"]["layouts"]["4096"]["token_budget"] == 1024  # the plan is one for this platform
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


def test_the_peak_of_a_call_includes_what_it_freed():
    before = _sides.resident_bytes()
    assert _sides.peak_bytes(lambda: np.ones(2**25).sum()) - before > 0.9 * 2**28


@pytest.mark.parametrize("model", ["real", "qwen3-0.6b", "moe8", "moe64"])
def test_a_toy_has_the_family_heads_and_dtype_of_its_model(tmp_path, model):
    directory = _models.locate(tmp_path, model, quick=True)
    cfg = _models.shape_of(directory)
    families = {"real": ("llama", 9, 3, True), "qwen3-0.6b": ("qwen3", 16, 8, True)}
    families |= {"moe8": ("qwen3_moe", 12, 4, False), "moe64": ("qwen3_moe", 8, 4, False)}
    assert (cfg.model_type, cfg.N, cfg.K, cfg.tied) == families[model]
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert _models.locate(tmp_path, model, quick=True) == directory  # written once


def test_the_large_random_model_has_the_published_shape():
    cfg, shape = train_gpu.MODELS["0.6B"], _models.SHAPES["qwen3-0.6b"]
    assert (cfg.V, cfg.D, cfg.F, cfg.L) == tuple(
        shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    )
    assert (cfg.N, cfg.K, cfg.H, cfg.tied) == tuple(
        shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    )


def test_a_decode_step_reads_an_embedding_only_where_it_is_the_head():
    cfg = _shapes.SMOKE_MODEL  # tied
    assert _models.weight_bytes(cfg, "float32") == base_bytes(cfg, 4) == 2 * _models.weight_bytes(cfg, "bfloat16")
    untied = replace(cfg, tied=False)
    assert _models.weight_bytes(untied, "float32") == base_bytes(untied, 4) - 4 * cfg.V * cfg.D


@pytest.mark.parametrize(("script", "case"), [(train, "real"), (sample, "real 1")], ids=["train", "sample"])
def test_cases_on_a_model_that_is_not_there_are_passed_over_with_a_line(monkeypatch, capsys, tmp_path, script, case):
    monkeypatch.setenv("TINKER_JAX_REAL_MODEL", str(tmp_path))
    monkeypatch.setattr(_models, "machine", lambda: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    script.main(["--cases", case])
    assert f"\n{case}: skipped, the model is not there; `make real-model` builds it\n" in capsys.readouterr().out


def test_the_loop_says_when_it_has_no_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TINKER_JAX_REAL_MODEL", str(tmp_path))
    rl_loop.main([])
    assert capsys.readouterr().out == "rl_loop: skipped, the model is not there; `make real-model` builds it\n"


@pytest.mark.parametrize("name", ["real", "qwen3-0.6b bf16"])
def test_both_sides_train_the_toys_of_large_models(tmp_path, name):
    case = train.quick(train.CASES[name])
    directory = str(_models.locate(tmp_path, case.model, quick=True))
    ran = {side: train.speed(side, directory, case) for side in train.STEPS}
    assert all(result["rates"][0] > 0 for result in ran.values()) and ran["tinker_jax"]["programs"] >= 1


def test_both_sides_draw_from_the_toy_of_the_real_model_and_time_a_decode_step(tmp_path):
    case = sample.quick(sample.CASES["real 1"])
    directory = str(_models.locate(tmp_path, case.model, quick=True))
    samplers = [
        sample.torch_sampler(directory, case, case.ways[0]),
        sample.our_sampler(sample.our_clients(directory, case), case),
    ]
    for sampler in samplers:
        assert isinstance(sample.measured(sampler, case, itertools.count())["step_s"], float)
    assert sample.PURPOSES["tinker_jax", "first"](directory, case, case.ways[0])["first_token_s"] > 0


def test_the_decode_step_of_a_single_row_leaves_the_prefill_out(monkeypatch):
    case, clock = sample.CASES["real 1"], iter(range(1_000))
    seconds = {case.new: 0.1 + 31 * 0.02, (1,): 0.1}
    lengths_of_run = []
    monkeypatch.setattr(_sides, "seconds", lambda run: (run(), seconds[lengths_of_run[-1]])[1])
    result = sample.measured(lambda rows, lengths: lengths_of_run.append(lengths), case, clock)
    assert result["step_s"] == pytest.approx(0.02)


def test_the_line_of_training_states_both_sides_shares_of_the_product_rate():
    pair = {"torch": 1.0, "tinker_jax": 2.0}
    result = {
        "tokens_per_s": pair,
        "ratio": 2.0,
        "share_of_product_rate": {"torch": 0.25, "tinker_jax": 0.5},
        "peak_bytes": pair,
    }
    line = train.row("real", {**result, "first_call_s": pair, "programs": 1, "packing": 1.0})
    assert len(line) == len(train.HEADER)
    assert line[train.HEADER.index("share of product rate torch / ours")] == "25 / 50 %"


def test_waiting_counts_once_for_several_threads():
    assert rl_loop.covered([(1.0, 2.0), (1.5, 1.7), (5.0, 6.0), (1.5, 3.0)]) == 3.0
    assert rl_loop.covered([]) == 0
    assert len(rl_loop.STEPS) == len(rl_loop.SMALL) == 10
    line = rl_loop.row("cold", {"step_s": [3.0, 1.0], "wait_s": [2.0, 0.0], "waits": 2})
    assert line == ["cold", "4.0 s", "2.0 s", "3.0 s", "50 %", "2"] and len(line) == len(rl_loop.HEADER)


def test_mixed_requests_are_all_different_and_span_the_stated_lengths():
    case = sample.CASES["mixed"]
    for lengths, shortest, longest in ((case.prompts, 16, 512), (case.new, 16, 256)):
        assert len(set(lengths)) == 64 and (min(lengths), max(lengths)) == (shortest, longest)
        assert list(lengths) != sorted(lengths)


def test_no_run_repeats_the_beginning_of_another_ones_prompt():
    beginnings = [tuple(row[:4]) for run in range(10) for row in sample.prompts(sample.CASES["group"], run)]
    assert len(set(beginnings)) == len(beginnings)


class FakePeft:
    """What a benchmark asks of a PEFT model."""

    def __init__(self):
        self.peft_config, self.active = {"default": "config"}, None

    def add_adapter(self, name, config):
        self.peft_config[name] = config

    def set_adapter(self, name):
        self.active = name

    def eval(self):
        pass


@pytest.mark.parametrize(
    ("case", "way"), [pytest.param(case, way, id=f"{name} {way}") for name, case in sample.CASES.items() for way in case.ways]
)
def test_torch_draws_every_request_once_in_full_with_its_adapter(monkeypatch, case, way):
    model, drawn = FakePeft(), []

    def generate(_, rows, new, samples, adapter_names=None):
        assert len(rows) <= way.batch and samples == case.samples
        drawn.extend((row, new, name) for row, name in zip(rows, adapter_names or [model.active] * len(rows), strict=True))

    monkeypatch.setattr(_sides, "torch_side", lambda *_: (model, None))
    monkeypatch.setattr(_sides, "torch_generate", generate)
    rows = [[i] * n for i, n in enumerate(case.prompts)]
    sample.torch_sampler("directory", case, way)(rows)
    drawn.sort()
    names = list(model.peft_config)
    assert len(names) == case.adapters
    assert [row for row, _, _ in drawn] == rows
    assert all(new >= least for (_, new, _), least in zip(drawn, case.new, strict=True))
    assert [name for _, _, name in drawn] == [names[i % case.adapters] for i in range(len(rows))]


def test_sorting_by_output_makes_torch_draw_fewest_tokens_that_nobody_asked_for(monkeypatch):
    case, drawn = sample.CASES["mixed"], {}
    monkeypatch.setattr(_sides, "torch_side", lambda *_: (FakePeft(), None))
    for way in case.ways:
        batches = []
        monkeypatch.setattr(_sides, "torch_generate", lambda _, rows, new, to=batches, **rest: to.append(len(rows) * new))
        sample.torch_sampler("directory", case, way)(sample.prompts(case, 0))
        drawn[way] = sum(batches)
    assert min(drawn, key=drawn.__getitem__) == sample.Way(16, "by output")
    assert drawn[sample.Way(16, "by output")] < 1.3 * case.tokens < 1.7 * case.tokens < drawn[sample.Way(64)]


def test_the_share_of_cached_prompt_tokens_is_that_of_the_single_samples():
    class Client:
        asked = 0

        def sample(self, prompt, num_samples, sampling_params):
            self.asked += 1
            future = Future()
            future.set_result(SampleResponse(sequences=[], prompt_cache_hit_tokens=prompt.length // 4))
            return future

    client, case, groups = Client(), sample.CASES["group"], []
    times = sample.cached(client, groups.append, case, rows := sample.prompts(case, 0))
    assert times["hit_share"] == 0.25 and client.asked == 128 and groups == [rows]


def test_the_bytes_of_a_decode_step_are_those_written_out():
    cfg = _shapes.SMOKE_MODEL  # V 512, D 64, F 96, L 2, N 4, K 2, H 16, tied
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64 + 2 * 16
    weights = 2 * layer + 512 * 64 + 64
    adapter = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    context = 32 + (32 + 64) / 2
    size = 2 * weights + 4 * adapter + 3 * context * (2 * 2 * 2 * 32)
    assert sample_gpu.bytes_per_step(cfg, 3, sample_gpu.SMOKE) == size
    untied = replace(cfg, tied=False)  # the embedding is looked up, not read
    assert sample_gpu.bytes_per_step(untied, 3, sample_gpu.SMOKE) == size


def test_a_decode_step_reads_the_experts_that_its_rows_choose_and_what_is_within_windows():
    cfg = _shapes.SMOKE["gpt-oss-20B"]  # V 512, D 64, F 32, L 2, N 4, K 2, H 16, E 8, k 2, one layer of two within 8 tokens
    read = 1 - (1 - 2 / 8) ** 3  # of the experts, by three rows
    attn = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 64 + 2 * 32 + 4  # with biases and sinks
    experts = 8 * (3 * 64 * 32 + 2 * 32 + 64)
    weights = 2 * (attn + 8 * 64 + 8 + read * experts + 2 * 64) + 512 * 64 + 64
    adapter = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + (64 + read * 2 * 8 * 32) + (read * 8 * 32 + 64))
    context = 32 + (32 + 64) / 2
    size = 2 * weights + 4 * adapter + 3 * (8 + context) * (2 * 2 * 32)
    assert sample_gpu.bytes_per_step(cfg, 3, sample_gpu.SMOKE) == pytest.approx(size)


def test_both_sides_of_the_accelerator_sampling_benchmark_run_at_toy_size():
    cfg, batches = _shapes.SMOKE_MODEL, [1, 4]
    ran = {kind: list(side(cfg, batches, sample_gpu.SMOKE)) for kind, side in sample_gpu.SIDES.items()}
    assert [[line.pop("rows") for line in lines] for lines in ran.values()] == [batches] * 2
    result = {kind: {"batches": dict(zip(map(str, batches), lines, strict=True))} for kind, lines in ran.items()}
    assert result["ours"]["batches"]["4"]["programs"] > 0
    args = argparse.Namespace(batches=[*batches, 64], smoke=True, bandwidth=1.0)
    table = list(sample_gpu.lines("toy", cfg, result, args))
    assert {len(line) for line in table} == {len(sample_gpu.HEADER)}
    assert float(table[0][-1]) > 0 and table[0][4].endswith(" %") and set(table[2][2:]) == {"–"}


def run(script, *arguments):
    path = f"{BENCHMARKS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tables_of_determinism_state_zeros_and_ratios():
    seconds = {"backward": 2.0, "sample 1": 1.0, "sample 64": 4.0, "score 64": 1.0}
    apart, same = {"most": 2e-6, "share": 0.25, "mean": -3e-8}, {"most": 0.0, "share": 0.0, "mean": 0.0}
    result = {
        "default": {"company": apart, "sampler": apart, "seconds": {**seconds, "sample 64": 2.0}},
        "deterministic": {"company": same, "sampler": same, "seconds": seconds},
    }
    one, other = determinism.lines("model", "float32", result)
    assert one == ["model", "float32", "default", "2.0e-06 (25 %)", "2.0e-06 (25 %)", "-3.0e-08"]
    assert other == ["model", "float32", "deterministic", "0", "0", "0"] and len(other) == len(determinism.HEADER)
    line = determinism.cost("model", "float32", result)
    assert line == ["model", "float32", "1.00", "1.00", "2.00", "25 %"] and len(line) == len(determinism.COST)


@pytest.mark.slow
def test_programs_that_are_optimised_as_usual_agree_bit_for_bit_in_deterministic_mode(monkeypatch, tmp_path):
    """The tests' own programs are not optimised."""
    monkeypatch.setenv("XLA_FLAGS", "")
    model = BENCHMARKS.parent / "tinker_jax" / "embedded" / "tiny-qwen3"
    run("determinism.py", "--turns", "1", "--dtypes", "float32", "--model", str(model), "--json", str(tmp_path / "out.json"))
    [result] = json.loads((tmp_path / "out.json").read_text())["results"].values()
    assert all(result["deterministic"][what]["most"] == 0 for what in ("company", "sampler"))
    assert all(result["default"][what]["most"] > 0 for what in ("company", "sampler"))


@pytest.mark.slow
def test_the_cpu_benchmark_runs_at_toy_size(tmp_path):
    names = "ragged,real ragged,qwen3-0.6b,moe8,overhead"
    out = run("train.py", "--quick", "--turns", "1", "--cases", names, "--json", str(tmp_path / "out.json"))
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases["ragged"]["ratio"] > 0 and cases["ragged"]["programs"] >= 1 and 0 < cases["ragged"]["packing"] <= 1
    assert all(size > 0 for size in cases["ragged"]["peak_bytes"].values())
    assert all(share > 0 for name in names.split(",")[:-1] for share in cases[name]["share_of_product_rate"].values())
    assert "| ragged |" in out and "| real ragged |" in out and "API overhead: " in out and "GFLOP/s" in out


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_at_toy_size(tmp_path):
    out = run("train_gpu.py", "--smoke", "--models", "8B,0.6B", "--json", str(tmp_path / "out.json"))
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [result[kind]["stopped"] for result in models.values() for kind in result] == [None] * 6
    assert "| 8B | packed |" in out


@pytest.mark.slow
def test_the_cpu_sampling_benchmark_runs_at_toy_size(tmp_path):
    names = "mixed,group,adapters,real 1,real mixed,moe64"
    out = run("sample.py", "--quick", "--turns", "1", "--cases", names, "--json", str(tmp_path / "out.json"))
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    for name, result in cases.items():
        assert result["ratio"] > 0 and result["programs"] >= 1 and f"| {name} |" in out
        assert 0 < result["first_token_s"]["p50"] <= result["first_token_s"]["p95"]
        assert all(size > 0 for size in result["peak_bytes"].values())
        assert result["torch_way"] in result["torch_ways"] or name in ("real 1", "moe64")
        assert result["first_token_cold_s"] > 0 and all(seconds > 0 for seconds in result["other_rows_s"])
    assert cases["group"]["cached"]["ratio"] > 0 and "cached: ratio " in out
    assert set(cases["real 1"]["share_of_memory_rate"]) == {"torch", "tinker_jax"} and "real 1: a decode step takes" in out


@pytest.mark.slow
def test_the_loop_of_mixed_batches_runs_at_toy_size(tmp_path):
    model = Path(train_gpu.__file__).parents[1] / "tinker_jax" / "embedded" / "tiny-qwen3"
    out = run("rl_loop.py", "--model", str(model), "--steps", "2", "--json", str(tmp_path / "out.json"))
    processes = json.loads((tmp_path / "out.json").read_text())["processes"]
    assert list(processes) == ["cold", "warm"] and all(0 < sum(p["compile_s"]) < sum(p["step_s"]) for p in processes.values())
    assert "| cold |" in out and "| warm |" in out


@pytest.mark.slow
def test_the_accelerator_sampling_benchmark_runs_at_toy_size(tmp_path):
    out = run("sample_gpu.py", "--smoke", "--batches", "1,4", "--json", str(tmp_path / "out.json"))
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [result[side]["stopped"] for result in models.values() for side in result] == [None] * 4
    assert "| 8B | 4 |" in out and "| 0.6B | 1 |" in out


def test_training_beside_sampling_is_compared_with_the_best_fixed_alternation():
    side = {"sampled": 100.0, "trained": 0.0, "latencies_s": [0.1] * 18 + [0.5, 0.9]}
    text = mixed.tables({"beside": {"sampling alone": side}, "rounds": {"whole": [4.0], "halves": [5.0], "at once": [2.0]}})
    assert "| sampling alone | 100 | – | 100 ms | 500 ms |" in text
    assert "| whole | 4.00 s | 100 % |" in text and "| at once | 2.00 s | 200 % |" in text


@pytest.mark.slow
def test_the_benchmark_of_training_beside_sampling_runs_on_a_toy():
    out = run("mixed.py", "--quick", "--turns", "1", "--seconds", "2")
    assert "| both |" in out and "| at once |" in out
