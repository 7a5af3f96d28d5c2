"""Where tokens lie in the text of a response."""

import itertools

import chat_templates
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from cme.errors import ModelError
from cme.text.rendering import Renderer
from cme.text.tokens import Aligner

TEXTS = ["Paris.", " Paris\n\nis  the\tcapital ", "naïve café", "日本 🙂👍!", "e\u0301 \u2028x\n"]


def trimming():
    """A byte-level tokenizer that leaves white space out of its offsets, as some on the hub do."""
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def byte_fallback():
    """A tokenizer of Gemma's kind: spaces are ▁, and what is not in its vocabulary falls apart into bytes."""
    known = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Pariscaptlhen.!"]
    bpe = models.BPE(
        {token: i for i, token in enumerate(dict.fromkeys(known))}, [], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def adding_spaces():
    """A tokenizer of Llama 2's kind, which puts a space before any text by itself."""
    tokenizer = byte_fallback()
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.backend_tokenizer.normalizer = prepend
    return tokenizer


def mistral():
    """Llama 2's kind with a chat template that writes a space before a response."""
    return chat_templates.sentencepiece(chat_templates.MISTRAL)


def phi3():
    """Llama 2's kind with white space in the special token before a response."""
    return chat_templates.swallowing(chat_templates.PHI3, chat_templates.SPECIAL["phi3"])


FORMS = [
    *itertools.product(
        [tiny.tokenizer, trimming, byte_fallback, adding_spaces],
        ["{prompt}{response}", "Q: {prompt}\nA: {response}"],
    ),
    *itertools.product([tiny.tokenizer, mistral, phi3], ["chat"]),
]


def aligned(renderer, text, ids, continued=False):
    aligner = Aligner(renderer.encoder)
    return aligner.align(text, ids, renderer.contexts(text, continued=continued))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(("make", "template"), FORMS)
def test_the_spans_of_tokens_tile_the_response(make, template, continued, text):
    renderer = Renderer.of(make(), template)
    ids = renderer.response_ids(text, continued=continued)
    alignment = aligned(renderer, text, ids, continued)
    distinct = [span for span, _ in itertools.groupby(alignment.spans) if span[0] < span[1]]
    covered = 0
    for start, end in distinct:
        assert start <= covered < end  # a token may begin with the rest of a character and have more
        covered = end
    assert covered == len(text)
    for piece, (start, end) in zip(alignment.pieces, alignment.spans, strict=True):
        if "\ufffd" not in piece:
            assert piece.lstrip(" ") == text[start:end].lstrip(" ")


def test_parts_of_a_character_all_have_it():
    renderer = Renderer.of(byte_fallback(), "{prompt} {response}")
    alignment = aligned(renderer, "a🙂", renderer.response_ids("a🙂"))
    assert alignment.spans == ((0, 0), (0, 1), *[(1, 2)] * 4)
    assert alignment.pieces == (" ", "a", *["\ufffd"] * 4)


def test_tokens_of_another_text_are_not_aligned():
    renderer = Renderer.of(tiny.tokenizer())
    with pytest.raises(ModelError, match="can't be found in its text"):
        aligned(renderer, "Paris", renderer.response_ids("Rome"))
