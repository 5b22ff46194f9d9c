"""The engine end to end: training, sampling and checkpoints of several clients on one base model."""

import logging
import re
import threading
import time
import uuid
import weakref

import jax
import numpy as np
import pytest
import tiny

from tinker_jax.checkpoints.state import read_meta, save_adapter
from tinker_jax.checkpoints.store import RunRecord, Store
from tinker_jax.engine.config import EngineConfig
from tinker_jax.engine.engine import Engine, get_engine
from tinker_jax.types import AdamParams, Datum, LoraConfig, ModelInput, SampleRequest, SamplingParams
from tinker_jax.types.errors import (
    BadRequestError,
    NotFoundError,
    RequestFailedError,
    StateError,
    StorageError,
    UnprocessableEntityError,
)

LORA = LoraConfig(rank=4, seed=0)
STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    engine = Engine(str(checkpoint("qwen3")), EngineConfig(home=tmp_path_factory.mktemp("home")))
    engine.info().result(120)
    yield engine
    engine.close()


@pytest.fixture
def model_id(engine):
    name = f"{uuid.uuid4().hex[:8]}:train:0"
    make_run(engine, name)
    engine.create_adapter(name, LORA)
    yield name
    engine.release(name)


def make_run(engine, name, rank=4):
    import datetime

    now = datetime.datetime.now(datetime.UTC)
    Store(engine.config.home).create_run(
        RunRecord(
            run_id=name,
            session_id="s",
            base_model=engine.base_model,
            lora_rank=rank,
            train_mlp=True,
            train_attn=True,
            train_unembed=True,
            seed=0,
            user_metadata=None,
            created=now,
            last_request_time=now,
        )
    )


def data(seed=0, lengths=(20, 33)):
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        tokens = rng.integers(2, tiny.VOCAB, n + 1).tolist()
        out.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]}))
    return out


def train(engine, model_id, steps, start=0):
    for i in range(start, start + steps):
        engine.forward_backward(model_id, data(i), "cross_entropy", None, backward=True)
        engine.optim_step(model_id, STEP)


def score(engine, model_id):
    out = engine.forward_backward(model_id, data(99), "cross_entropy", None, backward=False).result(120)
    return np.concatenate([x["logprobs"].to_numpy() for x in out.loss_fn_outputs])


def prompt_logprobs(engine, sampler_id, tokens):
    request = SampleRequest(
        prompt=ModelInput.from_ints(tokens), sampling_params=SamplingParams(max_tokens=1), prompt_logprobs=True
    )
    return np.asarray(engine.sample(sampler_id, request).result(120).prompt_logprobs[1:], np.float32)


def test_training_lowers_the_loss_and_reports_it(engine, model_id):
    batch = data(1)
    losses = []
    for _ in range(15):
        out = engine.forward_backward(model_id, batch, "cross_entropy", None, backward=True)
        step = engine.optim_step(model_id, STEP)
        losses.append(out.result(120).metrics["loss:sum"])
        assert step.result(120).metrics["grad_norm:mean"] > 0
    assert losses[-1] < 0.7 * losses[0]


def test_sampler_and_trainer_agree_on_the_adapter(engine, model_id):
    train(engine, model_id, 4)
    engine.snapshot(model_id, "agree")
    tokens = data(5, (60,))[0].model_input.to_ints()
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    out = engine.forward_backward(model_id, [datum], "cross_entropy", None, backward=False).result(120)
    trainer = out.loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(prompt_logprobs(engine, "agree", tokens), trainer, atol=1e-5)
    drawn = engine.sample(
        "agree",
        SampleRequest(
            prompt=ModelInput.from_ints(tokens[:30]),
            sampling_params=SamplingParams(max_tokens=20, stop=[], seed=1),
            num_samples=3,
        ),
    ).result(120)
    for sequence in drawn.sequences:
        whole = tokens[:30] + sequence.tokens
        datum = Datum(ModelInput.from_ints(whole[:-1]), {"target_tokens": whole[1:]})
        out = engine.forward_backward(model_id, [datum], "cross_entropy", None, backward=False).result(120)
        trainer = out.loss_fn_outputs[0]["logprobs"].to_numpy()[29:]
        np.testing.assert_allclose(sequence.logprobs, trainer, atol=1e-5)


