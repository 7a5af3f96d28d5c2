"""Command lines from dataclasses: an option is stated once, as a field with its type, default and help.

Like transformers' `HfArgumentParser`, whose import alone takes longer than a help text may, with groups, repeated
options and nested dataclasses. `python -m cme.train`, which has TRL's options too, has TRL's parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cme.errors import TemplateError

T = TypeVar("T")

_KEY = "option"


@dataclass(frozen=True)
class _Option:
    help: str
    group: str | None = None
    metavar: str | None = None
    type: Callable[[str], Any] | None = None
    short: str | None = None
    name: str | None = None
    positional: bool = False
    exclusive: str | None = None


def option(default: Any = MISSING, help: str = "", **how: Any) -> Any:
    """A field of a dataclass that is an option: `seed: int = option(0, "of the samples")` is `--seed`.

    A switch is a `bool`: of `progress: bool = option(True, ...)` the option is `--no-progress`. A tuple may be
    repeated, a Literal has choices. Without a default the option is required.

    Args:
        help: without the default, which is added to it unless it says one.
        how: `group`, under whose title it is listed; `metavar`; `type`, which reads the value, where that of the
            field doesn't; `short`, such as "-o"; `name`, where it isn't that of the field;
            `positional`; `exclusive`, a name that options share of which one can be given.
    """
    metadata = {_KEY: _Option(help, **how)}
    if isinstance(default, Mapping | list):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata, hash=False)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """Takes underscores for dashes in the names of options, and keeps the line breaks of its texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        words = [self._dashed(word) for word in given[:end]] + given[end:]
        return super().parse_known_args(words, namespace)

    def _dashed(self, word: str) -> str:
        """An option's name, with dashes. Other words are values, which may begin with dashes as well."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        is_option = any(known.startswith(dashed) for known in self._option_string_actions)
        return dashed + equals + value if name.startswith("--") and is_option else word


def add_options(parser: argparse.ArgumentParser, kind: type, defaults: Any = None) -> None:
    """Add the options of the dataclass `kind`, those of dataclasses in it included.

    `defaults` is an instance whose values are the defaults, in the place of the fields' own.
    """
    groups: dict[str | None, Any] = {None: parser}
    exclusive: dict[str, Any] = {}
    for name, of_field, hint, default in _options(kind, defaults):
        group = groups.get(of_field.group)
        if group is None:
            group = groups[of_field.group] = parser.add_argument_group(of_field.group)
        if of_field.exclusive is not None:
            if of_field.exclusive not in exclusive:
                exclusive[of_field.exclusive] = group.add_mutually_exclusive_group()
            group = exclusive[of_field.exclusive]
        _add(group, name, of_field, hint, default)


def options_of(kind: type[T], namespace: argparse.Namespace, defaults: Any = None) -> T:
    """The instance of `kind` that a parsed command line asks for."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if _KEY in f.metadata:
            value = getattr(namespace, f.name)
            values[f.name] = tuple(value) if isinstance(value, list) else value
        elif dataclasses.is_dataclass(hints[f.name]):
            values[f.name] = options_of(hints[f.name], namespace, _default(f, defaults))
        elif defaults is not None:
            values[f.name] = getattr(defaults, f.name)
    return kind(**values)


