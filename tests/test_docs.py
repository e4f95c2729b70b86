"""The documentation says what the code does: commands, keys, defaults, files and links.

Each test is a rule for all pages, and names every page that breaks it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import monai.bundle.scripts as monai_bundle
import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from tools.__main__ import find, translate
from tools.commands.runs import RUNS, build

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/train.yaml"))
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/**/*.md")])
}
WRITTEN = {"config.yaml", "plan.yaml"}  # by a run, by `python -m tools plan`
Scalar = (bool, int, float, str, type(None))


class Command(NamedTuple):
    """A command of a page's code block."""

    page: Path
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {' '.join(self.words)}"

    def after(self, *words: str) -> list[str]:
        """What comes after these neighbouring words, or nothing."""
        for start in range(len(self.words) - len(words) + 1):
            if self.words[start : start + len(words)] == list(words):
                return self.words[start + len(words) :]
        return []

    @property
    def tool(self) -> list[str]:
        """What comes after `hybridmim` or `python -m tools`, or nothing."""
        return self.words[1:] if self.words[0] == "hybridmim" else self.after("-m", "tools")

    @property
    def options(self) -> dict[str, str]:
        """Options of `python -m monai.bundle`; what `torchrun` takes comes before it."""
        words = self.after("-m", "monai.bundle")
        return {word[2:]: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}

    @property
    def bundle(self) -> Path:
        """The bundle that it is about: by `--bundle_root`, else the page's own."""
        root = self.options.get("bundle_root")
        return ROOT / root if root else self.page.parents[1]

    @property
    def configs(self) -> list[Path]:
        """Its config files; `configs/…` is meant inside the bundle's folder."""
        names = yaml.safe_load(self.options.get("config_file", "[]"))
        start = ROOT if "bundle_root" in self.options else self.bundle
        return [start / name for name in ([names] if isinstance(names, str) else names)]

    @property
    def keys(self) -> set[str]:
        """Top-level keys of its config files."""
        return {key for path in self.configs for key in read(path)}


@cache
def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[Command]:
    for page, text in PAGES.items():
        for block in code_blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    words = shlex.split(line)
                    yield Command(page, build(words[1], words[2:]) if is_run(words) else words)


def is_run(words: list[str]) -> bool:
    """Whether this is a command of `hybridmim` that stands for one of `python -m monai.bundle`."""
    return words[0] == "hybridmim" and words[1] in RUNS


MONAI_COMMANDS = [command for command in commands() if command.after("-m", "monai.bundle")]
TOOLS_COMMANDS = [command for command in commands() if command.tool]


def require_none(faults: Iterable[str]) -> None:
    """Fail with every fault, one on each line."""
    faults = list(faults)
    assert not faults, "\n" + "\n".join(faults)


def test_there_are_pages_and_commands():
    assert {ROOT / "README.md", *(bundle / "docs/README.md" for bundle in BUNDLES)} <= PAGES.keys()
    assert len(MONAI_COMMANDS) > 10
    assert len(TOOLS_COMMANDS) > 3


def test_the_readme_is_short_and_leads_to_every_page():
    text = PAGES[ROOT / "README.md"]
    assert len(text.splitlines()) <= 200
    missing = [page for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in text]
    require_none(f"README.md does not link to {page.name}" for page in missing)


def test_commands_run_from_the_root_or_inside_the_bundle():
    faults = []
    for command in MONAI_COMMANDS:
        files = [*command.configs, *(ROOT / path for path in [command.options.get("meta_file")] if path)]
        faults += [f"{command}: no {file}" for file in [command.bundle / "configs", *files] if not file.exists()]
    require_none(faults)


