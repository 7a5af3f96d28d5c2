"""Options of `cme score`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cme.files.compression import COMPRESSIONS
from cme.files.records import Columns
from cme.files.tables import FORMATS, OUTPUT_FORMATS
from cme.options import ModelOptions, model_name, named, option, positive, template_variables, unescaped

_FILES = f"{{}}, all but .parquet also with {' or '.join(COMPRESSIONS)} at the end; - is JSON lines on standard"
_SCORED, _MODELS, _RUN = "what is scored", "the models", "the run"


@dataclass(frozen=True)
class VerifierName:
    """A verifier as the columns and as `from_pretrained` call it."""

    name: str
    model: str

    @staticmethod
    def parse(text: str) -> VerifierName:
        """From `NAME=MODEL`, or `MODEL`, which is called by the last part of its path."""
        name, model = named(text)
        return VerifierName(name or model_name(model), model)


@dataclass(frozen=True)
class VerifierOptions(ModelOptions):
    """Options of loading and asking the verifiers."""

    device_map: str | None = option(
        None,
        "spread each model over several devices: auto, balanced, balanced_low_0 or sequential",
        group=_MODELS,
        metavar="HOW",
        exclusive="where the models are",
    )
    template: str = option(
        "auto",
        "chat, or a text with {prompt} and {response} (default: the model's chat template if it has one)",
        group=_MODELS,
        type=unescaped,
        metavar="TEXT",
    )
    chat_template_kwargs: Mapping[str, Any] = option(
        {},
        """variables of the chat template, such as '{"enable_thinking": false}'""",
        group=_MODELS,
        metavar="JSON",
        type=template_variables,
    )
    max_batch_tokens: int | None = option(
        None,
        "most tokens in a forward pass; lower it if memory runs out (default: by the free memory, and as it began "
        "where a run is resumed)",
        group=_MODELS,
        metavar="N",
        type=positive,
    )


@dataclass(frozen=True)
class Options:
    """A run of `cme score`."""

    input: Path = option(help=f"{_FILES.format(', '.join(FORMATS))} input", positional=True, metavar="INPUT")
    output: Path = option(
        help=f"{_FILES.format(', '.join(OUTPUT_FORMATS))} output, where an interrupted run can't be resumed",
        short="-o",
        metavar="OUTPUT",
    )
    verifiers: tuple[VerifierName, ...] = option(
        help="hub id or local folder; may be repeated, columns are then called NAME/mean_logprob and so on",
        name="verifier",
        metavar="[NAME=]MODEL",
        type=VerifierName.parse,
    )
    columns: Columns = Columns()
    tokens: bool = option(False, "add a column with every token and its signals", group=_SCORED)
    score_end_of_turn: bool = option(
        False, "score the token that ends the turn, too, where the response ended by itself", group=_SCORED
    )
    prefix: str = option("", "before the names of the added columns", group=_SCORED, metavar="TEXT")
    models: VerifierOptions = VerifierOptions()
    overwrite: bool = option(False, "replace an output, forget an unfinished run", group=_RUN)
    chunk_rows: int = option(
        1024, "most rows to score, and to lose in an interruption, at once", group=_RUN, metavar="N", type=positive
    )
    progress: bool = option(True, "show no bar", group=_RUN)

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share with the run that it continues."""
        models = self.models
        return {
            **asdict(self.columns),
            "score_end_of_turn": self.score_end_of_turn,
            "tokens": self.tokens,
            "prefix": self.prefix,
            "template": models.template,
            "chat_template_kwargs": json.dumps(models.chat_template_kwargs, sort_keys=True),
            "dtype": models.dtype,  # the device is in the verifiers' fingerprints
            "chunk_rows": self.chunk_rows,
            "verifier": {v.name: v.model for v in self.verifiers},
        }
