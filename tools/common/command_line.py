"""Paths on the command line: as they were typed, or an error that says how to type them.

Fire makes numbers, lists and booleans out of values that look like them (`2023_01`, `1.10`, `a,b`, `True`), and MONAI's
config parser reads `$`, `@` and `%` at the start of a value, and `#` anywhere in it, as its own signs.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fire import decorators

from tools.common.calling_parser import calling_parser

PATHS = ("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_dir", "ckpt_path", "cache_dir", "pretrained")
TEXTS = ("str", "str | None", "str | Path", "str | Path | None")  # annotations


def keep_text(command: Callable | Mapping[str, Any]) -> Callable | Mapping[str, Any]:
    """Make Fire pass the text arguments of a command, or of all commands of a mapping, as they were typed."""
    if isinstance(command, Mapping):
        return {name: keep_text(one) for name, one in command.items()}
    texts = [p for p in inspect.signature(command).parameters.values() if p.annotation in TEXTS]
    named = [p.name for p in texts if p.kind is not p.VAR_KEYWORD]
    if named:
        decorators.SetParseFn(str, *named)(command)
    if len(named) < len(texts):  # options of any name
        decorators.SetParseFn(str)(command)
    return command


def require_plain_paths() -> None:
    """Check the paths of a config, first of all; called from its `initialize`.

    Raises:
        ValueError: one is no text, or did not arrive as it was typed on the command line.
    """
    parser = calling_parser()
    typed = _typed(sys.argv)
    for key in PATHS:
        if key in parser:
            _require_plain(key, typed.get(key), parser[key])


def _typed(arguments: Sequence[str]) -> dict[str, str]:
    """Options of a command line, by name, of the forms `--name value` and `--name=value`."""
    options = {}
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else following
    return options


def _require_plain(key: str, typed: str | None, found: object) -> None:
    text = str(found) if typed is None else typed
    if not isinstance(found, str | os.PathLike | None):
        raise ValueError(
            f"{key}: found {text}, which is read as the {type(found).__name__} {found!r}, expected a path: "
            f"write ./{text}"
        )
    if typed is None:
        return
    if (typed == "None" or typed[:1] in ("$", "@")) and Path(typed).exists():
        raise ValueError(f"{key}: found {typed}, which is not read as a path, expected ./{typed}")
    if "#" in typed:
        escaped = typed.replace("#", r"\x23")
        raise ValueError(
            f"{key}: found {typed}, in which the config parser reads # as ::, expected a path without it, "
            f"or the expression \"\\$'{escaped}'\""
        )
