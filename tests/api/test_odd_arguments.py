"""Every argument of every client takes every odd value, or refuses it with a `TinkerError`, and the client stays usable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import pytest
from fake_engine import FakeEngine
from odd_values import ODD, Odd, Rule, either, named, none, nothing, outcome, string, text, truth, whole

import tinker_jax
from tinker_jax import AdamParams, APIFuture, Datum, LoraConfig, ModelInput, SamplingParams
from tinker_jax.training.validate import check_data

DATA = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]
PROMPT = ModelInput.from_ints([1, 2])
SEED = either(none, whole(-(2**63), 2**64 - 1))
METADATA = either(none, named("{}", "{'a': 'b'}"))
NAME = named("'a'", "'1'", "'0.5'", "'float32'", "'sample'", "np.str_('a')")
TTL = none  # no odd value lies between an hour and ten years


def model(odd: Odd) -> bool:
    """What may name a directory."""
    return text(odd) and odd.name not in ("'x' * 20_000", "'~\\0'", "'\\ud800'")


#: By client and method: arguments that are right, and for the others the rule of what is right.
SERVICE: dict[str, tuple[Mapping[str, Any], Mapping[str, Rule]]] = {
    "create_lora_training_client": (
        {"base_model": "base"},
        {
            "base_model": model,
            "rank": whole(1),
            "seed": SEED,
            "train_mlp": truth,
            "train_attn": truth,
            "train_unembed": truth,
            "user_metadata": METADATA,
            "optimizer": none,
        },
    ),
    "create_training_client_from_state": ({}, {"path": nothing}),
    "create_training_client_from_state_with_optimizer": ({}, {"path": nothing}),
    "create_sampling_client": ({"base_model": "base"}, {"base_model": model, "model_path": none}),
}
TRAINING: dict[str, tuple[Mapping[str, Any], Mapping[str, Rule]]] = {
    "forward": ({"data": DATA, "loss_fn": "cross_entropy"}, {"data": nothing, "loss_fn": nothing}),
    "forward_backward": (
        {"data": DATA, "loss_fn": "cross_entropy"},
        {"data": nothing, "loss_fn": nothing, "loss_fn_config": either(none, named("{}"))},
    ),
    "forward_backward_custom": (
        {"data": DATA, "loss_fn": lambda data, logprobs: (logprobs[0].sum(), {})},
        {"data": nothing, "loss_fn": nothing, "backend": nothing, "loss_type_input": none},
    ),
    "optim_step": ({}, {"optim_params": nothing, "adam_params": nothing}),
    "save_state": (
        {"name": "a"},
        {"name": NAME, "ttl_seconds": TTL, "overwrite": truth, "user_metadata": METADATA},
    ),
    "save_weights_for_sampler": ({"name": "a"}, {"name": NAME, "ttl_seconds": TTL, "user_metadata": METADATA}),
    "save_weights_and_get_sampling_client": ({}, {"kind": nothing}),
    "create_sampling_client": ({}, {"model_path": nothing}),
    "load_state": ({}, {"path": nothing}),
    "load_state_with_optimizer": ({}, {"path": nothing}),
}
SAMPLING: dict[str, tuple[Mapping[str, Any], Mapping[str, Rule]]] = {
    "sample": (
        {"prompt": PROMPT, "num_samples": 1, "sampling_params": SamplingParams()},
        {
            "prompt": nothing,
            "num_samples": whole(1),
            "sampling_params": nothing,
            "include_prompt_logprobs": truth,
            "topk_prompt_logprobs": whole(0),
            "topk_sample_logprobs": whole(0),
            "target_prompt_logprobs": none,
            "prompt_alt_tokens_k": whole(0),
        },
    ),
    "compute_logprobs": ({"prompt": PROMPT}, {"prompt": nothing, "prompt_logprobs_last_n": either(none, whole(1, 1))}),
}
REST: dict[str, tuple[Mapping[str, Any], Mapping[str, Rule]]] = {
    "get_training_run": ({}, {"training_run_id": nothing}),
    "get_training_run_by_tinker_path": ({}, {"tinker_path": nothing}),
    "get_weights_info_by_tinker_path": ({}, {"tinker_path": nothing}),
    "list_training_runs": ({}, {"limit": whole(1), "offset": whole(0)}),
    "list_checkpoints": ({}, {"training_run_id": nothing}),
    "list_user_checkpoints": ({}, {"limit": whole(1), "offset": whole(0)}),
    "delete_checkpoint": (
        {"training_run_id": "a", "checkpoint_id": "weights/b"},
        {"training_run_id": nothing, "checkpoint_id": nothing},
    ),
    "delete_checkpoint_from_tinker_path": ({}, {"tinker_path": nothing}),
    "set_checkpoint_ttl_from_tinker_path": (
        {"tinker_path": "tinker://a/weights/b", "ttl_seconds": None},
        {"tinker_path": nothing, "ttl_seconds": nothing},
    ),
    "get_session": ({}, {"session_id": nothing}),
    "list_sessions": ({}, {"limit": whole(1), "offset": whole(0)}),
    "get_sampler": ({}, {"sampler_id": nothing}),
}


@pytest.fixture
def checking(monkeypatch):
    """The fake engine checks data at the call, as the real one does."""
    plain = FakeEngine.forward_backward

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config, *, backward):
        check_data(data, loss_fn, loss_fn_config, vocab_size=100, context_length=64)
        return plain(self, model_id, data, loss_fn, loss_fn_config, backward=backward)

    monkeypatch.setattr(FakeEngine, "forward_backward", forward_backward)


def cases(table) -> list[tuple[str, str]]:
    return [(method, argument) for method, (_, rules) in table.items() for argument in rules]


def try_all(client: Any, table: Mapping, method: str, argument: str) -> None:
    right, rules = table[method]
    for odd in ODD:
        value = odd.value
        if callable(value) or (argument == "num_samples" and odd.finite and odd.number > 100):
            continue  # a loss of the caller's own; more samples than the fake engine has memory for

        def call(value: Any = value) -> None:
            made = getattr(client, method)(**{**right, argument: value})
            if isinstance(made, APIFuture):
                made.result(10)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = outcome(call)
        wanted = rules[argument](odd)
        assert (error is None) == wanted, f"{method}({argument}={odd.name}): {'right' if wanted else 'wrong'}, but {error!r}"


@pytest.mark.parametrize(("method", "argument"), cases(SERVICE))
def test_a_service_client_takes_every_odd_argument_or_refuses_it(service, method, argument):
    try_all(service, SERVICE, method, argument)
    service.create_lora_training_client("base").result()


@pytest.mark.parametrize(("method", "argument"), cases(TRAINING))
def test_a_training_client_takes_every_odd_argument_or_refuses_it(checking, training, method, argument):
    try_all(training, TRAINING, method, argument)
    training.forward_backward(DATA, "cross_entropy").result()
    training.optim_step(AdamParams()).result()


@pytest.mark.parametrize(("method", "argument"), cases(SAMPLING))
def test_a_sampling_client_takes_every_odd_argument_or_refuses_it(sampling, method, argument):
    try_all(sampling, SAMPLING, method, argument)
    sampling.sample(PROMPT, 1, SamplingParams()).result()


@pytest.mark.parametrize(("method", "argument"), cases(REST))
def test_a_rest_client_takes_every_odd_argument_or_refuses_it(tmp_path, method, argument):
    client = tinker_jax.RestClient(engine=tinker_jax.EngineConfig(home=tmp_path))
    try_all(client, REST, method, argument)
    client.list_training_runs().result()


CONSTRUCTORS: list[tuple[Callable[..., Any], str, Rule]] = [
    (tinker_jax.ServiceClient, "user_metadata", METADATA),
    (tinker_jax.ServiceClient, "display_name", either(none, string)),
    (tinker_jax.ServiceClient, "engine", none),
    (tinker_jax.RestClient, "engine", none),
    (LoraConfig, "rank", whole(1)),
    (tinker_jax.warm_up, "client", nothing),
]


@pytest.mark.parametrize(("make", "argument", "rule"), CONSTRUCTORS, ids=lambda x: getattr(x, "__name__", x))
def test_what_needs_no_client_takes_every_odd_argument_or_refuses_it(engines, make, argument, rule):
    for odd in ODD:
        error = outcome(lambda value=odd.value: make(**{argument: value}))
        assert (error is None) == rule(odd), f"{make.__name__}({argument}={odd.name}): {error!r}"


def test_a_timeout_is_a_number_or_none(training, engine):
    engine.hold()
    waiting = training.forward_backward(DATA, "cross_entropy")
    for odd in ODD:
        if none(odd) or (odd.finite and odd.number > 0.1):
            continue
        error = outcome(lambda value=odd.value: waiting.result(value))
        assert isinstance(error, tinker_jax.APITimeoutError if odd.finite else tinker_jax.BadRequestError), odd.name
    engine.go()
    assert waiting.result(10**300).metrics == {"loss:sum": 1.5}
    assert not isinstance(waiting.future().exception(), CancelledError)
