"""Short error messages for users."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

SHOW_TRACEBACK = "HYBRIDMIM_TRACEBACK"  # environment variable: 1 prints the traceback of every error
TOOLS = Path(__file__).resolve().parents[1]


def explain_errors() -> None:
    """Print the cause of an uncaught error as one line at the end.

    Config parsers wrap the cause in errors that name only a component. For wrong input, which this project reports
    itself, only that line is printed; for other errors, the traceback comes first.
    """

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = root_cause(error)
        if os.environ.get(SHOW_TRACEBACK) == "1" or not is_named(cause):
            sys.__excepthook__(kind, error, trace)
        print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)

    sys.excepthook = explain


def root_cause(error: BaseException) -> BaseException:
    """Return the original error inside the `RuntimeError`s of the config parsers."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_named(error: BaseException) -> bool:
    """Whether `tools` or a bundle's scripts raised the error themselves, so that its message is sufficient."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    raised_in = Path(frames[-1].filename).resolve()
    of_a_bundle = raised_in.parent.name == "scripts" and (raised_in.parents[1] / "configs/metadata.json").is_file()
    return raised_in.is_relative_to(TOOLS) or of_a_bundle
