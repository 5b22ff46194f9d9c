"""Stop rules: which token ends a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinker_jax.types.errors import BadRequestError

DecodeText = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class StopRule:
    """Ends a sequence at the first of `ids`, or once its text contains one of `strings`; neither: never."""

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


def stop_rule(stop: str | Sequence[str] | Sequence[int] | None, eos_ids: Sequence[int], vocab_size: int) -> StopRule:
    """The rule that `SamplingParams.stop` means.

    Args:
        stop: None is the model's end-of-sequence tokens; `[]` never stops; strings or token ids replace the former.
        eos_ids: end-of-sequence tokens of the model.
        vocab_size: token ids must be below.

    Raises:
        BadRequestError: a stop id outside the vocabulary.
    """
    if stop is None:
        return StopRule(ids=tuple(eos_ids))
    if isinstance(stop, str):
        return StopRule(strings=(stop,))
    ids, strings = [], []
    for i, item in enumerate(stop):
        if isinstance(item, str):
            strings.append(item)
        elif 0 <= item < vocab_size:
            ids.append(int(item))
        else:
            raise BadRequestError(f"stop[{i}]: token id {item} is outside the model's vocabulary of {vocab_size}.")
    return StopRule(tuple(ids), tuple(strings))


def first_stop(tokens: Sequence[int], start: int, rule: StopRule, decode_text: DecodeText) -> int | None:
    """Length of the shortest prefix of `tokens`, longer than `start`, that the rule ends; None if there is none.

    A string ends the sequence at the token that completes it, also when it spans several tokens or when a character's
    bytes do. `decode_text` sees a window rather than the whole sequence, so that the cost of a long answer stays linear.

    Args:
        tokens: all tokens of the sequence.
        start: so many of them were searched before.
        rule: what to look for.
        decode_text: tokens to text; bytes that are no whole character yet become replacement characters.
    """
    found = None
    if rule.ids:
        ids = frozenset(rule.ids)
        found = next((n for n in range(start + 1, len(tokens) + 1) if tokens[n - 1] in ids), None)
    if rule.strings:
        at = _window(tokens, start, max(map(len, rule.strings)), decode_text)
        for n in range(start + 1, len(tokens) + 1) if _contains(decode_text(tokens[at:]), rule.strings) else ():
            if _contains(decode_text(tokens[at:n]), rule.strings):
                found = n if found is None else min(n, found)
                break
    return found


def _contains(text: str, strings: Sequence[str]) -> bool:
    return any(s in text for s in strings)


def _window(tokens: Sequence[int], start: int, longest: int, decode_text: DecodeText) -> int:
    """Where to decode from, so that a string of `longest` characters that ends after `start` lies within.

    Four characters more: the window's first token can be the middle of a character, or lose a leading space.
    """
    width = longest + 4
    while width < start:
        if len(decode_text(tokens[start - width : start])) >= longest + 4:
            return start - width
        width *= 2  # tokens without text of their own
    return 0
