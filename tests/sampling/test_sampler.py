"""The sampler: parity with transformers on every path, the prompt's own numbers, stops, budgets, bad input."""

import itertools

import numpy as np
import pytest
import tiny
import torch
from sampler_cases import (
    BORDERS,
    CONTEXT,
    EOS,
    adapter,
    ask,
    check,
    finish,
    make,
    merged,
    model,
    reference_logits,
    run,
    shared,
    spy,
    submit,
    text,
    tokens_of,
)  # fmt: skip

from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.types import ModelInput, SampleRequest, SamplingParams, TensorData
from tinker_jax.types.errors import BadRequestError, UnsupportedError


@pytest.fixture(scope="module")
def sampler():
    return shared()


# -- parity ----------------------------------------------------------------------------------------------------------


def test_prompts_around_every_border_are_scored_and_continued_right_under_an_adapter(sampler):
    """Pages, chunks of the prefill, blocks of attention, the context."""
    lengths = [1, *BORDERS, CONTEXT - 1, CONTEXT]
    asks = [ask(tokens_of(n), max_tokens=3, seed=n, stop=[], prompt_logprobs=True) for n in lengths]
    for n, response in zip(lengths, run(sampler, *asks, weights="3", tree=adapter(3)), strict=True):
        assert np.isnan(response.prompt_logprobs_np[0]) and not np.isnan(response.prompt_logprobs_np[1:]).any()
        assert len(response.sequences[0].tokens) == min(3, CONTEXT - n + 1)
        check(merged(3), tokens_of(n), response)


def test_several_chunks_of_one_prompt_are_computed_in_one_call(sampler, monkeypatch):
    p = tokens_of(250, seed=1)
    calls = spy(monkeypatch, sampler._runner, "prefill")
    (response,) = run(sampler, ask(p, max_tokens=2, stop=[], prompt_logprobs=True))
    ((_, chunks, *_),) = calls
    assert [chunk.start for chunk in chunks if chunk] == [0, 64, 128, 192]
    check(model()[0], p, response)


def test_a_long_prompt_is_computed_in_long_chunks_and_what_is_left_in_short_ones(sampler, monkeypatch):
    p = tokens_of(320, seed=2)
    calls = spy(monkeypatch, sampler._runner, "prefill")
    (response,) = run(sampler, ask(p, max_tokens=2, stop=[], prompt_logprobs=True))
    starts = [(T, [chunk.start for chunk in chunks if chunk]) for _, chunks, T, *_ in calls]
    assert starts == [(256, [0]), (64, [256])]
    check(model()[0], p, response)


def tempered(prompt, sequence, temperature):
    """log p_τ of every token at each drawn position."""
    logits = reference_logits(model()[0], [*prompt, *sequence.tokens[:-1]])[len(prompt) - 1 :]
    return torch.log_softmax(logits / temperature, -1).numpy()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_logprobs_are_tempered_and_not_renormalised_over_the_filtered_set(sampler, temperature):
    p = tokens_of(7)
    (response,) = run(sampler, ask(p, temperature=temperature, top_k=5, top_p=0.7, max_tokens=20, seed=1, stop=[]))
    check(model()[0], p, response, temperature)
    expected = tempered(p, response.sequences[0], temperature)
    ranks = (expected > response.sequences[0].logprobs_np[:, None] + 1e-5).sum(-1)
    assert ranks.max() < 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e30, 1e300])
def test_extreme_temperatures_give_numbers_and_the_coldest_are_greedy(sampler, temperature):
    p = tokens_of(8)
    greedy, response = run(sampler, *(ask(p, temperature=t, max_tokens=12, seed=3, stop=[]) for t in (0, temperature)))
    check(model()[0], p, greedy)  # reports the model's own probabilities
    if temperature < 1:
        assert response.sequences[0].tokens == greedy.sequences[0].tokens
        np.testing.assert_allclose(response.sequences[0].logprobs_np, 0, atol=1e-5)
    else:
        np.testing.assert_allclose(response.sequences[0].logprobs_np, -np.log(tiny.VOCAB), atol=1e-5)


def test_log_probabilities_of_two_tokens_move_apart_as_one_over_the_temperature(sampler):
    p, k = tokens_of(14), 20
    asks = [ask(p, max_tokens=1, temperature=t, topk_sample_logprobs=k) for t in (1.0, 0.5, 2.5)]
    tops = [response.sequences[0].topk_logprobs_np for response in run(sampler, *asks)]
    for top in tops[1:]:
        np.testing.assert_array_equal(top.token_ids, tops[0].token_ids)
    gaps = [top.logprobs[0, 1:] - top.logprobs[0, 0] for top in tops]
    np.testing.assert_allclose(gaps[1], gaps[0] / 0.5, atol=2e-5)
    np.testing.assert_allclose(gaps[2], gaps[0] / 2.5, atol=2e-5)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, -1, 1.0), (0.5, 6, 1.0), (1.5, -1, 0.5), (0.8, 20, 0.7)])
