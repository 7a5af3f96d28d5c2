"""Chat templates that write the date, and a time that stands still for them."""

from __future__ import annotations

import json
from datetime import datetime

from transformers import PreTrainedTokenizerBase

_CODES = [f"%{code}" for code in "aAbBcCdDefFgGhHIjmMnprRStTuUVwWxXyYzZ%"] + [f"%-{code}" for code in "dmyHIMSj"]
"""What a format of time may have: Python's and the C standard's, and glibc's numbers without leading zeros."""


def standing_at(now: datetime, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Arguments for `tokenizer.apply_chat_template` with which its template takes `now` for the present; none if
    it does not ask for the time.

    transformers gives templates the function `strftime_now`, and no function as an argument. A macro of that name
    hides it.
    """
    found = tokenizer.chat_template
    template = found.get("default") if isinstance(found, dict) else found
    if template is None or "strftime_now" not in template:
        return {}
    filters = "".join(f"|replace({json.dumps(code)}, {json.dumps(now.strftime(code))})" for code in _CODES)
    # transformers drops the line break, after which the template's first tag stands at the start of a line
    return {
        "chat_template": f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
    }
