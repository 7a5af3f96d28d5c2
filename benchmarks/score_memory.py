"""Most memory of `cme score` against the size of its input: `python -m benchmarks.score_memory`.

Inputs are JSONL with a short prompt and response and a long text beside them in each row, so that reading and
writing, not scoring, are what is measured. Writes results/score-memory.json, the figures under a label.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import results

OUTPUT = Path(__file__).parent / "results" / "score-memory.json"
ROW_BYTES = 200_000


def write_input(path: Path, megabytes: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for row in range(megabytes * 1_000_000 // ROW_BYTES):
            text = " ".join(draw.choices(words, k=ROW_BYTES // 7))
            file.write(json.dumps({"id": row, "prompt": "Hi", "response": "Paris", "text": text}) + "\n")


def most_memory(data: Path, output: Path, verifier: str) -> float:
    """MiB of resident memory of one run, libraries and model included."""
    command = [sys.executable, "-m", "cme", "score", str(data), "-o", str(output), "--verifier", verifier]
    process = subprocess.Popen([*command, "--no-progress"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"`cme score` failed with status {status}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.score_memory", description=__doc__)
    parser.add_argument("--verifier", required=True, help="a small model")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[20, 50, 100, 200])
    parser.add_argument("--formats", nargs="*", default=["jsonl", "csv", "parquet"])
    parser.add_argument("--label", default="now")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    document = json.loads(args.output.read_text()) if args.output.exists() else {}
    document["row_bytes"] = ROW_BYTES
    document["versions"] = {name: version(name) for name in ("torch", "transformers", "pyarrow")}
    found = document.setdefault("most_mib", {}).setdefault(args.label, {})
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            data = Path(folder) / f"{megabytes}.jsonl"
            write_input(data, megabytes)
            for suffix in args.formats:
                memory = most_memory(data, Path(folder) / f"{megabytes}-scored.{suffix}", args.verifier)
                found.setdefault(suffix, {})[str(megabytes)] = round(memory)
                print(f"{megabytes} MB to {suffix}: {memory:.0f} MiB", flush=True)
                results.write(args.output, json.dumps(document, indent=1) + "\n")
            data.unlink()


if __name__ == "__main__":
    main()
