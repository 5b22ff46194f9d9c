"""Import of PEFT adapters: what PEFT or torch computes with one, the checkpoint computes, trains on and writes again."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from checkpoint_cases import our_logits, read_config, trained
from families import merged, torch_factors
from safetensors.torch import load_file, save_file

from tinker_jax import AdamParams, Datum, EngineConfig, ModelInput, SamplingParams, ServiceClient, lora
from tinker_jax.checkpoints import export_merged, export_peft, import_peft
from tinker_jax.checkpoints.state import read_adapter, read_meta
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import BadRequestError, NotFoundError, TinkerError, UnprocessableEntityError, UnsupportedError

PREFIX = "base_model.model.model.layers"
LAYERS, EXPERTS, RANK, ALPHA = 2, 6, 3, 7.0  # of a tiny Qwen3-MoE, and of adapters for it
SHAPES = {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}


def pretrained(base: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def stored(home: Path, path: str) -> dict[str, np.ndarray]:
    return read_adapter(Store(home).get(path).directory)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def write(directory: Path, tensors, **config) -> Path:
    """An adapter made by hand."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def pair(module: str, fan_out: int, fan_in: int, seed: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, fan_in), "B": (fan_out, rank)}
    return {f"{module}.lora_{x}.weight": 0.3 * torch.randn(shape, generator=draw) for x, shape in shapes.items()}


def per_expert() -> dict[str, torch.Tensor]:
    """Factors of every expert, and of some queries."""
    tensors = pair(f"{PREFIX}.1.self_attn.q_proj", 48, 32, 999)
    names = ((layer, expert, name) for layer in range(LAYERS) for expert in range(EXPERTS) for name in SHAPES)
    for seed, (layer, expert, name) in enumerate(names):
        tensors |= pair(f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}", *SHAPES[name], seed)
    return tensors


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_export_wrote_is_imported_bit_for_bit(tmp_path, checkpoint, family, record_property):
    base, home = checkpoint(family), tmp_path / "home"
    path = trained(home, base)
    record = Store(home).get(path)
    again = import_peft(export_peft(path, tmp_path / "peft", home=home), home=home, base_model=str(base))
    assert_equal(stored(home, again), stored(home, path))
    imported = Store(home).get(again)
    assert (imported.kind, imported.base_model, imported.has_optimizer) == ("weights", str(base), False)
    assert [getattr(imported, name) for name in ("lora_rank", "train_attn", "train_mlp", "train_unembed")] == [
        4,
        True,
        True,
        True,
    ]
    assert read_meta(imported.directory)["lora_alpha"] == read_meta(record.directory)["lora_alpha"]
    record_property("family", family)
    record_property("adapter import", "of `export_peft`")


def test_an_adapter_of_peft_computes_here_what_it_computes_there(tmp_path, checkpoint, record_property):
    """Scales, ranks and layers of all kinds, and a trained unembedding, whose base weights PEFT writes along with it."""
    base, home, tokens = checkpoint("llama"), tmp_path / "home", np.random.default_rng(0).integers(2, tiny.VOCAB, (2, 11))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "o_proj", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        alpha_pattern={"o_proj": 11},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(pretrained(base), config)
    with pytest.warns(UserWarning):
        model.save_pretrained(tmp_path / "peft")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "peft" / "adapter_model.safetensors")
    path = import_peft(tmp_path / "peft", home=home)
    record = Store(home).get(path)
    assert (record.lora_rank, record.train_attn, record.train_mlp, record.train_unembed) == (6, True, False, True)
    with torch.no_grad():
        expected = model.eval()(torch.as_tensor(tokens)).logits
        assert (expected - pretrained(base)(torch.as_tensor(tokens)).logits).abs().max() > 0.1
    np.testing.assert_allclose(our_logits(home, path, base, tokens), expected.numpy(), atol=1e-4, rtol=1e-4)
    ours = stored(home, path)
    assert not ours["layers.q_proj.b"][0, 4:].any() and ours["layers.q_proj.b"][1, 4:].any(), (
        "lower ranks are padded with zeros"
    )
    assert ours["layers.k_proj.a"].any() and not ours["layers.k_proj.b"].any(), (
        "what the files lack is as a fresh adapter has it"
    )
    record_property("family", "llama")
    record_property("adapter import", "of `peft`")