def test_frequencies_are_the_models_probabilities_under_temperature_and_filters(sampler, temperature, top_k, top_p):
    p, n = tokens_of(3), 1024
    (response,) = run(sampler, ask(p, n, max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=0))
    logits = reference_logits(model()[0], p)[-1].numpy() / temperature
    probabilities = np.exp(logits - np.logaddexp.reduce(logits))
    order = np.argsort(-probabilities)[: top_k if top_k > 0 else tiny.VOCAB]
    reached = np.cumsum(probabilities[order]) / probabilities[order].sum()
    kept = order[: np.searchsorted(reached, top_p) + 1] if top_p < 1 else order
    counts = np.bincount([s.tokens[0] for s in response.sequences], minlength=tiny.VOCAB)
    assert counts[kept].sum() == n, "a token outside the filters was drawn"
    expected = n * probabilities[kept] / probabilities[kept].sum()
    rare = expected < 5  # pooled: the statistic is a chi-square for cells that are expected to hold a few
    expected, counts = ([*x[~rare], x[rare].sum()] if rare.any() else x for x in (expected, counts[kept]))
    expected, counts = np.asarray(expected), np.asarray(counts)
    freedom = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_top_sample_logprobs_are_the_likeliest_tokens_at_the_temperature(sampler):
    p = tokens_of(6)
    (response,) = run(sampler, ask(p, temperature=0.7, max_tokens=18, seed=2, stop=[], topk_sample_logprobs=3))
    sequence = response.sequences[0]
    check(model()[0], p, response, 0.7)
    expected = tempered(p, sequence, 0.7)
    top = sequence.topk_logprobs_np
    assert top.token_ids.shape == top.logprobs.shape == (18, 3)
    np.testing.assert_array_equal(top.token_ids, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(top.logprobs, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)


# -- the prompt's own numbers -----------------------------------------------------------------------------------------


def test_prompt_top_k_and_last_n(sampler):
    p = tokens_of(12)
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()
    full, last = run(
        sampler,
        ask(p, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=4),
        ask(p, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=4, prompt_logprobs_last_n=3),
    )
    ids, values = full.topk_prompt_logprobs_np.token_ids, full.topk_prompt_logprobs_np.logprobs
    np.testing.assert_array_equal(ids[1:], np.argsort(-expected[:-1], axis=1)[:, :4])
    np.testing.assert_allclose(values[1:], -np.sort(-expected[:-1], axis=1)[:, :4], atol=1e-5)
    assert full.topk_prompt_logprobs[0] is None and full.prompt_logprobs[0] is None
    assert last.prompt_logprobs[:9] == [None] * 9 and last.topk_prompt_logprobs[:9] == [None] * 9
    assert last.prompt_logprobs[9:] == full.prompt_logprobs[9:]
    assert last.topk_prompt_logprobs[9:] == full.topk_prompt_logprobs[9:]


def test_a_prompt_of_one_token_has_nothing_to_score(sampler):
    targets = TensorData(np.zeros((0, 2), np.int64), "int64", shape=[0, 2])
    (response,) = run(
        sampler,
        ask([5], max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=2, target_prompt_logprobs=targets,
            prompt_alt_tokens_k=2),
    )  # fmt: skip
    assert response.prompt_logprobs == [None] and response.topk_prompt_logprobs == [None]
    assert response.target_prompt_logprobs.shape == [0, 2] and response.prompt_alt_tokens.tokens.shape == [0, 2]


def test_target_logprobs_come_back_in_the_layout_they_were_asked_in(sampler):
    p = tokens_of(6)
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()
    ids = np.array([[3, -1], [4, 5], [-1, -1], [7, -1], [8, 9]])
    dense = TensorData(ids, "int64", shape=[5, 2])
    sparse = TensorData(np.array([3, -1, 9]), "int64", [5, 2], [0, 1, 1, 1, 1, 3], [0, 0, 1])
    a, b = run(
        sampler,
        ask(p, max_tokens=1, target_prompt_logprobs=dense),
        ask(p, max_tokens=1, target_prompt_logprobs=sparse, prompt_logprobs=True),
    )
    want = np.where(ids < 0, 0, np.take_along_axis(expected[:5], np.maximum(ids, 0), axis=1))
    np.testing.assert_allclose(a.target_prompt_logprobs.to_numpy(), want, atol=1e-5)
    got = b.target_prompt_logprobs
    assert (got.sparse_crow_indices, got.sparse_col_indices) == ([0, 1, 1, 1, 1, 3], [0, 0, 1])
    np.testing.assert_allclose(got.data, [expected[0, 3], 0, expected[4, 9]], atol=1e-5)
    np.testing.assert_allclose(b.prompt_logprobs_np[1:], expected[np.arange(5), p[1:]], atol=1e-5)


def test_alternative_tokens_are_drawn_at_the_temperature_and_scored_at_one(sampler):
    p, k = tokens_of(9), 64
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()[:8]
    (response, again, greedy) = run(
        sampler,
        ask(p, max_tokens=1, prompt_alt_tokens_k=k, temperature=0.3, seed=5),
        ask(p, max_tokens=1, prompt_alt_tokens_k=k, temperature=0.3, seed=5),
        ask(p, max_tokens=1, prompt_alt_tokens_k=2, temperature=0),
    )
    tokens, logprobs = (x.to_numpy() for x in (response.prompt_alt_tokens.tokens, response.prompt_alt_tokens.logprobs))
    assert tokens.shape == (8, k) and tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, again.prompt_alt_tokens.tokens.to_numpy())
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, tokens, axis=1), atol=1e-5)
    tempered = np.exp(expected / 0.3 - np.logaddexp.reduce(expected / 0.3, axis=1, keepdims=True))
    for row in range(8):
        likely = tempered[row].argmax()
        share, p_likely = (tokens[row] == likely).mean(), tempered[row, likely]
        assert abs(share - p_likely) < 5 * np.sqrt(p_likely * (1 - p_likely) / k)
    np.testing.assert_array_equal(greedy.prompt_alt_tokens.tokens.to_numpy(), expected.argmax(1)[:, None].repeat(2, 1))