def test_options_of_monai_bundle_are_its_own_or_keys_of_the_configs():
    faults = []
    for command in MONAI_COMMANDS:
        function = getattr(monai_bundle, command.after("-m", "monai.bundle")[0])
        known = {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
        unknown = {re.split("#|::", option)[0] for option in command.options} - known - command.keys
        faults += [f"{command}: unknown {name}" for name in unknown]
    require_none(faults)


def test_the_run_id_is_a_key_of_the_configs():
    runs = [(command, *command.after("-m", "monai.bundle")[:2]) for command in MONAI_COMMANDS]
    require_none(str(command) for command, name, run in runs if name == "run" and run not in command.keys)


def test_no_option_is_null():
    """`null` would reach the config as text."""
    require_none(str(command) for command in MONAI_COMMANDS if "null" in command.options.values())


def test_config_files_that_are_named_exist():
    faults = []
    for page, text in PAGES.items():
        for path in set(re.findall(r"[\w./-]*configs/[\w.-]+\.(?:yaml|json)", text)):
            start = ROOT if path.startswith("bundles/") else page.parents[1] if page.parents[1] in BUNDLES else None
            found = [bundle / path for bundle in BUNDLES] if start is None else [start / path]
            faults += [f"{page}: {path}"] if not any(file.is_file() for file in found) else []
        names = set(re.findall(r"(?<![\w/.-])[\w-]+\.yaml", text)) - WRITTEN
        faults += [f"{page}: {name}" for name in names if not any((b / "configs" / name).is_file() for b in BUNDLES)]
    require_none(faults)


def is_plain(value: Any) -> bool:
    """A scalar, null, or a list of scalars that are no expressions."""
    if isinstance(value, list):
        return all(isinstance(v, Scalar) and not str(v).startswith(("$", "@")) for v in value)
    return isinstance(value, Scalar)


def key_table(bundle: Path) -> str:
    return re.search(r"<!-- keys -->(.*)<!-- /keys -->", PAGES[bundle / "docs/README.md"], re.DOTALL)[1]


def test_the_key_tables_list_every_plain_value_with_its_default():
    for bundle in BUNDLES:
        config = read(bundle / "configs/train.yaml")
        rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", key_table(bundle), re.MULTILINE)
        listed = [(key, yaml.safe_load(default)) for key, default in rows]
        # as text, in which `1`, `1.0` and `true` differ; in the order of train.yaml
        assert list(map(repr, listed)) == [repr(item) for item in config.items() if is_plain(item[1])], bundle.name


def test_the_key_tables_name_every_other_key():
    for bundle in BUNDLES:
        listed = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", key_table(bundle), re.MULTILINE)
        others = [key for key, value in read(bundle / "configs/train.yaml").items() if not is_plain(value)]
        assert sorted(listed) == sorted(others), bundle.name


def test_relative_links_and_pictures_exist():
    faults = []
    for page, text in PAGES.items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]
        faults += [f"{page}: {target}" for target in targets if not leads_somewhere(page, target)]
    require_none(faults)


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    if not file.exists():
        return False
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    return not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def tool(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The function that `hybridmim WORDS` calls, and its arguments."""
    found, rest = find(words)
    module, name = found.split(":")
    return getattr(importlib.import_module(module), name), translate(found, rest)


def refused(words: list[str], complete: bool = True) -> str:
    """Why `hybridmim WORDS` cannot be called so, or nothing; `complete`: with all that it needs."""
    if words[0] in RUNS:
        return ""
    try:
        function, rest = tool(words)
        positional, named = [], {}
        while rest:
            word, *rest = rest
            if word.startswith("--"):
                named[word[2:]], *rest = rest or [""]
            else:
                positional.append(word)
        signature = inspect.signature(function)
        if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):  # as Fire does
            positional = [named.pop(name) for name in signature.parameters if name in named] + positional
        signature.bind(*positional, **named) if complete else signature.bind_partial(**named)
    except (TypeError, LookupError, ValueError) as error:
        return str(error)
    return ""


def test_tools_accept_the_commands():
    found = ((command, refused(command.tool)) for command in TOOLS_COMMANDS)
    require_none(f"{command}: {why}" for command, why in found if why)


def test_tools_commands_in_the_text_exist():
    named = [
        (page, words)
        for page in PAGES
        for words in re.findall(r"`(?:python -m tools|hybridmim) ([a-z][^`]*)`", PAGES[page])
    ]
    named = [(page, re.sub("--bundle (…|NAME)", "--bundle btcv", words)) for page, words in named]
    found = ((page, words, refused(words.split(), complete=False)) for page, words in named)
    require_none(f"{page}: {words}: {why}" for page, words, why in found if why)


SNIPPETS = "\n".join(code_blocks(PAGES[ROOT / "docs/weights.md"], "python"))


def small(snippet: str) -> str:
    """The page's code with the sizes of `small.yaml`, which build faster."""
    config = read(ROOT / "bundles/hybridmim_pretrain/configs/small.yaml")
    features, size = tuple(config["unet_features"]), config["swin_feature_size"]
    snippet, first = re.subn(r"(?m)^features = \(.*?\)", f"features = {features}", snippet)
    snippet, second = re.subn(r"(?m)^feature_size = \d+", f"feature_size = {size}", snippet)
    assert (first, second) == (1, 1)
    return snippet


@pytest.mark.parametrize("overlays", [["small.yaml"], ["swin_unetr.yaml", "small.yaml"]], ids=" ".join)
def test_the_snippets_load_a_backbone_into_the_monai_network(overlays: list[str], monkeypatch: pytest.MonkeyPatch):
    bundle = ROOT / "bundles/hybridmim_pretrain"
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / name for name in ["train.yaml", *overlays]])
    parser["bundle_root"] = str(bundle)
    weights = parser.get_parsed_content("backbone").state_dict()
    monkeypatch.setattr(torch, "load", lambda path, weights_only: weights)
    scope: dict[str, Any] = {}
    exec(small(SNIPPETS), scope)
    network = scope["network"]
    assert type(network).__module__.startswith("monai.")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in scope["kept"].items())
    assert scope["classes"] == len(network.state_dict()[scope["missing"][-1]])


def test_the_snippet_has_the_default_sizes():
    config = read(ROOT / "bundles/hybridmim_pretrain/configs/train.yaml")
    assert f"features = {tuple(config['unet_features'])}" in SNIPPETS
    for key in ("feature_size", "window_size"):
        assert f"\n{key} = {config[f'swin_{key}']} " in SNIPPETS