@pytest.mark.parametrize(
    ("family", "modules", "parameters"),
    [
        ("gpt_oss", ["o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("gpt_oss", ["o_proj"], ["mlp.experts.gate_up_proj"]),
        ("qwen3_moe", ["o_proj", "gate_proj", "up_proj", "down_proj"], None),
        ("deepseek_v3", ["o_proj"], ["mlp.experts.down_proj", "shared_experts.up_proj.weight"]),
    ],
)
def test_experts_side_by_side_merge_into_what_peft_merges_them_into(
    tmp_path, checkpoint, family, modules, parameters, record_property
):
    base, home = checkpoint(family), tmp_path / "home"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, target_parameters=parameters, init_lora_weights=False)
    model = peft.get_peft_model(pretrained(base), config)
    model.save_pretrained(tmp_path / "peft")
    path = import_peft(tmp_path / "peft", home=home)
    assert any("per_expert" in name for name in stored(home, path))
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    export_merged(path, tmp_path / "ours", home=home, progress=False)
    ours, theirs, before = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs", base))
    assert ours.keys() == theirs.keys() == before.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5, msg=name)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert any("experts" in name for name in changed) and any("o_proj" in name for name in changed)
    record_property("family", family)
    record_property("adapter import", "of `peft`, experts side by side")


class Client:
    """A training client of the imported adapter, and torch beside it."""

    def __init__(self, service, path, base):
        self.client = service.create_training_client_from_state(path).result()
        self.model, self.cfg = tiny.model("qwen3_moe", num_hidden_layers=LAYERS), read_config(base)
        state = self.client._engine._adapters[self.client.model_id]
        self.scale, self.factors = state.scale, torch_factors(jax.device_get(state.stored()[0]))

    @property
    def gradients(self):
        return lora.trim(self.client._engine._adapters[self.client.model_id].grads, RANK)

    def logits(self, tokens):
        parameters = merged(self.cfg, self.model, self.factors, self.scale)
        return torch.func.functional_call(self.model, parameters, (torch.tensor([tokens]),), tie_weights=False).logits[0]

    def greedy(self, prompt, count):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.save("qwen3_moe", tmp_path / "base", num_hidden_layers=LAYERS)


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


def test_factors_of_each_expert_train_as_in_torch_and_are_written_again(tmp_path, base, home, record_property):
    tensors, tokens = per_expert(), np.random.default_rng(0).integers(2, tiny.VOCAB, 40).tolist()
    path = import_peft(write(tmp_path / "peft", tensors), home=home, base_model=str(base))
    assert read_meta(Store(home).get(path).directory)["meta"]["groups"] == ["attn", lora.PER_EXPERT]
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    with ServiceClient(engine=EngineConfig(home=home)) as service:
        imported = Client(service, path, base)
        client, factors = imported.client, imported.factors["layers"]
        for expert in (0, EXPERTS - 1):
            module = f"{PREFIX}.1.mlp.experts.{expert}.up_proj"
            theirs = ALPHA / RANK * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            ours = factors["gate_up_per_expert"]
            update = imported.scale * (ours["a"][1, 1, expert] @ ours["b"][1, 1, expert]).T
            torch.testing.assert_close(update.detach(), theirs, atol=1e-6, rtol=1e-5)

        # A step as torch takes it.
        (output,) = client.forward_backward([datum], "cross_entropy").result().loss_fn_outputs
        logits = imported.logits(tokens[:-1])
        theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        np.testing.assert_allclose(output["logprobs"].to_numpy(), theirs.detach().numpy(), atol=1e-4)
        (-theirs.sum()).backward()
        got = jax.tree_util.tree_leaves_with_path(imported.gradients)
        for (where, ours), expected in zip(got, jax.tree.leaves(imported.factors), strict=True):
            assert np.abs(ours - expected.grad.numpy()).max() <= 1e-4 * max(1e-3, expected.grad.abs().max()), where
        client.optim_step(AdamParams(learning_rate=1e-2)).result()

        # Saved, restored, written by PEFT's names and read again, it is the same adapter.
        saved = client.save_state("one").result().path
        restored = service.create_training_client_from_state_with_optimizer(saved).result()
        again = import_peft(export_peft(saved, tmp_path / "again", home=home), home=home, base_model=str(base))
        kept = stored(home, saved)
        assert_equal(stored(home, restored.save_state("two").result().path), kept)
        assert_equal(stored(home, again), kept)
        client.load_state(path).result()
        before = stored(home, client.save_state("three").result().path)
        assert_equal(before, stored(home, path))
        assert any(not np.array_equal(kept[name], before[name]) for name in kept)

        shared = import_peft(export_shared(tmp_path, base), home=home, base_model=str(base))
        with pytest.raises(
            UnprocessableEntityError, match="holds rank 4 on attn, mlp, unembed, but this client trains rank 3 on"
        ):
            client.load_state(shared).result()
    record_property("family", "qwen3_moe")
    record_property("adapter import", "factors of each expert")


