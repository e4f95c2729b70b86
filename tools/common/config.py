"""Saves the config of a run with its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import yaml
from monai.bundle import ConfigParser

from tools.common.calling_parser import calling_parser
from tools.common.files import atomic_path

PLAIN = (bool, int, float, str)


def save_config(path: str | Path) -> None:
    """Write the config that is being run as YAML: overlays and command line merged, top-level values resolved.

    The file can be run again unchanged. Called from a config's expression.

    Raises:
        RuntimeError: not called from a config.
    """
    if idist.get_rank() > 0:
        return
    parser = calling_parser()
    config = {key: _resolved(parser, key, value) for key, value in parser.get().items() if key != "_meta_"}
    with atomic_path(path) as temporary, temporary.open("w") as file:
        yaml.safe_dump(config, file, sort_keys=False, width=110)


def _resolved(parser: ConfigParser, key: str, value: Any) -> Any:
    """Return the value of an expression that was already evaluated to plain data; other values are unchanged."""
    if not isinstance(value, str) or not value.startswith(("$", "@")):
        return value
    content = parser.ref_resolver.resolved_content.get(key)
    parts = content if isinstance(content, list) else [content]
    return content if all(isinstance(part, PLAIN) for part in parts) else value
