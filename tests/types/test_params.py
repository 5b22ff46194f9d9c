"""Hyperparameters, responses and errors: bad values named, defaults and fields of the SDK."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st

import tinker_jax
from tinker_jax import types
from tinker_jax.types import errors
from tinker_jax.types.coerce import coerce
from tinker_jax.types.errors import BadRequestError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "bad", "message"),
    [
        ("AdamParams", {"learning_rate": NAN}, "AdamParams.learning_rate: expected a finite number >= 0, got float nan"),
        ("AdamParams", {"learning_rate": -1e-3}, "AdamParams.learning_rate"),
        ("AdamParams", {"learning_rate": "0.1"}, "AdamParams.learning_rate: .* got str '0.1'"),
        ("AdamParams", {"learning_rate": True}, "AdamParams.learning_rate"),
        ("AdamParams", {"learning_rate": 10**400}, "AdamParams.learning_rate: expected a finite number >= 0, got int"),
        ("AdamParams", {"beta1": 1.0}, "AdamParams.beta1: expected a finite number >= 0 and < 1, got float 1.0"),
        ("AdamParams", {"beta2": -0.1}, "AdamParams.beta2"),
        ("AdamParams", {"eps": INF}, "AdamParams.eps"),
        ("AdamParams", {"eps": 0}, "AdamParams.eps: expected a finite number > 0, got int 0"),
        ("AdamParams", {"weight_decay": -1}, "AdamParams.weight_decay"),
        ("AdamParams", {"grad_clip_norm": -1}, "AdamParams.grad_clip_norm"),
        ("SamplingParams", {"temperature": -0.1}, "SamplingParams.temperature: expected a finite number >= 0"),
        ("SamplingParams", {"temperature": NAN}, "SamplingParams.temperature"),
        ("SamplingParams", {"top_p": 0}, "SamplingParams.top_p: expected a finite number > 0 and <= 1, got int 0"),
        ("SamplingParams", {"top_p": 1.1}, "SamplingParams.top_p"),
        ("SamplingParams", {"top_k": 0}, r"SamplingParams.top_k: expected -1 \(all tokens\) or an integer >= 1, got int 0"),
        ("SamplingParams", {"top_k": -2}, "SamplingParams.top_k"),
        ("SamplingParams", {"max_tokens": 0}, "SamplingParams.max_tokens: expected an integer >= 1, got int 0"),
        ("SamplingParams", {"max_tokens": 2.5}, "SamplingParams.max_tokens"),
        ("SamplingParams", {"seed": "a"}, "SamplingParams.seed"),
        ("SamplingParams", {"stop": [1, "a"]}, "SamplingParams.stop: .*not a mixture"),
        ("SamplingParams", {"stop": [1.5]}, r"SamplingParams.stop\[0\]"),
        ("SamplingParams", {"stop": [-1]}, r"SamplingParams.stop\[0\]: expected an integer >= 0"),
        ("SamplingParams", {"stop": ""}, "SamplingParams.stop: expected a non-empty string"),
        ("SamplingParams", {"stop": 5}, "SamplingParams.stop"),
        ("LoraConfig", {"rank": 0}, "LoraConfig.rank: expected an integer >= 1, got int 0"),
        ("LoraConfig", {"rank": 4.5}, "LoraConfig.rank"),
        ("LoraConfig", {"rank": True}, "LoraConfig.rank"),
        ("LoraConfig", {"rank": 4, "train_mlp": 1}, "LoraConfig.train_mlp: expected True or False"),
        ("LoraConfig", {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}, "at least one of"),
        ("DimuonParams", {"learning_rate": NAN}, "DimuonParams.learning_rate"),
    ],
)
def test_bad_values_are_refused_by_name(cls, bad, message):
    with pytest.raises(BadRequestError, match=message):
        getattr(types, cls)(**bad)


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(1, 100),
            "seed": st.integers(-5, 2**40),
            "stop": st.one_of(st.none(), st.just("x"), st.lists(st.integers(0, 9)), st.lists(st.text(min_size=1), min_size=1)),
            "temperature": st.floats(0, 3),
            "top_k": st.one_of(st.just(-1), st.integers(1, 50)),
            "top_p": st.floats(0.01, 1),
        },
    )
)
def test_sampling_params_of_the_sdk_mean_the_same(arguments):
    theirs = tinker.SamplingParams(**arguments)
    ours = types.SamplingParams(**arguments)
    assert coerce(types.SamplingParams, theirs, "sampling_params") == ours
    assert dataclasses.asdict(ours) == theirs.model_dump()


def test_no_stop_and_never_stop_stay_apart():
    assert types.SamplingParams().stop is None
    assert types.SamplingParams(stop=[]).stop == []
    assert types.SamplingParams(stop=np.array([3])).stop == [3]


def test_unknown_keywords_are_refused():
    for cls in (types.AdamParams, types.SamplingParams, types.LoraConfig):
        with pytest.raises(TypeError, match="nonsense"):
            cls(nonsense=1)
    with pytest.raises(ValueError):
        tinker.AdamParams(nonsense=1)


def test_adam_params_of_the_sdk_become_ours():
    from tinker_jax.types.training import as_optim_params

    assert as_optim_params(tinker.AdamParams(learning_rate=0.1)) == types.AdamParams(learning_rate=0.1)
    assert as_optim_params(tinker.DimuonParams(learning_rate=0.1)) == types.DimuonParams(learning_rate=0.1)
    with pytest.raises(TypeError, match="expected AdamParams or DimuonParams, got dict"):
        as_optim_params({"learning_rate": 0.1})
    with pytest.raises(BadRequestError, match=r"AdamParams.eps"):
        as_optim_params(tinker.AdamParams(eps=NAN))


def test_topk_lists_are_the_sdks():
    from tinker.types.topk_logprobs import TopkLogprobs as Theirs
    from tinker.types.topk_logprobs import topk_to_lists as their_lists

    from tinker_jax.types.sampling import topk_to_lists

    ids = np.array([[5, 0, 0], [0, 0, 0], [0, 7, 2], [1, 2, 3]], np.int32)
    logprobs = np.array([[-1, -2, -99999], [-99999] * 3, [-1, -2, -3], [-1, -99999, -99999]], np.float32)
    assert topk_to_lists(types.TopkLogprobs(ids, logprobs)) == their_lists(Theirs(ids, logprobs))
    assert topk_to_lists(types.TopkLogprobs(ids[:0], logprobs[:0])) == []


def test_sampled_sequences_read_as_in_the_sdk():
    for module in (tinker, types):
        sequence = module.SampledSequence("stop", "id", np.array([1, 2], np.int32), np.array([-1, -2], np.float32))
        assert (sequence.tokens, sequence.logprobs, sequence.topk_logprobs) == ([1, 2], [-1.0, -2.0], None)
        assert module.SampledSequence("stop", "id", _tokens_list=[3]).tokens == [3]
        response = module.SampleResponse([sequence], np.array([np.nan, -1], np.float32))
        assert (response.prompt_logprobs, response.topk_prompt_logprobs) == ([None, -1.0], None)


def test_sample_requests_check_what_needs_no_model():
    def request(**changes):
        return types.SampleRequest(
            **{"prompt": types.ModelInput.from_ints([1, 2, 3]), "sampling_params": types.SamplingParams(), **changes}
        )

    good = request(
        prompt=tinker.ModelInput.from_ints([1, 2, 3]), target_prompt_logprobs=tinker.TensorData([[1], [2]], "int64", [2, 1])
    )
    assert isinstance(good.prompt, types.ModelInput) and isinstance(good.target_prompt_logprobs, types.TensorData)
    for changes, message in [
        ({"num_samples": 0}, "num_samples: expected an integer >= 1, got int 0"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 1}, "include_prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, r"at most len\(prompt\) - 1 = 2"),
        ({"target_prompt_logprobs": types.TensorData([[1.0]], "float32", [1, 1])}, "target_prompt_logprobs.dtype"),
        ({"target_prompt_logprobs": types.TensorData([1, 2], "int64")}, "target_prompt_logprobs.shape"),
        ({"prompt": [1, 2]}, "prompt: expected ModelInput, got list"),
        ({"sampling_params": {}}, "sampling_params: expected SamplingParams, got dict"),
    ]:
        with pytest.raises(BadRequestError, match=message):
            request(**changes)


@pytest.mark.parametrize(
    "path",
    [
        "x",
        "tinker://a/weights",
        "tinker://a/weights/b/c",
        "tinker://a/b/c",
        "http://a/weights/b",
        "tinker:///weights/b",
        "tinker://a/weights/",
        None,
    ],
)
def test_paths_that_are_not_tinker_paths_are_refused(path):
    with pytest.raises(BadRequestError, match=r"Invalid tinker path: .*expected tinker://<run>/"):
        types.ParsedCheckpointTinkerPath.from_tinker_path(path)


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_tinker_paths_parse_as_in_the_sdk(kind):
    path = f"tinker://s:train:0/{kind}/step-1"
    ours = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    assert dataclasses.asdict(ours) == tinker.ParsedCheckpointTinkerPath.from_tinker_path(path).model_dump()


def test_whole_floats_count_as_integers_as_in_the_sdk():
    for module in (tinker, types):
        assert module.SamplingParams(max_tokens=5.0, top_k=2.0).max_tokens == 5
        assert module.LoraConfig(rank=np.float32(8)).rank == 8
    assert type(types.LoraConfig(rank=8.0).rank) is int
    with pytest.raises(BadRequestError, match=r"SamplingParams.max_tokens: expected an integer >= 1, got float 5\.5"):
        types.SamplingParams(max_tokens=5.5)


def test_errors_are_picklable_standard_types():
    for name in errors.__dict__:
        cls = getattr(errors, name)
        if isinstance(cls, type) and issubclass(cls, errors.TinkerError):
            copy = pickle.loads(pickle.dumps(cls("message")))
            assert type(copy) is cls and str(copy) == "message"
    assert issubclass(tinker_jax.BadRequestError, ValueError)
    assert issubclass(tinker_jax.NotFoundError, LookupError)
    assert issubclass(tinker_jax.UnsupportedError, NotImplementedError)
    assert issubclass(tinker_jax.ExperimentalWarning, FutureWarning)
