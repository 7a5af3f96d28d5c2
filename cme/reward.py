"""Cross-Model Entropy as a reward function in TRL's form."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from cme.diagnostics import byte_counts, diagnose, distinct_rate, jensen_shannon
from cme.errors import CMEError, TemplateError
from cme.options import parse_chat_template_kwargs, unescaped
from cme.scores import SIGNAL_STATS, ResponseScore
from cme.text.messages import Conversations, Messages, text_of
from cme.verifier import EMPTY_RESPONSE, Verifier

Measure = Callable[[str, Mapping[str, Any]], Mapping[str, float]]
"""Numbers to log about a response, from its text and its row of the dataset. They don't enter the reward."""


class CMEReward:
    """Mean log-likelihood of each response under a frozen verifier, in nats per token (arXiv 2605.29009).

    Pass an instance to TRL: `GRPOTrainer(reward_funcs=[CMEReward("Qwen/Qwen3-0.6B")], ...)`. Each step it logs,
    as metrics `cme/...` and as columns of TRL's completions table, signs of a policy that games the reward:
    repetition, words copied from the prompt, the verifier's entropy, the share of responses without a score.
    """

    __name__ = "cme"  # TRL names the reward's columns after it
    _token_spans = False

    def __init__(
        self,
        verifier: Verifier | str,
        *,
        prompt_column: str | None = None,
        measures: Sequence[Measure] = (),
        canary: Verifier | None = None,
        stop_token_ids: Collection[int] = (),
        **verifier_options: Any,
    ) -> None:
        """
        Args:
            verifier: a Verifier, or the hub id or folder of one.
            prompt_column: column of the dataset that the verifier sees as the prompt; default the policy's own.
            measures: more numbers to log about each response.
            canary: a verifier, best of another family, that has no part in the reward: its likelihood of the same
                responses is logged as `canary`, and the reward minus it as `canary_gap`, which grows where the
                policy finds texts that only the reward's verifier likes.
            stop_token_ids: the policy's tokens at which a response ends. If given, the verifier's end-of-turn
                token is scored, too, of responses whose `completion_ids` (which TRL passes) end with one of them:
                a response that the verifier would have continued then has less likelihood.
            verifier_options: for `Verifier.from_pretrained`, where `verifier` is a name, such as
                `score_thoughts=False` to reward only the answer after the thoughts.

        Raises CMEError for options beside a Verifier, which has its own.
        """
        if verifier_options and not isinstance(verifier, str):
            raise CMEError(f"{', '.join(verifier_options)}: give a loaded verifier its options when you load it")
        self.verifier = (
            Verifier.from_pretrained(verifier, **verifier_options) if isinstance(verifier, str) else verifier
        )
        self.prompt_column = prompt_column
        self.measures = measures
        self.canary = canary
        self.stop_token_ids = frozenset(stop_token_ids)
        self._has_scored = False

    def __call__(
        self,
        prompts: Conversations,
        completions: Conversations,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards in the order of `completions`; None for a response that can't be scored, which TRL then leaves
        out of its group's baseline and gives no advantage. Other arguments that TRL passes are ignored."""
        scores = self.score(prompts, completions, columns)
        self.log(prompts, completions, scores, columns, log_extra, log_metric)
        return [score.mean_logprob for score in scores]

    def score(
        self, prompts: Conversations, completions: Conversations, columns: Mapping[str, Any]
    ) -> list[ResponseScore]:
        """Scores of the responses, each once, with all of SIGNAL_STATS.

        Args:
            columns: of the dataset, and `completion_ids` where the end of the turn is scored.

        Raises CMEError if a column is missing, or if none of the first responses that are not empty can be scored.
        """
        finished = self._finished(columns)
        scores = self.verifier.score(
            verifier_prompts(prompts, columns, self.prompt_column),
            completions,
            stats=SIGNAL_STATS,
            finished=finished,
            score_end_of_turn=finished is not None,
            token_spans=self._token_spans,
        )
        self._check_that_any_can_be_scored(scores)
        return scores

    def log(
        self,
        prompts: Conversations,
        completions: Conversations,
        scores: Sequence[ResponseScore],
        columns: Mapping[str, Any],
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        """Log the diagnostics of scored responses: one column per name, and its mean as a metric."""
        seen = verifier_prompts(prompts, columns, self.prompt_column)
        texts = [self._text(completion) for completion in completions]
        table = self._table(seen, texts, scores, columns)
        table.update(self._canary(seen, completions, self._finished(columns), scores))
        if log_extra is not None:
            for name, values in table.items():
                log_extra(name, values)
        if log_metric is not None and scores:
            for name, values in table.items():
                known = [v for v in values if v is not None]
                if known:
                    log_metric(f"cme/{name}", sum(known) / len(known))
            for name, value in {**self._metrics(scores), **_of_all_texts(seen, texts)}.items():
                log_metric(f"cme/{name}", value)

    def _metrics(self, scores: Sequence[ResponseScore]) -> dict[str, float]:
        """Numbers of all responses together."""
        return {"unscorable_rate": sum(score.unscorable is not None for score in scores) / len(scores)}

    def _text(self, completion: str | Messages) -> str:
        """The text of a completion that is scored; where that is none, the text for people to read."""
        try:
            return self.verifier.renderer.response_text(completion)
        except TemplateError:
            return text_of(completion)

    def _finished(self, columns: Mapping[str, Any]) -> list[bool] | None:
        """Per response True if it ended by itself; None where the end of the turn is not scored."""
        if not self.stop_token_ids:
            return None
        if columns.get("completion_ids") is None:
            raise CMEError("to score the end of the turn the reward needs `completion_ids`, which TRL passes")
        return [len(ids) > 0 and ids[-1] in self.stop_token_ids for ids in columns["completion_ids"]]

    def _check_that_any_can_be_scored(self, scores: Sequence[ResponseScore]) -> None:
        """Raise CMEError if none of the first responses that are not empty can be scored: training would run to
        its end with no reward at all."""
        reasons = [score.unscorable for score in scores if score.unscorable != EMPTY_RESPONSE]
        self._has_scored = self._has_scored or None in reasons
        if reasons and not self._has_scored:
            reason = Counter(reasons).most_common(1)[0][0]
            raise CMEError(f"none of the {len(reasons)} responses of the first step could be scored: {reason}")

    def _table(
        self,
        prompts: Conversations,
        texts: Sequence[str],
        scores: Sequence[ResponseScore],
        columns: Mapping[str, Any],
    ) -> dict[str, list[float | None]]:
        rows: list[dict[str, float | None]] = []
        for i, (response, score) in enumerate(zip(texts, scores, strict=True)):
            row: dict[str, float | None] = {
                "verifier_tokens": float(score.num_tokens),
                "verifier_entropy": score.mean_entropy,
                "verifier_top1_rate": score.top1_rate,
                "bits_per_byte": score.bits_per_byte,
                "empty_rate": float(not response.strip()),
                **diagnose(text_of(prompts[i]), response),
            }
            example = {name: values[i] for name, values in columns.items() if isinstance(values, list)}
            for measure in self.measures:
                row.update(measure(response, example))
            rows.append(row)
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def _canary(
        self,
        prompts: Conversations,
        completions: Conversations,
        finished: Sequence[bool] | None,
        scores: Sequence[ResponseScore],
    ) -> dict[str, list[float | None]]:
        if self.canary is None:
            return {}
        own = [score.mean_logprob for score in scores]
        of_canary = self.canary.score(
            prompts, completions, finished=finished, score_end_of_turn=finished is not None
        )
        other = [score.mean_logprob for score in of_canary]
        gap = [None if a is None or b is None else a - b for a, b in zip(own, other, strict=True)]
        return {"canary": other, "canary_gap": gap}


def _of_all_texts(prompts: Conversations, texts: Sequence[str]) -> dict[str, float]:
    """Diagnostics of a step's responses together, without those for which there are too few words.

    `distinct_n` is the mean over prompts of the distinct n-grams in their responses: low where a group has become
    one text. `byte_divergence` is that of the responses' bytes from their prompts', in bits: a batch brings the
    languages of its prompts, so a change of it is one in how they are answered.
    """
    asked = [text_of(p) for p in prompts]
    groups: dict[str, list[str]] = {}
    for prompt, text in zip(asked, texts, strict=True):
        groups.setdefault(prompt, []).append(text)
    found = {"byte_divergence": jensen_shannon(byte_counts(asked), byte_counts(texts))}
    for n in (1, 2):
        rates = [rate for group in groups.values() if (rate := distinct_rate(group, n)) is not None]
        found[f"distinct_{n}"] = sum(rates) / len(rates) if rates else math.nan
    return {name: value for name, value in found.items() if math.isfinite(value)}


def verifier_prompts(prompts: Conversations, columns: Mapping[str, Any], column: str | None) -> Conversations:
    """The prompts that a verifier sees: the policy's own, or a column. Raises CMEError if it is not there."""
    if column is None:
        return prompts
    if column not in columns:
        have = sorted(k for k, v in columns.items() if isinstance(v, list))
        raise CMEError(f"the dataset has no column {column!r} for the verifier's prompt; it has {have}")
    values: Conversations = columns[column]
    return values


@cache
def _from_environment() -> CMEReward:
    name = os.environ.get("CME_VERIFIER")
    if not name:
        raise CMEError(
            "the reward `cme.reward.cme` takes its verifier from the environment: set CME_VERIFIER to a hub id or "
            "a local folder (and CME_TEMPLATE to a template with {prompt} and {response}, if it needs one)"
        )
    return CMEReward(
        name,
        template=unescaped(os.environ.get("CME_TEMPLATE", "auto")),
        chat_template_kwargs=parse_chat_template_kwargs(
            os.environ.get("CME_CHAT_TEMPLATE_KWARGS"), "CME_CHAT_TEMPLATE_KWARGS"
        ),
        score_thoughts=_score_thoughts(),
        dtype=os.environ.get("CME_DTYPE") or None,
        max_batch_tokens=_max_batch_tokens(),
    )


def _score_thoughts() -> bool:
    value = os.environ.get("CME_SCORE_THOUGHTS") or "true"
    if value not in ("true", "false"):
        raise CMEError(f"CME_SCORE_THOUGHTS={value!r} is neither 'true' nor 'false'")
    return value == "true"


def _max_batch_tokens() -> int | Literal["auto"]:
    value = os.environ.get("CME_MAX_BATCH_TOKENS") or "auto"
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise CMEError(f"CME_MAX_BATCH_TOKENS={value!r} is neither a positive whole number nor 'auto'")
    return int(value)


def cme(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """CMEReward for command lines that take a reward by import path: `--reward-funcs cme.reward.cme`.

    The verifier comes from the environment, and is loaded at the first call: CME_VERIFIER, and where needed
    CME_TEMPLATE, CME_CHAT_TEMPLATE_KWARGS (JSON), CME_SCORE_THOUGHTS (false to score only the answer after them),
    CME_DTYPE and CME_MAX_BATCH_TOKENS.
    """
    return _from_environment()(prompts, completions, **kwargs)
