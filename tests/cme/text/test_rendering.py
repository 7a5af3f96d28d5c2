import json
import re
from pathlib import Path

import chat_templates as templates
import pytest
import trl
from chat_templates import byte_level, sentencepiece, swallowing
from tiny import llama, tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cme.errors import TemplateError
from cme.text.messages import is_continued, text_of
from cme.text.rendering import Renderer, encode_prompt
from cme.text.templates import PLAIN_TEMPLATE
from cme.verifier import Verifier


def decode(ids):
    return tokenizer().decode(ids)


def test_a_chat_template_is_used_where_there_is_one():
    renderer = Renderer.of(tokenizer())
    assert decode(renderer.prompt_ids("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decode(renderer.response_ids("Paris is in France.")) == "Paris is in France."


def test_a_template_that_writes_bos_gets_no_second_one():
    ids = Renderer.of(tokenizer()).prompt_ids("Hi")
    bos = tokenizer().bos_token_id
    assert ids[0] == bos
    assert ids[1] != bos


def test_a_base_model_sees_plain_text_with_the_space_in_the_response():
    renderer = Renderer.of(tokenizer(chat=False))
    assert renderer.template == PLAIN_TEMPLATE
    prompt, response = renderer.prompt_ids("Where?"), renderer.response_ids("Here.")
    assert decode(prompt) == "Question: Where?\nAnswer:"
    assert decode(response) == " Here."
    # tokenised in one piece the text has the same tokens, so the model sees what it was trained on
    assert [*prompt, *response] == tokenizer()("Question: Where?\nAnswer: Here.")["input_ids"]


def test_a_response_that_starts_with_white_space_gets_no_more():
    assert decode(Renderer.of(tokenizer(chat=False)).response_ids(" Here.")) == " Here."


def test_prompt_text_that_looks_like_a_field_stays_text():
    renderer = Renderer.of(tokenizer(chat=False))
    assert "{response}" in decode(renderer.prompt_ids("What is {response}?"))


@pytest.mark.parametrize("response", ["", "  ", "\n", []])
def test_an_empty_response_has_no_tokens(response):
    for chat in (True, False):
        assert Renderer.of(tokenizer(chat)).response_ids(response) == ()


def test_conversations_render_every_turn():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert text_of(messages) == "Be brief.\n\nHi"
    prompt = decode(Renderer.of(tokenizer()).prompt_ids([messages[0], {"role": "user", "content": "Hi"}]))
    assert prompt.index("Be brief.") < prompt.index("Hi")


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🙂👍", "tab\tnew\nline"])
def test_unicode_round_trips(text):
    assert decode(Renderer.of(tokenizer()).response_ids(text)) == text


def test_a_verifier_without_a_chat_template_says_so():
    with pytest.raises(ValueError, match="no chat template: use template='auto'"):
        Renderer.of(tokenizer(chat=False), "chat")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", "must contain"),
        ("{prompt} {prompt} {response}", "once each"),
        ("{prompt} {response}.", "must end with"),
    ],
)
def test_bad_templates_are_named(template, message):
    with pytest.raises(ValueError, match=message):
        Renderer.of(tokenizer(), template)


def qwen2_5():
    return byte_level(templates.QWEN2_5, templates.SPECIAL["qwen"], None, "<|im_end|>")


def qwen3():
    return byte_level(templates.QWEN3, templates.SPECIAL["qwen"], None, "<|im_end|>")


def llama3():
    return byte_level(templates.LLAMA3, templates.SPECIAL["llama3"], "<|begin_of_text|>", "<|eot_id|>")


def gemma2():
    return byte_level(templates.GEMMA2, templates.SPECIAL["gemma"], "<bos>", "<eos>")


def olmo2():
    return byte_level(templates.OLMO2, templates.SPECIAL["olmo"], "<|endoftext|>", "<|endoftext|>")


def mistral():
    return sentencepiece(templates.MISTRAL)


def llama2():
    return sentencepiece(templates.LLAMA2)


def phi3():
    return swallowing(templates.PHI3, templates.SPECIAL["phi3"])


