"""Signatures, fields and names against tinker 0.38, with every difference listed and explained here and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import tinker

import tinker_jax

CLIENTS = ["APIFuture", "AdminClient", "RestClient", "SamplingClient", "ServiceClient", "TrainingClient"]

NOT_EXPORTED = {
    "Timeout": "an HTTP client's option",
    "RequestOptions": "an HTTP client's option",
    "auth": "nobody logs in",
}

OURS_ALONE = {"EngineConfig", "StorageError", "UnsupportedError", "checkpoints", "warm_up"}

# Types of the wire protocol and of cloud accounts: nothing in process makes or takes them.
TYPES_NOT_HERE = re.compile(
    r"(AccessibleSearchOwner|OwnSearchOwner|UserSearchOwner|SearchOwner"
    r"|.*(Session(Search|Status|Summary|Failed|Active|Cancelled|Finish|Heartbeat|Start|End)|SessionStatusQuery).*"
    r"|(Audit|AuthToken|Billing|Checkpoint(Billing)|Client(Config|DynamicConfig)|CopyWeights|Create|CurrentCheckpoint).*"
    r"|(CustomLoss(Graph|Node)|EventType|ExternalWeights|Future|Generic|Get(BillingUsage|CurrentCheckpoint)|Health).*"
    r"|(GetInfo|LoadWeights|SaveWeights|SaveWeightsExternal|SaveWeightsForSampler|UnloadModel)Request"
    r"|(SaveWeights.*Internal|SaveWeightsExternalResponse|UnloadModelResponse)"
    r"|(Join|RequestErrorCategory|RequestFailed|Sampling(Prefill|Sample|SessionFutures)|Severity|Storage|Telemetry).*"
    r"|(TrainingBilling|UnhandledException|UntypedAPIFuture|Whoami).*)"
)

METHODS_NOT_HERE = {
    ("ServiceClient", "holder"): "the SDK's connection to the service",
    ("SamplingClient", "create"): "takes the SDK's connection; use the factories",
    ("SamplingClient", "on_queue_state_change"): "a callback of the SDK's own queue",
}

SIGNATURES_DIFFER = {
    ("TrainingClient", "__init__"): "clients are made by factories; the constructor is internal in both",
    ("SamplingClient", "__init__"): "clients are made by factories; the constructor is internal in both",
    ("ServiceClient", "__init__"): "engine=: what the cloud decides for you",
    ("RestClient", "__init__"): "no _holder; engine=: whose storage",
    ("AdminClient", "__init__"): "no _holder",
    ("TrainingClient", "forward_backward_custom"): "backend=: JAX losses",
    ("TrainingClient", "forward_backward_custom_async"): "backend=: JAX losses",
}


def public(cls: type) -> dict[str, object]:
    """Public attributes defined by `cls` itself, and its constructor."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("_") or name == "__init__"}


def parameters(function: object) -> list[tuple]:
    function = getattr(function, "__func__", function)
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


METHODS = [(name, method) for name in CLIENTS for method in public(getattr(tinker, name))]


def test_every_name_of_the_sdk_is_exported():
    assert set(tinker.__all__) - set(tinker_jax.__all__) == set(NOT_EXPORTED)
    assert set(tinker_jax.__all__) - set(tinker.__all__) == OURS_ALONE
    for name in tinker_jax.__all__:
        assert getattr(tinker_jax, name) is not None


@pytest.mark.parametrize(("client", "method"), METHODS)
def test_methods_have_the_sdks_parameters(client, method):
    theirs = inspect.getattr_static(getattr(tinker, client), method)
    if (client, method) in METHODS_NOT_HERE:
        assert not hasattr(getattr(tinker_jax, client), method)
        return
    ours = inspect.getattr_static(getattr(tinker_jax, client), method)
    assert isinstance(ours, staticmethod) == isinstance(theirs, staticmethod)
    if (client, method) in SIGNATURES_DIFFER:
        assert parameters(ours) != parameters(theirs), "no difference left: remove it from the list"
        return
    assert parameters(ours) == parameters(theirs)
    assert inspect.iscoroutinefunction(ours) == (method.endswith("_async") or method == "coroutine")


