"""Exit codes of the commands, the errors that their users are told, and standard streams that break."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TextIO

from cme.errors import CMEError, is_disk_full, is_out_of_memory, is_short_of_memory

_Arguments = ParamSpec("_Arguments")

OK, FAILED, INCOMPLETE, INTERRUPTED = 0, 1, 3, 130
"""Exit codes; 2 is argparse's, for a command line that makes no sense."""


_reserve = [bytearray(2**23)]
"""Memory to explain an error with when there is none left. Until then it takes only addresses."""


def entry_point(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """`main`, which a standard stream that breaks does not end, and too little memory for its imports ends with a
    line in place of a traceback."""

    @functools.wraps(main)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        with _streams_that_may_break():
            try:
                return main(*args, **kwargs)
            except Exception as error:
                _reserve.clear()
                if not is_short_of_memory(error):
                    raise
                print(f"error: {_first_line(error)}. There is too little memory: free some", file=sys.stderr)
                return FAILED

    return guarded


@contextlib.contextmanager
def _streams_that_may_break() -> Iterator[None]:
    out, err = (None if stream is None else _Stream(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
        if out is not None:
            out.flush()
            if out.broken is not None and not isinstance(out.broken, BrokenPipeError):
                print(f"warning: standard output can't be written to ({out.broken.strerror})", file=sys.stderr)


class _Stream:
    """A standard stream whose reader may leave, or whose disk may be full: what can't be said then is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.broken: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[..., Any], *args: str) -> None:
        if self.broken is None:
            try:
                act(*args)
            except OSError as error:
                self.broken = error
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what is flushed at exit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(
    command: Callable[[], int],
    output: Path | None,
    how_to_resume: Callable[[], str],
    if_out_of_memory: str | None = None,
    if_disk_full: str = "Make room",
) -> int:
    """The exit code of `command`. Errors that a user can do something about are told, others raised.

    Args:
        output: what is written to.
        how_to_resume: says so, after an interruption.
        if_out_of_memory: what helps; None lets such an error be raised.
        if_disk_full: what helps.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {how_to_resume()}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        _reserve.clear()
        told = _explanation(error, output, how_to_resume, if_out_of_memory, if_disk_full)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return FAILED


def _explanation(
    error: Exception,
    output: Path | None,
    how_to_resume: Callable[[], str],
    if_out_of_memory: str | None,
    if_disk_full: str,
) -> str | None:
    if isinstance(error, CMEError):
        return str(error)
    if output is not None and is_disk_full(error):
        return f"could not write to {output}: {error}. {if_disk_full}; {how_to_resume()}"
    if if_out_of_memory is not None and (is_short_of_memory(error) or is_out_of_memory(error)):
        return f"out of memory: {_first_line(error)}\n{if_out_of_memory}; {how_to_resume()}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
