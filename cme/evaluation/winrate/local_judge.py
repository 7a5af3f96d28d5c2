"""A local model as the judge: which label is most likely where the verdict stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers.utils import logging

from cme.evaluation.winrate.judges import Reply
from cme.fingerprint import model_files
from cme.models import load_model
from cme.text.rendering import Messages
from cme.verifier import Verifier

LABELS = ("1", "2", "tie")
_LEAD = "Verdict:"
_CHUNK = 16  # calls whose verdicts are lost when the process is killed


@dataclass(frozen=True)
class LocalJudge:
    """The judge's turn begins with "Verdict:", and the verdict is the label that is most likely to follow: one
    forward pass, no sampling, and always in the form that was asked for. It can't reason before it judges.

    Attributes:
        model: hub id, folder, or a model of the demo.
        options: for `cme.models.load_model`.
    """

    model: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.model.rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def identity(self) -> dict[str, Any]:
        folder = self.model
        return {
            "kind": "local",
            "model": self.model,
            "weights": model_files(folder),
            "dtype": self.options.get("dtype"),
            "labels": LABELS,
            "lead": _LEAD,
        }

    def ask(self, texts: Sequence[str], record: Callable[[int, Reply], None]) -> None:
        """In chunks, so that what is judged is kept."""
        for start in range(0, len(texts), _CHUNK):
            for i, reply in enumerate(self._ask(texts[start : start + _CHUNK]), start):
                record(i, reply)

    @cached_property
    def _verifier(self) -> Verifier:
        logging.disable_progress_bar()
        model, tokenizer = load_model(self.model, "judge", **self.options)
        template = "chat" if tokenizer.chat_template else "{prompt} {response}"
        return Verifier.of(model, tokenizer, template=template)

    def _ask(self, texts: Sequence[str]) -> list[Reply]:
        start = time.monotonic()
        questions = [self._question(text) for text in texts for _ in LABELS]
        scores = self._verifier.score(questions, [f" {label}" for label in LABELS] * len(texts))
        seconds = (time.monotonic() - start) / len(texts)
        replies = []
        for i, text in enumerate(texts):
            of_labels = scores[i * len(LABELS) : (i + 1) * len(LABELS)]
            logprobs = [score.sum_logprob for score in of_labels]
            if any(logprob is None for logprob in logprobs):
                problem = next(score.unscorable for score in of_labels if score.unscorable)
                replies.append(Reply(None, "refused", f"{self.model}: {problem}", seconds=seconds))
                continue
            probabilities = {k: math.exp(v) for k, v in zip(LABELS, logprobs, strict=True) if v is not None}
            best = max(probabilities, key=probabilities.__getitem__)
            tokens = len(self._verifier.renderer.prompt_ids(self._question(text)))
            replies.append(
                Reply(
                    f"{_LEAD} {best}",
                    probabilities=probabilities,
                    prompt_tokens=tokens,
                    completion_tokens=0,
                    seconds=seconds,
                )
            )
        return replies

    def _question(self, text: str) -> str | Messages:
        if self._verifier.renderer.template is not None:
            return f"{text}\n{_LEAD}"
        return [{"role": "user", "content": text}, {"role": "assistant", "content": _LEAD}]