@pytest.mark.parametrize("client", ["ServiceClient", "RestClient", "AdminClient"])
def test_constructors_only_add_and_drop_what_is_listed(client):
    ours = {name for name, *_ in parameters(getattr(tinker_jax, client).__init__)}
    theirs = {name for name, *_ in parameters(getattr(tinker, client).__init__)}
    assert theirs - ours <= {"_holder"}
    assert ours - theirs <= {"engine"}


def test_our_clients_have_no_public_methods_of_their_own():
    for client in CLIENTS:
        assert set(public(getattr(tinker_jax, client))) <= set(public(getattr(tinker, client))), client


def types_of(module) -> set[str]:
    return {name for name in dir(module) if name[0].isupper()}


def test_every_type_of_the_sdk_is_here_or_listed():
    missing = types_of(tinker.types) - set(tinker_jax.types.__all__)
    assert {name for name in missing if not TYPES_NOT_HERE.fullmatch(name)} == set()
    assert {name for name in tinker_jax.types.__all__ if not hasattr(tinker.types, name)} == {"TopkLogprobs"}


def their_fields(cls: type) -> dict[str, object]:
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    return {
        name: dataclasses.MISSING if field.is_required() else field.default
        for name, field in cls.model_fields.items()  # type: ignore[attr-defined]
    }


def plain(default: object) -> object:
    return type(default).__name__ if dataclasses.is_dataclass(default) or hasattr(default, "model_dump") else default


SHARED = sorted(name for name in tinker_jax.types.__all__ if dataclasses.is_dataclass(getattr(tinker_jax.types, name)))


@pytest.mark.parametrize("name", SHARED)
def test_types_have_the_sdks_fields_and_defaults(name):
    import tinker.types.topk_logprobs

    theirs = getattr(tinker.types, name, None) or getattr(tinker.types.topk_logprobs, name)
    ours = getattr(tinker_jax.types, name)
    assert [f.name for f in dataclasses.fields(ours)] == list(their_fields(theirs))
    for field in dataclasses.fields(ours):
        if field.default_factory is not dataclasses.MISSING:
            continue
        default = their_fields(theirs)[field.name]
        assert plain(field.default) == plain(default), field.name
    if not dataclasses.is_dataclass(theirs):
        assert all(field.kw_only for field in dataclasses.fields(ours)), "the SDK's models take keywords alone"


@pytest.mark.parametrize("name", ["LossFnType", "StopReason", "TensorDtype", "CheckpointType", "SamplingClientKind"])
def test_literals_have_the_sdks_values(name):
    values = [typing.get_args(getattr(module.types, name)) for module in (tinker_jax, tinker)]
    assert values[0] == values[1]


def test_errors_form_the_sdks_tree():
    for name in tinker.__all__:
        theirs = getattr(tinker, name)
        if isinstance(theirs, type) and issubclass(theirs, Exception):
            ours = getattr(tinker_jax, name)
            bases = {base.__name__ for base in theirs.__mro__ if base.__module__.startswith("tinker")}
            assert bases <= {base.__name__ for base in ours.__mro__}, name


# The table in docs/compatibility.md

ROW = re.compile(r"^\| `(?P<cls>\w+)\.(?P<method>\w+)` \| (?P<status>yes|no) \|(?P<note>.*)\|$", re.MULTILINE)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")


def test_the_compatibility_table_names_every_public_call_of_the_sdk_once():
    rows = [(row["cls"], row["method"]) for row in ROW.finditer(DOCUMENT)]
    assert len(rows) == len(set(rows))
    names = {(cls, "__init__" if method == cls else method) for cls, method in rows}
    expected = {(cls, method) for cls, method in METHODS if not method.endswith("_async")}
    assert names == expected


def test_the_compatibility_table_says_no_exactly_where_a_call_is_refused_or_missing():
    for row in ROW.finditer(DOCUMENT):
        cls = getattr(tinker_jax, row["cls"])
        ours = cls.__init__ if row["method"] == row["cls"] else getattr(cls, row["method"], None)
        refused = ours is None or inspect.signature(ours).return_annotation in ("NoReturn", typing.NoReturn)
        assert refused == (row["status"] == "no"), row.group()
        if row["status"] == "no":
            assert row["note"].strip(), f"{row['cls']}.{row['method']}: say why"


def test_every_listed_difference_is_explained_in_the_document():
    for name in [*NOT_EXPORTED, "engine=", "backend=", "SamplingParams", "_holder"]:
        assert f"`{name}`" in DOCUMENT, name
