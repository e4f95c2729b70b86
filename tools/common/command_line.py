"""Options on the command line: as they were meant, or an error that says how to type them.

Fire makes numbers, lists and booleans out of values that look like them (`2023_01`, `1.10`, `a,b`, `True`), and MONAI's
config parser reads `$`, `@` and `%` at the start of a value, and `#` anywhere in it, as its own signs. A key that no
config has is taken by MONAI without a word.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fire import decorators
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from tools.common.calling_parser import calling_parser

PATHS = ("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_dir", "ckpt_path", "cache_dir", "pretrained")
MONAIS = ("initialize", "run", "finalize", *inspect.signature(run).parameters, *DEFAULT_MLFLOW_SETTINGS["configs"])
# Sizes of numbers that MONAI and PyTorch take without a word, or refuse without the key
COUNTS = ("epochs", "batch_size", "crops_per_volume", "log_interval", "swin_window_size")
WHOLE = {**dict.fromkeys(COUNTS, 1), "num_workers": 0, "seed": 0}
LEAST = {**WHOLE, "warmup_epochs": 0, "learning_rate": 0, "weight_decay": 0}
ABOVE = {"clip_norm": 0, "timeout_minutes": 0}
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


def require_options() -> None:
    """Check what was typed on the command line, first of all; called from a config's `initialize`.

    Raises:
        ValueError: a path is no text, or did not arrive as it was typed; no config file has a key; a number of the
            config was replaced by something else; a number is too small, or not whole.
    """
    parser = calling_parser()
    typed = _typed(sys.argv)
    for key in PATHS:
        if key in parser:
            _require_plain(key, typed.get(key), parser[key])
    if "config_file" in typed:
        config = ConfigParser.load_config_files(DefaultParseValue(typed["config_file"]))
        for key in typed:
            if key in parser.get():  # what is not is an option of another program, such as a server's
                _require_key(key, typed, config)
                _require_number(key, parser[key], config.get(key))
    for key in (*LEAST, *ABOVE):
        if key in parser:
            _require_size(key, parser[key])


def _require_key(key: str, typed: Mapping[str, str], config: Mapping[str, Any]) -> None:
    if key not in (*config, *MONAIS) and not any(f"@{key}" in value for value in typed.values()):
        close = get_close_matches(key, config, n=3)
        raise ValueError(
            f"{key}: found on the command line, but in no config file; expected one of their keys"
            + (f": {' or '.join(close)}?" if close else "")
        )


def _require_number(key: str, found: object, default: object) -> None:
    number = isinstance(default, int | float) and not isinstance(default, bool)
    expression = isinstance(found, str) and found.startswith(("$", "@", "%"))
    if number and not expression and (isinstance(found, bool) or not isinstance(found, int | float | None)):
        raise ValueError(f"{key}: found {found!r}, expected a number, such as {default}")


def _require_size(key: str, found: object) -> None:
    if not isinstance(found, int | float):
        return
    if key in ABOVE and not found > ABOVE[key]:
        raise ValueError(f"{key}: found {found}, expected a number above {ABOVE[key]}")
    if key in LEAST and not (found >= LEAST[key] and (key not in WHOLE or float(found).is_integer())):
        kind = "whole number" if key in WHOLE else "number"
        raise ValueError(f"{key}: found {found}, expected a {kind}, {LEAST[key]} or more")


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