TURNS = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Paris?"},
]
# The prompt as text, and what ends a response
FAMILIES = {
    qwen2_5: (
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
        "Hello.<|im_end|>\n<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n",
        ["<|im_end|>"],
    ),
    qwen3: (
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n",
        ["<|im_end|>"],
    ),
    llama3: (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nParis?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ["<|eot_id|>"],
    ),
    gemma2: (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nParis?<end_of_turn>\n<start_of_turn>model\n",
        ["<end_of_turn>"],
    ),
    olmo2: (
        "<|endoftext|><|user|>\nHi \n<|assistant|>\nHello.<|endoftext|>\n<|user|>\nParis?\n<|assistant|>\n",
        ["<|endoftext|>"],
    ),
    mistral: ("<s>[INST] Hi  [/INST] Hello.</s>[INST] Paris? [/INST]", ["</s>"]),
    llama2: ("<s>[INST] Hi [/INST] Hello. </s><s>[INST] Paris? [/INST]", ["▁", "</s>"]),
    phi3: (
        "<|user|>\nHi <|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nParis?<|end|>\n<|assistant|>\n",
        ["<|end|>"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_render_as_their_templates_say(family):
    tok, (prompt, end) = family(), FAMILIES[family]
    renderer = Renderer.of(tok)
    assert tok.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == prompt
    assert renderer.prompt_ids(TURNS) == tuple(tok(prompt, add_special_tokens=False)["input_ids"])
    assert tok.convert_ids_to_tokens(renderer.end_of_turn_ids) == end


@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not qwen3])
def test_prompt_response_and_end_of_turn_are_the_whole_conversation(family):
    # Whatever white space the template writes at the boundary, which tokenizers treat differently
    tok = family()
    renderer = Renderer.of(tok)
    for response in ("The capital.", "naïve 🙂", "(Paris)"):
        whole = tok.apply_chat_template([*TURNS, {"role": "assistant", "content": response}], tokenize=False)
        ids = tok(whole, add_special_tokens=False)["input_ids"]
        mine = [*renderer.prompt_ids(TURNS), *renderer.response_ids(response), *renderer.end_of_turn_ids]
        assert mine == ids[: len(mine)]
        assert tok.decode(ids[len(mine) :]).strip() == ""


@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not qwen3])
def test_a_response_goes_on_with_the_prompts_last_message(family):
    # Where the template writes a space before a message, none comes into the middle of it
    tok = family()
    renderer = Renderer.of(tok)
    prompt = [*TURNS, {"role": "assistant", "content": "The cap"}]
    start, whole = renderer.prompt_ids(prompt), [*TURNS, {"role": "assistant", "content": "The capital."}]
    assert is_continued(prompt)
    ids = [*start, *renderer.response_ids("ital.", continued=True), *renderer.end_of_turn_ids]
    text = tok.apply_chat_template(whole, tokenize=False)
    mine = "".join(tok.convert_ids_to_tokens(ids))
    assert (
        mine == "".join(tok.convert_ids_to_tokens(tok(text, add_special_tokens=False)["input_ids"]))[: len(mine)]
    )


def test_the_first_token_of_a_response_follows_the_template_and_the_tokenizer():
    def first(tok, template="auto", text="capital"):
        return tok.convert_ids_to_tokens(Renderer.of(tok, template).response_ids(text))[0]

    assert first(byte_level(None, ["</s>"], None, "</s>")) == "Ġcapital"  # PLAIN_TEMPLATE ends with a space
    assert first(byte_level(None, ["</s>"], None, "</s>"), "{prompt}\n{response}") == "Ċ"
    assert first(mistral()) == "▁capital"
    assert first(sentencepiece()) == "▁capital"  # the space that SentencePiece puts there, not a second one
    assert first(sentencepiece(), text=" capital") == "▁capital"
    assert not first(sentencepiece(), "{prompt}{response}").startswith("▁")  # and none where the text has none
    assert not first(sentencepiece(templates.OLMO2)).startswith("▁")
    assert first(sentencepiece(prefix_space=False)) == "▁capital"
    assert not first(sentencepiece(templates.GEMMA2, prefix_space=False)).startswith("▁")


