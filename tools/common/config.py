"""The config of a run as text, to be saved with its results."""

from __future__ import annotations

from typing import Any

import yaml
from monai.bundle import ConfigParser

from tools.common.calling_parser import calling_parser

PLAIN = (bool, int, float, str)


def config_text() -> str:
    """Return the config that is being run as YAML: overlays and command line merged, top-level values resolved.

    Saved as a file, it can be run again unchanged. Called from a config's expression.

    Raises:
        RuntimeError: not called from a config.
    """
    parser = calling_parser()
    config = {key: _resolved(parser, key, value) for key, value in parser.get().items() if key != "_meta_"}
    return yaml.safe_dump(config, sort_keys=False, width=110)


def _resolved(parser: ConfigParser, key: str, value: Any) -> Any:
    """Return the value of an expression that was already evaluated to plain data; other values are unchanged."""
    if not isinstance(value, str) or not value.startswith(("$", "@")):
        return value
    content = parser.ref_resolver.resolved_content.get(key)
    parts = content if isinstance(content, list) else [content]
    return content if all(isinstance(part, PLAIN) for part in parts) else value