def _options(kind: type, defaults: Any) -> Iterable[tuple[str, _Option, Any, Any]]:
    """Name, option, type and default of each, in order."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        default = _default(f, defaults)
        if _KEY in f.metadata:
            yield f.name, f.metadata[_KEY], hints[f.name], default
        elif dataclasses.is_dataclass(hints[f.name]):
            yield from _options(hints[f.name], None if default is MISSING else default)


def _default(f: dataclasses.Field[Any], defaults: Any) -> Any:
    if defaults is not None:
        return getattr(defaults, f.name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _add(group: Any, name: str, of_field: _Option, hint: Any, default: Any) -> None:
    word, kind, text = (of_field.name or name).replace("_", "-"), _plain(hint), _help(of_field, default)
    if kind is bool:
        flag, action = (f"--no-{word}", "store_false") if default is True else (f"--{word}", "store_true")
        group.add_argument(flag, dest=name, action=action, default=default, help=text)
        return
    required = default is MISSING
    how: dict[str, Any] = {"help": text, "default": None if required else default, "metavar": of_field.metavar}
    if get_origin(kind) is Literal:
        how["choices"] = get_args(kind)
        how["metavar"] = of_field.metavar or f"{{{','.join(how['choices'])}}}"
    if of_field.type is not None:
        how["type"] = of_field.type
    elif get_origin(kind) is tuple:
        how["type"] = get_args(kind)[0]
    elif isinstance(kind, type) and not issubclass(kind, Mapping):
        how["type"] = kind
    if get_origin(kind) is tuple:
        how |= {"action": "append", "default": None if required else []}
    if of_field.positional:
        group.add_argument(name, nargs=None if required else "?", **{**how, "metavar": of_field.metavar or name})
    else:
        names = [of_field.short] * (of_field.short is not None) + [f"--{word}"]
        group.add_argument(*names, dest=name, required=required, **how)


def _help(of_field: _Option, default: Any) -> str:
    text = of_field.help.replace("%", "%%")
    unsaid = default is MISSING or isinstance(default, bool) or default in (None, "", (), {})
    if unsaid or "default:" in text:
        return text
    return text + (f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})")


def _plain(hint: Any) -> Any:
    """The type without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def number(
    kind: type[int] | type[float], at_least: float = -math.inf, at_most: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """The type of an option that is a number within bounds."""
    bounds = [f"at least {at_least:g}"] * math.isfinite(at_least) + [f"above {above:g}"] * math.isfinite(above)
    bounds += [f"at most {at_most:g}"] * math.isfinite(at_most)
    what = ("a whole number" if kind is int else "a number") + (f" {', '.join(bounds)}" if bounds else "")

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (at_least <= value <= at_most and value > above):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


def named(text: str) -> tuple[str | None, str]:
    """The name and the value in `[NAME=]VALUE`. A file or folder that exists under the whole text has no name."""
    match = re.fullmatch(r"([\w.-]+)=(.+)", text)
    return (match[1], match[2]) if match and not Path(text).exists() else (None, text)


def model_name(model: str) -> str:
    """The last part of a hub id, or of the path of a folder."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name


positive = number(int, at_least=1)
"""A whole number above zero."""


def parse_chat_template_kwargs(value: str | Mapping[str, Any] | None, option: str) -> dict[str, Any]:
    """Variables of a chat template, from the JSON in which an option or the environment gives them.

    Raises TemplateError, which names `option`, if `value` is no JSON object.
    """
    if not value:
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise TemplateError(f"{option} {value!r} is not JSON: {error}. {_EXAMPLE}") from error
    if not isinstance(found, Mapping):
        raise TemplateError(f"{option} {value!r} is not a JSON object. {_EXAMPLE}")
    return dict(found)


def template_variables(text: str) -> dict[str, Any]:
    """The type of an option that gives the variables of a chat template as JSON."""
    try:
        return parse_chat_template_kwargs(text, "the value")
    except TemplateError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def unescaped(template: str) -> str:
    r"""A template from a command line or the environment, where a line break is written \n and a tab \t."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


_EXAMPLE = """Give names and values, such as '{"enable_thinking": false}'"""


@dataclass(frozen=True)
class ModelOptions:
    """Options of loading models, for `cme.models.load_model`."""

    dtype: str | None = option(
        None,
        "of the weights: float32, bfloat16, float16, or auto, which is the checkpoint's "
        "(default: float32 on a CPU, else auto)",
        group="the models",
        metavar="NAME",
    )
    device: str | None = option(
        None,
        "default: the accelerator if there is one",
        group="the models",
        metavar="NAME",
        exclusive="where the models are",
    )
    trust_remote_code: bool = option(False, "run the code in a model's repository", group="the models")

    def kwargs(self) -> dict[str, Any]:
        """For `load_model`."""
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}


def parse(parser: Parser, kind: type[T], argv: Sequence[str]) -> T:
    """The options that `argv` asks for. Exits like argparse where it makes no sense."""
    add_options(parser, kind)
    return options_of(kind, parser.parse_args(argv))