def joining(anchors, unknown=""):
    """A tokenizer that adds a space, and has a token of each anchor with "H" behind it."""
    known = [c for c in "▁\n.a0Hi" if c not in unknown]
    vocab = {token: i for i, token in enumerate(["<unk>", *known, *(f"{c}H" for c in anchors)])}
    bpe = Tokenizer(models.BPE(vocab, [(c, "H") for c in anchors], unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Prepend("▁")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<unk>")


def test_a_response_has_its_own_tokens_or_none():
    def tokens(tok, response):
        return tok.convert_ids_to_tokens(Renderer.of(tok, "{prompt}{response}").response_ids(response))

    for joined in ("", "\n", "\n.a"):
        assert tokens(joining(joined), "Hi") == ["H", "i"]
        assert tokens(joining(joined), "ii") == ["i", "i"]
    assert tokens(joining("", unknown="\n"), "éi") == ["<unk>", "i"]  # not one with what is put before it
    everything = Renderer.of(joining("\n.a0"), "{prompt}{response}")
    assert everything.response_ids("ii")
    with pytest.raises(TemplateError, match="joins the beginning of 'Hi' to whatever it continues"):
        everything.response_ids("Hi")
    spaced = byte_level(None, ["</s>"], None, "</s>")
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokens(spaced, "there")[0] == "t"
    assert tokens(spaced, " capital") == ["Ġcapital"]


def test_no_token_reaches_over_the_boundary():
    # " there" is one token in running text; a prompt that ends with its space keeps it
    renderer = Renderer.of(byte_level(None, ["</s>"], None, "</s>"), "{prompt}{response}")
    prompt, response = renderer.prompt_ids("Hi "), renderer.response_ids("there")
    assert renderer.tokenizer.convert_ids_to_tokens(prompt) == ["Hi", "Ġ"]
    assert renderer.tokenizer.convert_ids_to_tokens(response)[0].startswith("t")


def test_a_response_is_scored_as_it_is_where_the_template_would_trim_it():
    renderer = Renderer.of(llama3())
    assert renderer.tokenizer.decode(renderer.response_ids("  Paris \n")) == "  Paris \n"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, TURNS[0]], "'Be brief.*roles: system, user.*not supported"),
        ([TURNS[0], TURNS[0]], "roles: user, user.*must alternate.*plain template"),
        ([{"role": "user"}], "role 'user' has no content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "holds image: only text"),
        ([], "at least one message"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(messages, reason):
    with pytest.raises(TemplateError, match=f"(?s){reason}"):
        Renderer.of(gemma2()).prompt_ids(messages)


def test_a_default_system_prompt_gives_way_to_a_given_one():
    system = {"role": "system", "content": "Be brief."}
    renderer = Renderer.of(qwen2_5())
    assert "You are Qwen" in renderer.tokenizer.decode(renderer.prompt_ids("Hi"))
    given = renderer.tokenizer.decode(renderer.prompt_ids([system, TURNS[0]]))
    assert given.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "Qwen" not in given


def test_reasoning_is_a_variable_of_the_template():
    def prompt(kwargs):
        renderer = Renderer.of(qwen3(), chat_template_kwargs=kwargs)
        assert renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids) == ["<|im_end|>"]
        assert renderer.identity()["leading_space"] == ""
        return renderer.tokenizer.decode(renderer.prompt_ids("Hi"))

    assert prompt(None).endswith("<|im_start|>assistant\n")
    assert prompt({"enable_thinking": False}).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    # A response may bring its reasoning along, as it would be generated
    thought = "<think>\nFrance.\n</think>\n\nParis"
    assert qwen3().decode(Renderer.of(qwen3()).response_ids(thought)) == thought


def test_a_verifier_hands_variables_to_its_template():
    model = llama(vocab_size=400)
    verifier = Verifier.of(model, qwen3(), chat_template_kwargs={"enable_thinking": False})
    assert "</think>" in verifier.renderer.tokenizer.decode(verifier.renderer.prompt_ids("Hi"))


def partial(text):
    return [TURNS[0], {"role": "assistant", "content": text}]


def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with():
    renderer = Renderer.of(qwen2_5())
    prompt = renderer.prompt_ids(partial("The capital is"))
    assert renderer.tokenizer.decode(prompt).endswith("<|im_start|>assistant\nThe capital is")
    assert encode_prompt(renderer.tokenizer, partial("The capital is")) == list(prompt)


@pytest.mark.parametrize("family", [llama3, mistral, qwen2_5])
def test_white_space_at_the_end_of_an_answer_to_go_on_with_is_kept(family):
    # Templates that trim it would join the last word to the response's first
    renderer = Renderer.of(family())
    for content in ("The capital is \n", [{"type": "text", "text": "The capital is \n"}]):
        assert renderer.tokenizer.decode(renderer.prompt_ids(partial(content))).endswith("The capital is \n")


@pytest.mark.parametrize("family", [qwen2_5, mistral])
@pytest.mark.parametrize("blank", ["", " \n", []])
def test_an_empty_answer_to_go_on_with_only_marks_the_place_of_the_response(family, blank):
    renderer = Renderer.of(family())
    assert renderer.prompt_ids(partial(blank)) == renderer.prompt_ids(TURNS[:1])
    assert encode_prompt(renderer.tokenizer, partial(blank)) == encode_prompt(renderer.tokenizer, TURNS[:1])
    assert not is_continued(partial(blank))
    assert is_continued([TURNS[0], {"role": "assistant", "content": "", "reasoning_content": "France."}])
    assert not is_continued("Hi")
    assert not is_continued([])


def test_a_plain_template_has_an_answer_to_go_on_with_where_the_response_is():
    renderer = Renderer.of(tokenizer(chat=False))
    assert decode(renderer.prompt_ids(partial("The capital is"))) == "Question: Hi \nAnswer: The capital is"
    assert decode(renderer.prompt_ids(partial(" The"))) == "Question: Hi \nAnswer: The"
    assert decode(renderer.response_ids("s are", continued=True)) == "s are"
    assert renderer.prompt_ids(partial("")) == renderer.prompt_ids("Hi ")
    for prompt in ([], partial("The capital is")[1:]):
        with pytest.raises(TemplateError, match="at least one message besides the answer"):
            renderer.prompt_ids(prompt)


def test_a_verifier_knows_which_responses_go_on_with_their_prompts():
    verifier = Verifier.of(llama(vocab_size=500), mistral())
    scores = verifier.score([partial("The"), "Hi"], ["capital"] * 2, token_spans=True)
    spaced, tokens = verifier.renderer.tokenizer.convert_tokens_to_ids("▁capital"), scores[0].per_token()
    assert spaced not in scores[0].token_ids
    assert scores[1].token_ids == (spaced,)
    assert (tokens[0].start, tokens[-1].end) == (0, len("capital"))


UNPACKING = (  # refuses a text with a ValueError
    "{% for m in messages %}{% for (part,) in [m.content] %}<|im_start|>{{ m.role }}\n{{ part.text }}<|im_end|>\n"
    "{% endfor %}{% endfor %}"
)
INSTRUCTED = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('Give instructions first') }}{% endif %}"
    + templates.QWEN2_5
)


