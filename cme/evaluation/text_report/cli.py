"""The command: options, what is generated once and read again after an interruption, and the output folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from cme.cli import FAILED, INTERRUPTED, OK
from cme.data import prepare
from cme.demo.models import local_path
from cme.errors import CMEError
from cme.evaluation.fingerprint import fingerprint
from cme.evaluation.generate import Sampling
from cme.evaluation.text_report import divergence, output, responses
from cme.evaluation.text_report.compare import byte_drift, check_pairs, compare, text_metrics
from cme.evaluation.text_report.responses import Response
from cme.loading import load_model
from cme.rendering import Messages, text_of

_EPILOG = """\
A is what B is compared with: the start model. Files are .jsonl, .json, .csv or .parquet with columns prompt and
response (or a list of responses), and finished if it is known. With two models of one tokenizer the divergence of
B from A is estimated, too. It and the entropy are over the tokens of the text, without the end of the turn.

The folder gets text.json, text.md, text.png and the responses of each side. Interrupted, the same command goes on
with the responses that are there.

examples:
  cme eval text smollm2-135m-instruct runs/demo/model --prompts capitals --samples 4 --max-new-tokens 20 -o report
  cme eval text before.jsonl after.jsonl -o report
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit codes are those of `cme`."""
    arguments = _parser().parse_args(argv)
    try:
        print(report(arguments))
    except CMEError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the responses that are there", file=sys.stderr)
        return INTERRUPTED
    print(f"written to {arguments.output}")
    return OK


def report(options: argparse.Namespace) -> str:
    """Compare two sides, write the folder, and return the table. Raises CMEError."""
    names = {"a": options.a, "b": options.b}
    if options.prompts is None and not all(map(responses.is_file, names.values())):
        raise CMEError(
            "--prompts is missing: a model needs prompts to respond to (a task's name, a file, or a hub id)"
        )
    rows = [] if options.prompts is None else responses.load_rows(options.prompts, options.max_prompts)
    settings = _settings(options, rows)
    _open(options, settings)
    sides, policies = {}, {}
    for side, name in names.items():
        if responses.is_file(name):
            sides[side] = responses.read_file(name)
            continue
        model, tokenizer = load_model(local_path(name), "generator", dtype=options.dtype)
        policies[side] = divergence.policy_of(model, tokenizer, options.temperature)
        sides[side] = _generated(options, side, policies[side], rows)
    check_pairs(sides["a"], sides["b"])
    metrics = {side: text_metrics(some) for side, some in sides.items()}
    notes = _add_divergence(metrics, sides, policies, rows)
    table = compare(metrics["a"], metrics["b"])
    drift = byte_drift(sides["a"], sides["b"])
    settings["prompts_compared"] = len({r.prompt for r in sides["a"]})
    text = output.markdown(table, drift, settings, notes)
    result = {"settings": settings, "metrics": [asdict(r) for r in table], "byte_drift": drift, "notes": notes}
    (options.output / "text.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (options.output / "text.md").write_text(text)
    output.draw(table, options.output / "text.png")
    return text


def _add_divergence(
    metrics: dict[str, Any], sides: dict[str, list[Response]], policies: dict[str, Any], rows: list[dict[str, Any]]
) -> list[str]:
    """Entropy for each model, and the KL estimates for two; returns what there is to say about it."""
    asked: dict[str, dict[str, str | Messages]] = {}
    for side, policy in policies.items():
        chat = prepare(Dataset.from_dict({"prompt": [row["prompt"] for row in rows]}), policy.tokenizer)["prompt"]
        asked[side] = {text_of(row["prompt"]): prompt for row, prompt in zip(rows, chat, strict=True)}
        metrics[side]["entropy"] = divergence.entropy(policy, asked[side], sides[side])
    if len(policies) < 2:
        return []
    if not divergence.same_tokens(policies["a"].tokenizer, policies["b"].tokenizer):
        return ["no KL divergence: the models have different tokenizers"]
    metrics["b"] |= divergence.kl(policies["b"], policies["a"], asked["b"], sides["b"])
    return ["kl_k1 and kl_k3 estimate KL(B || A) in nats a token, on B's responses without the end of the turn"]


def _generated(options: argparse.Namespace, side: str, policy: Any, rows: list[dict[str, Any]]) -> list[Response]:
    path = options.output / f"responses_{side}.jsonl"
    if path.exists():
        return responses.read(path)
    sampling = Sampling(options.samples, options.max_new_tokens, options.temperature, seed=options.seed)
    done = responses.generate_all(policy.model, policy.tokenizer, rows, sampling, f"responses of {side.upper()}")
    responses.write(path, done)
    return done


def _settings(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that responses depend on: the options, and the models and prompts behind the names in them."""
    models = {side: name for side, name in (("a", options.a), ("b", options.b)) if not responses.is_file(name)}
    asked = json.dumps([row["prompt"] for row in rows], sort_keys=True, default=str)
    return {
        **{k: v for k, v in vars(options).items() if k not in ("output", "overwrite")},
        **{f"files_{side}": fingerprint(local_path(name)) for side, name in models.items()},
        "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
    }


def _open(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Make the folder, or go on in it. Raises CMEError if it holds responses that other settings gave."""
    file = options.output / "settings.json"
    generated = list(options.output.glob("responses_?.jsonl"))
    if options.overwrite:
        for path in generated:
            path.unlink()
    elif generated:
        found = json.loads(file.read_text()) if file.exists() else {}
        differing = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        if differing:
            raise CMEError(
                f"{options.output} holds a comparison with other settings ({', '.join(differing)}): "
                "give another -o, or --overwrite"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cme eval text",
        description="Compare the responses of two models, or in two files, without labels: length, finished and "
        "truncated, empty, repeated, copied from the prompt, distinct n-grams, bytes, entropy, KL.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a model (hub id, local folder, demo model) or a file of responses")
    parser.add_argument("b", metavar="B", help="the same, to compare with A")
    parser.add_argument(
        "--prompts", metavar="FILE_OR_TASK", help="a task (held-out questions), a file, or a hub id"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/text"), help="folder (default: runs/text)")
    parser.add_argument("--max-prompts", type=_positive, metavar="N", help="most prompts (default: all)")
    parser.add_argument("--samples", type=_positive, default=1, help="responses a prompt (default: 1)")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--temperature", type=_above_zero, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--dtype", help="of the weights (default: float32 on a CPU, else the checkpoint's)")
    parser.add_argument("--overwrite", action="store_true", help="generate again what the folder has")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _above_zero(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError
    return value