def test_a_seed_that_was_drawn_is_told_and_makes_the_same_adapter_again(engine):
    drawn = engine.create_adapter("unseeded", LoraConfig(rank=4)).result(120)
    assert drawn.seed is not None
    engine.create_adapter("again", drawn)
    for name in ("unseeded", "again"):
        train(engine, name, 1)
    np.testing.assert_array_equal(score(engine, "unseeded"), score(engine, "again"))


def test_a_snapshot_keeps_the_weights_of_its_place_in_the_order(engine, model_id):
    train(engine, model_id, 2)
    engine.snapshot(model_id, "frozen")
    tokens = list(range(2, 40))
    before = prompt_logprobs(engine, "frozen", tokens)
    train(engine, model_id, 3, start=2)
    during = engine.sample(
        "frozen",
        SampleRequest(prompt=ModelInput.from_ints(tokens), sampling_params=SamplingParams(max_tokens=1), prompt_logprobs=True),
    )
    np.testing.assert_array_equal(np.asarray(during.result(120).prompt_logprobs[1:], np.float32), before)
    np.testing.assert_array_equal(prompt_logprobs(engine, "frozen", tokens), before)
    engine.snapshot(model_id, "moved")
    assert np.abs(prompt_logprobs(engine, "moved", tokens) - before).max() > 1e-3


def test_sampling_does_not_change_training(engine):
    results = []
    for busy in (False, True):
        name = f"pure-{busy}:train:0"
        engine.create_adapter(name, LORA)
        train(engine, name, 2)
        if busy:
            engine.snapshot(name, name)
            for _ in range(3):
                request = SampleRequest(prompt=ModelInput.from_ints([5, 6, 7]), sampling_params=SamplingParams(max_tokens=9))
                engine.sample(name, request)
        train(engine, name, 2, start=2)
        results.append(score(engine, name))
    np.testing.assert_array_equal(*results)


def test_adapters_of_one_base_do_not_touch_each_other(engine, model_id):
    other = "other:train:0"
    engine.create_adapter(other, LORA)
    train(engine, other, 1)
    before = score(engine, other)
    train(engine, model_id, 2)
    engine.forward_backward(model_id, data(), "cross_entropy", None, backward=True)
    engine.optim_step(model_id, AdamParams(learning_rate=0.1, weight_decay=0.5))
    np.testing.assert_array_equal(score(engine, other), before)


def test_a_restored_run_continues_bit_for_bit_and_a_cold_one_does_not(engine, model_id):
    train(engine, model_id, 3)
    path = engine.save_state(model_id, model_id, "mid").result(120)
    train(engine, model_id, 3, start=3)
    uninterrupted = score(engine, model_id)
    engine.load_adapter("warm", path, with_optimizer=True, create=True)
    engine.load_adapter("cold", path, with_optimizer=False, create=True)
    for name in ("warm", "cold"):
        train(engine, name, 3, start=3)
    np.testing.assert_array_equal(score(engine, "warm"), uninterrupted)
    assert np.abs(score(engine, "cold") - uninterrupted).max() > 1e-5
    engine.load_adapter(model_id, path, with_optimizer=True, create=False)
    train(engine, model_id, 3, start=3)
    np.testing.assert_array_equal(score(engine, model_id), uninterrupted)


def test_a_saved_sampler_equals_the_snapshot(engine, model_id):
    train(engine, model_id, 2)
    engine.snapshot(model_id, "live")
    path = engine.save_sampler(model_id, model_id, "final").result(120)
    engine.load_sampler("loaded", path)
    tokens = list(range(2, 30))
    np.testing.assert_array_equal(prompt_logprobs(engine, "loaded", tokens), prompt_logprobs(engine, "live", tokens))
    with pytest.raises(BadRequestError, match="sampler_weights"):
        engine.load_adapter("x", path, with_optimizer=True, create=True).result(120)


