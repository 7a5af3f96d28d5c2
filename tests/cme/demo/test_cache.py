"""The folder of things that were built once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cme.demo import cache


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def fill(work: Path, out: Path) -> None:
    (work / "scratch").write_text("s")
    (out / "deep").mkdir()
    (out / "deep" / "file").write_text("content")


@pytest.mark.parametrize(
    ("cme", "xdg", "expected"),
    [("/x/y", "/z", "/x/y"), (None, "/z", "/z/cme"), ("", "", "~/.cache/cme"), ("~/c", None, "~/c")],
)
def test_cache_folder(monkeypatch, cme, xdg, expected):
    for name, value in {"CME_CACHE": cme, "XDG_CACHE_HOME": xdg}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected).expanduser()


def test_built_once_and_rebuilt_for_another_source(tmp_path):
    folder, calls = tmp_path / "c" / "m", []

    def build(work, out):
        calls.append(work)
        fill(work, out)

    for source in ("a", "a", "b", "b"):
        cache.build_once(folder, source, build)
    assert len(calls) == 2
    assert left_over(folder.parent) == ["m"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "file").write_text("conten"),
        lambda folder: (folder / "deep" / "file").unlink(),
        lambda folder: (folder / "cme-manifest.json").write_text("{"),
        lambda folder: (folder / "cme-manifest.json").write_text("[]"),
        lambda folder: (folder / "cme-manifest.json").unlink(),
    ],
)
def test_damage_is_noticed(tmp_path, damage):
    folder = tmp_path / "m"
    cache.build_once(folder, "a", fill)
    assert cache.is_complete(folder, "a")
    damage(folder)
    assert not cache.is_complete(folder, "a")
    cache.build_once(folder, "a", fill)
    assert (folder / "deep" / "file").read_text() == "content"
    assert left_over(tmp_path) == ["m"]


def test_failed_build_leaves_nothing_and_frees_the_lock(tmp_path):
    def fail(work, out):
        fill(work, out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.build_once(tmp_path / "m", "a", fail)
    assert left_over(tmp_path) == []
    cache.build_once(tmp_path / "m", "a", fill, on_wait=lambda: pytest.fail("still locked"))


BUILD = """
import os, signal, sys, time
from pathlib import Path
from cme.demo.cache import build_once
folder, mode = Path(sys.argv[1]), sys.argv[2]
def build(work, out):
    (out / "part").write_text("x" * 1000)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(folder.parent / "builds.lock", "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
build_once(folder, "a", build, lambda: print("waiting"))
assert (folder / "part").stat().st_size == 1000
"""


def start(folder: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder), mode], stdout=subprocess.PIPE, text=True)


def test_killed_build_is_cleaned_up_by_the_next(tmp_path):
    killed = start(tmp_path / "m", "die")
    assert killed.wait(30) == -signal.SIGKILL
    assert len(left_over(tmp_path)) == 1
    assert not (tmp_path / "m").exists()
    cache.build_once(tmp_path / "m", "a", fill, on_wait=lambda: pytest.fail("the dead process holds the lock"))
    assert left_over(tmp_path) == ["m"]


def test_concurrent_processes_build_once(tmp_path):
    processes = [start(tmp_path / "m", "live") for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "builds.lock").read_text() == "built\n"
    assert "waiting\n" in said
    assert left_over(tmp_path) == ["m"]
