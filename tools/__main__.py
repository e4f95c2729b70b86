"""`hybridmim COMMAND`, or `python -m tools COMMAND`: the project's commands.

Those of `RUNS` only write a command of `python -m monai.bundle`, and run it. Modules are imported when their command is
called: `--help` reads the text of a function from its file, because an import of PyTorch and MONAI takes seconds.
"""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.commands.runs import RUNS, bundle_folder, start

COMMANDS: dict[str, Any] = {
    "check": "tools.commands.check:check",
    "new_bundle": "tools.commands.new_bundle:new_bundle",
    "plan": "tools.commands.plan:plan",
    "report": "tools.results.report:report",
    "release": "tools.shipping.release:release",
    "serve": "tools.shipping.monailabel:serve",
    "bundles": "tools.commands.bundles:bundles",
    "compare": "tools.commands.compare:compare",
    "datalist": {name: f"tools.commands.datalist:{name}" for name in ("pretrain", "btcv", "brats", "msd")},
    "figures": "tools.results.figures:curves_figure",
    "install": "tools.shipping.install:install",
    "monailabel": "tools.shipping.monailabel:serve",
    "sample_data": "tools.samples.sample_data:sample_data",
    "transfer": {"inspect": "tools.weights.transfer:inspect"},
    "verify": "tools.shipping.verify:verify",
}
NOUNS = {"data": ("dataset_dir", "studies"), "out": ("output_dir", "output", "apps_dir")}
HELP = {"--help", "-h"}


def find(words: Sequence[str]) -> tuple[Any, list[str]]:
    """What `hybridmim WORDS` calls, as `module:name` or a group of such, and the arguments that are left.

    Raises:
        LookupError: there is no such command.
    """
    found, rest = COMMANDS, list(words)
    while isinstance(found, dict) and rest and rest[0] not in HELP:
        name = rest.pop(0).replace("-", "_")
        if name not in found:
            known = (*found, *RUNS) if found is COMMANDS else found
            raise LookupError(f"hybridmim: found {name}, expected one of {', '.join(known)}")
        found = found[name]
    return found, rest


def translate(function: str, words: Sequence[str]) -> list[str]:
    """The nouns `--data`, `--out`, `--bundle` and `--small` in the words of a function; all others are unchanged.

    Raises:
        ValueError: there is no such bundle.
    """
    arguments = _definition(function).args
    own = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    translated, rest = [], iter(words)
    for word in rest:
        noun, equals, value = word.removeprefix("--").partition("=")
        names = [name for name in NOUNS.get(noun, ()) if name in own] if word.startswith("--") else []
        if word.partition("=")[0] == "--bundle":
            folder = str(bundle_folder(value if equals else next(rest, "")))
            translated += [folder] if arguments.vararg else ["--bundle", folder]
        elif word == "--small" and "variant" in own:
            translated += ["--variant", "small"]
        else:
            translated.append(f"--{names[0]}{equals}{value}" if names else word)
    return translated


def help_text(found: Any, words: Sequence[str]) -> str:
    """What `hybridmim WORDS --help` prints."""
    name = " ".join(["hybridmim", *words])
    if isinstance(found, str):
        node = _definition(found)
        usage = f"usage: {name} [--OPTION VALUE ...]   options and their defaults: {ast.unparse(node.args)}"
        return f"{usage}\n\n{ast.get_docstring(node)}\n\n--data and --out stand for the options of folders."
    runs = {key: run.text for key, run in RUNS.items()} if found is COMMANDS else {}
    others = {
        key: ast.get_docstring(_definition(one)) if isinstance(one, str) else " | ".join(one)
        for key, one in found.items()
    }
    lines = [f"  {key.replace('_', '-'):<12} {text.splitlines()[0]}" for key, text in {**runs, **others}.items()]
    return "\n".join([f"usage: {name} COMMAND --data FOLDER --out FOLDER …; {name} COMMAND --help", "", *lines])


def _definition(function: str) -> ast.FunctionDef:
    """A function in the text of its module."""
    module, name = function.split(":")
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)


def main() -> None:
    """Run the command of the command line."""
    words = sys.argv[1:]
    try:
        if words and words[0] in RUNS:
            start(words[0], words[1:])
        found, rest = find(words)
        if not isinstance(found, str) or HELP & set(rest):
            print(help_text(found, words[: len(words) - len(rest)]))
            return
        import fire

        from tools.common.command_line import keep_text

        # MONAI looks for a decoder of GPU machines at every start; the bundles' configs keep it quiet, too
        logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "NvImgCodec")
        module, name = found.split(":")
        function = keep_text(getattr(import_module(module), name))
        fire.Fire(function, command=translate(found, rest), name=name)
    except LookupError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:  # wrong input: the message is enough
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
