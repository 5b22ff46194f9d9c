"""Import: every tensor in its place, every key accounted for, and never more than one tensor in host memory."""

from __future__ import annotations

import json
import tracemalloc

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from tinker_jax import sharding
from tinker_jax.checkpoints.hf_import import load_base, stored_as
from tinker_jax.checkpoints.tensor_files import INDEX_FILE, SINGLE_FILE, plan, read_header, shards, write
from tinker_jax.models.registry import parse
from tinker_jax.models.weights import Weight, weights
from tinker_jax.types.errors import NotFoundError, StorageError, UnprocessableEntityError, UnsupportedError


def table_of(directory):
    return weights(parse(json.loads((directory / "config.json").read_text())))


def load(directory, dtype=jnp.float32, **kwargs):
    return load_base(directory, table_of(directory), dtype, progress=False, **kwargs)


def assert_holds(params, table, tensors):
    """`params` are the file's tensors, stacked as the table says."""
    assert list(params) == [weight.name for weight in table]
    for weight in table:
        stored = [tensors[name] for name, _ in stored_as(weight, tensors)]
        if weight.fused is not None and weight.fused.shape == stored[0].shape:
            stored = [np.stack([weight.cut(part) for part in tensor]) for tensor in stored]
        expected = np.stack(stored).reshape(weight.full_shape)
        np.testing.assert_array_equal(np.asarray(params[weight.name]), expected, err_msg=weight.name)


@pytest.fixture
def qwen3(tmp_path):
    return tiny.save("qwen3", tmp_path / "qwen3")