# -- stops and budgets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(sampler):
    """What greedy decoding says when nothing stops it."""
    (response,) = run(sampler, ask(tokens_of(10), temperature=0, max_tokens=40, stop=[]))
    sequence = response.sequences[0]
    assert EOS not in sequence.tokens and len(set(sequence.tokens)) > 8
    return sequence


def greedy(sampler, **kwargs):
    (response,) = run(sampler, ask(tokens_of(10), temperature=0, max_tokens=40, **kwargs))
    return response.sequences[0]


@pytest.mark.parametrize("extra", [0, 20], ids=["few ids", "more ids than the device checks"])
def test_a_stop_token_ends_the_sequence_and_belongs_to_it(sampler, free, extra):
    target = free.tokens[20]
    unused = [t for t in range(tiny.VOCAB) if t not in free.tokens][:extra]
    sequence = greedy(sampler, stop=[*unused, target])
    first = free.tokens.index(target)
    assert sequence.tokens == free.tokens[: first + 1] and sequence.stop_reason == "stop"
    np.testing.assert_allclose(sequence.logprobs_np, free.logprobs_np[: first + 1], atol=1e-5)


@pytest.mark.parametrize("form", [lambda s: s, lambda s: ["never there", s]], ids=["string", "list"])
def test_a_string_that_spans_tokens_ends_the_sequence_at_its_last_token(sampler, free, form):
    sequence = greedy(sampler, stop=form(text(free.tokens[18:21])))
    end = text(free.tokens).index(text(free.tokens[18:21])) + 3
    assert sequence.tokens == free.tokens[:end] and sequence.stop_reason == "stop"
    assert len(sequence.logprobs) == end


def test_a_string_whose_character_is_split_over_tokens_ends_the_sequence_when_it_is_whole(sampler, free, monkeypatch):
    first, second = next(pair for pair in itertools.pairwise(free.tokens[15:]) if len(set(pair)) == 2)
    pieces = {first: "é".encode()[:1], second: "é".encode()[1:]}

    def decode(tokens):
        return b"".join(pieces.get(token, b".") for token in tokens).decode(errors="replace")

    monkeypatch.setattr(sampler, "_decode_text", decode)
    end = next(n for n in range(2, 41) if free.tokens[n - 2 : n] == [first, second])
    assert greedy(sampler, stop="é").tokens == free.tokens[:end]
    assert greedy(sampler, stop=["é.", "never there"]).tokens == free.tokens[: end + 1]


def test_a_string_frees_its_row_at_once_and_the_others_go_on(sampler, free):
    stopped = submit(sampler, ask(tokens_of(10), temperature=0, max_tokens=300, stop=text(free.tokens[1:3])))
    others = submit(sampler, ask(tokens_of(10), 2, max_tokens=60, stop=[]))
    sampler.step()
    assert stopped.done() and not others.done() and sampler.running == 2
    assert stopped.result(0).sequences[0].stop_reason == "stop"
    finish(sampler, others)


