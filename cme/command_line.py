"""What the commands have in common: exit codes, the types and wording of shared options, and what a user is told
of an error. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
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
) -> int:
    """The exit code of `command`. Errors that a user can do something about are told, others raised.

    Args:
        output: what is written to.
        how_to_resume: says so, after an interruption.
        if_out_of_memory: what helps; None lets such an error be raised.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {how_to_resume()}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        _reserve.clear()
        told = _explanation(error, output, how_to_resume, if_out_of_memory)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return FAILED


def _explanation(
    error: Exception, output: Path | None, how_to_resume: Callable[[], str], if_out_of_memory: str | None
) -> str | None:
    if isinstance(error, CMEError):
        return str(error)
    if output is not None and is_disk_full(error):
        return f"could not write to {output}: {error}. Make room; {how_to_resume()}"
    if if_out_of_memory is not None and (is_short_of_memory(error) or is_out_of_memory(error)):
        return f"out of memory: {_first_line(error)}\n{if_out_of_memory}; {how_to_resume()}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def add_models(group: argparse._ArgumentGroup, whose: str = "the weights") -> None:
    """--dtype, --device, --trust-remote-code."""
    group.add_argument(
        "--dtype",
        metavar="NAME",
        help=f"of {whose}: float32, bfloat16, float16, or auto, which is the checkpoint's "
        "(default: float32 on a CPU, else auto)",
    )
    group.add_argument("--device", metavar="NAME", help="default: the accelerator if there is one")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code in a model's repository")


def add_chat_template_kwargs(group: argparse._ArgumentGroup) -> None:
    """--chat-template-kwargs."""
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""variables of the chat template, such as '{"enable_thinking": false}'""",
    )


def add_max_batch_tokens(group: argparse._ArgumentGroup, default: int | None) -> None:
    """--max-batch-tokens; with no default, by the free memory."""
    group.add_argument(
        "--max-batch-tokens",
        type=positive,
        default=default,
        metavar="N",
        help="most tokens in a forward pass; lower it if memory runs out (default: "
        + ("by the free memory)" if default is None else "%(default)s)"),
    )


def add_progress(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """--no-progress."""
    group.add_argument("--no-progress", dest="progress", action="store_false", help="show no bar")


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def not_negative(text: str) -> float:
    """A number from zero on."""
    return _number(text, lambda value: value >= 0, "a number from 0 on")


def above_zero(text: str) -> float:
    """A number above zero."""
    return _number(text, lambda value: value > 0, "a number above 0")


def whole(text: str) -> int:
    """A whole number from zero on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """A number from zero to one."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def share_above_zero(text: str) -> float:
    """A number above zero, at most one."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