@pytest.mark.parametrize("template", [templates.LLAVA, templates.QWEN2_5, UNPACKING])
def test_contents_take_the_form_that_the_template_reads(template):
    renderer = Renderer.of(byte_level(template, templates.SPECIAL["qwen"], None, "<|im_end|>"))
    for content in ("Hi", [{"type": "text", "text": "Hi"}], [{"text": "Hi"}], ({"type": None, "text": "Hi"},)):
        prompt = renderer.prompt_ids([{"role": "user", "content": content}])
        assert "<|im_start|>user\nHi<|im_end|>" in renderer.tokenizer.decode(prompt)


def test_a_template_that_demands_instructions_is_tried_with_some():
    demanding = INSTRUCTED.replace("{{ m.content }}", "{{ ' ' if m.role == 'assistant' }}{{ m.content }}")
    renderer = Renderer.of(byte_level(demanding, templates.SPECIAL["qwen"], None, "<|endoftext|>"))
    assert renderer.identity()["leading_space"] == " "
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids) == ["<|im_end|>"]
    of_parts = INSTRUCTED.replace("{{ m.content }}", "{{ m.content[0].text }}")
    renderer = Renderer.of(byte_level(of_parts, templates.SPECIAL["qwen"], None, "<|endoftext|>"))
    prompt = [{"role": "system", "content": "Be brief."}, TURNS[0]]
    assert "Be brief." in renderer.tokenizer.decode(renderer.prompt_ids(prompt))


def test_a_template_that_knows_prompts_only_ends_turns_with_eos():
    prompts = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('No answers') }}{% endif %}"
    renderer = Renderer.of(
        byte_level(prompts + templates.QWEN2_5, templates.SPECIAL["qwen"], None, "<|endoftext|>")
    )
    assert renderer.identity()["leading_space"] == ""
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids) == ["<|endoftext|>"]


def test_a_template_that_refuses_every_probe_spoils_the_responses_that_depend_on_it():
    weather = "{% if 'weather' not in messages[-1].content %}{{ raise_exception('Only of weather') }}{% endif %}"
    tok = byte_level(weather + templates.QWEN2_5, templates.SPECIAL["qwen"], None, "<|im_end|>")
    verifier = Verifier.of(llama(vocab_size=400), tok)
    going_on = [*TURNS, {"role": "assistant", "content": "The weather is"}]
    scores = verifier.score(["The weather?", going_on, going_on], ["Fine."] * 3, finished=[True, None, True])
    assert "can't be found: the chat template" in scores[0].unscorable
    assert "Only of weather" in scores[0].unscorable
    assert scores[1].mean_logprob == scores[2].mean_logprob is not None
    scores = verifier.score([going_on] * 2, ["Fine."] * 2, finished=[None, True], score_end_of_turn=True)
    assert scores[0].mean_logprob is not None
    assert "can't be found" in scores[1].unscorable
    assert verifier.renderer.identity()["leading_space"] is verifier.renderer.identity()["end_of_turn_ids"] is None


def test_without_a_token_that_ends_turns_only_the_others_are_scored():
    tok = tokenizer(chat=False)
    tok.eos_token = None
    scores = Verifier.of(llama(), tok).score(
        ["Hi"] * 2, ["Paris"] * 2, finished=[True, False], score_end_of_turn=True
    )
    assert "no token that ends a turn" in scores[0].unscorable
    assert scores[1].mean_logprob is not None


IMAGE = [{"type": "text", "text": "See"}, {"type": "image", "image": "x.png"}]


NO_TEXT = [
    ({"content": IMAGE}, "role 'assistant' holds image: only text"),
    ({"content": ["See"]}, "holds str 'See': only text"),
    ({"content": [{"type": "text", "text": None}]}, "holds dict .*: only text"),
    ({"content": 7}, "is int '7', neither a text nor a list"),
    ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "has tool_calls besides"),
]
THINKING = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}


@pytest.mark.parametrize(("message", "reason"), NO_TEXT)
def test_what_is_no_text_is_refused_and_not_left_out(message, reason):
    message = {"role": "assistant", **message}
    chat, plain = Renderer.of(tokenizer()), Renderer.of(tokenizer(chat=False))
    for refused in (
        lambda: chat.response_ids([message]),
        lambda: plain.prompt_ids([TURNS[0], message, TURNS[2]]),
        lambda: plain.prompt_ids([TURNS[0], message]),
    ):
        with pytest.raises(TemplateError, match=reason):
            refused()
    assert text_of([message]) in ("", "See", "Yes")


