import pytest
from tiny import tokenizer

from cme.rendering import PLAIN_TEMPLATE, Renderer, text_of


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