def rewrite(directory, change):
    """Rewrites the single weight file after `change` edited its dict of arrays."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_lands_in_its_place(tmp_path, family, stored, record_property):
    directory = tiny.save(family, tmp_path / "m", dtype=stored)
    tensors = {name: tensor.float().numpy() for name, tensor in load_torch(directory / SINGLE_FILE).items()}
    assert_holds(load(directory), table_of(directory), tensors)
    record_property("family", family)
    record_property("import", str(stored).removeprefix("torch."))


def test_shards_hold_the_same_model_as_one_file(checkpoint, tmp_path):
    directory = tiny.save("qwen3", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    whole, parts = load(checkpoint("qwen3")), load(directory)
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_stored_dtypes_are_cast_exactly_as_torch_casts_them(tmp_path, stored, wanted):
    directory = tiny.save("qwen2", tmp_path / "m", dtype=stored)
    params = load(directory, wanted)
    assert all(array.dtype == wanted for array in params.values())
    target = torch.float32 if wanted == jnp.float32 else torch.bfloat16
    tensors = {name: t.to(target).float().numpy() for name, t in load_torch(directory / SINGLE_FILE).items()}
    assert_holds({k: v.astype(jnp.float32) for k, v in params.items()}, table_of(directory), tensors)


def test_weights_are_cut_over_the_mesh_as_asked(checkpoint):
    directory = checkpoint("qwen3")
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    table = table_of(directory)
    shardings = {w.name: sharding.named(mesh, w.full_axes) for w in table}
    params = load(directory, shardings=shardings)
    for weight in table:
        assert params[weight.name].sharding.is_equivalent_to(shardings[weight.name], len(weight.full_shape)), weight.name
    assert {s.data.shape for s in params["layers.q_proj.kernel"].addressable_shards} == {(3, 24, 16)}
    assert {s.data.shape for s in params["lm_head.kernel"].addressable_shards} == {(150, 16)}
    assert_holds(params, table, load_file(directory / SINGLE_FILE))


def test_host_memory_stays_near_one_tensor(tmp_path):
    layers, width = 24, 256
    one = width * width * 4
    plans = [plan(f"layer.{i}.w", np.float32, (width, width)) for i in range(layers)]
    write(tmp_path / SINGLE_FILE, plans, (np.full((width, width), i, np.float32) for i in range(layers)))
    table = [Weight("layers.w.kernel", "layer.{layer}.w", (width, width), (None, None), layers=tuple(range(layers)))]
    load_base(tmp_path, table, jnp.float32, progress=False)  # compiles; what tracing allocates is not the model
    tracemalloc.start()
    params = load_base(tmp_path, table, jnp.float32, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * one, f"{peak / one:.1f} tensors at once, of {layers}"
    np.testing.assert_array_equal(params["layers.w.kernel"][:, 0, 0], np.arange(layers))


def test_the_stacked_buffer_is_written_in_place():
    from tinker_jax.checkpoints.hf_import import _place, _zeros

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    buffer = _zeros((4, 8, 8), jnp.dtype("float32"), device)
    _place(buffer, jnp.ones((8, 8)), (0,), device)
    assert buffer.is_deleted()


def test_a_missing_tensor_is_named_with_the_file(qwen3):
    rewrite(qwen3, lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"))
    with pytest.raises(UnprocessableEntityError) as error:
        load(qwen3)
    assert "lacks tensor 'model.layers.1.self_attn.q_norm.weight' (1 of 36 are missing; looked in model.safetensors)" in str(
        error.value
    )


def test_unexpected_tensors_are_listed(qwen3):
    rewrite(qwen3, lambda t: t.update({f"model.layers.{i}.extra": np.zeros(3, np.float32) for i in range(12)}))
    with pytest.raises(UnprocessableEntityError, match=r"holds 12 tensors that the model has no place for: .*extra and 2 more"):
        load(qwen3)


def test_more_layers_than_the_config_says_are_refused(qwen3):
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UnprocessableEntityError, match=r"no place for: model\.layers\.2\.input_layernorm\.weight"):
        load(qwen3)


def test_layers_of_multi_token_prediction_are_passed_over_where_the_config_tells_of_them(tmp_path):
    directory = tiny.save("deepseek_v3", tmp_path / "m")
    before = cases.load(directory)
    tiny.add_predictor(directory)
    after = cases.load(directory)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(UnprocessableEntityError, match=r"no place for: model\.layers\.3\."):
        cases.load(directory)


@pytest.mark.parametrize("encoding", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mxfp4", "fp8"))])
def test_a_quantised_model_loads_as_its_bf16_twin_bit_for_bit(tmp_path, encoding):
    found, twin = (cases.load(directory, jnp.bfloat16) for directory in cases.quantised_case(encoding, tmp_path))
    for name in twin:
        np.testing.assert_array_equal(found[name], twin[name], err_msg=name)


def test_a_missing_scale_is_named(tmp_path):
    directory, _ = cases.quantised_case("mxfp4", tmp_path)
    rewrite(directory, lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(
        UnprocessableEntityError, match=r"expected tensor 'model\.layers\.1\.mlp\.experts\.down_proj_scales' beside"
    ):
        cases.load(directory)


@pytest.mark.parametrize(("family", "expected"), [("gpt_oss", [6, 32, 40]), ("qwen3_moe", [6, 40, 32])])
def test_experts_in_another_order_are_refused_by_name(tmp_path, family, expected):
    directory = tiny.save(family, tmp_path / "m")
    tiny.model(family).save_pretrained(directory, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(directory, lambda t: t.update({name: np.ascontiguousarray(t[name].swapaxes(1, 2))}))
    with pytest.raises(UnprocessableEntityError) as error:
        cases.load(directory)
    assert f"tensor '{name}' in " in str(error.value) and "The two are transposed" in str(error.value)
    assert f"expected shape {expected} from config.json" in str(error.value)


def test_rotary_buffers_of_old_checkpoints_are_ignored(qwen3):
    rewrite(qwen3, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32)}))
    load(qwen3)


def test_a_tied_head_may_repeat_the_embedding_but_not_differ(tmp_path):
    directory = tiny.save("llama", tmp_path / "m")
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "lm_head.kernel" not in load(directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UnprocessableEntityError, match=r"lm_head\.weight differs from .* set tie_word_embeddings to false"):
        load(directory)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(qwen3):
    rewrite(qwen3, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 33), np.float32)}))
    with pytest.raises(UnprocessableEntityError) as error:
        load(qwen3)
    assert "tensor 'model.layers.2.mlp.up_proj.weight' in " in str(error.value)
    assert "expected shape [48, 32] from config.json, got [48, 33]" in str(error.value)


def test_other_stored_dtypes_are_refused_by_name(qwen3):
    tensors = load_torch(qwen3 / SINGLE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float64)
    save_torch(tensors, qwen3 / SINGLE_FILE)
    with pytest.raises(UnsupportedError, match=r"'model\.norm\.weight' .* is stored as F64; supported are F32, F16, BF16"):
        load(qwen3)


def test_a_missing_shard_is_named_with_what_it_holds(tmp_path):
    directory = tiny.save("qwen3", tmp_path / "m", max_shard_size="20KB")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(NotFoundError, match=rf"lacks its shard {shard.name}, which holds 'model\..*' and \d+ more tensors"):
        load(directory)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    directory = tiny.save("qwen3", tmp_path / "m", max_shard_size="20KB")
    index = json.loads((directory / INDEX_FILE).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.other"] = shard
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(StorageError, match=rf"places tensor 'model\.other' in {shard}, but that file does not hold it"):
        load(directory)
    (directory / INDEX_FILE).write_text("{")
    with pytest.raises(StorageError, match=r"index\.json is damaged"):
        load(directory)
    (directory / INDEX_FILE).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(StorageError, match=r"which is not a plain file name"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 4, 20, -5])
def test_a_truncated_file_is_refused(qwen3, keep):
    file = qwen3 / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"model\.safetensors is damaged: .* Download it again"):
        load(qwen3)


def test_a_directory_without_safetensors_says_so(tmp_path, checkpoint):
    table = table_of(checkpoint("qwen3"))
    with pytest.raises(NotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json\.$"):
        load_base(tmp_path, table, jnp.float32)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(NotFoundError, match=r"PyTorch \.bin weights; convert them to safetensors"):
        load_base(tmp_path, table, jnp.float32)


def test_written_files_are_read_by_safetensors_itself(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 3), np.float32)}
    half = torch.arange(5).to(torch.bfloat16)
    plans = [plan(name, array.dtype, array.shape) for name, array in arrays.items()]
    plans.append(plan("half", jnp.bfloat16, (5,)))
    write(tmp_path / "x.safetensors", plans, [*arrays.values(), np.asarray(half.float().numpy()).astype(jnp.bfloat16)])
    got = load_torch(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(got["a"], arrays["a"])
    assert got["empty"].shape == (0, 3) and torch.equal(got["half"], half)
    entries = read_header(tmp_path / "x.safetensors")
    assert [entries[n].shape for n in ("a", "empty", "half")] == [(2, 3), (0, 3), (5,)]


def test_shards_fill_up_in_order_and_a_large_tensor_stands_alone():
    plans = [plan(str(i), np.float32, (n,)) for i, n in enumerate([1, 1, 5, 1, 2])]
    assert [[p.name for p in group] for group in shards(plans, 12)] == [["0", "1"], ["2"], ["3", "4"]]