def export_shared(tmp_path: Path, base: Path) -> Path:
    """An adapter whose experts share factors."""
    return export_peft(trained(tmp_path / "other", base), tmp_path / "shared", home=tmp_path / "other")


@pytest.mark.slow
def test_adapters_of_both_forms_in_one_batch_say_what_torch_says(tmp_path, base, home):
    adapters = write(tmp_path / "peft", per_expert()), export_shared(tmp_path, base)
    paths = [import_peft(adapter, home=home, base_model=str(base)) for adapter in adapters]
    prompt, params = list(range(20, 29)), SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    with ServiceClient(engine=EngineConfig(home=home)) as service:
        clients = [Client(service, path, base) for path in paths]
        samplers = [service.create_sampling_client(paths[0]), clients[1].client.save_weights_and_get_sampling_client()]
        runner, at_work = clients[0].client._engine._sampler._runner, []
        real = runner.decode
        runner.decode = lambda adapter, *rest: at_work.append(set(adapter["layers"])) or real(adapter, *rest)
        futures = [sampler.result().sample(ModelInput.from_ints(prompt), 1, params) for sampler in samplers]
        drawn = [future.result().sequences[0].tokens for future in futures]
        assert any({"gate_up_per_expert", "gate_up_experts"} <= modules for modules in at_work)
        assert drawn == [client.greedy(prompt, 5) for client in clients] and drawn[0] != drawn[1]


def test_an_a_of_gate_and_one_of_up_become_one_tensor_of_twice_the_rank_where_files_have_one(tmp_path, checkpoint):
    base, home = checkpoint("gpt_oss"), tmp_path / "home"
    path = trained(home, base, rank=3, groups=("attn", lora.PER_EXPERT, "unembed"))
    export_peft(path, tmp_path / "peft", home=home)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({r".*\.gate_up_proj": 6}, {r".*\.gate_up_proj": 64})
    again = import_peft(tmp_path / "peft", home=home, base_model=str(base))
    merged = []
    for number, one in enumerate((path, again)):
        export_merged(one, tmp_path / str(number), home=home, progress=False)
        merged.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    theirs = peft.PeftModel.from_pretrained(pretrained(base), tmp_path / "peft").merge_and_unload().state_dict()
    for name, tensor in merged[0].items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