def test_an_adapter_is_stored_and_sampled_at_its_own_rank(engine):
    name = "five:train:0"
    make_run(engine, name, rank=5)
    engine.create_adapter(name, LoraConfig(rank=5, seed=0))
    train(engine, name, 2)
    path = engine.save_state(name, name, "mid").result(120)
    shapes = read_meta(Store(engine.config.home).get(path).directory)["tensors"]
    assert shapes["adapter"]["layers.q_proj.a"]["shape"] == [3, 32, 5]
    assert shapes["optimizer"]["nu.lm_head.b"]["shape"] == [5, tiny.VOCAB]
    engine.load_adapter("five again", path, with_optimizer=True, create=True)
    for client in (name, "five again"):
        train(engine, client, 2, start=2)
    np.testing.assert_array_equal(score(engine, "five again"), score(engine, name))
    engine.snapshot(name, "five live")
    engine.load_sampler("five stored", engine.save_sampler(name, name, "end").result(120))
    tokens = data(7, (30,))[0].model_input.to_ints()
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    out = engine.forward_backward(name, [datum], "cross_entropy", None, backward=False).result(120)
    live = prompt_logprobs(engine, "five live", tokens)
    np.testing.assert_allclose(live, out.loss_fn_outputs[0]["logprobs"].to_numpy(), atol=1e-5)
    np.testing.assert_array_equal(prompt_logprobs(engine, "five stored", tokens), live)


def test_the_bare_base_model_equals_a_fresh_adapter(engine, model_id):
    engine.load_sampler("bare", None)
    engine.snapshot(model_id, "fresh")
    tokens = list(range(2, 30))
    np.testing.assert_array_equal(prompt_logprobs(engine, "bare", tokens), prompt_logprobs(engine, "fresh", tokens))


def test_a_checkpoint_of_another_shape_is_refused_and_changes_nothing(engine, model_id):
    train(engine, model_id, 1)
    path = engine.save_state(model_id, model_id, "r4").result(120)
    small = "small:train:0"
    engine.create_adapter(small, LoraConfig(rank=2, seed=1))
    before = score(engine, small)
    with pytest.raises(UnprocessableEntityError, match=r"holds rank 4 on attn, mlp, unembed, but this client trains rank 2"):
        engine.load_adapter(small, path, with_optimizer=True, create=False).result(120)
    np.testing.assert_array_equal(score(engine, small), before)


@pytest.mark.parametrize(
    ("change", "loss_fn", "config", "text"),
    [
        ({"target_tokens": [1, 2]}, "cross_entropy", None, "target_tokens"),
        ({"target_tokens": [tiny.VOCAB, 2, 3]}, "cross_entropy", None, "vocabulary"),
        ({"target_tokens": [1, 2, 3], "weights": [1.0, float("nan"), 1.0]}, "cross_entropy", None, "weights"),
        ({"target_tokens": [1, 2, 3]}, "importance_sampling", None, "logprobs"),
        ({"target_tokens": [1, 2, 3]}, "mse", None, "mse"),
        ({"target_tokens": [1, 2, 3]}, "cross_entropy", {"clip": 1.0}, "clip"),
    ],
)
def test_bad_data_is_refused_at_the_call_and_changes_nothing(engine, model_id, change, loss_fn, config, text):
    engine.forward_backward(model_id, data(), "cross_entropy", None, backward=True).result(120)
    with pytest.raises(BadRequestError, match=text):
        bad = Datum(ModelInput.from_ints([1, 2, 3]), change)
        engine.forward_backward(model_id, [*data(), bad], loss_fn, config, backward=True)
    norm = engine.optim_step(model_id, STEP).result(120).metrics["grad_norm:mean"]
    engine.create_adapter("clean", LORA)
    engine.forward_backward("clean", data(), "cross_entropy", None, backward=True)
    assert engine.optim_step("clean", STEP).result(120).metrics["grad_norm:mean"] == norm


