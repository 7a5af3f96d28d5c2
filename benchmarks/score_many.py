"""`cme score` on many short responses, left alone and killed on the way: `python -m benchmarks.score_many`.

Scores the same file twice, once in one go and once with `kill -9` at given shares of the rows and the same command
again after each. Reports tokens per second, resident memory against rows, and whether both outputs have the same
bytes. Writes results/score-many.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks import environment, results
from cme.demo.models import local_path

OUTPUT = Path(__file__).parent / "results" / "score-many.json"
MODEL = "smollm2-135m-instruct"
GROUP = 8  # responses per prompt
INTERVAL = 5.0  # seconds between looks at the process


@dataclass(frozen=True)
class Look:
    """Rows that were scored and on the disk, and the process's resident memory in MiB, after some seconds."""

    seconds: float
    rows: int
    rss_mib: float


@dataclass(frozen=True)
class Attempt:
    """One process, until it ended or was killed."""

    killed: bool
    seconds: float
    cpu_seconds: float
    looks: list[Look]


def write_input(path: Path, rows: int) -> None:
    """Prompts and responses of 5 to 11 words that are tokens of the verifier, `GROUP` responses per prompt."""
    vocabulary = AutoTokenizer.from_pretrained(local_path(MODEL)).get_vocab()
    words = sorted(token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{3,}", token))
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, 11)))

    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            if row % GROUP == 0:
                prompt = text()
            file.write(json.dumps({"id": row, "prompt": prompt, "response": " " + text()}) + "\n")


def score(data: Path, output: Path, rows: int, kill_at: float, title: str) -> Attempt:
    """Run the command; kill it once it has scored `kill_at` rows."""
    command = [sys.executable, "-m", "cme", "score", str(data), "-o", str(output), "--verifier", MODEL]
    command += ["--template", "{prompt}{response}", "--no-progress"]
    partial = output.with_name(output.name + ".partial")
    looks: list[Look] = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    with open(output.with_suffix(".log"), "a") as log, tqdm(total=rows, desc=title, unit="row") as bar:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        rss = psutil.Process(process.pid)
        while True:
            try:
                process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                done = _rows_in(partial)
                looks.append(Look(time.monotonic() - start, done, rss.memory_info().rss / 2**20))
                bar.update(done - bar.n)
                if done >= kill_at:
                    process.kill()
    killed = process.returncode == -9
    if process.returncode and not killed:
        sys.exit(f"`cme score` failed with {process.returncode}: see {output.with_suffix('.log')}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Attempt(killed, time.monotonic() - start, cpu, looks)


def _rows_in(partial: Path) -> int:
    """Rows in the whole lines of a partial file (its first line is a header)."""
    try:
        lines = partial.read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return 0
    return sum(line.count(b'"mean_logprob"') for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.score_many", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kill-at", type=float, nargs="*", default=[0.3, 0.7], help="shares of the rows")
    parser.add_argument("--folder", type=Path, default=Path("score-many"), help="for the input and outputs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = args.folder / "input.jsonl"
    write_input(data, args.rows)
    outputs = [args.folder / f"{name}.jsonl" for name in ("whole", "killed")]
    for path in outputs:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".partial").unlink(missing_ok=True)

    killed: list[Attempt] = []
    for share in (*args.kill_at, 2.0):  # twice the rows are never reached
        if not killed or killed[-1].killed:
            killed.append(score(data, outputs[1], args.rows, share * args.rows, "killed on the way"))
    whole = score(data, outputs[0], args.rows, 2.0 * args.rows, "in one go")
    identical = outputs[0].read_bytes() == outputs[1].read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(local_path(MODEL))
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    lengths = {
        name: sum(len(tokenizer(row[name])["input_ids"]) for row in rows) for name in ("prompt", "response")
    }
    scoring = [look for look in whole.looks if look.rows]
    document = {
        "hardware": environment.hardware(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "model": MODEL,
        "rows": args.rows,
        "mean_tokens": {name: total / len(rows) for name, total in lengths.items()},
        "response_tokens_per_second": lengths["response"] / whole.seconds,
        "rss_mib": {
            "first": scoring[0].rss_mib,
            "last": scoring[-1].rss_mib,
            "most": max(look.rss_mib for look in scoring),
        },
        "identical": identical,
        "whole": asdict(whole),
        "killed": [asdict(attempt) for attempt in killed],
    }
    results.write(args.output, json.dumps(document) + "\n")
    print(json.dumps({k: v for k, v in document.items() if k not in ("whole", "killed")}, indent=1))
    print("load average:", os.getloadavg())
    if not identical:
        sys.exit("the outputs differ")


if __name__ == "__main__":
    main()