Q = f"{PREFIX}.0.self_attn.q_proj"
QUERY = pair(Q, 48, 32, 0)
EXPERT = f"{PREFIX}.0.mlp.experts"
BAD_SETTINGS = [
    ({"peft_type": "LOHA"}, UnsupportedError, "peft_type='LOHA' cannot be imported: expected 'LORA'"),
    ({"use_dora": True}, UnsupportedError, "use_dora=True cannot be imported: an adapter here is a pair of factors"),
    ({"modules_to_save": ["norm"]}, UnsupportedError, r"modules_to_save=\['norm'\] cannot be imported"),
    ({"bias": "lora_only"}, UnsupportedError, "bias='lora_only' cannot be imported: an adapter here has no biases"),
    ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights='pissa' cannot be imported: it changes the base"),
    ({"r": 0}, UnprocessableEntityError, "r: expected a whole number from 1, got 0"),
    ({"lora_alpha": "8"}, UnprocessableEntityError, "lora_alpha: expected a finite number, got '8'"),
    ({"rank_pattern": [3]}, UnprocessableEntityError, r"rank_pattern: expected an object, or null, got \[3\]"),
    ({"rank_pattern": {"(": 3}}, UnprocessableEntityError, r"expected regular expressions as keys, got \['\('\]"),
    ({"target_parameters": "x"}, UnprocessableEntityError, "target_parameters: expected a list of texts, or null, got 'x'"),
    (
        {"rank_pattern": {"q_proj": 2}},
        UnprocessableEntityError,
        r"q_proj.lora_A.weight' .* rank 2 need shape \[2, 32\], .* has \[3, 32\]",
    ),
]
BAD_TENSORS = [
    ({}, "holds no factors of any linear"),
    ({f"{Q}.lora_A.weight": QUERY[f"{Q}.lora_A.weight"]}, "q_proj.lora_B.weight' is missing"),
    (
        QUERY | pair(f"{PREFIX}.3.self_attn.q_proj", 48, 32, 0),
        r"'.*layers\.3\.self_attn\.q_proj\.lora_A\.weight' .* has no place in base",
    ),
    (QUERY | pair(f"{PREFIX}.0.mlp.gate", 6, 32, 0), r"'.*mlp\.gate\.lora_A\.weight' .* has no place in base model"),
    (QUERY | {f"{Q}.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector' .* has no place in base model"),
    (QUERY | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 300)}, "lora_embedding_A' .* has no place"),
    (QUERY | {"base_model.model.lm_head.base_layer.weight": torch.ones(300, 32)}, "it is not the embedding of base model"),
    (pair(Q, 48, 64, 0), r"q_proj\.lora_A\.weight' .* need shape \[3, 32\], the file has \[3, 64\]"),
    (pair(Q, 50, 32, 0), r"q_proj\.lora_B\.weight' .* need shape \[48, 3\], the file has \[50, 3\]"),
    (QUERY | {f"{Q}.lora_B.weight": torch.full((48, 3), torch.nan)}, r"q_proj\.lora_B\.weight' .* NaN or infinite"),
    (QUERY | {f"{Q}.lora_A.weight": QUERY[f"{Q}.lora_A.weight"].double()}, r"q_proj\.lora_A\.weight' .* is stored as F64"),
    (pair(f"{EXPERT}.0.up_proj", 20, 32, 0), r"experts\.1\.up_proj\.lora_A\.weight' is missing .* has 6 experts"),
    (
        {k: v for e in range(7) for k, v in pair(f"{EXPERT}.{e}.up_proj", 20, 32, 0).items()},
        r"'.*experts\.6\.up_proj\.lora_A\.weight' .* has no place in base model",
    ),
]


def refused(tmp_path, base, error, text, tensors, **config):
    home = tmp_path / "home"
    with pytest.raises(error, match=text):
        import_peft(write(tmp_path / "peft", tensors, **config), home=home, base_model=str(base))
    assert not home.exists(), "nothing is written"


@pytest.mark.parametrize(("config", "error", "text"), BAD_SETTINGS)
def test_a_configuration_that_means_something_else_is_refused_by_its_key(tmp_path, checkpoint, config, error, text):
    refused(tmp_path, checkpoint("qwen3_moe"), error, text, QUERY, **config)


@pytest.mark.parametrize(("tensors", "text"), BAD_TENSORS)
def test_a_tensor_without_its_place_is_refused_by_its_name(tmp_path, checkpoint, tensors, text):
    refused(tmp_path, checkpoint("qwen3_moe"), (UnprocessableEntityError, UnsupportedError), text, tensors)


def test_what_is_no_adapter_is_refused(tmp_path, checkpoint):
    def error(kind: type[TinkerError]) -> str:
        with pytest.raises(kind) as caught:
            import_peft(tmp_path / "peft", home=tmp_path / "home")
        return str(caught.value)

    assert "peft has no adapter_config.json, so it is no PEFT adapter." in error(NotFoundError)
    file = write(tmp_path / "peft", QUERY) / "adapter_model.safetensors"
    assert "adapter_config.json names no base model; say which one it is (base_model)." in error(BadRequestError)
    file.rename(file.with_suffix(".bin"))
    assert "peft has no adapter_model.safetensors. Convert adapter_model.bin to safetensors." in error(NotFoundError)
