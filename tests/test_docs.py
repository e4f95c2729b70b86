"""The documentation says what the code does: commands, keys, defaults, files and links."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import monai.bundle.scripts as monai_bundle
import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from tools.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/train.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/**/*.md")])
WRITTEN = {"config.yaml"}  # by a run
Scalar = (bool, int, float, str, type(None))


def name_of(value: Any) -> str:
    """Test IDs: paths from the root of the repository."""
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


class Command(NamedTuple):
    """A command of a page's code block."""

    page: Path
    words: list[str]

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {' '.join(self.words)}"

    def after(self, *words: str) -> list[str]:
        """What comes after these neighbouring words, or nothing."""
        for start in range(len(self.words) - len(words) + 1):
            if self.words[start : start + len(words)] == list(words):
                return self.words[start + len(words) :]
        return []

    @property
    def options(self) -> dict[str, str]:
        """Options of `python -m monai.bundle`; what `torchrun` takes comes before it."""
        words = self.after("-m", "monai.bundle")
        return {word[2:]: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[Command]:
    for page in PAGES:
        for block in code_blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield Command(page, shlex.split(line))


MONAI_COMMANDS = [command for command in commands() if command.after("-m", "monai.bundle")]
TOOLS_COMMANDS = [command for command in commands() if command.after("-m", "tools")]


def bundle_of(command: Command) -> Path:
    """The bundle that a command is about: by `--bundle_root`, else the page's own."""
    root = command.options.get("bundle_root")
    return ROOT / root if root else command.page.parents[1]


def config_paths(command: Command) -> list[Path]:
    """Config files of a command; `configs/…` is meant inside the bundle's folder."""
    names = yaml.safe_load(command.options.get("config_file", "[]"))
    start = ROOT if "bundle_root" in command.options else bundle_of(command)
    return [start / name for name in ([names] if isinstance(names, str) else names)]


def test_there_are_pages_and_commands():
    assert {ROOT / "README.md", *(bundle / "docs/README.md" for bundle in BUNDLES)} <= set(PAGES)
    assert len(MONAI_COMMANDS) > 10
    assert len(TOOLS_COMMANDS) > 3


@pytest.mark.parametrize("command", MONAI_COMMANDS, ids=str)
def test_options_of_monai_bundle_are_its_own_or_keys_of_the_configs(command: Command):
    function = getattr(monai_bundle, command.after("-m", "monai.bundle")[0])
    known = {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    keys = {key for path in config_paths(command) for key in yaml.safe_load(path.read_text())}
    unknown = {re.split("#|::", option)[0] for option in command.options} - known - keys
    assert not unknown


@pytest.mark.parametrize("command", MONAI_COMMANDS, ids=str)
def test_the_run_id_is_a_key_of_the_configs(command: Command):
    name, *rest = command.after("-m", "monai.bundle")
    if name == "run":
        assert rest[0] in {key for path in config_paths(command) for key in yaml.safe_load(path.read_text())}


@pytest.mark.parametrize("command", MONAI_COMMANDS, ids=str)
def test_commands_run_from_the_root_or_inside_the_bundle(command: Command):
    assert (bundle_of(command) / "configs").is_dir()
    for path in [*config_paths(command), *(ROOT / p for p in [command.options.get("meta_file")] if p)]:
        assert path.is_file(), path


@pytest.mark.parametrize("command", MONAI_COMMANDS, ids=str)
def test_no_option_is_null(command: Command):
    """`null` would reach the config as text."""
    assert "null" not in command.options.values()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_files_that_are_named_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"[\w./-]*configs/[\w.-]+\.(?:yaml|json)", text):
        start = ROOT if path.startswith("bundles/") else page.parents[1] if page.parents[1] in BUNDLES else None
        found = [bundle / path for bundle in BUNDLES] if start is None else [start / path]
        assert any(file.is_file() for file in found), path
    for name in set(re.findall(r"(?<![\w/.-])[\w-]+\.yaml", text)) - WRITTEN:
        assert any((bundle / "configs" / name).is_file() for bundle in BUNDLES), name


def is_plain(value: Any) -> bool:
    """A scalar, null, or a list of scalars that are no expressions."""
    if isinstance(value, list):
        return all(isinstance(v, Scalar) and not str(v).startswith(("$", "@")) for v in value)
    return isinstance(value, Scalar)


def key_table(bundle: Path) -> str:
    text = (bundle / "docs/README.md").read_text(encoding="utf-8")
    return re.search(r"<!-- keys -->(.*)<!-- /keys -->", text, re.DOTALL)[1]


@pytest.mark.parametrize("bundle", BUNDLES, ids=name_of)
def test_the_key_table_lists_every_plain_value_with_its_default(bundle: Path):
    config = yaml.safe_load((bundle / "configs/train.yaml").read_text())
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", key_table(bundle), re.MULTILINE)
    listed = {key: yaml.safe_load(default) for key, default in rows}
    assert len(listed) == len(rows), "a key is listed twice"
    assert listed == {key: value for key, value in config.items() if is_plain(value)}
    for key, value in listed.items():
        assert type(value) is type(config[key]), key
    assert list(listed) == [key for key in config if key in listed], "the order is that of train.yaml"


@pytest.mark.parametrize("bundle", BUNDLES, ids=name_of)
def test_the_key_table_names_every_other_key(bundle: Path):
    config = yaml.safe_load((bundle / "configs/train.yaml").read_text())
    listed = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", key_table(bundle), re.MULTILINE)
    assert sorted(listed) == sorted(key for key, value in config.items() if not is_plain(value))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_pictures_exist(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]
    assert [target for target in targets if not leads_somewhere(page, target)] == []


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    if not file.exists():
        return False
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    return not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def tool(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The function that `python -m tools WORDS` calls, and its arguments."""
    found: Any = COMMANDS
    while isinstance(found, dict):
        assert words and words[0] in found, f"found {words[:1]}, expected one of {sorted(found)}"
        found, words = found[words[0]], words[1:]
    return found, words


@pytest.mark.parametrize("command", TOOLS_COMMANDS, ids=str)
def test_tools_accept_the_command(command: Command):
    function, words = tool(command.after("-m", "tools"))
    positional, named = [], {}
    while words:
        word, *words = words
        if word.startswith("--"):
            named[word[2:]], *words = words
        else:
            positional.append(word)
    inspect.signature(function).bind(*positional, **named)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tools_commands_in_the_text_exist(page: Path):
    for words in re.findall(r"`python -m tools ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        function, rest = tool(words.split())
        options = {word[2:] for word in rest if word.startswith("--")}
        assert options <= set(inspect.signature(function).parameters), words


def small(snippet: str) -> str:
    """The README's code with the sizes of `small.yaml`, which build faster."""
    config = yaml.safe_load((ROOT / "bundles/hybridmim_pretrain/configs/small.yaml").read_text())
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
    exec(small("\n".join(code_blocks(ROOT / "README.md", "python"))), scope)
    network = scope["network"]
    assert type(network).__module__.startswith("monai.")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in scope["kept"].items())
    assert scope["classes"] == len(network.state_dict()[scope["missing"][-1]])


def test_the_snippet_has_the_default_sizes():
    code = "\n".join(code_blocks(ROOT / "README.md", "python"))
    config = yaml.safe_load((ROOT / "bundles/hybridmim_pretrain/configs/train.yaml").read_text())
    assert f"features = {tuple(config['unet_features'])}" in code
    assert f"feature_size = {config['swin_feature_size']}" in code
