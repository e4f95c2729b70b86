"""`hybridmim`: the commands that it prints, its help, and what it passes on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import fire
import pytest

from tools.__main__ import COMMANDS, find, help_text, translate
from tools.commands.runs import RUNS, build
from tools.common.command_line import keep_text
from tools.common.text import command_text
from tools.shipping import monailabel

ROOT = Path(__file__).resolve().parents[3]
BTCV = "bundles/hybridmim_btcv_seg"


def child(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *(["-c", code] if code else ["-m", "tools"]), *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_printed_command_is_the_documented_one():
    block = "\n".join(re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/commands.md").read_text("utf-8"), re.M | re.S))
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line]
    pairs = [(ours, then) for ours, then in pairwise(lines) if ours[0] == "hybridmim"]
    runs = [(ours, then) for ours, then in pairs if ours[1] in RUNS]
    assert {ours[1] for ours, _ in runs} == set(RUNS)
    for ours, then in runs:
        assert build(ours[1], ours[2:]) == then


@pytest.mark.parametrize("words", [["a b", "[1,2]", "it's", "['x','y']", "$None"], ["$x", '["a"]', "['it\\'s $x']"]])
def test_the_printed_command_is_what_a_shell_reads(words):
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command_text(words)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == words


def test_other_options_are_passed_on_unchanged():
    rest = [
        "--roi_size",
        "[64,64,64]",
        "--train#trainer#max_epochs=3",
        "--fold",
        "-1",
        "--datalist",
        "x.json",
        "--pretrained",
        "$None",
    ]
    assert build("finetune", ["--bundle", "btcv", *rest[:3], "--data=d", *rest[3:], "--out", "o"])[-len(rest) :] == rest


@pytest.mark.parametrize("given", ["btcv", "hybridmim_btcv_seg", BTCV])
def test_a_bundle_is_found_by_its_name_or_folder(given):
    words = build("segment", ["--data", "d", "--out", "o", "--bundle", given])
    assert words[words.index("--bundle_root") + 1] == BTCV


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--bundle", "heart"], "found heart, expected the folder of a bundle or one of hybridmim_brats_seg"),
        (
            ["--bundle", "btcv", "--method", "mae"],
            "hybridmim_btcv_seg has no configs/mae.yaml, expected one of dicom_seg, evaluate",
        ),
        (["--bundle", "btcv", "--overlay", "plans/mine.yaml"], "plans/mine.yaml: no such file"),
    ],
)
def test_what_does_not_exist_is_named(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build("finetune", ["--data", "d", "--out", "o", *arguments])


def test_an_overlay_of_ones_own_lies_between_the_first_config_and_the_last(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 1\n")
    words = build("evaluate", ["--data", "d", "--out", "o", "--bundle", "btcv", "--overlay", str(mine), "--small"])
    named = [Path(name).name for name in re.findall(r"'(.*?)'", words[words.index("--config_file") + 1])]
    assert named == ["train.yaml", "mine.yaml", "small.yaml", "evaluate.yaml"]


def test_a_command_without_its_nouns_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        build("finetune", ["--data", "d"])
    assert end.value.code == 2
    assert "--out, --bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], *([name, "--help"] for name in (*RUNS, "check", "serve", "datalist"))]
)
def test_help_imports_neither_torch_nor_monai(arguments):
    code = (
        "import sys; sys.argv = ['hybridmim', *sys.argv[1:]]\n"
        "from tools.__main__ import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "slow = {'torch', 'monai', 'numpy', 'fire'}\n"
        "print('imported', sorted({name.partition('.')[0] for name in sys.modules} & slow))"
    )
    done = child(code, *arguments)
    assert done.returncode == 0, done.stderr
    *text, imported = done.stdout.splitlines()
    assert imported == "imported []"
    assert text[0].startswith("usage: hybridmim")


def test_help_lists_every_command():
    text = help_text(COMMANDS, [])
    assert all(re.search(rf"^  {name.replace('_', '-')} ", text, re.MULTILINE) for name in (*RUNS, *COMMANDS))


def test_every_command_exists():
    functions = [one for found in COMMANDS.values() for one in (found.values() if isinstance(found, dict) else [found])]
    for function in functions:
        module, name = function.split(":")
        assert callable(getattr(import_module(module), name))


def test_the_nouns_are_those_of_each_function():
    function, rest = find(["check", "--data=d", "--out", "usable.json", "--bundle", "btcv", "--workers", "0"])
    assert translate(function, rest) == [
        "--dataset_dir=d",
        "--output",
        "usable.json",
        "--bundle",
        BTCV,
        "--workers",
        "0",
    ]
    function, rest = find(["serve", "--data", "studies", "--out", "apps", "--bundle", "btcv"])
    assert translate(function, rest) == ["--studies", "studies", "--apps_dir", "apps", BTCV]
    function, rest = find(["release", "--bundle", "btcv", "--small"])
    assert translate(function, rest) == [BTCV, "--variant", "small"]
    function, rest = find(["sample-data", "--out", "o", "--cases", "2"])
    assert translate(function, rest) == ["--output_dir", "o", "--cases", "2"]


def test_fire_takes_bundles_after_named_folders(monkeypatch):
    monkeypatch.setattr(monailabel, "require_monailabel", lambda: None)  # is not in this environment
    _, rest = find(["serve", "--data", "no_studies", "--out", "apps", "--bundle", "btcv"])
    with pytest.raises(ValueError, match="studies: no such folder: no_studies"):
        fire.Fire(keep_text(monailabel.serve), command=translate("tools.shipping.monailabel:serve", rest))


def test_an_unknown_command_is_named():
    done = child("", "segmnt")
    assert done.returncode == 2
    assert "found segmnt, expected one of check" in done.stderr


def test_the_command_is_printed_and_its_exit_status_returned(tmp_path):
    """Through the whole chain: printed, started, refused by the run itself."""
    done = child("", "segment", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--bundle", "btcv")
    printed = shlex.split(done.stdout.splitlines()[0])
    assert printed == build(
        "segment", ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--bundle", "btcv"]
    )
    assert done.returncode == 1
    assert "model.pt: no such checkpoint" in done.stderr


def test_the_console_script_is_the_same_program():
    target = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]["hybridmim"]
    module, name = target.split(":")
    assert callable(getattr(import_module(module), name))
