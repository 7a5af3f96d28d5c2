"""Options of `cme eval correctness`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cme.evaluation.options import Generation
from cme.files.records import Columns
from cme.options import ModelOptions, number, option, positive, template_variables, unescaped

_RESPONSES, _LABELS, _MODELS, _RUN = "the responses", "what is right in a file", "the models", "the run"


def _label(help: str) -> Any:
    return option(None, help, group=_LABELS, metavar="NAME")


@dataclass(frozen=True)
class Samples(Generation):
    """Responses of the generator, in its own template."""

    template: str = "auto"


@dataclass(frozen=True)
class Options:
    """A run of `cme eval correctness`. The seed is that of samples, of random weights and of folds."""

    data: str = option(help="a file, or a task's name (below)", positional=True, metavar="DATA")
    output: Path = option(help="folder for the results", short="-o", metavar="DIR")
    verifier: str = option(help="hub id, local folder or demo model", metavar="MODEL")
    generator: str | None = option(
        None, "samples the responses; its own likelihood is a control", group=_RESPONSES, metavar="MODEL"
    )
    split: Literal["train", "held_out", "all"] = option("held_out", "of a task", group=_RESPONSES)
    limit: int | None = option(
        None, "the first N questions only (default: all)", group=_RESPONSES, type=positive, metavar="N"
    )
    generation: Samples = Samples(samples=4, max_new_tokens=64, temperature=1.0, batch_size=64)
    columns: Columns = Columns()
    matcher: str | None = _label("of gold answers (below)")
    correct_column: str | None = _label("true or false, or a list (default: correct)")
    answer_column: str | None = _label("gold answer, or a list of accepted ones (default: answer, answers)")
    choices_column: str | None = _label("the options (default: choices)")
    id_column: str | None = _label("unique ids (default: id)")
    models: ModelOptions = ModelOptions()
    template: str = option(
        "auto",
        "of the verifier: chat, or a text with {prompt} and {response} (default: chat if it has a template)",
        group=_MODELS,
        type=unescaped,
        metavar="TEXT",
    )
    verifier_chat_template_kwargs: Mapping[str, Any] = option(
        {},
        "variables of the verifier's chat template; those of the generator's: --chat-template-kwargs",
        group=_MODELS,
        type=template_variables,
        metavar="JSON",
    )
    max_batch_tokens: int = option(
        8192,
        "most tokens in a forward pass; lower it if memory runs out",
        group=_MODELS,
        type=positive,
        metavar="N",
    )
    random_verifiers: int = option(
        1,
        "controls: the verifier's architecture with random weights",
        group=_MODELS,
        type=number(int, at_least=0),
        metavar="N",
    )
    resamples: int = option(10_000, "of the bootstrap", group=_RUN, type=positive, metavar="N")
    overwrite: bool = option(False, "forget an earlier run in the folder", group=_RUN)
    progress: bool = option(True, "show no bar", group=_RUN)

    def settings(self) -> dict[str, Any]:
        """All that results depend on, for JSON."""
        nested = ("generation", "columns", "models")
        free = (*nested, "output", "overwrite", "progress")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        settings = {**own, **asdict(self.columns), **self.models.kwargs(), "seed": self.generation.seed}
        return settings if self.generator is None else {**self.generation.settings(), **settings}
