"""Options that evaluations have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cme import command_line


@dataclass(frozen=True)
class Generation:
    """How a model responds to prompts.

    Attributes:
        samples: responses to a prompt.
        temperature: 0 decodes greedily.
        seed: of the samples.
        batch_size: responses that are drawn together, with random numbers of their own.
        template: "chat", a text with {prompt} and, at its end, {response}, or "auto": the model's chat template if
            it has one, else `cme.text.rendering.PLAIN_TEMPLATE`.
        chat_template_kwargs: variables of the chat template.
        dtype: of the weights; None is `cme.models.default_dtype`.
    """

    samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    template: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtype: str | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def decoding(self) -> dict[str, Any]:
        """For `cme.evaluation.generate`."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def settings(self) -> dict[str, Any]:
        """What responses depend on."""
        drawn = {} if self.greedy else {"seed": self.seed}
        return {
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            **self.decoding,
            **drawn,
            "batch_size": self.batch_size,
            "template": self.template,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "dtype": self.dtype,
        }


def add_generation(group: argparse._ArgumentGroup, default: Generation, *, several: bool, template: bool) -> None:
    """The options of a `Generation`, but for `dtype` and `seed`; `samples` and `template` if asked for."""

    def add(name: str, type_: Any, metavar: str, text: str) -> None:
        value = getattr(default, name.replace("-", "_"))
        group.add_argument(
            f"--{name}", type=type_, default=value, metavar=metavar, help=f"{text} (default: {value:g})"
        )

    if several:
        add("samples", command_line.positive, "N", "responses to a prompt")
    add("max-new-tokens", command_line.positive, "N", "most tokens of a response")
    add("temperature", command_line.not_negative, "T", "of the samples; 0 decodes greedily")
    add("top-p", command_line.share_above_zero, "P", "of the samples")
    add("batch-size", command_line.positive, "N", "responses that are generated together")
    if template:
        group.add_argument(
            "--template",
            default=default.template,
            metavar="TEXT",
            help="chat, or a text with {prompt} and, at its end, {response} (default: a model's chat template if "
            "it has one, else a plain form with questions and answers)",
        )
    command_line.add_chat_template_kwargs(group)


def generation_of(arguments: argparse.Namespace, template: str = "auto") -> Generation:
    """From the options of `add_generation`, --seed and --dtype. Raises TemplateError if variables are no JSON."""
    from cme.options import parse_chat_template_kwargs

    a = arguments
    return Generation(
        samples=getattr(a, "samples", 1),
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        top_p=a.top_p,
        seed=a.seed,
        batch_size=a.batch_size,
        template=template,
        chat_template_kwargs=parse_chat_template_kwargs(a.chat_template_kwargs, "--chat-template-kwargs"),
        dtype=a.dtype,
    )
