"""Tables of pages are as wide as the longest row at work, and no call gets more of them than its attention holds."""

import dataclasses

import pytest
from sampler_cases import CONTEXT, ask, check, finish, make, model, same, spy, submit, tokens_of

from tinker_jax.models import caches
from tinker_jax.sampling import page_pool
from tinker_jax.sampling.page_pool import pages_for, table_widths

MOST = pages_for(CONTEXT)
REQUESTS = {n: ask(tokens_of(n), 2, max_tokens=30, seed=n, stop=[], prompt_logprobs=True) for n in (5, 40, 100, 280)}


@pytest.fixture
def narrow(monkeypatch):
    """One page is the narrowest table."""
    monkeypatch.setattr(page_pool, "_NARROWEST", 1)


@pytest.mark.parametrize(
    ("context", "widths"),
    [(330, [6]), (8192, [128]), (16_384, [128, 256]), (40_960, [128, 640]), (262_144, [128, 512, 2048, 4096])],
)
def test_few_widths_serve_every_context(context, widths):
    assert table_widths(pages_for(context)) == widths


def shapes(calls):
    return [rows.table.shape for _, rows, _ in calls]


def test_tables_widen_with_the_longest_row_and_change_no_result(narrow, monkeypatch):
    sampler = make()
    decoded, chunks = spy(monkeypatch, sampler._runner, "decode"), spy(monkeypatch, sampler._runner, "prefill")
    assert sampler._runner.widths == [1, MOST]
    (grown,) = finish(sampler, submit(sampler, ask(tokens_of(30), 2, max_tokens=60, seed=0, stop=[])))
    assert [width for _, width in shapes(decoded)] == [1, 1, MOST, MOST], "out of its first page"
    decoded.clear()
    responses = dict(zip(REQUESTS, finish(sampler, *[submit(sampler, request) for request in REQUESTS.values()]), strict=True))
    assert {width for _, width in shapes(decoded)} == {MOST}
    assert {args[3] for args in chunks} == {1, MOST}
    for n in REQUESTS:
        check(model()[0], tokens_of(n), responses[n])
    check(model()[0], tokens_of(30), grown)


def test_wider_tables_that_are_there_serve_rather_than_a_compiler(narrow, monkeypatch):
    sampler = make()
    finish(sampler, submit(sampler, ask(tokens_of(280), max_tokens=4, stop=[])))
    decoded = spy(monkeypatch, sampler._runner, "decode")
    programs = sampler.programs
    finish(sampler, submit(sampler, ask(tokens_of(20), max_tokens=4, stop=[])))
    assert shapes(decoded) == [(1, MOST)]
    assert sampler.programs == programs


def test_deterministic_programs_have_one_width(narrow):
    assert make(deterministic=True)._runner.widths == [MOST]


def limit_tables(monkeypatch, count):
    """Samplers made from now on have calls that hold so many tables for the whole context."""
    make_attention = caches.paged_attention_on

    def limited(*args, **options):
        paged = make_attention(*args, **options)
        return dataclasses.replace(paged, backend=dataclasses.replace(paged.backend, most_entries=count * MOST))

    monkeypatch.setattr(caches, "paged_attention_on", limited)


def test_rows_that_do_not_fit_one_call_are_decoded_in_several(narrow, monkeypatch):
    expected = finish(whole := make(), *[submit(whole, request) for request in REQUESTS.values()])
    limit_tables(monkeypatch, 4)
    sampler = make()
    decoded = spy(monkeypatch, sampler._runner, "decode")
    responses = finish(sampler, *[submit(sampler, request) for request in REQUESTS.values()])
    assert max(rows * width for rows, width in shapes(decoded)) <= 4 * MOST
    assert (4, MOST) in shapes(decoded), "the longest four of eight"
    for ours, theirs in zip(responses, expected, strict=True):
        same(ours, theirs)


def test_deterministic_programs_have_as_many_rows_as_a_call_holds(monkeypatch):
    limit_tables(monkeypatch, 8)
    sampler = make(deterministic=True)
    decoded = spy(monkeypatch, sampler._runner, "decode")
    responses = finish(sampler, *[submit(sampler, request) for request in REQUESTS.values()])
    assert set(shapes(decoded)) == {(8, MOST)}
    for (n, _), response in zip(REQUESTS.items(), responses, strict=True):
        check(model()[0], tokens_of(n), response)


@pytest.mark.slow
def test_a_prompt_of_32768_tokens_is_scored_and_continued_as_by_the_model():
    prompt, sampler = tokens_of(32_768), make(context_length=33_000, pages=600)
    assert sampler._runner.widths == [128, 516]
    (response,) = finish(sampler, submit(sampler, ask(prompt, max_tokens=8, seed=0, stop=[], prompt_logprobs=True)))
    check(model()[0], prompt, response, atol=1e-4)