def test_none_stops_at_the_models_own_end_and_an_empty_list_does_not(free):
    ending = make(stop_ids=[free.tokens[5]])
    first = free.tokens.index(free.tokens[5])
    assert greedy(ending).tokens == free.tokens[: first + 1]
    assert greedy(ending, stop=[]).tokens == free.tokens
    assert greedy(ending, stop=[free.tokens[0]]).tokens == free.tokens[:1]


def test_the_budget_ends_a_sequence_with_length(sampler, free):
    for n in (1, 15, 16, 17, 33):
        (response,) = run(sampler, ask(tokens_of(10), temperature=0, max_tokens=n, stop=[]))
        assert response.sequences[0].tokens == free.tokens[:n]
        assert response.sequences[0].stop_reason == "length"


@pytest.mark.parametrize("length", [1, 200, CONTEXT - 1, CONTEXT])
@pytest.mark.parametrize("max_tokens", [None, 10_000])
def test_without_a_budget_or_with_too_large_a_one_the_context_ends_it(sampler, length, max_tokens):
    (response,) = run(sampler, ask(tokens_of(length), max_tokens=max_tokens, stop=[]))
    assert len(response.sequences[0].tokens) == CONTEXT + 1 - length
    assert response.sequences[0].stop_reason == "length"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: ask([]), "prompt: expected at least one token, got none"),
        (lambda: ask([3, 300]), "prompt: token 1 is 300, outside the model's vocabulary of 300"),
        (lambda: ask([-1]), "prompt: token 0 is -1, outside"),
        (lambda: ask(tokens_of(CONTEXT + 1)), f"prompt: {CONTEXT + 1} tokens exceed the model's context length of {CONTEXT}"),
        (lambda: ask([3], stop=[300]), r"stop\[0\]: token id 300 is outside the model's vocabulary of 300"),
        (lambda: ask([3], topk_sample_logprobs=301), "topk_sample_logprobs: expected at most 300 for this model, got 301"),
        (lambda: ask([3], topk_prompt_logprobs=301), "topk_prompt_logprobs: expected at most 300"),
        (lambda: ask([3], prompt_alt_tokens_k=1025), "prompt_alt_tokens_k: expected at most 1024"),
        (
            lambda: ask([3, 4], target_prompt_logprobs=TensorData(np.array([[2, 300]]), "int64", shape=[1, 2])),
            r"target_prompt_logprobs\[0, 1\]: expected a token id below 300, or -1 for nothing, got 300",
        ),
    ],
)
def test_bad_requests_are_refused_at_the_call_and_change_nothing(sampler, request_, message):
    with pytest.raises(BadRequestError, match=message):
        submit(sampler, request_())
    assert sampler.waiting == 0


def test_images_are_refused(sampler):
    image = {"type": "image", "data": b"x", "format": "png", "expected_tokens": 3}
    request = SampleRequest(prompt=ModelInput(chunks=[image]), sampling_params=SamplingParams())
    with pytest.raises(UnsupportedError, match=r"prompt.chunks\[0\] is ImageChunk, but qwen3 is a text model"):
        submit(sampler, request)


def test_a_request_that_never_fits_the_cache_is_refused_with_the_numbers():
    small, most = make(pages=3), 3 * PAGE - 49  # the last token drawn is never fed back
    with pytest.raises(BadRequestError, match=rf"A prompt of 50 tokens with max_tokens={most + 1} needs [\d,]+ bytes .* has"):
        submit(small, ask(tokens_of(50), max_tokens=most + 1))
    assert small.parse(ask(tokens_of(50), max_tokens=most)).need == 3 * PAGE


@pytest.mark.parametrize("prompt", [1, 50, 3 * PAGE])
def test_without_a_budget_what_fits_the_cache_ends_a_sequence(prompt):
    small = shared(pages=3)
    assert 3 * PAGE < CONTEXT
    (response,) = run(small, ask(tokens_of(prompt), stop=[]))
    assert len(response.sequences[0].tokens) == 3 * PAGE - prompt + 1
    assert response.sequences[0].stop_reason == "length"


def test_a_prompt_that_does_not_fit_the_cache_is_refused_without_a_budget_too():
    with pytest.raises(BadRequestError, match=rf"A prompt of {3 * PAGE + 1} tokens .* needs [\d,]+ bytes"):
        shared(pages=3).parse(ask(tokens_of(3 * PAGE + 1)))


def test_targets_with_too_many_columns_are_refused_before_they_are_made_dense(sampler):
    sparse = TensorData([5], "int64", [1, 10**8], [0, 1], [7])
    with pytest.raises(BadRequestError, match="target_prompt_logprobs: expected at most 1024 columns, got 100000000"):
        sampler.parse(ask([3, 4], target_prompt_logprobs=sparse))