@pytest.mark.parametrize(
    ("tokens", "changes", "params", "text"),
    [
        ([], {}, {}, "prompt: expected at least one token"),
        ([tiny.VOCAB], {}, {}, "prompt: token 0 is 300, outside the model's vocabulary of 300"),
        ([3] * 600, {}, {}, "600 tokens exceed the model's context length of 512"),
        ([3], {}, {"stop": [tiny.VOCAB]}, r"stop\[0\]: token id 300 is outside"),
        ([3, 4], {"topk_prompt_logprobs": 999}, {}, "topk_prompt_logprobs: expected at most 300"),
    ],
)
def test_a_bad_sample_request_is_refused_at_the_call_once_the_model_is_known(engine, tokens, changes, params, text):
    engine.load_sampler("checked", None).result(120)
    with pytest.raises(BadRequestError, match=text):
        engine.sample(
            "checked",
            SampleRequest(
                prompt=ModelInput.from_ints(tokens), sampling_params=SamplingParams(max_tokens=2, **params), **changes
            ),
        )


def test_a_hyperparameter_beyond_float32_is_refused_at_the_call(engine, model_id):
    with pytest.raises(BadRequestError, match=r"AdamParams.learning_rate must be a finite float32 number, got 1e\+300"):
        engine.optim_step(model_id, AdamParams(learning_rate=1e300))


def test_a_checkpoint_of_another_base_model_names_both(engine, model_id, checkpoint):
    path = engine.save_state(model_id, model_id, "mine").result(120)
    other = Engine(str(checkpoint("llama")), engine.config)
    text = f"{path} was trained on '{engine.base_model}' and does not fit '{other.base_model}': adapter tensor 'layers"
    for load in (
        lambda: other.load_adapter("other", path, with_optimizer=False, create=True),
        lambda: other.load_sampler("other", path),
    ):
        with pytest.raises(UnprocessableEntityError, match=re.escape(text)):
            load().result(120)
    other.close()


def test_a_damaged_or_diverged_checkpoint_is_refused_and_changes_nothing(engine, model_id):
    train(engine, model_id, 1)
    path = engine.save_state(model_id, model_id, "good").result(120)
    store = Store(engine.config.home)
    meta = store.get(path).directory / "meta.json"
    diverged = jax.tree.map(lambda x: x * np.nan, engine._adapters[model_id].stored()[0])
    bad = store.write(model_id, "weights", "bad", lambda d: save_adapter(d, diverged, None, {}), has_optimizer=False).path
    meta.write_text(meta.read_text().replace("32.0", "36.0"))
    before = score(engine, model_id)
    for name, create in ((model_id, False), ("another", True)):
        with pytest.raises(StorageError, match=r"^\S*meta\.json is damaged: its SHA-256 is not the one in SHA256SUMS"):
            engine.load_adapter(name, path, with_optimizer=True, create=create).result(120)
        with pytest.raises(UnprocessableEntityError, match=r"^adapter tensor .* holds \d+ values that are NaN or infinite"):
            engine.load_adapter(name, bad, with_optimizer=False, create=create).result(120)
    with pytest.raises(StorageError, match=r"meta\.json is damaged"):
        engine.load_sampler("damaged", path).result(120)
    np.testing.assert_array_equal(score(engine, model_id), before)


def test_a_failed_request_leaves_the_client_usable(engine, model_id):
    with pytest.raises(BadRequestError, match="optim_step without gradients"):
        engine.optim_step(model_id, STEP).result(120)
    with pytest.raises(NotFoundError):
        engine.load_adapter(model_id, "tinker://nobody/weights/x", with_optimizer=True, create=False).result(120)
    with pytest.raises(NotFoundError, match="no training client 'ghost'"):
        engine.optim_step("ghost", STEP).result(120)
    with pytest.raises(NotFoundError, match="no sampling client 'ghost'"):
        request = SampleRequest(prompt=ModelInput.from_ints([1]), sampling_params=SamplingParams(max_tokens=1))
        engine.sample("ghost", request).result(120)
    train(engine, model_id, 1)
    assert np.isfinite(score(engine, model_id)).all()


