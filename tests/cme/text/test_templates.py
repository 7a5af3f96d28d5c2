"""Chat templates for which time stands still."""

from datetime import datetime

import pytest
import tiny

from cme.text.rendering import Renderer
from cme.text.templates import standing_at

NOW = datetime(2026, 1, 5, 7, 8, 9, 123456)
ASKED = [{"role": "user", "content": "Hi"}]


def written(template, now=NOW):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(ASKED, tokenize=False, **standing_at(now, tokenizer))


@pytest.mark.parametrize("code", [*"aAbBcCdDefFgGhHIjmMnprRStTuUVwWxXyYzZ%", "-d", "-m", "-I"])
def test_every_code_of_a_format_is_written_as_python_writes_it(code):
    assert written(f"{{{{ strftime_now('<%{code}>') }}}}") == NOW.strftime(f"<%{code}>")


@pytest.mark.parametrize(
    "template",
    [
        # As Llama 3.1's, as SmolLM3's, and within a macro as gpt-oss's
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}{{ date_string }}",
        "{%- set today = strftime_now('%d %b %Y') -%}\n{{ today }}",
        "{%- macro system() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ system() }}",
        "{% for m in messages %}{{ strftime_now(format='%d %b %Y') }}{% endfor %}",
    ],
)
def test_templates_that_ask_for_the_date_get_the_one_given(template):
    assert written(template) == "05 Jan 2026"


@pytest.mark.parametrize("start", ["\n", "\n\n", "  ", "  {% if true %}x{% endif %}", "a\n"])
def test_the_rest_of_a_template_is_written_as_ever(start):
    template = start + "{{ strftime_now('') }}|{{ messages[0].content }}\n"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    assert written(template) == tokenizer.apply_chat_template(ASKED, tokenize=False)


def test_a_template_without_the_date_is_left_alone_and_one_with_it_is_told_one_time():
    assert standing_at(NOW, tiny.tokenizer()) == {}
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%f') }}" + tokenizer.chat_template
    renderer = Renderer.of(tokenizer)
    assert len({renderer.prompt_ids(f"Hi {i}")[:6] for i in range(5)}) == 1
