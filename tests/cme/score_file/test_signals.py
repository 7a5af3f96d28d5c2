"""What is said about a response and its tokens: places in the text, spans, the end of the turn, tables."""

import itertools
import math

import chat_templates
import pandas
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from cme import to_frame, tokens_to_frame
from cme.errors import ModelError
from cme.scores import SIGNAL_STATS, SIGNALS, ResponseScore
from cme.text.rendering import Renderer
from cme.text.tokens import Aligner
from cme.verifier import Verifier

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


@pytest.fixture(scope="module")
def verifier():
    return Verifier.of(tiny.llama(), tiny.tokenizer())


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
        assert start <= covered < end  # a token may begin with the rest of a character and go on
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


class Straightening(PreTrainedTokenizerFast):
    """Changes the text before it tokenises it, which its tokenizer.json knows nothing of."""

    def __call__(self, text, **how):
        return super().__call__(text.replace("’", "'"), **how)


def test_a_response_that_is_not_found_in_its_tokens_is_scored_all_the_same():
    plain = tiny.tokenizer()
    tokenizer = Straightening(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    scores = Verifier.of(tiny.llama(), tokenizer).score(["Hi"] * 2, ["It’s", "Paris"], token_spans=True)
    assert scores[0].mean_logprob is not None
    assert scores[0].alignment is None
    for asked in (scores[0].per_token, lambda: scores[0].within(0, 1)):
        with pytest.raises(ModelError, match="the tokens of the response 'It’s' can't be found in its text"):
            asked()
    assert [token.text for token in scores[1].per_token()]


def test_tokens_come_with_their_signals(verifier):
    (score,) = verifier.score(["Hi"], ["The é"], stats=SIGNAL_STATS, token_spans=True)
    tokens = score.per_token()
    assert [t.id for t in tokens] == list(score.token_ids)
    assert [(t.start, t.end) for t in tokens] == [(0, 3), (3, 4), (4, 5), (4, 5)]
    assert [t.text for t in tokens] == ["The", " ", "\ufffd", "\ufffd"]
    assert sum(t.logprob for t in tokens) == pytest.approx(score.sum_logprob)
    assert sum(t.entropy for t in tokens) / 4 == pytest.approx(score.mean_entropy)
    assert sum(t.top1 for t in tokens) / 4 == score.top1_rate
    with pytest.raises(ValueError, match="token_spans=True"):
        verifier.score(["Hi"], ["The"])[0].per_token()
    (plain,) = verifier.score(["Hi"], ["The"], token_spans=True)
    assert plain.per_token()[0].entropy is plain.per_token()[0].top1 is None


def test_a_first_choice_is_the_most_likely_token(verifier):
    letters = [chr(code) for code in range(ord("!"), ord("~"))]
    firsts = 0
    for prompt in ("Where?", "Hi", "What is it?", "Why", "When"):
        ids = torch.tensor([verifier.renderer.prompt_ids(prompt)])
        choice = int(verifier.model(ids).logits[0, -1].argmax())
        scores = verifier.score([prompt] * len(letters), letters, stats=SIGNAL_STATS, token_spans=True)
        for score in scores:
            (token,) = score.per_token()
            assert token.top1 == (token.id == choice)
            assert score.top1_rate == token.top1
            firsts += token.top1
    assert firsts > 0


def test_a_part_is_scored_by_the_tokens_that_overlap_it(verifier):
    text = "The capital is Paris, é."
    (score,) = verifier.score(["Where?"], [text], stats=SIGNAL_STATS, token_spans=True)
    start = text.index("Paris")
    part = score.within(start, start + 5)
    inside = [t for t in score.per_token() if t.start < start + 5 and t.end > start]
    assert part.per_token() == inside
    assert part.sum_logprob == pytest.approx(sum(t.logprob for t in inside))
    assert part.mean_entropy == pytest.approx(sum(t.entropy for t in inside) / len(inside))
    assert part.num_bytes == len(" Paris")  # the token holds the space
    assert score.within(22, 23).num_tokens == 2  # both bytes of é
    assert score.within(0, len(text)).as_dict() == score.as_dict()
    assert "not within the response's 24 characters" in score.within(20, 25).unscorable
    assert "not within" in score.within(3, 3).unscorable
    assert verifier.score(["Where?"], [""], token_spans=True)[0].within(0, 1).unscorable == "the response is empty"


def test_the_end_of_the_turn_is_scored_where_the_response_ended_by_itself(verifier):
    prompts, responses, finished = ["Hi"] * 3, ["Paris"] * 3, [True, False, None]
    scores = verifier.score(prompts, responses, finished=finished, score_end_of_turn=True, token_spans=True)
    plain = verifier.score(["Hi"], ["Paris"])[0]
    end = verifier.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert scores[0].token_ids == (*plain.token_ids, end)
    assert scores[1].token_ids == scores[2].token_ids == plain.token_ids
    ids = torch.tensor([[*verifier.renderer.prompt_ids("Hi"), *plain.token_ids]])
    want = verifier.model(ids).logits[0, -1].log_softmax(-1)[end]
    assert float(scores[0].tokens.logprob[-1]) == pytest.approx(float(want), abs=1e-5)
    assert (scores[0].per_token()[-1].start, scores[0].per_token()[-1].end) == (5, 5)
    assert [s.finished for s in scores] == finished
    assert verifier.score(prompts, responses, finished=finished)[0].token_ids == plain.token_ids
    assert verifier.score(["Hi"], [""], finished=[True], score_end_of_turn=True)[0].unscorable
    with pytest.raises(ValueError, match="1 values for 3 responses"):
        verifier.score(prompts, responses, finished=[True])


def test_a_stream_is_scored_in_order_and_read_no_further_than_a_chunk(verifier):
    read = []

    def pairs():
        for i in itertools.count():
            read.append(i)
            yield ("Hi", "", None) if i == 3 else (f"Where is {i}?", "Paris is" + " nice" * (i % 3), True)

    stream = verifier.score_stream(pairs(), chunk_size=4, score_end_of_turn=True)
    scores = list(itertools.islice(stream, 6))
    assert len(read) == 8
    for i, score in enumerate(scores):
        if i == 3:
            assert score.unscorable == "the response is empty"
            continue
        (alone,) = verifier.score(
            [f"Where is {i}?"], ["Paris is" + " nice" * (i % 3)], finished=[True], score_end_of_turn=True
        )
        assert score.token_ids == alone.token_ids
        assert score.mean_logprob == pytest.approx(alone.mean_logprob, abs=1e-5)
    assert len(list(verifier.score_stream([("a", "b"), ("c", "d"), ("e", "f")], chunk_size=2))) == 3
    assert list(verifier.score_stream([])) == []


def test_scores_turn_into_tables(verifier):
    scores = verifier.score(
        ["Hi"] * 2, ["The é", ""], stats=SIGNAL_STATS, token_spans=True, finished=[False, None]
    )
    frame = to_frame(scores)
    assert list(frame.columns) == [*SIGNALS, "finished", "unscorable"]
    assert frame["mean_logprob"][0] == scores[0].mean_logprob
    assert math.isnan(frame["mean_logprob"][1])
    assert frame["unscorable"][1] == "the response is empty"
    tokens = tokens_to_frame(scores)
    assert list(tokens["response"]) == [0] * 4
    assert tokens["logprob"].sum() == pytest.approx(scores[0].sum_logprob)
    assert to_frame([]).empty
    assert isinstance(tokens_to_frame([]), pandas.DataFrame)


def test_a_perplexity_beyond_every_number_is_infinite():
    from cme_kernels import TokenStats

    assert ResponseScore(TokenStats(torch.tensor([-1e4])), (1,), 1).perplexity == math.inf


def test_text_that_is_no_unicode_is_not_scored(verifier):
    scores = verifier.score(["Hi", "\udc00", "Hi"], ["\ud83d", "Paris", "Paris"])
    assert scores[0].unscorable == "the response is not valid Unicode: it holds half of a surrogate pair"
    assert scores[1].unscorable.startswith("the prompt is not valid Unicode")
    assert scores[2].mean_logprob is not None


def test_a_huge_response_is_not_even_tokenised(verifier, monkeypatch):
    seen = []
    original = Renderer.response_ids
    monkeypatch.setattr(
        Renderer, "response_ids", lambda self, text, **how: seen.append(len(text)) or original(self, text, **how)
    )
    scores = verifier.score(["Hi", "Hi", "x" * 10**6], ["é " * 10**6, "Paris", "Paris"])
    assert scores[0].unscorable == "the response's 2000000 characters exceed the verifier's context of 256"
    assert scores[2].unscorable.startswith("the prompt's 1000000 characters exceed")
    assert scores[1].mean_logprob is not None
    assert seen == [5]


def test_a_template_that_refuses_a_conversation_spoils_that_one_alone():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('roles must alternate') if messages|length > 1 }}" + tiny.CHAT_TEMPLATE
    )
    verifier = Verifier.of(tiny.llama(), tokenizer)
    twice = [{"role": "user", "content": "Hi"}] * 2
    scores = verifier.score([twice, "Hi"], ["Paris", "Paris"])
    assert "refuses the prompt" in scores[0].unscorable
    assert "roles must alternate" in scores[0].unscorable
    assert scores[1].mean_logprob is not None


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    with pytest.raises(ModelError, match="does not belong to this model"):
        Verifier.of(tiny.llama(vocab_size=200), tiny.tokenizer())


def test_a_padded_vocabulary_is_fine_and_an_added_token_without_a_row_is_not_scored():
    tokenizer = tiny.tokenizer()
    rows = tokenizer.vocab_size
    tokenizer.add_tokens("<image>")
    padded = Verifier.of(tiny.llama(vocab_size=rows + 60), tokenizer)
    assert padded.score(["Hi"], ["Paris"])[0].mean_logprob is not None
    exact = Verifier.of(tiny.llama(vocab_size=rows), tokenizer)
    scores = exact.score(["Hi", "Hi"], ["An <image>", "Paris"])
    assert scores[0].unscorable == f"the verifier has no token {rows}: its vocabulary has {rows}"
    assert scores[1].mean_logprob is not None


def test_a_head_with_fewer_rows_than_the_embedding_limits_the_vocabulary():
    model = tiny.llama()
    model.lm_head = torch.nn.Linear(64, 250, bias=False)
    model.config.vocab_size = 250
    with pytest.raises(ModelError, match=r"303 tokens and the model only 250"):
        Verifier.of(model, tiny.tokenizer())