def test_a_program_that_fails_keeps_gradients_and_weights(engine, model_id, monkeypatch):
    engine.forward_backward(model_id, data(), "cross_entropy", None, backward=True).result(120)
    with monkeypatch.context() as patch:
        patch.setattr(engine._trainer._model, "run", lambda *_: 1 / 0)
        with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
            engine.forward_backward(model_id, data(), "cross_entropy", None, backward=True).result(120)
    norm = engine.optim_step(model_id, STEP).result(120).metrics["grad_norm:mean"]
    engine.create_adapter("clean", LORA)
    engine.forward_backward("clean", data(), "cross_entropy", None, backward=True)
    assert engine.optim_step("clean", STEP).result(120).metrics["grad_norm:mean"] == norm


def test_a_custom_loss_gives_the_gradients_of_the_built_in_one(engine, model_id):
    batch = data()

    def gradient(logprobs):
        assert threading.current_thread().name == "tinker_jax-custom-loss"
        return float(-sum(lp.sum() for lp in logprobs)), {"mine": 1.0}, [-np.ones_like(lp) for lp in logprobs]

    custom = engine.forward_backward_custom(model_id, batch, gradient)
    custom_step = engine.optim_step(model_id, STEP)
    output, loss, metrics = custom.result(120)
    engine.create_adapter("built-in", LORA)
    plain = engine.forward_backward("built-in", batch, "cross_entropy", None, backward=True)
    plain_step = engine.optim_step("built-in", STEP)
    assert loss == pytest.approx(plain.result(120).metrics["loss:sum"], rel=1e-5) and metrics == {"mine": 1.0}
    assert output.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert custom_step.result(120).metrics["grad_norm:mean"] == plain_step.result(120).metrics["grad_norm:mean"]


def test_a_bfloat16_engine_trains_in_float32_and_reports_float32_logprobs(checkpoint, tmp_path):
    engine = Engine(str(checkpoint("qwen3")), EngineConfig(home=tmp_path, dtype="bfloat16"))
    engine.create_adapter("low", LORA)
    batch, losses = data(1), []
    for _ in range(12):
        out = engine.forward_backward("low", batch, "cross_entropy", None, backward=True)
        engine.optim_step("low", STEP)
        losses.append(out.result(120).metrics["loss:sum"])
    assert losses[-1] < 0.7 * losses[0]
    state = engine._adapters["low"]
    assert {x.dtype.name for x in engine._params.values()} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves((state.params, state.opt["mu"], state.opt["nu"]))} == {"float32"}

    tokens = data(5, (200,))[0].model_input.to_ints()
    engine.snapshot("low", "low-sampler")

    def trainer(tokens):
        datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
        out = engine.forward_backward("low", [datum], "cross_entropy", None, backward=False).result(120)
        return out.loss_fn_outputs[0]["logprobs"].to_numpy()

    scores = trainer(tokens)
    assert len(set(scores.tolist())) > 0.9 * len(scores)  # bfloat16 would leave a few dozen values
    # Two programs may round a bfloat16 differently, which later tokens see.
    gap = prompt_logprobs(engine, "low-sampler", tokens) - scores
    assert np.sqrt(np.mean(gap**2)) < 0.03
    request = SampleRequest(
        prompt=ModelInput.from_ints(tokens[:30]), sampling_params=SamplingParams(max_tokens=40, stop=[], seed=1)
    )
    (drawn,) = engine.sample("low-sampler", request).result(120).sequences
    gap = np.asarray(drawn.logprobs) - trainer(tokens[:30] + drawn.tokens)[29:]
    assert np.sqrt(np.mean(gap**2)) < 0.05
    engine.close()


