"""What a command makes of broken streams and of too little memory."""

import subprocess
import sys

import pytest

from cme.command_line import entry_point

TALKS = """
import sys
from cme.command_line import entry_point

@entry_point
def main():
    for _ in range(20_000):
        print("a line")
    print("done", file=sys.stderr)
    return 3

sys.exit(main())
"""


def test_a_full_standard_output_does_not_end_a_command():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", TALKS], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == "done\nwarning: standard output can't be written to (No space left on device)\n"


def test_a_reader_that_leaves_does_not_end_a_command():
    process = subprocess.Popen([sys.executable, "-c", TALKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"done\n"
    process.stderr.close()
    assert process.wait() == 3


def test_a_full_standard_error_does_not_end_a_command():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", TALKS], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout.count("a line\n")) == (3, 20_000)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("/lib/x.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_imports_without_memory_end_in_one_line(error, capsys):
    @entry_point
    def main():
        raise ModuleNotFoundError("Could not import module 'x'") from error

    assert main() == 1
    assert capsys.readouterr().err == "error: Could not import module 'x'. There is too little memory: free some\n"


def test_other_errors_are_not_taken_for_too_little_memory():
    @entry_point
    def main():
        raise ImportError("no module named x")

    with pytest.raises(ImportError, match="no module"):
        main()


def test_training_with_too_little_memory_to_import_it_ends_in_one_line():
    code = (
        "import runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': raise MemoryError\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['train']\n"
        "runpy.run_module('cme.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: MemoryError. There is too little memory: free some\n")