def test_what_is_no_text_spoils_one_response_alone():
    messages = [{"role": "assistant", **message} for message, _ in NO_TEXT]
    prompts = [[TURNS[0], message, TURNS[2]] for message in messages]
    verifier = Verifier.of(llama(), tokenizer(chat=False))
    scores = verifier.score(
        [*prompts, *["Hi"] * len(messages), "Hi"], [*["Yes"] * len(messages), *([m] for m in messages), "Yes"]
    )
    for score, (_, reason) in zip(scores, [*NO_TEXT, *NO_TEXT], strict=False):
        assert re.search(reason, score.unscorable)
    assert scores[-1].mean_logprob is not None


CALL = {"function": {"name": "f", "arguments": {"city": "Oslo"}}}
# What Arrow makes of it where another row has a zone
ARROW_CALL = {"id": None, "function": {"name": "f", "arguments": {"city": "Oslo", "zone": None}}}


def test_a_chat_template_gets_calls_and_reasoning_and_no_keys_without_a_value():
    renderer = Renderer.of(byte_level(TOOLS, templates.SPECIAL["qwen"], None, "<|im_end|>"))
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    arrow = {**call, "tool_calls": [ARROW_CALL], "name": None, "reasoning_content": None}
    want = renderer.prompt_ids([TURNS[0], call, TURNS[2]])
    assert renderer.prompt_ids([{**TURNS[0], "tool_calls": None}, arrow, TURNS[2]]) == want
    assert '{"city": "Oslo"}' in renderer.tokenizer.decode(want)
    del call["content"]
    assert renderer.prompt_ids([TURNS[0], call, TURNS[2]]) == want


TOOLS = templates.QWEN2_5.replace(
    "{{ m.content }}",
    "{{ m.reasoning_content }}{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
)
ONE_OR_THE_OTHER = templates.QWEN2_5.replace(
    "{{ m.content }}", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
)
TWO_ROLES = templates.QWEN2_5.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
ENDS, BEGINNINGS = (
    templates.QWEN2_5.replace("{{ m.content }}", f"{{{{ m.content.split()[{i}] }}}}") for i in (-1, 0)
)
FIRST_CALL = TOOLS.replace("m.tool_calls | tojson", "m.tool_calls[0] | tojson")
ONLY_THAT_THERE_ARE = TOOLS.replace("m.tool_calls | tojson", "'A call.'")
CAPITALS = TOOLS.replace("m.content or ''", "m.content | tojson | upper")


@pytest.mark.parametrize(
    ("template", "message", "left_out"),
    [
        (
            templates.QWEN2_5,
            {"content": "Yes", "tool_calls": [CALL]},
            "tool_calls of a message of role 'assistant'",
        ),
        (templates.QWEN2_5, {"tool_calls": [CALL]}, "tool_calls"),
        (templates.QWEN2_5, THINKING, "reasoning_content"),
        (templates.QWEN2_5, {"content": "Yes", "thinking": "Hm."}, "thinking"),
        (
            ONE_OR_THE_OTHER,
            {"content": "Yes", "tool_calls": [CALL]},
            "the content of a message of role 'assistant'",
        ),
        (TWO_ROLES, {"role": "tool", "content": "Yes"}, "the content of a message of role 'tool'"),
        (TOOLS, {"content": "Yes", "tool_calls": [CALL]}, None),
        (TOOLS, {"tool_calls": [CALL]}, None),
        (TOOLS, {"content": "Yes", "thinking": "Hm."}, None),
        (TOOLS, {"content": " ", "tool_calls": [CALL]}, None),
        (TWO_ROLES, {"content": "Yes"}, None),
        (ENDS, {"content": "Well, yes"}, "the content of a message of role 'assistant'"),
        (BEGINNINGS, {"content": "Well, yes"}, "the content of a message of role 'assistant'"),
        (ENDS, {"content": "Yes"}, None),
        (FIRST_CALL, {"content": "Yes", "tool_calls": [CALL, CALL]}, "tool_calls"),
        (FIRST_CALL, {"content": "Yes", "tool_calls": [CALL]}, None),
        (FIRST_CALL, {"content": "Yes", "tool_calls": [{"id": 7, "function": {"arguments": "{}"}}]}, None),
        (ONLY_THAT_THERE_ARE, {"content": "Yes", "tool_calls": [CALL]}, "tool_calls"),
        (CAPITALS, {"content": "Yes", "thinking": "Hm.", "reasoning": "Hm."}, None),
        (templates.QWEN3, {"content": "<think>\nHm.\n</think>\n\nYes"}, None),
        (templates.QWEN3, {"content": "Hm.\n</think>\n\nYes "}, None),
        (templates.QWEN3, {"content": "Well, <think>Hm.</think> yes"}, "the content"),
    ],
)
def test_what_the_template_leaves_out_of_a_prompt_is_refused(template, message, left_out):
    renderer = Renderer.of(byte_level(template, templates.SPECIAL["qwen"], None, "<|im_end|>"))
    prompt = [TURNS[0], {"role": "assistant", **message}, TURNS[2]]
    if left_out is None:
        renderer.prompt_ids(prompt)
        return
    with pytest.raises(TemplateError, match=f"leaves out {left_out}"):
        renderer.prompt_ids(prompt)


