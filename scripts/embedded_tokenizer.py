"""The embedded models' tokenizer: bytes, plus the words its instructions are made of.

Text is cut into words, single digits and single other characters. A frequent word of the instructions is one token;
every other piece falls apart into its bytes. So the model sees the letters of the words it works on, and any Unicode
text survives the round trip.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # ordinary tokens, as Qwen has them

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def build(sample: Iterable[str], *, vocab_size: int, spell_out: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose whole words are the most frequent ones of `sample`.

    Args:
        sample: text of the corpus, without chat markers.
        vocab_size: bytes, markers and words together.
        spell_out: words that must stay sequences of letters, however frequent.
    """
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = {form for word in spell_out for form in (word, "Ġ" + word)}
    count = Counter(piece for text in sample for piece, _ in cut.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(alphabet) - len(SPECIAL) - len(MARKERS)
    ranked = sorted(count, key=lambda piece: (-count[piece], piece))
    words = [piece for piece in ranked if len(piece.lstrip("Ġ")) > 1 and piece not in letters][:room]
    vocab = {piece: i for i, piece in enumerate(alphabet + words)}
    # Without merges, `ignore_merges` makes a piece one token if it is in the vocabulary and bytes otherwise.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release of transformers knows
    path.write_text(json.dumps(config, indent=2) + "\n")
