"""Commands and options in the documents exist, and so do the files that they link to."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cme.files.records import COLUMNS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/notes/*.md")])
PAGES = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

COMMANDS = (
    *("cme score", "cme eval correctness", "cme eval winrate", "cme eval text", "python -m cme.train"),
    *("python -m experiments.study", "python -m benchmarks", "python -m benchmarks.score_memory"),
    "python -m cme_kernels.inspect",
)
FOREIGN = {"--log-samples", "--reward-funcs", "--contestants", "--help-all"}  # of lm_eval, trl grpo and others


@cache
def options(command):
    flag = "--help-all" if "train" in command else "--help"
    words = [sys.executable, "-m", *command.removeprefix("python -m ").split(), flag]
    return named(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def named(text):
    return {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}


@PAGES
def test_commands_have_the_options_that_they_are_given(page):
    text = re.sub(r"\\\n\s*", "", page.read_text())
    commands = "|".join(re.escape(name) for name in sorted(COMMANDS, key=len, reverse=True))
    for command, rest in re.findall(rf"({commands})(?![\w.])((?:(?!&&|`|\n).)*)", text):
        assert not named(rest) - options(command) - FOREIGN, f"{command}{rest}"
        assert not re.search(r"--\w+_", rest), f"{command}{rest}: dashes, not underscores"


@PAGES
def test_options_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names options that are gone")
    known = FOREIGN.union(*map(options, COMMANDS))
    for name in re.findall(r"`(--[a-z][\w-]*)", page.read_text()):
        assert name in known, name


@PAGES
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_table_of_columns_is_whole():
    text = (ROOT / "docs" / "files.md").read_text()
    assert [name for names in COLUMNS.values() for name in names if f"`{name}`" not in text] == []