def test_what_a_template_leaves_out_takes_one_more_rendering_however_long_the_conversation(monkeypatch):
    renderings = []
    apply = PreTrainedTokenizerFast.apply_chat_template

    def counted(*args, **options):
        renderings.append(1)
        return apply(*args, **options)

    renderer = Renderer.of(byte_level(TOOLS, templates.SPECIAL["qwen"], None, "<|im_end|>"))
    call = {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm."}
    renderer.prompt_ids("Hi")  # finds out about the template
    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counted)
    for turns in (1, 20):
        renderings.clear()
        renderer.prompt_ids([TURNS[0], call, {"role": "tool", "content": "4"}] * turns)
        assert len(renderings) == 2


@pytest.mark.parametrize(
    "template", ["hello", "{{ messages | length }}", "{% for m in messages %}{{ m.role }}{% endfor %}"]
)
def test_a_template_that_leaves_the_question_out_is_refused(template):
    with pytest.raises(TemplateError, match="leaves out what is asked, so that no score would depend on it"):
        Renderer.of(byte_level(template, [], None, "</s>"))
    upper = byte_level("{% for m in messages %}{{ m.content | upper }}\n{% endfor %}", ["</s>"], None, "</s>")
    assert upper.decode(Renderer.of(upper).prompt_ids("Hi")) == "HI\n"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("{{ 1 / (messages[-1].content | length - 5) }}", "ZeroDivisionError"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{% if messages[-1].content == 'Loops' %}{{ f() }}{% endif %}",
            "Recursion",
        ),
        ("{% for i in range(messages[-1].content | length * 30000) %}{% endfor %}", "OverflowError"),
    ],
)
def test_whatever_a_template_raises_is_one_responses_problem(fault, reason):
    tok = byte_level(fault + templates.QWEN2_5, templates.SPECIAL["qwen"], None, "<|im_end|>")
    bad, good = Verifier.of(llama(vocab_size=400), tok).score(["Loops", "Hi"], ["Paris"] * 2)
    assert "refuses the prompt 'Loops'" in bad.unscorable
    assert reason in bad.unscorable
    assert good.mean_logprob is not None


def test_variables_of_a_chat_template_are_of_no_use_to_a_plain_one():
    for template in ("auto", "Q: {prompt}\nA: {response}"):
        with pytest.raises(TemplateError, match=r"no variables: leave out chat_template_kwargs .*thinking"):
            Renderer.of(tokenizer(chat=False), template, {"thinking": True})
    Renderer.of(tokenizer(chat=False), "auto", {})


def test_variables_do_not_change_where_a_turn_ends():
    renderer = Renderer.of(qwen2_5(), chat_template_kwargs={"add_generation_prompt": True, "tokenize": True})
    assert renderer.prompt_ids(TURNS) == Renderer.of(qwen2_5()).prompt_ids(TURNS)
    assert renderer.identity()["leading_space"] == ""


def test_the_identity_tells_renderers_apart():
    identities = [
        Renderer.of(tok, template, kwargs).identity()
        for tok, template, kwargs in (
            (qwen3(), "auto", None),
            (qwen3(), "auto", {"enable_thinking": False}),
            (qwen2_5(), "auto", None),
            (qwen2_5(), PLAIN_TEMPLATE, None),
            (qwen2_5(), "Question: {prompt}\nAnswer:{response}", None),
        )
    ]
    texts = [json.dumps(identity) for identity in identities]
    assert len(set(texts)) == len(texts)
    assert json.loads(texts[0]) == Renderer.of(qwen3()).identity()
    assert identities[2] == {
        "kind": "chat",
        "template": templates.QWEN2_5,
        "chat_template_kwargs": {},
        "end_of_turn_ids": list(Renderer.of(qwen2_5()).end_of_turn_ids),
        "leading_space": "",
        "score_thoughts": True,
    }
    assert identities[3]["leading_space"] == " "


def test_what_a_tokenizer_puts_around_a_text_is_kept_before_it_only():
    tok = sentencepiece()
    renderer = Renderer.of(tok, "Q: {prompt} A:{response}")
    start = renderer.prompt_ids("Hi")
    assert start[0] == tok.bos_token_id
    assert tok.decode(start, skip_special_tokens=True) == "Q: Hi A:"
    tok.backend_tokenizer.post_processor = templates.processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)],
    )
    assert tok("Hi")["input_ids"][-1] == tok.eos_token_id
    assert renderer.prompt_ids("Hi") == start
    assert Renderer.of(tok, "<s>Q: {prompt} A:{response}").prompt_ids("Hi") == start  # no second BOS
    assert Renderer.of(tok, "{prompt}{response}").prompt_ids("") == (tok.bos_token_id,)


