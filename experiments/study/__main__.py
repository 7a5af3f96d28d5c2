"""Runs the study's grid, cell by cell, and writes what it found.

Each cell (a task, a reward, a seed) is a run of `cme.train` in a process of its own, under --runs. What is kept of
it (settings, the numbers of every step, which held-out answers were right) goes to --results, a small file a cell,
as soon as the cell is done; then its weights and checkpoints are deleted. Cells whose files are there are not run
again; one that was interrupted goes on from its checkpoint. Files and runs with other settings than the grid's are
an error, and stay as they are. The report, docs/results.md with its pictures, is written anew after each cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cme.errors import CMEError
from cme.train.folder import RunFolder
from experiments.study import cells, report
from experiments.study.grid import load

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
DOCS = HERE.parents[1] / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 after an error with a message, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m experiments.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "cpu.yaml", help="the grid (default: cpu.yaml)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose names contain this")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the training runs")
    parser.add_argument("--keep-weights", action="store_true", help="leave models and checkpoints in --runs")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of what is kept (default: experiments/results/study, with the grid's name unless it is cpu)",
    )
    parser.add_argument("--report", type=Path, help="the Markdown file (default: docs/results.md, likewise)")
    parser.add_argument("--list", action="store_true", help="list the cells and whether they are done")
    args = parser.parse_args(argv)
    name = "" if args.config.stem == "cpu" else f"-{args.config.stem}"
    args.results = args.results or RESULTS / f"study{name}"
    args.report = args.report or DOCS / f"results{name}.md"
    try:
        _run(args)
    except CMEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    grid = load(args.config)
    planned = [cell.name for cell in grid]
    chosen = [cell for cell in grid if args.only in cell.name]
    if not chosen:
        raise CMEError(f"no cell's name contains {args.only!r}: --list shows them")
    files = {cell.name: args.results / f"{cell.name}.json" for cell in chosen}
    if args.list:
        for cell in chosen:
            print(f"{'done' if files[cell.name].exists() else '    '}  {cell.name}")
        return
    for cell in chosen:
        if files[cell.name].exists():
            kept = json.loads(files[cell.name].read_text(encoding="utf-8"))
            cells.check_settings(cell, kept["settings"], files[cell.name])
    waiting = [cell for cell in chosen if not files[cell.name].exists()]
    with tqdm(total=len(chosen), initial=len(chosen) - len(waiting), desc="study", unit="cell") as bar:
        for cell in waiting:
            bar.set_postfix_str(cell.name)
            cells.save(files[cell.name], cells.run(cell, args.runs / cell.name))
            if not args.keep_weights:
                RunFolder(args.runs / cell.name).drop_weights()
            report.write(args.results, args.report, planned)
            bar.update()
    report.write(args.results, args.report, planned)
    print(f"{len(chosen)} cells are in {args.results}; the report is {args.report}")


if __name__ == "__main__":
    sys.exit(main())
