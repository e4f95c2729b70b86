"""Errors as a user should meet them."""

from __future__ import annotations

import sys
from types import TracebackType


def explain_errors() -> None:
    """End an uncaught error with its cause: config parsers wrap it in messages that name only the component."""

    def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        error = root_cause(error)
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)

    sys.excepthook = explain


def root_cause(error: BaseException) -> BaseException:
    """The error that config parsers wrapped, each in a `RuntimeError` of its own."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error