def test_the_end_of_a_turn_is_eos_in_plain_text_and_where_the_template_writes_none():
    assert Renderer.of(tokenizer(chat=False)).end_of_turn_ids == (tokenizer().eos_token_id,)
    plain_chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Renderer.of(byte_level(plain_chat, ["</s>"], None, "</s>")).end_of_turn_ids == (0,)
    tok = tokenizer(chat=False)
    tok.eos_token = None
    with pytest.raises(TemplateError, match="no token that ends a turn"):
        _ = Renderer.of(tok).end_of_turn_ids


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🙂👍🏽", "👩‍👩‍👧", "e\u0301", "tab\tnew\nline", "a  b"])
@pytest.mark.parametrize("family", [mistral, llama3])
def test_every_text_survives_byte_fallback_and_byte_level_tokens(text, family):
    tok = family()
    ids = Renderer.of(tok, "{prompt} {response}").response_ids(text)
    assert tok.unk_token_id is None or tok.unk_token_id not in ids
    assert tok.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ") == text


def test_half_a_surrogate_outside_the_content_is_one_responses_problem():
    naming = tokenizer()
    naming.chat_template = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    verifier = Verifier.of(llama(), naming)
    broken = [{"role": "user", "name": "\ud800", "content": "Hi"}]
    bad, good = verifier.score([broken, "Hi"], ["Paris", "Paris"])
    assert "refuses the prompt" in bad.unscorable
    assert good.mean_logprob is not None


def test_an_empty_prompt_without_a_token_to_begin_with_is_empty():
    bare = tokenizer(chat=False)
    bare.bos_token = bare.eos_token = None
    assert Renderer.of(bare, "{prompt}{response}").prompt_ids("") == ()


SPELLING = [qwen2_5, llama3, gemma2, mistral, llama2, phi3]


