"""Runs the study's grid, cell by cell, and writes what it found.

Each cell (a task, a reward, a seed) is a run of `cme.train` in a process of its own, under --runs. What is kept of
it (settings, the numbers of every step, which held-out answers were right) goes to --results, one file per cell,
as soon as the cell is done; then its weights and checkpoints are deleted. --pack moves the files into one archive,
RESULTS.jsonl.xz. A cell that is in either is not run again; one that was interrupted resumes from its checkpoint.
Results and runs with other settings than the grid's are an error, and stay as they are. The report is written anew
after each cell: docs/results.md and its pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cme.errors import CMEError
from cme.train.folder import RunFolder
from experiments.study import cells, report, store
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
    parser.add_argument("--pack", action="store_true", help="run nothing: move finished cells into the archive")
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
        print("\ninterrupted; the same command resumes where this one stopped", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    grid = load(args.config)
    planned = [cell.name for cell in grid]
    chosen = [cell for cell in grid if args.only in cell.name]
    if not chosen:
        raise CMEError(f"no cell's name contains {args.only!r}: --list shows them")
    if args.pack:
        print(f"the finished cells are in {store.pack(args.results)}")
        return
    done = store.read(args.results)
    if args.list:
        for cell in chosen:
            print(f"{'done' if cell.name in done else '    '}  {cell.name}")
        return
    for cell in chosen:
        if cell.name in done:
            cells.check_settings(cell, done[cell.name]["settings"], store.place_of(args.results, cell.name))
    waiting = [cell for cell in chosen if cell.name not in done]
    with tqdm(total=len(chosen), initial=len(chosen) - len(waiting), desc="study", unit="cell") as bar:
        for cell in waiting:
            bar.set_postfix_str(cell.name)
            store.save(args.results, cells.run(cell, args.runs / cell.name))
            if not args.keep_weights:
                RunFolder(args.runs / cell.name).drop_weights()
            report.write(args.results, args.report, planned)
            bar.update()
    report.write(args.results, args.report, planned)
    print(f"{len(chosen)} cells are in {args.results}; the report is {args.report}")


if __name__ == "__main__":
    sys.exit(main())
