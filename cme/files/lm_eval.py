"""Files `samples_….jsonl` that lm-evaluation-harness writes (`lm_eval --log_samples`), as rows of this package.

The format is that of `EvaluationTracker.save_results_samples` (lm_eval/loggers/evaluation_tracker.py). A line is a
document of a benchmark under one of the task's filters:

doc_id, target    its number, and the right answer as a text; of a multiple-choice question the index of the option
arguments         requests: {"gen_args_0": {"arg_0": prompt, "arg_1": continuation or settings}, "gen_args_1": …}
resps             per request a list: of generated texts, or of one pair (log-likelihood, is greedy)
filter, metrics   under which filter the document's metrics, such as "exact_match" or "acc", were computed
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cme.errors import DatasetError

Row = dict[str, Any]

FIELDS = frozenset({"doc_id", "doc", "target", "arguments", "resps", "filtered_resps"})
"""Columns by which a sample file is known."""

METRICS = ("math_verify", "exact_match", "acc", "em", "contains", "pass_at_1", "pass@1", "prompt_level_strict_acc")
"""Metrics that label generated responses: the first that a file has, with values 0 and 1 alone, is taken."""


def read_samples(rows: Iterable[Any], file: str) -> Iterator[Any]:
    """One row per document, with the columns id, prompt, responses, answer, the metrics, and correct.

    Responses are the generated texts, or the options of a multiple-choice question. `correct` holds a label per
    response. Filters differ in how they extract the answer: a response is right if it is under any of them. If a
    metric covers several responses together, or no metric is 0 or 1, there is no column `correct`; the responses
    can be matched with the answers instead.

    Args:
        rows: of the file; those that are no dictionaries are passed on.
        file: its name, for errors.

    Raises:
        DatasetError: a document has another form.
    """
    documents: dict[Any, Row] = {}
    for row in rows:
        if not isinstance(row, dict):
            yield row
        elif row.get("doc_id") not in documents:
            documents[row.get("doc_id")] = row
        else:
            documents[row["doc_id"]] = _merged(documents[row["doc_id"]], row, file)
    metric = _metric(list(documents.values()))
    for row in documents.values():
        try:
            yield _record(row, metric)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _error(file, row, f"lacks the expected form ({type(error).__name__}: {error})") from error
        except DatasetError as error:
            raise _error(file, row, str(error)) from error


def _merged(document: Row, row: Row, file: str) -> Row:
    """Metrics that are 1 under any filter are 1."""
    if document.get("resps") != row.get("resps"):
        raise _error(file, row, "occurs twice, with other responses")
    shared = [name for name in _metrics(row) if _is_label(row[name]) and _is_label(document.get(name))]
    return {**document, **{name: max(document[name], row[name]) for name in shared}}


def _error(file: str, row: Row, why: str) -> DatasetError:
    return DatasetError(f"{file}: the document {row.get('doc_id')!r} {why}")


def _metrics(row: Row) -> list[str]:
    return [name for name in row.get("metrics", METRICS) if name in row]


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def _metric(rows: list[Row]) -> str | None:
    """The metric that labels generated responses."""
    if any(len(resps) > 1 for row in rows for resps in row.get("resps") or ()):
        return None
    return next((name for name in METRICS if all(_is_label(row.get(name)) for row in rows)), None)


def _record(row: Row, metric: str | None) -> Row:
    requests = [_values(arguments) for arguments in _values(row["arguments"])]
    common = {"id": str(row["doc_id"]), "prompt": _prompt(requests[0][0])}
    metrics = {name: row[name] for name in _metrics(row)}
    if not isinstance(row["resps"][0][0], list):
        texts = [str(text).strip() for text in row["resps"][0]]
        label = {} if metric is None else {"correct": [bool(row[metric])]}
        return {**common, "responses": texts, "answer": str(row["target"]), **metrics, **label}
    conditioned = [request for request in requests if request[0] != ""]  # others are for mutual information
    if any(request[0] != requests[0][0] for request in conditioned):
        raise DatasetError("has its options in the prompts, so that its responses are all the same")
    options = [str(request[1]).strip() for request in conditioned]
    right = _right_options(row, options)
    answers = [options[i] for i in sorted(right)]
    labels = [i in right for i in range(len(options))]
    return {**common, "responses": options, "answer": answers, **metrics, "correct": labels}


def _values(items: Any) -> list[Any]:
    return list(items.values() if isinstance(items, Mapping) else items)


def _prompt(prompt: Any) -> Any:
    """A text; or messages, which are written as JSON in a list of one text if they were for a chat API."""
    return json.loads(prompt[0]) if isinstance(prompt, list) else prompt


def _right_options(row: Row, options: list[str]) -> set[int]:
    """The indices of the right options, which the target gives, or one of their texts."""
    target = str(row["target"]).strip()
    try:
        value = ast.literal_eval(target)
    except (SyntaxError, ValueError):
        value = None
    indices = value if isinstance(value, list) else [value]
    right = {i for i in indices if type(i) is int and 0 <= i < len(options)}
    right = right or {i for i, option in enumerate(options) if option == target}
    likelihoods = [float(resps[0][0]) for resps in row["resps"][: len(options)]]
    chosen = likelihoods.index(max(likelihoods))
    if not right or ("acc" in row and row["acc"] != (chosen in right)):
        raise DatasetError(
            f"has the target {row['target']!r}, which does not tell the right ones of its options "
            f"({', '.join(options)}), as in tasks with measures of their own such as truthfulqa_mc2"
        )
    return right
