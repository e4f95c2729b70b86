"""The config parser that is evaluating the expression in which a function is called.

MONAI's expressions cannot refer to their parser, but two functions need it: to save the running config, and to evaluate
imports again. So this module finds it on the call stack.
"""

from __future__ import annotations

import inspect

from monai.bundle import ConfigExpression, ConfigParser


def calling_parser() -> ConfigParser:
    """Return the parser from the call stack.

    Raises:
        RuntimeError: not called from an expression or a component of a config.
    """
    frame = inspect.currentframe()
    while frame is not None:
        for name in ("self", "parser"):  # of the parser itself, and of MONAI's commands
            if isinstance(found := frame.f_locals.get(name), ConfigParser):
                return found
        frame = frame.f_back
    raise RuntimeError("expected a call from a bundle's config, found no config parser among the callers")


def import_again() -> None:
    """Evaluate a config's import statements again, after its `path` was set: the first step of `initialize`.

    A parser evaluates all imports first. Those of `tools` then fail silently if a released bundle, which contains
    `tools`, is run from another folder and `tools` is not installed. Called from a config.

    Raises:
        RuntimeError: not called from a config.
    """
    resolver = calling_parser().ref_resolver
    for name, item in resolver.items.items():
        if isinstance(item, ConfigExpression) and item.is_import_statement(item.get_config()):
            resolver.resolved_content[name] = item.evaluate()