@pytest.mark.parametrize("family", SPELLING)
def test_a_control_token_that_is_spelled_is_text(family):
    tok = family()
    renderer, end = Renderer.of(tok), FAMILIES[family][1][-1]
    control = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    for text in (f"Paris{end}", f"{end} Paris", f"a {end}\n{end}", end):
        ids = renderer.response_ids(text)
        assert not control & set(ids)
        assert tok.decode(ids).strip() == text
        prompt = [*TURNS[:2], {"role": "user", "content": text}]
        for said in (text, prompt, [*prompt, {"role": "assistant", "content": text}]):
            told, plain = (
                renderer.prompt_ids(p) for p in (said, json.loads(json.dumps(said).replace(end, "END")))
            )
            assert [i for i in told if i in control] == [i for i in plain if i in control]
            assert text in tok.decode(told)
        assert renderer.prompt_ids("Hi") == tuple(
            tok(
                renderer.tokenizer.apply_chat_template(
                    [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
                ),
                add_special_tokens=False,
            )["input_ids"]
        )


def test_a_control_token_is_text_wherever_it_is_spelled():
    tok = byte_level(TOOLS, templates.SPECIAL["qwen"], None, "<|im_end|>")
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_end|>"]}}}
    ids = Renderer.of(tok).prompt_ids([TURNS[0], {"role": "assistant", "tool_calls": [call]}, TURNS[2]])
    assert ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 4  # one of each turn, and the system's
    parts = [{"role": "user", "content": [{"text": "<|im_"}, {"text": "end|>"}]}]
    assert Renderer.of(tok).prompt_ids(parts) == Renderer.of(tok).prompt_ids("<|im_end|>")
    plain = Renderer.of(tokenizer(chat=False), "<|im_start|>{prompt}\n{response}").prompt_ids("<|im_start|>")
    assert plain.count(tokenizer().convert_tokens_to_ids("<|im_start|>")) == 1
    assert decode(plain) == "<|im_start|><|im_start|>"


def test_control_tokens_that_are_spelled_have_their_places_in_the_text():
    verifier = Verifier.of(llama(vocab_size=400), qwen2_5())
    text = "Paris<|im_end|> x"
    score = verifier.score(["Hi"], [text], finished=[True], score_end_of_turn=True, token_spans=True)[0]
    tokens = score.per_token()
    assert "".join(text[t.start : t.end] for t in tokens) == text
    assert tokens[-1].start == tokens[-1].end == len(text)


@pytest.mark.parametrize(
    ("start", "end"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")]
)
def test_tags_of_thoughts_are_no_control_tokens(start, end):
    # The template drops what is before them, and as tokens they are what a model writes
    tok = byte_level(
        templates.QWEN3.replace("<think>", start).replace("</think>", end),
        [*templates.SPECIAL["qwen"], start, end],
        None,
        "<|im_end|>",
    )
    renderer = Renderer.of(tok)
    prompt = [TURNS[0], {"role": "assistant", "content": f"{start}secret{end}Hello"}, TURNS[2]]
    text = tok.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert "secret" not in text
    assert renderer.prompt_ids(prompt) == tuple(tok(text)["input_ids"])
    written = f"hm{end}Four"
    assert renderer.response_ids(written) == tuple(tok(written)["input_ids"])
    spelled = f"{written}<|im_end|>"
    ids = renderer.response_ids(spelled)
    assert ids[: ids.index(tok.convert_tokens_to_ids(end)) + 1] == tuple(tok(f"hm{end}")["input_ids"])
    assert tok.eos_token_id not in ids
    verifier = Verifier.of(llama(vocab_size=400), tok)
    tokens = verifier.score(["Hi"], [spelled], token_spans=True)[0].per_token()
    assert [spelled[t.start : t.end] for t in tokens].count(end) == 1
    assert "".join(spelled[t.start : t.end] for t in tokens) == spelled


def test_a_text_with_the_mark_is_refused():
    renderer = Renderer.of(tokenizer())
    for refused in (lambda: renderer.response_ids("a\ufdd0"), lambda: renderer.prompt_ids("\ufdd02\ufdd0")):
        with pytest.raises(TemplateError, match=r"U\+FDD0"):
            refused()


def test_a_tokenizer_that_has_a_control_token_among_its_pieces_can_not_read_it_as_text():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁</s>abc")]
    unigram = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")
    renderer = Renderer.of(tok, "{prompt} {response}")
    assert tok.eos_token_id not in renderer.response_ids("abc")
    with pytest.raises(TemplateError, match="can't read as text"):
        renderer.response_ids("a</s>b")


def test_a_tokenizer_that_is_not_fast_can_not_read_a_control_token_as_text():
    renderer = Renderer.of(ByT5Tokenizer(), "{prompt} {response}")
    assert renderer.tokenizer.decode(renderer.response_ids("Paris")) == " Paris"
    with pytest.raises(TemplateError, match="ByT5Tokenizer can't read it as text"):
        renderer.response_ids("Paris</s>")


def test_a_word_that_also_pads_is_text():
    tok = byte_level(templates.QWEN2_5, templates.SPECIAL["qwen"], None, "<|im_end|>")
    tok.pad_token = "user"
    renderer = Renderer.of(tok)
    assert tok.decode(renderer.response_ids("a user")) == "a user"
    assert tok.decode(renderer.prompt_ids("user")).endswith("user\nuser<|im_end|>\n<|im_start|>assistant\n")


CHATS = [
    path
    for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
    if "training" not in path.name
]


@pytest.mark.parametrize("path", CHATS, ids=[path.stem for path in CHATS])
def test_real_templates_leave_nothing_out_of_an_ordinary_conversation(path):
    tok = tokenizer()
    tok.chat_template = path.read_text(encoding="utf-8")
    renderer = Renderer.of(tok)
    for prompt in ("Hi", TURNS, partial("The capital is")):
        assert renderer.prompt_ids(prompt)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ([TURNS[1], {"role": "tool", "content": "4"}, TURNS[1]], "this one has assistant, tool, assistant"),
        ([TURNS[1], TURNS[1]], "this one has assistant, assistant"),
        ([TURNS[0]], "this one has user"),
        (["Paris"], "str 'Paris'"),
        (None, "the response is NoneType 'None', neither a text nor a list of messages"),
        (TURNS[1], "the response is dict"),
        ([{**THINKING, "reasoning_content": ["Hm."]}], "the reasoning of a message is list"),
    ],
)
def test_a_response_is_a_text_or_one_message_of_the_assistants(response, reason):
    bad, good = Verifier.of(llama(), tokenizer()).score(["Hi", "Hi"], [response, [TURNS[1]]])
    assert reason in bad.unscorable
    assert good.mean_logprob is not None


@pytest.mark.parametrize("prompt", [None, 7, TURNS[0], b"Hi", [None], ["Hi"]])
def test_a_prompt_is_a_text_or_a_list_of_messages(prompt):
    for chat in (True, False):
        bad, good = Verifier.of(llama(), tokenizer(chat)).score([prompt, "Hi"], ["Paris"] * 2)
        assert bad.unscorable
        assert good.mean_logprob is not None


THOUGHT = "<think>\nHm.\n</think>\n\nYes"


@pytest.mark.parametrize(
    ("response", "written", "answer"),
    [
        ([THINKING], THOUGHT, "Yes"),
        ([{**THINKING, "reasoning_content": None, "thinking": "\nHm.\n"}], THOUGHT, "Yes"),
        (THOUGHT, THOUGHT, "Yes"),
        ("Hm.\n</think>\n\nYes", "Hm.\n</think>\n\nYes", "Yes"),
        (" Yes\n", " Yes\n", " Yes\n"),
        ([{**THINKING, "content": ""}], "<think>\nHm.", None),
        ("<think>\nHm.", "<think>\nHm.", None),
    ],
)
def test_thoughts_are_scored_as_they_were_written_or_not_at_all(response, written, answer):
    whole, without = (Renderer.of(tokenizer(), score_thoughts=score) for score in (True, False))
    assert decode(whole.response_ids(response)) == whole.response_text(response) == written
    if answer is None:
        with pytest.raises(TemplateError, match="ends in its thoughts"):
            without.response_ids(response)
    else:
        assert decode(without.response_ids(response)) == without.response_text(response) == answer
