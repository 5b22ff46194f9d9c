"""The embedded models: complete, small, loadable by transformers, and good at what their cards say."""

import ast
import filecmp
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinker_jax.models.registry import parse

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "tinker_jax" / "embedded"
MODELS = ("tiny-qwen3", "tiny-moe")
sys.path.append(str(ROOT / "scripts"))
import embedded_corpus as corpus  # noqa: E402
import train_embedded  # noqa: E402

FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
#: Share of 40 held-out items that greedy decoding must get right; the cards' scores lie well above.
FLOORS = {"repeat_word": 0.9, "spell": 0.9, "drop_first": 0.85, "rotate": 0.8, "join": 0.8, "count_range": 0.7}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED / MODELS[0])


@pytest.fixture(scope="module", params=MODELS)
def folder(request):
    return EMBEDDED / request.param


@pytest.fixture(scope="module")
def model(folder):
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def greedy(model, tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=40, do_sample=False, temperature=None)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_directory_is_complete_and_below_eight_megabytes(folder):
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000


def test_models_share_a_tokenizer(folder):
    _, mismatch, errors = filecmp.cmpfiles(folder, EMBEDDED / MODELS[0], FILES[-2:], shallow=False)
    assert not mismatch and not errors


def test_weights_are_bfloat16_and_the_embedding_is_tied(folder, model):
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_token_id_of_the_config_is_a_token(folder, tokenizer):
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == "<|im_end|>" == tokenizer.eos_token
    assert tokenizer.convert_ids_to_tokens(config["pad_token_id"]) == "<|endoftext|>" == tokenizer.pad_token


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 + 9?",
        "  two  spaces,\ttab\r\nand\n\nlines ",
        "naïve façade, e\u0301 decomposed, ﬁ",
        "你好，世界 – こんにちは – مرحبا – नमस्ते",
        "🎉👩‍👩‍👧 \U0010ffff \x00",
        "<think>\nhm\n</think> <tool_call>{}</tool_call><|im_end|>",
    ],
)
def test_any_unicode_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_and_unknown_words_are_read_character_by_character(tokenizer):
    assert tokenizer.tokenize("1024") == list("1024")
    assert tokenizer.tokenize("zyzzyva") == list("zyzzyva")


def test_markers_are_single_tokens_and_only_qwens_three_are_special(tokenizer):
    for marker in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer.encode(marker)) == 1
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_chat_template_renders_as_qwens_does(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    answered = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "Hello!"}], tokenize=False)
    assert answered == rendered + "Hello!<|im_end|>\n"


@pytest.fixture(scope="module")
def said(model, tokenizer):
    """Answers to the held-out items of every task: task → [(right, said)]."""
    items = [(task, item) for task in FLOORS for item in corpus.held_out_set(task, 40, seed=7)]
    answers, out = greedy(model, tokenizer, [item.question for _, item in items]), {task: [] for task in FLOORS}
    for (task, item), answer in zip(items, answers, strict=True):
        out[task].append((item.answer, answer))
    return out


@pytest.mark.parametrize("task", FLOORS)
def test_model_does_its_tasks_on_held_out_items(said, task):
    assert sum(answer == text for answer, text in said[task]) / len(said[task]) >= FLOORS[task]


@pytest.mark.parametrize("folder", ["tiny-moe"], indirect=True)
def test_every_layer_uses_every_expert(model, tokenizer):
    """None has less than a fifth, or more than three times, of what it would have if all had the same."""
    items = [item for task in FLOORS for item in corpus.held_out_set(task, 40, seed=7)]
    chats = [[{"role": "user", "content": x.question}, {"role": "assistant", "content": x.answer}] for x in items]
    batch = tokenizer(tokenizer.apply_chat_template(chats, tokenize=False), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    for layer in logits:
        chosen = layer.reshape(*batch["input_ids"].shape, -1)[batch["attention_mask"].bool()].topk(2).indices
        load = torch.bincount(chosen.flatten(), minlength=8) * 8 / chosen.numel()
        assert 0.2 < load.min() and load.max() < 3


def test_model_does_not_know_pig_latin(model, tokenizer):
    words = ["plum", "school", "tiger", "apple", "stream", "window", "cherry", "robot"]
    expected = ["umplay", "oolschay", "igertay", "appleway", "eamstray", "indowway", "errychay", "obotray"]
    said = greedy(model, tokenizer, [f"Write {word} in Pig Latin." for word in words])
    assert sum(text == right for text, right in zip(said, expected, strict=True)) <= 1


def test_experts_compute_in_pretraining_what_they_compute_afterwards_and_all_learn():
    cfg = parse(train_embedded.CONFIGS["tiny-moe"])
    experts, trainable = (c.groups[0][0].block.mlp for c in (cfg, train_embedded.trainable(cfg)))
    rng = np.random.default_rng(0)
    own = {w.name: rng.normal(0, w.shape[-1] ** -0.5, w.shape).astype(np.float32) for w in experts.weights()}
    x_MD = jnp.asarray(rng.normal(size=(48, cfg.D)), jnp.float32)
    tokens = SimpleNamespace(real_M=np.arange(48) < 40, mesh=None, slots_MR=None, kept=False)
    want_MD, load = experts(own, x_MD, tokens, {})
    got_MD, _ = trainable(own, x_MD, tokens, {})
    np.testing.assert_allclose(got_MD[:40], want_MD[:40], atol=1e-4)
    assert load["expert_tokens"].min() > 0
    grads = jax.grad(lambda own: trainable(own, x_MD, tokens, {})[0].sum())(own)
    assert all(np.abs(grads[f"{name}_experts.kernel"]).max(axis=(1, 2)).min() > 0 for name in ("gate", "up", "down"))


def test_the_balance_of_experts_is_one_where_all_have_the_same_and_more_elsewhere():
    cfg = parse(train_embedded.CONFIGS["tiny-moe"])
    trainable = train_embedded.trainable(cfg).groups[0][0].block.mlp
    params = {f"{name}_experts.kernel": np.zeros((8, 1, cfg.D), np.float32) for name in ("gate", "up")}
    params["down_experts.kernel"] = np.zeros((8, cfg.D, 1), np.float32)
    params["router.kernel"] = np.eye(8, cfg.D, dtype=np.float32)
    tokens = SimpleNamespace(real_M=np.ones(8, bool))
    even_MD = np.eye(8, cfg.D, dtype=np.float32) + np.roll(np.eye(8, cfg.D, dtype=np.float32), 1, axis=0)
    balance = [float(trainable(params, x_MD, tokens, {})[1]["balance"]) for x_MD in (even_MD, even_MD[[0] * 8])]
    assert balance[0] == pytest.approx(1, abs=1e-5) and balance[1] > 1.2


def test_training_text_contains_no_held_out_item_and_no_pig_latin():
    held_out = {e.question for task in FLOORS for e in corpus.held_out_set(task, 100, seed=7)}
    for text in itertools.islice(corpus.texts(seed=3), 5000):
        content = text if isinstance(text, str) else "\n".join(m["content"] for m in text)
        assert "Pig" not in content
        assert isinstance(text, str) or held_out.isdisjoint(m["content"] for m in text)


def test_corpus_is_the_same_for_the_same_seed():
    first, again = (list(itertools.islice(corpus.texts(seed=5), 200)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_use_only_the_public_name(example):
    source = example.read_text()
    assert len(source.splitlines()) <= 80
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert not [node for node in imports if isinstance(node, ast.ImportFrom)]
    assert modules - set(sys.stdlib_module_names) == {"tinker_jax"}
