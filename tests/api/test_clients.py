"""Clients over a fake engine: what reaches the engine, in what order, and what comes back."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import warnings
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
import tinker
import torch

import tinker_jax
from tinker_jax import AdamParams, APIFuture, Datum, EngineConfig, ModelInput, SamplingParams, ServiceClient
from tinker_jax.api import futures
from tinker_jax.checkpoints.store import Store
from tinker_jax.types.errors import StorageError


def datum(n: int = 3, **inputs) -> Datum:
    return Datum(ModelInput.from_ints(list(range(n))), inputs or {"target_tokens": list(range(1, n + 1))})


def calls(engine, *names):
    return [entry for entry in engine.log if not names or entry[0] in names]


# Creation


def test_making_a_service_client_loads_nothing(engines):
    ServiceClient(base_url="http://x", api_key="k", project_id="p", default_headers_overrides={}, display_name="d")
    assert engines == {}


def test_unknown_arguments_are_ignored_with_a_warning(engines):
    with pytest.warns(FutureWarning, match="ServiceClient ignores unknown arguments: timeout"):
        ServiceClient(timeout=3)


def test_a_factory_returns_a_future_that_is_the_client(service):
    future = service.create_lora_training_client("base", 4)
    assert isinstance(future, APIFuture) and isinstance(future, tinker_jax.TrainingClient)
    client = future.result()
    assert type(client) is tinker_jax.TrainingClient
    assert asyncio.run(future.result_async()) is client
    with pytest.warns(FutureWarning, match="reading .model_id from a client's future"):
        assert future.model_id == client.model_id
    with pytest.warns(FutureWarning, match=r"calling get_info\(\) on a client's future"):
        assert future.get_info().lora_rank == 4
    with pytest.raises(AttributeError):
        _ = future._session
    assert repr(future).startswith("<BackcompatTrainingClientFuture: <tinker_jax")


def test_every_public_method_of_a_client_is_forwarded_by_its_future():
    for future, client in [
        (tinker_jax.BackcompatTrainingClientFuture, tinker_jax.TrainingClient),
        (tinker_jax.BackcompatSamplingClientFuture, tinker_jax.SamplingClient),
    ]:
        for name, method in inspect.getmembers(client, inspect.isfunction):
            if name.startswith("_") or isinstance(inspect.getattr_static(client, name), staticmethod):
                continue
            assert name in vars(future), name
            assert inspect.iscoroutinefunction(getattr(future, name)) == inspect.iscoroutinefunction(method)
            assert inspect.signature(getattr(future, name)) == inspect.signature(method)


def test_the_forwarded_coroutines_await_as_the_clients_do(service):
    async def main():
        future = service.create_lora_training_client("base")
        output = await future.forward_backward_async([datum()], "cross_entropy")
        return await output

    assert asyncio.run(main()).metrics == {"loss:sum": 1.5}


def test_clients_of_one_service_have_names_of_their_own(service, engines):
    clients = [service.create_lora_training_client("base").result() for _ in range(2)]
    samplers = [service.create_sampling_client(base_model="base").result() for _ in range(2)]
    names = [client.model_id for client in clients] + [sampler._sampler_id for sampler in samplers]
    session_id = names[0].partition(":")[0]
    assert names == [f"{session_id}:train:0", f"{session_id}:train:1", f"{session_id}:sample:0", f"{session_id}:sample:1"]
    assert list(engines) == ["base"]


def test_lora_arguments_reach_the_engine_and_the_run_is_recorded(service, engines, tmp_path):
    client = service.create_lora_training_client(
        "base", 8, 3, train_mlp=False, train_unembed=False, user_metadata={"renderer_name": "qwen3"}
    ).result()
    lora = engines["base"].log[0][2]
    assert lora == tinker_jax.LoraConfig(rank=8, seed=3, train_mlp=False, train_attn=True, train_unembed=False)
    run = Store(tmp_path).get_run(client.model_id)
    assert (run.base_model, run.lora_rank, run.seed, run.train_mlp) == ("base", 8, 3, False)
    assert run.user_metadata == {"renderer_name": "qwen3"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, tinker_jax.BadRequestError, "LoraConfig.rank"),
        ({"train_mlp": False, "train_attn": False, "train_unembed": False}, tinker_jax.BadRequestError, "at least one"),
        ({"base_model": ""}, tinker_jax.BadRequestError, "base_model: expected a hub id"),
        ({"user_metadata": {"a": 1}}, tinker_jax.BadRequestError, r"user_metadata\['a'\]"),
        ({"user_metadata": "a"}, tinker_jax.BadRequestError, "user_metadata: expected a dict"),
        ({"optimizer": tinker_jax.DimuonOptimizerConfig()}, tinker_jax.UnsupportedError, "optimizer 'dimuon'"),
        ({"optimizer": tinker.DimuonOptimizerConfig()}, tinker_jax.UnsupportedError, "optimizer 'dimuon'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_queued(service, engines, arguments, error, message):
    with pytest.raises(error, match=message):
        service.create_lora_training_client(**{"base_model": "base", **arguments})
    assert engines == {}
    service.create_lora_training_client("base", optimizer=tinker.AdamOptimizerConfig()).result()


def test_an_engine_that_cannot_load_fails_the_future_not_the_call(service, engines, monkeypatch):
    service.create_lora_training_client("base").result()
    failed = engines["base"]._pool.submit(lambda: (_ for _ in ()).throw(tinker_jax.NotFoundError("no model 'base'")))
    monkeypatch.setattr(engines["base"], "create_adapter", lambda *args: failed)
    future = service.create_lora_training_client("base")
    with pytest.raises(tinker_jax.NotFoundError, match="no model 'base'"):
        future.result()
    with pytest.raises(tinker_jax.NotFoundError), pytest.warns(FutureWarning):
        future.forward([datum()], "cross_entropy")


# Training


def test_calls_reach_the_engine_in_order(training, engine):
    step = training.forward_backward([datum()], "cross_entropy")
    update = training.optim_step(AdamParams(learning_rate=0.1))
    saved = training.save_state("a", overwrite=True, user_metadata={"k": "v"})
    sampler = training.save_weights_for_sampler("a", ttl_seconds=3600)
    client = training.save_weights_and_get_sampling_client().result()
    assert step.result().metrics == {"loss:sum": 1.5}
    assert update.result().metrics == {"grad_norm:mean": 1.0}
    assert saved.result().path == f"tinker://{training.model_id}/weights/a"
    assert sampler.result().path == f"tinker://{training.model_id}/sampler_weights/a"
    assert [entry[0] for entry in engine.log] == [
        "create_adapter", "forward_backward", "optim_step", "save_state", "save_sampler", "snapshot",
    ]  # fmt: skip
    assert engine.log[3][2:] == ("a", None, True, {"k": "v"})
    assert engine.log[5] == ("snapshot", training.model_id, client._sampler_id)


def test_a_failed_call_does_not_hold_up_the_next(training):
    failing = training.forward_backward([datum()], "dro")
    following = training.forward_backward([datum()], "cross_entropy")
    with pytest.raises(RuntimeError, match="on fire"):
        failing.result()
    assert following.result().metrics["loss:sum"] == 1.5


def test_forward_and_forward_backward_differ_in_the_backward_pass_alone(training, engine):
    training.forward([datum()], "ppo", {"clip_low_threshold": 0.8}).result()
    training.forward_backward([datum()], "ppo", loss_fn_config={"clip_low_threshold": 0.8}).result()
    forward, backward = calls(engine, "forward_backward")
    assert forward[3:] == ("ppo", {"clip_low_threshold": 0.8}, False)
    assert backward[3:] == ("ppo", {"clip_low_threshold": 0.8}, True)


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], "cross_entropy", "No data provided"),
        (datum(), "cross_entropy", "data: expected a list of Datum, got Datum"),
        ([datum(), 5], "cross_entropy", r"^data\[1\]: expected Datum, got int$"),
        ([datum()], "nonsense", "unknown loss 'nonsense'"),
    ],
)
def test_bad_data_is_refused_at_the_call(training, engine, data, loss, message):
    with pytest.raises(ValueError, match=message):
        training.forward_backward(data, loss)
    assert calls(engine, "forward_backward") == []


def test_what_happens_to_the_data_after_the_call_changes_nothing(training, engine):
    weights = np.ones(3, np.float32)
    example = datum(weights=weights)
    engine.hold()
    future = training.forward_backward([example], "cross_entropy")
    weights[:] = 9
    del example.loss_fn_inputs["weights"]
    engine.go()
    future.result()
    assert calls(engine, "forward_backward")[0][2][0].loss_fn_inputs["weights"].data == [1, 1, 1]


def test_a_value_put_into_a_datums_dict_later_is_converted_and_a_bad_one_named(training):
    example = datum()
    example.loss_fn_inputs["weights"] = [1.0, 1.0, 1.0]
    training.forward_backward([example], "cross_entropy").result()
    example.loss_fn_inputs["weights"] = 3
    with pytest.raises(tinker_jax.BadRequestError, match=r"data\[0\]: loss_fn_inputs\['weights'\].*got int"):
        training.forward_backward([example], "cross_entropy")


def test_objects_of_the_sdk_are_accepted_wherever_ours_are(training, sampling, engine):
    example = tinker.Datum(tinker.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    training.forward_backward([example], "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=0.5)).result()
    sampling.sample(tinker.ModelInput.from_ints([1]), 2, tinker.SamplingParams(max_tokens=2, stop=[1])).result()
    sampling.compute_logprobs(tinker.ModelInput.from_ints([1, 2])).result()
    assert type(calls(engine, "forward_backward")[0][2][0]) is Datum
    assert calls(engine, "optim_step")[0][2] == AdamParams(learning_rate=0.5)
    request = calls(engine, "sample")[0][2]
    assert type(request.prompt) is ModelInput and request.sampling_params == SamplingParams(max_tokens=2, stop=[1])


def test_optim_step_takes_one_set_of_parameters(training, engine):
    training.optim_step(adam_params=AdamParams(eps=1e-8)).result()
    assert calls(engine, "optim_step")[0][2].eps == 1e-8
    with pytest.raises(ValueError, match="not both"):
        training.optim_step(AdamParams(), adam_params=AdamParams())
    with pytest.raises(TypeError, match="optim_params is missing"):
        training.optim_step()
    with pytest.raises(TypeError, match="got dict"):
        training.optim_step({"learning_rate": 1})
    with pytest.raises(tinker_jax.UnsupportedError, match="Dimuon is not available"):
        training.optim_step(tinker.DimuonParams(learning_rate=1))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", 5])
def test_checkpoint_names_are_checked_at_the_call(training, engine, name):
    for save in (training.save_state, training.save_weights_for_sampler):
        with pytest.raises(tinker_jax.BadRequestError, match="checkpoint name"):
            save(name)
    with pytest.raises(tinker_jax.BadRequestError, match="ttl_seconds=3 is not allowed"):
        training.save_state("a", ttl_seconds=3)


def test_get_info_needs_no_request(training, engine):
    info = training.get_info()
    assert (info.model_id, info.model_name, info.lora_rank, info.is_lora) == (training.model_id, "base", 4, True)
    assert (info.model_data.arch, info.model_data.tokenizer_id) == ("qwen3", "/nowhere")
    assert asyncio.run(training.get_info_async()) == info


# Custom losses


def squared(data, logprobs):
    return sum((values**2).sum() for values in logprobs), {"custom/count:sum": len(data)}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_custom_losses_give_value_metrics_and_gradient(training, engine, backend):
    data = [datum(3), datum(2)]
    output = training.forward_backward_custom(data, squared, backend=backend).result()
    assert output.metrics == {"other:mean": 1.0, "surrogate_loss:sum": 7.0, "custom/count:sum": 2.0, "loss:sum": 20.0}
    grads = [record["logprobs"].tolist() for record in output.loss_fn_outputs]
    assert grads == [[-4.0] * 3, [-4.0] * 2]


def test_the_custom_loss_gets_the_callers_own_data(training):
    data = [tinker.Datum(tinker.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "extra": np.ones(2)})]
    seen = []

    def loss(given, logprobs):
        seen.append((given, logprobs[0].requires_grad, logprobs[0].dtype))
        return logprobs[0].sum(), {}

    training.forward_backward_custom(data, loss).result()
    assert seen[0][0][0] is data[0] and seen[0][1:] == (True, torch.float32)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda data, logprobs: 1 / 0, ZeroDivisionError, "division"),
        (lambda data, logprobs: (logprobs[0].sum(), {}), ValueError, r"data\[1\]: No gradient computed for logprob tensor"),
        (lambda data, logprobs: (3.0, {}), ValueError, "must be a torch tensor, got float"),
        (lambda data, logprobs: logprobs[0].sum(), ValueError, r"must return \(loss, metrics dict\), got Tensor"),
        (lambda data, logprobs: (sum(v.sum() for v in logprobs) * torch.tensor(float("nan")), {}), ValueError, "not finite"),
        (lambda data, logprobs: (torch.cat(logprobs), {}), ValueError, r"must be one number, got shape \[6\]; sum it"),
        (lambda data, logprobs: (torch.tensor(1.0), {}), ValueError, "does not depend on the logprobs"),
        (lambda data, logprobs: (torch.cat(logprobs).sum(), {"m": "x"}), ValueError, "metric 'm' .*expected a number, got 'x'"),
    ],
)
def test_a_failed_custom_loss_leaves_the_client_usable(training, loss, error, message):
    future = training.forward_backward_custom([datum(), datum()], loss)
    with pytest.raises(error, match=message):
        future.result()
    assert training.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"] == 1.5


def test_a_jax_loss_must_be_one_number(training):
    future = training.forward_backward_custom([datum()], lambda data, logprobs: (logprobs[0], {}), backend="jax")
    with pytest.raises(tinker_jax.BadRequestError, match=r"must be one number, got shape \[3\]; sum it"):
        future.result()


def test_custom_losses_are_checked_at_the_call(training):
    with pytest.raises(ValueError, match=r"data\[0\]: target_tokens must be provided"):
        training.forward_backward_custom([datum(weights=[1.0, 1.0, 1.0])], squared)
    with pytest.raises(ValueError, match="No data provided"):
        training.forward_backward_custom([], squared)
    with pytest.raises(ValueError, match="loss_fn: expected a callable"):
        training.forward_backward_custom([datum()], "cross_entropy")
    with pytest.raises(ValueError, match="backend: expected one of 'torch', 'jax', got str 'numpy'"):
        training.forward_backward_custom([datum()], squared, backend="numpy")
    with pytest.warns(DeprecationWarning, match="loss_type_input"):
        training.forward_backward_custom([datum()], squared, loss_type_input="logprobs").result()
    with pytest.raises(ValueError, match="loss_type_input: expected 'logprobs'"):
        training.forward_backward_custom([datum()], squared, loss_type_input="logits")
    with pytest.raises(tinker_jax.UnsupportedError, match="LossHandle"):
        training.forward_backward_custom([datum()], tinker_jax.LossHandle("x", (), "s", None))


# Sampling


def test_sample_passes_everything_on(sampling, engines):
    prompt, params = ModelInput.from_ints([1, 2, 3]), SamplingParams(max_tokens=2)
    targets = tinker_jax.TensorData([[1], [2]], "int64", [2, 1])
    response = sampling.sample(prompt, 2, params, True, 3, 4, targets, 5, 1).result()
    assert [sequence.tokens for sequence in response.sequences] == [[1, 2], [1, 2]]
    assert response.prompt_logprobs == [None, -1.0, -1.0]
    request = calls(engines["base"], "sample")[0][2]
    assert (request.num_samples, request.prompt_logprobs, request.topk_prompt_logprobs) == (2, True, 3)
    assert (request.topk_sample_logprobs, request.prompt_alt_tokens_k, request.prompt_logprobs_last_n) == (4, 5, 1)
    assert request.target_prompt_logprobs is targets and request.sampling_session_id == sampling._sampler_id
    assert sampling.compute_logprobs(prompt).result() == [None, -1.0, -1.0]
    assert calls(engines["base"], "sample")[1][2].seq_id == 1


def test_bad_sampling_arguments_are_refused_at_the_call(sampling, engines):
    prompt, params = ModelInput.from_ints([1, 2]), SamplingParams()
    with pytest.raises(ValueError, match="num_samples: expected an integer >= 1"):
        sampling.sample(prompt, 0, params)
    with pytest.raises(ValueError, match="prompt: expected ModelInput, got list"):
        sampling.sample([1], 1, params)
    with pytest.raises(ValueError, match=r"target_prompt_logprobs.dtype"):
        sampling.sample(prompt, 1, params, target_prompt_logprobs=tinker_jax.TensorData([[1.0]], "float32"))
    assert calls(engines["base"], "sample") == []


def test_hundreds_of_samples_can_be_awaited_on_one_loop(sampling):
    async def main():
        prompt = ModelInput.from_ints([1])
        return await asyncio.gather(*(sampling.sample(prompt, 1, SamplingParams(max_tokens=1)) for _ in range(300)))

    assert len(asyncio.run(main())) == 300


def test_sampling_clients_do_not_leave_the_process(sampling, service):
    for refuse in (
        lambda: pickle.dumps(sampling),
        lambda: pickle.dumps(service.create_sampling_client(base_model="base")),
        sampling.get_sampler_handle,
        lambda: tinker_jax.SamplingClient.from_sampler_handle("x"),
    ):
        with pytest.raises(tinker_jax.UnsupportedError, match="weights live in this process"):
            refuse()


def test_create_sampling_client_needs_a_model(service):
    with pytest.raises(ValueError, match="needs model_path, base_model or both"):
        service.create_sampling_client()
    with pytest.raises(ValueError, match="tinker://"):
        service.create_sampling_client("/some/where")
    with pytest.raises(tinker_jax.NotFoundError):
        service.create_sampling_client("tinker://run/sampler_weights/x")


def test_snapshot_options(training):
    with pytest.raises(ValueError, match="kind: expected one of 'snapshot', 'inflight', got str 'other'"):
        training.save_weights_and_get_sampling_client(kind="other")
    with pytest.warns(DeprecationWarning, match="name"):
        training.save_weights_and_get_sampling_client("x", record_stability_info=True).result()


def test_warm_up_counts_programs_and_checks_its_argument(training, engines):
    client = training.save_weights_and_get_sampling_client(kind="inflight").result()
    assert tinker_jax.warm_up(client, adapters=2).result() == 7
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="adapters: expected an integer >= 1"):
            tinker_jax.warm_up(client, adapters=wrong)


# Checkpoints


def test_clients_start_from_checkpoints(service, engines, stored):
    path, sampler_path = "tinker://old:train:0/weights/a", "tinker://old:train:0/sampler_weights/a"
    plain = service.create_training_client_from_state(path, weights_access_token="t").result()
    resumed = service.create_training_client_from_state_with_optimizer(path, user_metadata={"a": "b"}).result()
    bare = service.create_training_client_from_state(sampler_path).result()
    engine = engines["base"]  # the name stored with the checkpoint
    assert engine.log == [
        ("load_adapter", plain.model_id, path, False, True),
        ("load_adapter", resumed.model_id, path, True, True),
        ("load_adapter", bare.model_id, sampler_path, False, True),
    ]
    assert stored.get_run(resumed.model_id).user_metadata == {"a": "b"}
    assert plain.get_info().lora_rank == 4
    sampler = service.create_sampling_client(sampler_path, base_model="moved").result()
    assert engines["moved"].log == [("load_sampler", sampler._sampler_id, sampler_path)]
    assert plain.create_sampling_client(path).result().get_base_model() == "base"


def test_checkpoints_that_are_missing_or_of_the_wrong_kind_are_refused_at_the_call(service, engines, stored):
    wrong = "tinker://old:train:0/sampler_weights/a"
    for create in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
        service.create_sampling_client,
    ):
        with pytest.raises(tinker_jax.NotFoundError, match="weights/b"):
            create("tinker://old:train:0/weights/b")
    with pytest.raises(tinker_jax.BadRequestError, match="weights"):
        service.create_training_client_from_state_with_optimizer(wrong)
    assert engines == {}


def test_load_state_works_and_is_deprecated(training, engine, stored):
    path = "tinker://old:train:0/weights/a"
    with pytest.warns(FutureWarning, match="create_training_client_from_state"):
        response = training.load_state(path).result()
    assert (response.path, response.model_id) == (path, training.model_id)
    with pytest.warns(FutureWarning, match="create_training_client_from_state_with_optimizer"):
        training.load_state_with_optimizer(path).result()
    assert [entry[2:] for entry in calls(engine, "load_adapter")] == [(path, False, False), (path, True, False)]
    with pytest.raises(tinker_jax.NotFoundError), pytest.warns(FutureWarning):
        training.load_state("tinker://old:train:0/weights/b")


# The awaiting rules


def test_async_twins_of_training_calls_await_to_a_future(training):
    async def main():
        twins = [
            training.forward_async([datum()], "cross_entropy"),
            training.forward_backward_async([datum()], "cross_entropy"),
            training.forward_backward_custom_async([datum()], squared),
            training.optim_step_async(AdamParams()),
            training.save_state_async("a"),
            training.save_weights_for_sampler_async("a"),
        ]
        for twin in twins:
            future = await twin
            assert isinstance(future, APIFuture)
            await future

    with pytest.warns(FutureWarning, match=r"forward_async\(\) is deprecated in the Tinker API: call forward\(\)"):
        asyncio.run(main())


def test_async_twins_of_everything_else_await_to_the_result(service, training, sampling):
    async def main():
        client = await service.create_lora_training_client_async("base")
        assert type(client) is tinker_jax.TrainingClient
        assert type(await service.create_sampling_client_async(base_model="base")) is tinker_jax.SamplingClient
        assert type(await training.save_weights_and_get_sampling_client_async()) is tinker_jax.SamplingClient
        response = await sampling.sample_async(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1))
        assert isinstance(response, tinker_jax.SampleResponse)
        assert await sampling.compute_logprobs_async(ModelInput.from_ints([1, 2])) == [None, -1.0]
        assert await sampling.get_base_model_async() == "base"
        assert (await service.get_server_capabilities_async()).supported_models

    with pytest.warns(FutureWarning, match=r"await sample\(\)"):
        asyncio.run(main())


def test_plain_calls_do_not_warn(service, training, sampling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.forward_backward([datum()], "cross_entropy").result()
        training.optim_step(AdamParams()).result()
        sampling.sample(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1)).result()
        training.save_weights_and_get_sampling_client().result()


def test_methods_patched_on_the_class_are_called_by_clients_futures_and_twins(service, training, monkeypatch):
    seen = []
    original = tinker_jax.TrainingClient.forward_backward

    def traced(self, *args, **kwargs):
        seen.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tinker_jax.TrainingClient, "forward_backward", traced)
    training.forward_backward([datum()], "cross_entropy").result()
    asyncio.run(training.forward_backward_async([datum()], "cross_entropy"))
    with pytest.warns(FutureWarning):
        service.create_lora_training_client("base").forward_backward([datum()], "cross_entropy").future().result()
    assert seen == [tinker_jax.TrainingClient] * 3


# The end


def test_dropping_a_client_frees_its_adapter_after_its_last_call(service, engines):
    client = service.create_lora_training_client("base").result()
    name, engine = client.model_id, engines["base"]
    engine.hold()
    future = client.forward_backward([datum()], "cross_entropy")
    del client
    gc.collect()
    assert name not in engine.released
    engine.go()
    future.result()
    engine._pool.submit(lambda: None).result()
    gc.collect()
    assert engine.released == [name]


def test_close_lets_pending_calls_finish_then_frees_everything(service, training, sampling, engine):
    engine.hold()
    future = training.forward_backward([datum()], "cross_entropy")
    closing = service.close("success")
    assert not closing.future().done() and engine.released == []
    for call in (
        lambda: training.forward([datum()], "cross_entropy"),
        lambda: training.optim_step(AdamParams()),
        lambda: training.save_state("a"),
        lambda: sampling.sample(ModelInput.from_ints([1]), 1, SamplingParams()),
        lambda: service.create_lora_training_client("base"),
        lambda: service.create_sampling_client(base_model="base"),
    ):
        with pytest.raises(RuntimeError, match="ServiceClient is closed"):
            call()
    engine.go()
    assert future.result().metrics["loss:sum"] == 1.5
    closing.result(5)
    assert sorted(engine.released) == sorted([training.model_id, sampling._sampler_id])
    assert service.close("success").result(5) is None
    with pytest.raises(ValueError, match="status: expected"):
        service.close("fine")


def test_an_error_in_the_with_block_cancels_what_has_not_begun(engines, tmp_path):
    with pytest.raises(KeyError), ServiceClient(engine=EngineConfig(home=tmp_path)) as service:
        client = service.create_lora_training_client("base").result()
        engines["base"].hold()
        future = client.forward_backward([datum()], "cross_entropy")
        raise KeyError
    assert future.future().cancelled()
    engines["base"].go()
    with ServiceClient(engine=EngineConfig(home=tmp_path)) as service:
        done = service.create_lora_training_client("base").result().forward([datum()], "cross_entropy")
    assert done.result().metrics == {"loss:sum": 1.5}


def test_a_client_that_becomes_ready_after_the_close_is_freed(service, engines):
    service.create_lora_training_client("base").result()
    engines["base"].hold()
    future = service.create_lora_training_client("base")
    closing = service.close("success")
    engines["base"].go()
    closing.result(5)
    with pytest.raises(RuntimeError, match="ServiceClient is closed"):
        future.result(5)
    assert len(set(engines["base"].released)) == 2


def test_a_client_that_cannot_be_made_leaves_no_adapter_behind(service, engines, monkeypatch):
    client = service.create_lora_training_client("base").result()
    monkeypatch.setattr("tinker_jax.checkpoints.store.Store.create_run", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    with pytest.raises(StorageError, match="full"):
        service.create_lora_training_client("base").result(5)
    created = [name for kind, name, *_ in engines["base"].log if kind == "create_adapter"]
    assert created[0] == client.model_id and set(engines["base"].released) == {created[1]}


@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_a_client_that_is_cancelled_when_its_adapter_is_there_leaves_none_behind(service, engines, training, monkeypatch, kind):
    """The moment between the end of the engine's work and that of the client's making."""
    real = futures.Derived.set_running_or_notify_cancel
    monkeypatch.setattr(
        futures.Derived, "set_running_or_notify_cancel", lambda self: (Future.cancel(self) and False) or real(self)
    )
    with pytest.raises(CancelledError):
        if kind == "training":
            service.create_lora_training_client("base").result(5)
        else:
            training.save_weights_and_get_sampling_client().result(5)
    monkeypatch.undo()
    made = [entry[1] if entry[0] == "create_adapter" else entry[2] for entry in engines["base"].log[1:]]
    assert engines["base"].released == made


def test_what_only_the_cloud_has_is_refused_with_the_way_out(service, training):
    for call, advice in [
        (lambda: training.save_weights_external("a"), "export_peft"),
        (lambda: service.create_custom_loss(squared, {}), "forward_backward_custom"),
        (lambda: service.copy_weights("tinker://a/weights/b"), "copy_weights"),
        (service.get_console_url, "list_training_runs"),
        (training.get_console_url, "get_training_run"),
        (lambda: training.forward([datum()], "custom"), "forward_backward_custom"),
    ]:
        with pytest.raises(tinker_jax.UnsupportedError, match=advice):
            call()


def test_custom_engine_types_are_refused():
    with pytest.raises(tinker_jax.BadRequestError, match="engine: expected EngineConfig, got dict"):
        ServiceClient(engine={"dtype": "float32"})


def test_a_local_model_is_remembered_by_its_absolute_path(service, engines, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {service.create_lora_training_client(name).result().get_info().model_name for name in ("model", "./model/")}
    assert names == {str(tmp_path / "model")} == set(engines)
    assert {run.base_model for run in Store(tmp_path).list_runs()} == names


def test_a_model_without_a_tokenizer_says_so(training):
    with pytest.raises(tinker_jax.NotFoundError, match="/nowhere has no tokenizer: none of"):
        training.get_tokenizer()


# Representations


def test_clients_show_their_model_and_state(service, training, sampling, stored):
    loaded = service.create_sampling_client("tinker://old:train:0/sampler_weights/a").result()
    session = training.model_id.partition(":")[0]
    assert repr(training) == f"<tinker_jax.TrainingClient of 'base', rank 4, model_id '{training.model_id}', open>"
    assert repr(sampling) == f"<tinker_jax.SamplingClient of 'base', sampler_id '{sampling._sampler_id}', open>"
    assert "of 'base', weights 'tinker://old:train:0/sampler_weights/a', sampler_id" in repr(loaded)
    assert repr(service) == f"<tinker_jax.ServiceClient, session '{session}', open>"
    service.close("success").result(5)
    assert all(repr(client).endswith(", closed>") for client in (service, training, sampling))


# Names of base models


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("org/model:peft:262144", "org/model"),
        ("org/model:variant", "org/model"),
        ("tinker-jax/tiny-qwen3:peft:64", "tinker-jax/tiny-qwen3"),
        ("org/model", "org/model"),
        ("model", "model"),
        ("gs://bucket/model", "gs://bucket/model"),
        ("org/model/variant", "org/model/variant"),
    ],
)
def test_a_base_models_name_goes_without_what_says_how_it_is_served(service, engines, name, resolved):
    client = service.create_lora_training_client(name).result()
    assert list(engines) == [resolved] and client.get_info().model_name == resolved


def test_a_directory_may_have_a_colon_in_its_name(service, engines, tmp_path, monkeypatch):
    (tmp_path / "org" / "model:peft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    service.create_sampling_client(base_model="org/model:peft").result()
    assert list(engines) == [str(tmp_path / "org" / "model:peft")]


def test_a_configuration_and_metadata_may_change_after_the_call(training, engine):
    config, metadata = {"beta": 0.1}, {"k": "v"}
    engine.hold()
    training.forward([datum()], "dro", config)
    training.save_state("a", user_metadata=metadata)
    config["beta"], metadata["k"] = 0.2, "w"
    engine.go()
    training.optim_step(AdamParams()).result()
    assert calls(engine, "forward_backward")[0][4] == {"beta": 0.1}
    assert calls(engine, "save_state")[0][5] == {"k": "v"}
