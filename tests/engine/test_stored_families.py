"""Every family through the public API: a directory is loaded, trained, saved, resumed, exported, and read by other tools."""

import json

import numpy as np
import peft
import pytest
import tiny
import torch
from checkpoint_cases import fuse, load, quantised_case, read_config
from families import pretrained
from safetensors.torch import load_file

from tinker_jax import AdamParams, Datum, EngineConfig, ModelInput, SamplingParams, ServiceClient
from tinker_jax.checkpoints import Store, export_merged, export_peft, export_tinker
from tinker_jax.checkpoints.state import read_adapter
from tinker_jax.lora import PER_EXPERT
from tinker_jax.models.weights import lora_targets

RANK = 3
LENGTHS = (40, 21)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def service(home):
    with ServiceClient(engine=EngineConfig(home=home)) as service:
        yield service


def rows(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, tiny.VOCAB, n + 1).tolist() for n in LENGTHS]


def data(seed):
    return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in rows(seed)]


def step(client, seed):
    client.forward_backward(data(seed), "cross_entropy")
    client.optim_step(AdamParams(learning_rate=2e-2))


def scores(client):
    """Log-probabilities of the last batch's tokens."""
    outputs = client.forward(data(9), "cross_entropy").result().loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])


def torch_scores(model):
    """`scores`, of a model of transformers."""
    out = []
    with torch.no_grad():
        for row in rows(9):
            logprobs = torch.log_softmax(model.eval()(torch.tensor([row[:-1]])).logits[0].float(), -1)
            out.append(logprobs[range(len(row) - 1), row[1:]])
    return torch.cat(out).numpy()


def tinker_updates(cfg, directory):
    """What an adapter in Tinker's layout adds to each weight, as its own names and shapes say: {our name: array}."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    experts = {"gate_experts": "w1", "up_experts": "w3", "down_experts": "w2"}

    def update(w, layer):
        name = w.hf.format(layer=layer, expert=0).removesuffix(".weight")
        if w.experts:
            name = f"model.layers.{layer}.mlp.experts.{experts[w.module]}"
        if cfg.model_type == "gpt_oss":
            name = name.replace(".self_attn.", ".attn.")
        name = f"base_model.model.{'model.unembed_tokens' if name == 'lm_head' else name}"
        A, B = (tensors.pop(f"{name}.lora_{factor}.weight") for factor in "AB")
        return (config["lora_alpha"] / config["r"] * (B @ A)).numpy()

    table = [w for target in lora_targets(cfg) if PER_EXPERT not in target.groups[:1] for w in target.weights]
    found = {w.name: np.stack([update(w, i) for i in w.layers]) if w.layers else update(w, 0) for w in table}
    assert not tensors
    return found


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", [*tiny.DENSE, *map(slow, ("qwen3_moe", "gpt_oss", "deepseek_v3", "kimi_k2"))])
def test_a_run_resumes_bit_for_bit_and_every_export_of_it_computes_the_same(
    family, checkpoint, service, home, tmp_path, record_property
):
    base = checkpoint(family)
    client = service.create_lora_training_client(str(base), rank=RANK, seed=0).result()
    before = scores(client)
    step(client, 0)
    middle = client.save_state("middle").result().path
    resumed = service.create_training_client_from_state_with_optimizer(middle).result()
    ends = []
    for each in (client, resumed):
        step(each, 1)
        path = each.save_state("end").result().path
        ends.append((scores(each), read_adapter(Store(home).get(path).directory), path))
    (trained, adapter, _), (again, resumed_adapter, path) = ends
    np.testing.assert_array_equal(again, trained)
    assert adapter.keys() == resumed_adapter.keys()
    for name in adapter:
        np.testing.assert_array_equal(resumed_adapter[name], adapter[name], err_msg=name)
    moved = np.abs(trained - before).max()
    assert moved > 0.1, "the adapter does too little to prove anything"

    export_tinker(path, tmp_path / "tinker", home=home)
    export_peft(path, tmp_path / "peft", home=home)
    export_merged(path, tmp_path / "merged", home=home, max_shard_size="30KB", progress=False)
    cfg, source, merged = read_config(base), load(base), load(tmp_path / "merged")
    if cfg.tied:
        source["lm_head.kernel"] = source["embed.embedding"]
    for name, update in tinker_updates(cfg, tmp_path / "tinker").items():
        np.testing.assert_allclose(merged[name], source[name] + update, atol=1e-6, err_msg=name)
    reloaded = service.create_lora_training_client(str(tmp_path / "merged"), rank=RANK).result()
    gaps = {
        "merged, tinker_jax": scores(reloaded) - trained,
        "merged, transformers": torch_scores(pretrained(tmp_path / "merged")) - trained,
        "PEFT, peft": torch_scores(peft.PeftModel.from_pretrained(pretrained(base), tmp_path / "peft")) - trained,
    }
    gaps = {name: float(np.abs(gap).max()) for name, gap in gaps.items()}
    assert max(gaps.values()) <= 1e-4, gaps

    record_property("family", family)
    record_property("resumed", "bit for bit")
    record_property("moved by", float(moved))
    for name, gap in gaps.items():
        record_property(f"export {name}", gap)
    record_property("export Tinker's layout", "equal updates")


@pytest.mark.parametrize(
    ("family", "encoding"),
    [slow("gpt_oss", "mxfp4"), slow("qwen3_moe", "fused"), slow("deepseek_v3", "fp8"), slow("kimi_k2", "int4")],
)
def test_a_stored_encoding_trains_and_samples_as_its_plain_twin(
    family, encoding, checkpoint, service, tmp_path, record_property
):
    if encoding == "fused":
        directories = fuse(family, tmp_path / "fused"), checkpoint(family)
    else:
        directories = quantised_case(encoding, tmp_path)
    assert json.loads((directories[0] / "config.json").read_text())["model_type"] == family
    prompt, params = ModelInput.from_ints(rows(3)[0]), SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    found = []
    for directory in directories:
        client = service.create_lora_training_client(str(directory), rank=RANK, seed=0).result()
        before = scores(client)
        step(client, 0)
        sampler = client.save_weights_and_get_sampling_client().result()
        drawn = sampler.sample(prompt, 1, params).result().sequences[0]
        found.append((before, scores(client), drawn.tokens, drawn.logprobs))
    (before, after, *_), twin = found
    assert np.abs(after - before).max() > 0.1
    for ours, theirs in zip(found[0], twin, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    record_property("family", family)
    record_property("import", "one tensor of all experts" if encoding == "fused" else encoding.upper())
