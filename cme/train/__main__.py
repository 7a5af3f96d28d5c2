"""`python -m cme.train`: a run from the command line, its exit code, and what a user is told of an error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cme.command_line import OK, entry_point, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 after an error with a message, 130 after Ctrl-C."""
    return run(lambda: _train(argv), None, lambda: "nothing had been written")


def _train(argv: Sequence[str] | None) -> int:
    _quiet()
    from cme.train.config import parse  # here, as these imports take seconds, in which one may press Ctrl-C

    options = parse(argv)
    from cme.train.run import train

    output_dir = Path(str(options[2].output_dir))

    def command() -> int:
        train(*options)
        return OK

    return run(
        command,
        output_dir,
        lambda: _how_to_continue(output_dir),
        if_disk_full="Make room (a checkpoint holds the weights and twice their size of optimizer state)",
    )


def _how_to_continue(output_dir: Path) -> str:
    if not output_dir.exists():
        return "nothing had been written"
    return f"continue with the same command and --resume-from-checkpoint latest (the run is in {output_dir})"


def _quiet() -> None:
    # What a user of this command can't act on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


if __name__ == "__main__":
    sys.exit(entry_point(main)())
