"""Options that evaluations have in common. Light, so that a help text is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cme.errors import CMEError
from cme.options import number, option, positive, template_variables, unescaped

_GROUP = "the responses"


@dataclass(frozen=True)
class Generation:
    """Options of responses to prompts. A command without one of these options redefines it as a plain field.

    Attributes:
        template: "chat", a text with {prompt} and, at its end, {response}, or "auto": the model's chat template if
            it has one, else `cme.text.templates.PLAIN_TEMPLATE`.
        batch_size: responses that are drawn together, with random numbers of their own.
    """

    samples: int = option(1, "responses per prompt", group=_GROUP, type=positive, metavar="N")
    max_new_tokens: int = option(512, "most tokens of a response", group=_GROUP, type=positive, metavar="N")
    temperature: float = option(
        0.0, "of the samples; 0 decodes greedily", group=_GROUP, type=number(float, at_least=0), metavar="T"
    )
    top_p: float = option(1.0, "of the samples", group=_GROUP, type=number(float, above=0, at_most=1), metavar="P")
    seed: int = option(0, "of everything that is drawn", group=_GROUP, type=number(int, at_least=0), metavar="N")
    batch_size: int = option(16, "responses that are generated together", group=_GROUP, type=positive, metavar="N")
    template: str = option(
        "auto",
        "chat, or a text with {prompt} and, at its end, {response} (default: a model's chat template if it has "
        "one, else a plain form with questions and answers)",
        group=_GROUP,
        type=unescaped,
        metavar="TEXT",
    )
    chat_template_kwargs: Mapping[str, Any] = option(
        {},
        """variables of the chat template, such as '{"enable_thinking": false}'""",
        group=_GROUP,
        type=template_variables,
        metavar="JSON",
    )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def decoding(self) -> dict[str, Any]:
        """Fields of transformers' GenerationConfig."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def check(self) -> None:
        """Raise CMEError if several responses per prompt would be equal."""
        if self.greedy and self.samples > 1:
            raise CMEError("--temperature 0 gives equal responses: say --samples 1, or a positive temperature")

    def settings(self) -> dict[str, Any]:
        """All that responses depend on, for JSON."""
        idle = ("top_p", "seed") if self.greedy else ()
        settings = {**vars(self), **self.decoding, "chat_template_kwargs": dict(self.chat_template_kwargs)}
        return {name: value for name, value in settings.items() if name not in idle}
