"""Options of the benchmarks; and what `--benchmark-json` writes: this project's facts of the hardware, and none
that would name a machine."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import environment
from benchmarks.timing import DEVICE


def pytest_addoption(parser: pytest.Parser) -> None:
    """Hook of pytest."""
    parser.addoption(
        "--contestants",
        metavar="TEXT,TEXT",
        help="only those contestants of test_scoring.py whose names contain one of these, and cme",
    )


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Hook of pytest-benchmark."""
    output_json["machine_info"] = environment.hardware(DEVICE)
    output_json.pop("commit_info", None)