def test_many_threads_train_and_sample_at_once(engine):
    def client(i, out):
        name = f"thread-{i}:train:0"
        engine.create_adapter(name, LORA)
        train(engine, name, 3)
        engine.snapshot(name, name).result(120)  # the sampling client exists from here on
        request = SampleRequest(
            prompt=ModelInput.from_ints([9, 8, 7]), sampling_params=SamplingParams(max_tokens=8, seed=3, stop=[])
        )
        futures = [engine.sample(name, request) for _ in range(3)]
        out[i] = ([f.result(120).sequences[0].tokens for f in futures], score(engine, name))

    out = {}
    threads = [threading.Thread(target=client, args=(i, out)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    tokens, scores = zip(*out.values(), strict=True)
    assert len(tokens) == 4 and all(t == tokens[0][0] for client in tokens for t in client)
    for s in scores[1:]:
        np.testing.assert_array_equal(s, scores[0])


def test_a_mesh_trains_samples_and_resumes_like_one_device(engine, checkpoint, tmp_path):
    meshed = Engine(
        str(checkpoint("qwen3")),
        EngineConfig(mesh={"data": 2, "fsdp": 2, "tensor": 2}, home=engine.config.home, memory=1 << 30),
    )
    runs = []
    for runner, name in ((engine, "single:train:0"), (meshed, "meshed:train:0")):
        make_run(runner, name)
        runner.create_adapter(name, LORA)
        train(runner, name, 2)
        runner.snapshot(name, name).result(120)
        request = SampleRequest(
            prompt=ModelInput.from_ints([9, 8, 7, 6]),
            sampling_params=SamplingParams(max_tokens=12, seed=5, stop=[]),
            num_samples=3,
            prompt_logprobs=True,
        )
        drawn = runner.sample(name, request).result(120)
        runs.append((score(runner, name), drawn))
    (single_score, single), (meshed_score, meshed_drawn) = runs
    np.testing.assert_allclose(meshed_score, single_score, atol=1e-4)
    np.testing.assert_allclose(meshed_drawn.prompt_logprobs[1:], single.prompt_logprobs[1:], atol=1e-4)
    for a, b in zip(single.sequences, meshed_drawn.sequences, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    path = engine.save_state("single:train:0", "single:train:0", "moves").result(120)
    meshed.load_adapter("moved", path, with_optimizer=True, create=True)
    np.testing.assert_allclose(score(meshed, "moved"), single_score, atol=1e-4)
    meshed.close()


def test_a_defect_of_the_sampler_reaches_everyone_who_waits_and_the_engine_goes_on(engine, model_id, monkeypatch):
    engine.snapshot(model_id, "fragile").result(120)
    request = SampleRequest(prompt=ModelInput.from_ints([5, 6]), sampling_params=SamplingParams(max_tokens=4, stop=[]))
    with monkeypatch.context() as patch:
        patch.setattr(engine._sampler, "_admit", lambda: 1 / 0)
        waiting = [engine.sample("fragile", request) for _ in range(2)]
        for future in waiting:
            with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
                future.result(120)
    assert len(engine.sample("fragile", request).result(120).sequences[0].tokens) == 4


def test_release_forgets_an_adapter_after_what_is_queued(engine):
    engine.create_adapter("gone", LORA)
    queued = engine.forward_backward("gone", data(), "cross_entropy", None, backward=False)
    engine.release("gone")
    queued.result(120)
    with pytest.raises(NotFoundError):
        engine.optim_step("gone", STEP).result(120)


def test_engines_are_shared_by_configuration_and_retried_after_a_failed_load(checkpoint, tmp_path):
    missing = get_engine(str(tmp_path / "nothing"), EngineConfig(), "test", "client")
    with pytest.raises(NotFoundError):
        missing.info().result(120)
    assert get_engine(str(tmp_path / "nothing"), EngineConfig(), "test", "client") is not missing
    config = EngineConfig(home=tmp_path)
    engine = get_engine(str(checkpoint("llama")), config, "test", "client")
    assert get_engine(str(checkpoint("llama")), EngineConfig(home=str(tmp_path)), "test", "client") is engine
    assert engine.info().result(120).model_type == "llama"


def test_loading_compiling_and_saving_log_one_line_each(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="tinker_jax"):
        engine = Engine(str(checkpoint("qwen2")), EngineConfig(home=tmp_path))
        make_run(engine, "log:train:0")
        engine.create_adapter("log:train:0", LORA)
        for _ in range(2):
            engine.forward_backward("log:train:0", data(), "cross_entropy", None, backward=True).result(120)
        engine.save_state("log:train:0", "log:train:0", "a").result(120)
        engine.close()
    messages = [r.getMessage() for r in caplog.records if r.name == "tinker_jax"]
    assert sum(m.startswith("loaded ") for m in messages) == 1
    for what in (
        "embedding rows=1 length=128",
        "layer forward rows=1 length=128 rank=8 attn+mlp+unembed",
        "loss rows=1 length=128 rank=8 target_tokens cross_entropy backward",
        "layer backward rows=1 length=128 rank=8 attn+mlp+unembed",
    ):
        assert sum(m.startswith(f"compiled {what} in ") for m in messages) == 1
    assert sum(m.startswith("wrote tinker://log:train:0/weights/a") for m in messages) == 1


def test_closing_ends_what_is_under_way_and_frees_the_weights(checkpoint, tmp_path):
    engine = Engine(str(checkpoint("llama")), EngineConfig(home=tmp_path))
    engine.create_adapter("a", LORA)
    engine.snapshot("a", "s").result(120)
    request = SampleRequest(prompt=ModelInput.from_ints([5, 6]), sampling_params=SamplingParams(stop=[]), num_samples=4)
    sampling = [engine.sample("s", request) for _ in range(3)]
    while not engine._sampler.running:
        time.sleep(0.01)
    weights = [*engine._params.values(), *engine._adapters["a"].params["lm_head"].values()]
    alive = [weakref.ref(x) for x in weights]
    del weights
    engine.close()
    assert all(future.cancelled() or future.result(0) for future in sampling)
    end = time.monotonic() + 10
    while any(ref() is not None for ref in alive) and time.monotonic() < end:
        jax.device_put(np.int32(0))  # JAX lets go of memory that it borrowed from NumPy at its next call
        time.sleep(0.01)
    assert not [ref for ref in alive if ref() is not None]


def test_a_closed_engine_refuses_every_call_with_an_error_of_the_api(checkpoint, tmp_path):
    engine = Engine(str(checkpoint("llama")), EngineConfig(home=tmp_path))
    engine.info().result(120)
    engine.close()
    request = SampleRequest(prompt=ModelInput.from_ints([5, 6]), sampling_params=SamplingParams(max_tokens=1))
    for call in (
        engine.info,
        lambda: engine.create_adapter("a", LORA),
        lambda: engine.forward_backward("a", data(), "cross_entropy", None, backward=True),
        lambda: engine.optim_step("a", AdamParams()),
        lambda: engine.save_state("a", "run", "name"),
        lambda: engine.snapshot("a", "s"),
        lambda: engine.sample("s", request),
    ):
        with pytest.raises(StateError, match="the engine is closed"):
            call()
    engine.release("a")


def test_a_tokenizer_that_loads_slowly_holds_up_its_own_sampler_alone(engine, monkeypatch):
    """The first request with a stop string imports transformers; the engine goes on meanwhile."""
    loading, gate = threading.Event(), threading.Event()

    def load(_):
        loading.set()
        assert gate.wait(60)
        return Words()

    class Words:
        def decode(self, tokens, **options):
            return " ".join(map(str, tokens))

    monkeypatch.setattr("tinker_jax.engine.model_files.load_tokenizer", load)
    monkeypatch.setattr(engine, "_text", type(engine._text)(engine._text._directory))
    monkeypatch.setattr(engine._sampler, "_decode_text", engine._text)
    for name in ("slow", "other"):
        engine.load_sampler(name, None).result(120)
    prompt, params = ModelInput.from_ints([5, 6]), {"max_tokens": 3, "seed": 0}
    waiting = engine.sample("slow", SampleRequest(prompt=prompt, sampling_params=SamplingParams(stop="no such text", **params)))
    assert loading.wait(60)
    other = engine.sample("other", SampleRequest(prompt=prompt, sampling_params=SamplingParams(stop=[], **params))).result(120)
    assert not waiting.done()
    gate.set()
    assert waiting.result(120).sequences[0].tokens == other.sequences[0].tokens
    again = engine.sample("slow", SampleRequest(prompt=prompt, sampling_params=SamplingParams(stop="no such text", **params)))
    assert len(again.result(120).sequences[0].tokens) == 3
    for name in ("slow", "other"):
        engine.release(name)
