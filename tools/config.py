"""The config that a run used, written beside its results."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import yaml
from monai.bundle import ConfigExpression, ConfigParser

from tools.files import atomic_path

PLAIN = (bool, int, float, str)


def save_config(path: str | Path) -> None:
    """Write the config that is being run as YAML: overlays and command line merged, top-level values resolved.

    The file can be run again as it is. Called from a config's expression, which has no name for the parser that
    evaluates it; so the parser is looked for among the callers.

    Raises:
        RuntimeError: not called from a config.
    """
    if idist.get_rank() > 0:
        return
    parser = _calling_parser()
    config = {key: _resolved(parser, key, value) for key, value in parser.get().items() if key != "_meta_"}
    with atomic_path(path) as temporary, temporary.open("w") as file:
        yaml.safe_dump(config, file, sort_keys=False, width=110)


def import_again() -> None:
    """Evaluate a config's import statements once more, after its `path` was set: the first step of `initialize`.

    A parser evaluates all imports before anything else. Those of `tools` fail then, silently, if a released bundle,
    which holds `tools`, is run from another folder and `tools` is not installed. Called from a config.

    Raises:
        RuntimeError: not called from a config.
    """
    resolver = _calling_parser().ref_resolver
    for name, item in resolver.items.items():
        if isinstance(item, ConfigExpression) and item.is_import_statement(item.get_config()):
            resolver.resolved_content[name] = item.evaluate()


def truth(value: bool | str) -> bool:
    """The command line gives `--resume true` as text, and any text would count as true.

    Raises:
        ValueError: neither true nor false.
    """
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise ValueError(f"found {value!r}, expected true or false")
    return words[str(value).lower()]


def _calling_parser() -> ConfigParser:
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, ConfigParser):
            return found
        frame = frame.f_back
    raise RuntimeError("save_config must be called from an expression of a bundle's config")


def _resolved(parser: ConfigParser, key: str, value: Any) -> Any:
    """The value of a plain expression that was evaluated already; everything else as it stands in the config."""
    if not isinstance(value, str) or not value.startswith(("$", "@")):
        return value
    content = parser.ref_resolver.resolved_content.get(key)
    parts = content if isinstance(content, list) else [content]
    return content if all(isinstance(part, PLAIN) for part in parts) else value
