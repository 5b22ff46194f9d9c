"""Export: the tool that a file is written for loads it and computes what we compute."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import quantised
import tiny
import torch
import transformers
from checkpoint_cases import ALL, fuse, load, our_logits, quantised_case, read_config, trained
from families import pretrained
from safetensors import safe_open
from safetensors.torch import load_file

from tinker_jax.checkpoints import export_merged, export_peft, export_tinker
from tinker_jax.checkpoints.hf_import import load_base
from tinker_jax.checkpoints.hub import resolve
from tinker_jax.checkpoints.tensor_files import INDEX_FILE, SINGLE_FILE
from tinker_jax.models.weights import weights
from tinker_jax.types.errors import (
    BadRequestError,
    ConflictError,
    NotFoundError,
    StorageError,
    UnprocessableEntityError,
)

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(2, tiny.VOCAB, (2, 11))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.float().numpy()


def assert_same_model(got: np.ndarray, expected: np.ndarray, base: Path):
    assert np.abs(expected - torch_logits(pretrained(base))).max() > 0.1, "the adapter does too little to prove anything"
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


# The exports of dense models are loaded in tests/engine/test_stored_families.py by default.
EXPERTS = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
OTHERS = [*tiny.DENSE, "kimi_k2", "qwen3_moe mixed"]


@pytest.fixture(params=[*EXPERTS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def base(request, checkpoint) -> Path:
    return checkpoint(request.param)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "groups", [pytest.param(ALL, id="all"), pytest.param(("attn", "mlp"), id="no unembed", marks=pytest.mark.slow)]
)
def test_peft_loads_the_adapter_and_computes_our_logits(tmp_path, base, groups):
    path = trained(tmp_path / "home", base, groups=groups)
    assert export_peft(path, tmp_path / "peft", home=tmp_path / "home") == tmp_path / "peft"
    model = peft.PeftModel.from_pretrained(pretrained(base), tmp_path / "peft")
    assert_same_model(torch_logits(model), our_logits(tmp_path / "home", path, base, TOKENS), base)


def test_the_peft_files_say_what_they_are(tmp_path, checkpoint):
    base = checkpoint("qwen3")
    path = trained(tmp_path / "home", base, kind="sampler_weights")
    export_peft(path, tmp_path / "peft", home=tmp_path / "home")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32, base.name)
    assert config["target_modules"] == [*(f"{m}_proj" for m in ["q", "k", "v", "o", "gate", "up", "down"]), "lm_head"]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (3 * 7 + 1)
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"].shape == (48, 4)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (tiny.VOCAB, 4)


@pytest.mark.parametrize(
    "groups", [pytest.param(ALL, id="all"), pytest.param(("attn", "mlp"), id="no unembed", marks=pytest.mark.slow)]
)
def test_transformers_loads_the_merged_model_and_computes_our_logits(tmp_path, base, groups):
    path = trained(tmp_path / "home", base, groups=groups)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", max_shard_size="30KB", progress=False)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    assert_same_model(torch_logits(pretrained(tmp_path / "merged")), our_logits(tmp_path / "home", path, base, TOKENS), base)


def test_untouched_tensors_are_bit_equal_and_touched_ones_differ(tmp_path):
    base = tiny.save("qwen3", tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB")
    path = trained(tmp_path / "home", base, groups=("attn",))
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", progress=False)

    def tensors(directory):
        return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}

    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == torch.bfloat16
        changed = any(f"{m}_proj" in name for m in "qkvo") and "self_attn" in name
        assert torch.equal(before[name], after[name]) != changed, name
    table = weights(read_config(base))
    one, two = (load_base(d, table, jnp.bfloat16, progress=False) for d in (base, tmp_path / "merged"))
    assert {name for name in one if not jnp.array_equal(one[name], two[name])} == {f"layers.{m}_proj.kernel" for m in "qkvo"}


def test_the_update_is_added_in_float32_and_rounded_once(tmp_path):
    base = tiny.save("qwen2", tmp_path / "base", dtype=torch.bfloat16)
    path = trained(tmp_path / "home", base, groups=("mlp",))
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", progress=False)
    export_peft(path, tmp_path / "peft", home=tmp_path / "home")
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = (load_file(base / SINGLE_FILE)[f"{name}.weight"].float() + 8.0 * (b @ a)).bfloat16()
    got = load_file(tmp_path / "merged" / SINGLE_FILE)[f"{name}.weight"]
    # Float32 sums in another order may fall on the other side of a rounding boundary, rarely.
    assert (got == expected).float().mean() > 0.99
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)


def test_merging_in_blocks_of_rows_changes_nothing(tmp_path, checkpoint, monkeypatch):
    path = trained(tmp_path / "home", checkpoint("qwen2"))
    export_merged(path, tmp_path / "one", home=tmp_path / "home", progress=False)
    monkeypatch.setattr("tinker_jax.checkpoints.export._BLOCK", 7 * 32)
    export_merged(path, tmp_path / "two", home=tmp_path / "home", progress=False)
    one, two = (load_file(tmp_path / d / SINGLE_FILE) for d in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)


def test_a_tied_model_is_untied_only_if_its_unembedding_was_trained(tmp_path, checkpoint):
    base = checkpoint("llama")
    for name, groups, tied in (("with", ALL, False), ("without", ("attn", "mlp"), True)):
        path = trained(tmp_path / name, base, groups=groups)
        export_merged(path, tmp_path / f"{name}-merged", home=tmp_path / name, progress=False)
        config = json.loads((tmp_path / f"{name}-merged" / "config.json").read_text())
        tensors = load_file(tmp_path / f"{name}-merged" / SINGLE_FILE)
        assert config["tie_word_embeddings"] is tied and ("lm_head.weight" in tensors) is not tied
        assert torch.equal(tensors["model.embed_tokens.weight"], load_file(base / SINGLE_FILE)["model.embed_tokens.weight"])


def test_tokenizer_generation_config_and_chat_template_come_along(tmp_path):
    base = tiny.save("qwen3", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("of the base model")
    path = trained(tmp_path / "home", base)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", progress=False)
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json"}
    assert files == kept | {SINGLE_FILE}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_dtype_converts_every_tensor_and_the_config(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", dtype="bfloat16", progress=False)
    assert {t.dtype for t in load_file(tmp_path / "merged" / SINGLE_FILE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(BadRequestError, match=r"dtype='int8' is not supported; choose float32, float16, bfloat16"):
        export_merged(path, tmp_path / "other", home=tmp_path / "home", dtype="int8")


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), (60_000, 3), ("60KB", 3), ("0.06 mb", 3)])
def test_shards_respect_their_size(tmp_path, checkpoint, size, files):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", max_shard_size=size, progress=False)
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    if files == 1:
        assert [s.name for s in shards] == [SINGLE_FILE] and not (tmp_path / "merged" / INDEX_FILE).exists()
        return
    index = json.loads((tmp_path / "merged" / INDEX_FILE).read_text())
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert {index["weight_map"][name] for name in opened.keys()} == {shard.name}  # noqa: SIM118
        assert shard.stat().st_size < 60_000 + 4096
    assert len(shards) >= files
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())


@pytest.mark.parametrize("size", ["", "5TB", "-1GB", 0, "0GB", "GB", None])
def test_impossible_shard_sizes_are_refused(tmp_path, size):
    with pytest.raises(BadRequestError, match=r"is not a size; give bytes, or a text like '5GB'"):
        export_merged("tinker://a/weights/b", tmp_path / "x", max_shard_size=size)


@pytest.mark.parametrize("export", [export_peft, export_merged, export_tinker])
def test_a_directory_that_holds_something_is_left_alone(tmp_path, checkpoint, export):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    (tmp_path / "out").mkdir()
    export(path, tmp_path / "out", home=tmp_path / "home")  # empty is fine
    before = sorted(f.name for f in (tmp_path / "out").iterdir())
    with pytest.raises(ConflictError, match=r"out exists and is not an empty directory; choose another one"):
        export(path, tmp_path / "out", home=tmp_path / "home")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == before


def test_a_failed_export_leaves_nothing_behind(tmp_path, checkpoint, monkeypatch):
    path = trained(tmp_path / "home", checkpoint("qwen3"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*out: No space left on device"):
        export_merged(path, tmp_path / "out", home=tmp_path / "home", progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["home"]


def test_wrong_paths_and_wrong_base_models_are_refused(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    with pytest.raises(NotFoundError, match=r"checkpoint 'tinker://.*/weights/b' does not exist"):
        export_peft(path[:-1] + "b", tmp_path / "x", home=tmp_path / "home")
    with pytest.raises(UnprocessableEntityError) as error:
        export_peft(path, tmp_path / "x", home=tmp_path / "home", base_model=str(checkpoint("qwen2")))
    assert "adapter tensor 'layers.q_proj.b' of tinker://" in str(error.value)
    assert "needs shape [3, 4, 32], the checkpoint has [3, 4, 48]. It was trained on " in str(error.value)
    with pytest.raises(NotFoundError, match=r"is neither an existing directory nor a hub id"):
        export_peft(path, tmp_path / "x", home=tmp_path / "home", base_model="/moved/away")
    assert not (tmp_path / "x").exists()


def test_a_base_model_that_moved_can_be_named(tmp_path, checkpoint):
    moved = shutil.copytree(checkpoint("qwen3"), tmp_path / "first")
    path = trained(tmp_path / "home", moved)
    moved = moved.rename(tmp_path / "second")
    export_peft(path, tmp_path / "peft", home=tmp_path / "home", base_model=str(moved))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "second"


@pytest.mark.parametrize(
    ("place", "origin", "name"),
    [
        ("hub/models--owner--name/snapshots/" + "0" * 40, None, "owner/name"),
        ("my-model", "owner/name", "owner/name"),
        ("my-model", "/home/me/model", "my-model"),
        ("my-model", "./model", "my-model"),
        ("my-model", 3, "my-model"),
    ],
)
def test_the_peft_files_name_no_path_of_this_machine(tmp_path, checkpoint, place, origin, name):
    base = shutil.copytree(checkpoint("qwen3"), tmp_path / place)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": origin}))
    export_peft(trained(tmp_path / "home", base), tmp_path / "peft", home=tmp_path / "home")
    text = (tmp_path / "peft" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == name and str(tmp_path) not in text


def test_the_peft_files_name_an_embedded_model_as_we_do(tmp_path):
    base = resolve("tinker-jax/tiny-qwen3")
    export_peft(trained(tmp_path / "home", base), tmp_path / "peft", home=tmp_path / "home", base_model="tinker-jax/tiny-qwen3")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tinker-jax/tiny-qwen3"


@pytest.mark.parametrize("export", [export_peft, export_merged, export_tinker])
def test_exported_files_have_the_mode_that_the_umask_gives(tmp_path, checkpoint, export):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    umask = os.umask(0o027)
    try:
        export(path, tmp_path / "out", home=tmp_path / "home")
    finally:
        os.umask(umask)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {
        file.name: "0o640" for file in (tmp_path / "out").iterdir()
    }


def test_tinkers_layout_names_the_unembedding_as_tinker_does(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    export_tinker(path, tmp_path / "tinker", home=tmp_path / "home")
    tensors = load_file(tmp_path / "tinker" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.unembed_tokens.lora_A.weight"].shape == (4, 32)
    assert not any("lm_head" in name for name in tensors)
    config = json.loads((tmp_path / "tinker" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32 and config["target_modules"][-1] == "unembed_tokens"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_the_cookbooks_tools_take_tinkers_layout(tmp_path, checkpoint, family, record_property):
    cookbook = pytest.importorskip("tinker_cookbook.weights", reason="its dependencies do not resolve on the package index")
    base = checkpoint(family)
    path = trained(tmp_path / "home", base)
    export_tinker(path, tmp_path / "tinker", home=tmp_path / "home")
    expected = our_logits(tmp_path / "home", path, base, TOKENS)
    cookbook.build_hf_model(
        base_model=str(base), adapter_path=str(tmp_path / "tinker"), output_path=str(tmp_path / "hf"), dtype="float32"
    )
    built = torch_logits(pretrained(tmp_path / "hf"))
    assert_same_model(built, expected, base)
    record_property("family", family)
    record_property("export Tinker's layout, tinker_cookbook", float(np.abs(built - expected).max()))
    cookbook.build_lora_adapter(base_model=str(base), adapter_path=str(tmp_path / "tinker"), output_path=str(tmp_path / "peft"))
    if family == "gpt_oss":  # PEFT refuses a pair for each expert here
        return
    model = peft.PeftModel.from_pretrained(pretrained(base), tmp_path / "peft")
    assert_same_model(torch_logits(model), expected, base)


def test_tinkers_layout_has_one_factor_for_all_experts(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("gpt_oss"))
    export_tinker(path, tmp_path / "tinker", home=tmp_path / "home")
    tensors = load_file(tmp_path / "tinker" / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.3.mlp.experts"
    shapes = {"w1": ((1, 4, 32), (6, 20, 4)), "w3": ((1, 4, 32), (6, 20, 4)), "w2": ((6, 4, 20), (1, 32, 4))}
    for name, expected in shapes.items():
        assert tuple(tuple(tensors[f"{experts}.{name}.lora_{x}.weight"].shape) for x in "AB") == expected
    assert torch.equal(tensors[f"{experts}.w1.lora_A.weight"], tensors[f"{experts}.w3.lora_A.weight"])
    assert "base_model.model.model.layers.3.attn.q_proj.lora_A.weight" in tensors


def test_the_peft_files_of_deepseek_have_a_pair_for_each_expert_and_name_the_linears_called_alike(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("deepseek_v3"))
    export_peft(path, tmp_path / "peft", home=tmp_path / "home")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert config["target_modules"] == [*attention, "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert config["target_parameters"] == [
        f"mlp.{where}{name}_proj.weight" for where in ("", "shared_experts.") for name in ("gate", "up", "down")
    ]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.2.mlp.experts.7.down_proj.lora_B.weight"].shape == (32, 4)


def test_the_peft_files_of_gpt_oss_have_the_experts_side_by_side(tmp_path, checkpoint):
    path = trained(tmp_path / "home", checkpoint("gpt_oss"))
    export_peft(path, tmp_path / "peft", home=tmp_path / "home")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    tensors, experts = load_file(tmp_path / "peft" / "adapter_model.safetensors"), "base_model.model.model.layers.0.mlp.experts"
    shapes = {name: tuple(tensors[f"{experts}.{name}.weight"].shape) for name in ("lora_A", "base_layer.lora_A")}
    assert shapes == {"lora_A": (24, 20), "base_layer.lora_A": (24, 32)}


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_merged_model_of_fused_files_is_fused_and_the_same(tmp_path, checkpoint, family):
    base = fuse(family, tmp_path / "fused")
    path = trained(tmp_path / "home", base)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", progress=False)
    export_merged(path, tmp_path / "other", home=tmp_path / "home", base_model=str(checkpoint(family)), progress=False)
    fused, each = (load_file(tmp_path / directory / SINGLE_FILE) for directory in ("merged", "other"))
    assert fused.keys() == load_file(base / SINGLE_FILE).keys() and len(each) > len(fused)
    one, two = load(tmp_path / "merged"), load(tmp_path / "other")
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("encoding", quantised.LAYOUTS)
def test_a_quantised_base_model_merges_into_the_plain_model_that_its_bf16_twin_merges_into(tmp_path, encoding):
    base, plain = quantised_case(encoding, tmp_path)
    path = trained(tmp_path / "home", base)
    for directory, source in (("merged", base), ("twin", plain)):
        export_merged(path, tmp_path / directory, home=tmp_path / "home", base_model=str(source), progress=False)
    merged, twin = (load_file(tmp_path / directory / SINGLE_FILE) for directory in ("merged", "twin"))
    assert merged.keys() == twin.keys()
    for name in merged:
        assert merged[name].dtype == twin[name].dtype and torch.equal(merged[name], twin[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    pretrained(tmp_path / "merged")


@pytest.mark.parametrize("encoding", ["mxfp4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_merged_quantised_model_computes_our_logits(tmp_path, encoding):
    base, plain = quantised_case(encoding, tmp_path)
    path = trained(tmp_path / "home", base)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", dtype="float32", progress=False)
    assert_same_model(torch_logits(pretrained(tmp_path / "merged")), our_logits(tmp_path / "home", path, base, TOKENS), plain)


def test_layers_of_multi_token_prediction_come_along(tmp_path):
    base = tiny.save("deepseek_v3", tmp_path / "base", dtype=torch.bfloat16)
    further = tiny.add_predictor(base)
    path = trained(tmp_path / "home", base)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", progress=False)
    merged = load_file(tmp_path / "merged" / SINGLE_FILE)
    assert all(torch.equal(merged[name], tensor) for name, tensor in further.items())
    load(tmp_path / "merged")


def test_the_bias_that_steers_a_router_keeps_float32(tmp_path, checkpoint):
    base = checkpoint("deepseek_v3")
    path = trained(tmp_path / "home", base)
    export_merged(path, tmp_path / "merged", home=tmp_path / "home", dtype="bfloat16", progress=False)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    merged, before = load_file(tmp_path / "merged" / SINGLE_FILE), load_file(base / SINGLE_FILE)
    assert torch.equal(merged[name], before[name]) and merged["lm_head.weight"].dtype == torch.bfloat16


def test_an_adapter_for_another_number_of_experts_is_refused_by_name(tmp_path, checkpoint):
    base = checkpoint("qwen3_moe")
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_experts": 4}))
    path = trained(tmp_path / "home", base)
    with pytest.raises(UnprocessableEntityError) as error:
        export_merged(path, tmp_path / "x", home=tmp_path / "home", base_model=str(other))
    assert "adapter tensor 'layers.gate_up_experts.b' of tinker://" in str(error.value)
    assert "needs shape [3, 2, 4, 4, 20], the checkpoint has [3, 2, 6, 4, 20]" in str(error.value)
