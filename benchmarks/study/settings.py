"""What a study is made of: the numbers of its preset, the bundle, the cases, and what was asked for.

`study.json` in the output folder keeps all of it, so that a study continues as it began or is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.commands.datalist import brats, btcv, msd
from tools.common.files import write_json
from tools.data.datalists import load_datalist
from tools.data.scans import find_scans
from tools.data.splits import label_subset

ROOT = Path(__file__).resolve().parents[2]
PRESETS = Path(__file__).with_name("presets.yaml")
PRETRAIN = "bundles/hybridmim_pretrain"
BUNDLES = ("hippocampus", "btcv", "brats", "liver", "spleen")
MR = ("hippocampus", "brats")  # their intensities have no unit
METHODS = {"scratch": "from scratch", "simclr": "SimCLR", "simmim": "SimMIM", "mae": "MAE", "hybridmim": "HybridMIM"}
NETWORKS = {"UNet": (), "SwinUNETR": ("swin_unetr",), "UNETR": ("unetr",)}  # overlays of the segmentation bundles
TABLES = (1, 2, 3, 4, 5, 6)
NUMBERS = {3: "ablation", 4: "masks", 6: "resolution"}  # of tables that not every preset has
FIXED = ("data", "split", "networks", "pretraining", "finetuning")  # what all runs of a study share; rows may be added
STUDY, DATALIST, UNLABELLED = "study.json", "datalist.json", "pretraining.json"


@dataclass(frozen=True)
class Pretraining:
    """Numbers that all pre-trainings share, and what a method has in place of them."""

    overlays: list[str]
    epochs: int
    validations: int
    options: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)  # options, by method
    unlabelled: str | None = None  # folder of more scans, below that of the data set
    seeds: int | None = None  # so many pre-trainings of an arm, shared by the seeds of fine-tuning; None: one for each


@dataclass(frozen=True)
class Finetuning:
    """Numbers that all fine-tunings share; of `steps` and `epochs`, one is given."""

    overlays: list[str]
    validations: int
    warmup: float  # share of the steps
    learning_rates: list[float]
    rate_chosen_at: dict[str, Any]  # label_fraction: a number or `each`; seeds: of these, the mean
    options: dict[str, Any]
    steps: dict[float, int] | None = None  # by label fraction
    epochs: int | None = None  # over all labels


@dataclass(frozen=True)
class Preset:
    """The numbers of a study; presets.yaml says what each is."""

    tables: list[int]
    seeds: list[int]
    arms: dict[str, dict[str, list[float]]]
    split: dict[str, int]
    networks: dict[str, dict[str, Any]]
    pretraining: Pretraining
    finetuning: Finetuning
    data: dict[str, Any] = field(default_factory=dict)
    ablation: dict[str, Any] | None = None
    masks: dict[str, Any] | None = None
    cost: dict[str, Any] = field(default_factory=lambda: {"fractions": [], "rows": []})
    resolution: dict[str, Any] | None = None


def read_preset(name: str, bundle: str | None) -> tuple[str, Preset, dict[str, Any]]:
    """A bundle (by default the preset's), the preset as it is for it, and the same as plain data.

    Raises:
        ValueError: there is no such preset, or no such bundle.
    """
    presets = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    _require_one("preset", name, presets)
    usual, others = presets[name].pop("bundle", BUNDLES[0]), presets[name].pop("bundles", {})
    bundle = bundle or usual
    _require_one("bundle", bundle, BUNDLES)
    numbers = _merged(presets[name], others.get(bundle, {}))
    return bundle, _preset(numbers), numbers


def _preset(numbers: dict[str, Any]) -> Preset:
    """Numbers as they are in presets.yaml, or in study.json, whose keys are text."""
    finetuning = Finetuning(**numbers["finetuning"])
    if finetuning.steps is not None:
        steps = {float(fraction): count for fraction, count in finetuning.steps.items()}
        finetuning = replace(finetuning, steps=steps)
    return Preset(**{**numbers, "pretraining": Pretraining(**numbers["pretraining"]), "finetuning": finetuning})


def _merged(numbers: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Numbers with some changed, at any depth."""
    both = {
        key: _merged(numbers[key], value) if isinstance(value, dict) and isinstance(numbers.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**numbers, **both}


def _require_one(key: str, found: Any, expected: Sequence[Any] | dict[str, Any]) -> None:
    if found not in expected:
        raise ValueError(f"{key}: found {found!r}, expected one of {', '.join(map(str, expected))}")


@dataclass(frozen=True)
class Asked:
    """What is to be run, and so what the report shows.

    Attributes:
        tables: their numbers.
        methods: keys of `METHODS`.
        preset_fractions: whether the preset's label fractions are among those of tables 1 and 2.
        label_fractions: others that are.
        seeds: of pre-training and fine-tuning.
        jobs: runs at a time.
    """

    tables: tuple[int, ...]
    methods: tuple[str, ...]
    preset_fractions: bool
    label_fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    jobs: int

    def and_before(self, before: Asked) -> Asked:
        """What was asked for at any start of the study; `jobs` as now."""
        return Asked(
            _union(before.tables, self.tables),
            tuple(method for method in METHODS if method in {*before.methods, *self.methods}),
            before.preset_fractions or self.preset_fractions,
            _union(before.label_fractions, self.label_fractions),
            _union(before.seeds, self.seeds),
            self.jobs,
        )


def _union(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted({*first, *second}))


@dataclass(frozen=True)
class Study:
    """A study in its output folder.

    Attributes:
        output_dir: absolute.
        dataset_dir: absolute, in the layout of the bundle.
        bundle: `hippocampus` and so on.
        preset_name: of presets.yaml.
        preset: its numbers.
        asked: what is to be run.
    """

    output_dir: Path
    dataset_dir: Path
    bundle: str
    preset_name: str
    preset: Preset
    asked: Asked

    @property
    def datalist(self) -> Path:
        """The fixed split."""
        return self.output_dir / DATALIST

    @property
    def scans(self) -> Path:
        """Data list of pre-training: that of the labelled cases, or one with the unlabelled scans, too."""
        return self.output_dir / UNLABELLED if self.preset.pretraining.unlabelled else self.datalist

    @property
    def segmentation(self) -> str:
        """Folder of the segmentation bundle, from the root of the repository."""
        return f"bundles/hybridmim_{self.bundle}_seg"

    def cases(self, section: str) -> list[dict[str, Any]]:
        """Entries of the data list: training, validation or test."""
        return _cases(self.datalist)[section]

    def pretraining_scans(self) -> int:
        """How many scans pre-training learns from."""
        return len(_cases(self.scans)["training"])

    def labelled(self, fraction: float) -> int:
        """Training cases of a label fraction."""
        return _labelled(self.datalist, fraction)


@cache  # a plan asks for them hundreds of times, and the list never changes
def _cases(datalist: Path) -> dict[str, Any]:
    return load_datalist(datalist)


@cache
def _labelled(datalist: Path, fraction: float) -> int:
    return len(label_subset(_cases(datalist)["training"], fraction, seed=0))


def open_study(
    output_dir: str,
    dataset_dir: str,
    preset: str,
    bundle: str | None,
    methods: Sequence[str] | None,
    label_fractions: Sequence[float] | None,
    seeds: Sequence[int] | None,
    tables: Sequence[int] | None,
    jobs: int,
) -> Study:
    """Begin a study, or continue one: checks the options, splits the cases once, writes `study.json`.

    Raises:
        ValueError: an option is out of range, or contradicts the study that the folder holds.
    """
    bundle, chosen, numbers = read_preset(preset, bundle)
    asked = Asked(
        tuple(tables or chosen.tables),
        tuple(methods or METHODS),
        not label_fractions,
        tuple(label_fractions or ()),
        tuple(seeds if seeds is not None else chosen.seeds),
        jobs,
    )
    _check(asked, chosen)
    folder = Path(output_dir).absolute()
    study = Study(folder, Path(dataset_dir).absolute(), bundle, preset, chosen, asked)
    content = {"bundle": bundle, "dataset_dir": str(study.dataset_dir), "preset": preset, "numbers": numbers}
    content = json.loads(json.dumps(content))  # keys become text, as in the file
    if (folder / STUDY).is_file():
        before = _content(folder / STUDY)
        _refuse_contradictions(folder / STUDY, before, content)
        content["asked"] = asdict(asked.and_before(_asked(before["asked"])))
    else:
        content["asked"] = asdict(asked)
    if not study.datalist.is_file():
        _split(study)
    if not study.scans.is_file():
        _add_unlabelled(study)
    _require_disjoint(study)
    write_json(folder / STUDY, content)
    return study


def read_study(output_dir: str | Path) -> Study:
    """The study of a folder, with all that was ever asked of it.

    Raises:
        ValueError: the folder holds none, a damaged one, or one of an earlier version.
    """
    folder = Path(output_dir).absolute()
    path = folder / STUDY
    if not path.is_file():
        raise ValueError(f"output_dir: found no {STUDY} in {folder}, expected the folder of a study")
    content = _content(path)
    at = content["numbers"]["finetuning"]["rate_chosen_at"]
    if "seeds" not in at:
        raise ValueError(
            f"{path}: found finetuning rate_chosen_at {at}, of an earlier version of the study, expected the keys "
            "label_fraction and seeds (a list, in place of `seed`)"
        )
    places = folder, Path(content["dataset_dir"])
    return Study(*places, content["bundle"], content["preset"], _preset(content["numbers"]), _asked(content["asked"]))


def _content(path: Path) -> dict[str, Any]:
    """What study.json holds.

    Raises:
        ValueError: the file is damaged.
    """
    keys = {"bundle", "dataset_dir", "preset", "numbers", "asked"}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(
            f"{path}: found no JSON ({error}), expected an object with {', '.join(sorted(keys))}"
        ) from None
    if not isinstance(content, dict) or not keys <= set(content):
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: found {found or 'nothing'}, expected an object with {', '.join(sorted(keys))}")
    return content


def everything(study: Study) -> Study:
    """The study with all that was ever asked of it, for its report."""
    return replace(study, asked=read_study(study.output_dir).asked)


def _asked(content: dict[str, Any]) -> Asked:
    return Asked(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def _check(asked: Asked, preset: Preset) -> None:
    for table in asked.tables:
        _require_one("tables", table, TABLES)
        if table in NUMBERS and getattr(preset, NUMBERS[table]) is None:
            raise ValueError(f"tables: found {table}, for which this preset has no numbers; expected {preset.tables}")
    for method in asked.methods:
        _require_one("methods", method, METHODS)
    for seed in asked.seeds:
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seeds: found {seed!r}, expected whole numbers of at least 0")
    for fraction in asked.label_fractions:
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"label_fractions: found {fraction!r}, expected numbers above 0, at most 1")
        if preset.finetuning.steps is not None:
            _require_one("label_fractions", fraction, preset.finetuning.steps)
    if not isinstance(asked.jobs, int) or asked.jobs < 1:
        raise ValueError(f"jobs: found {asked.jobs!r}, expected a whole number of at least 1")


def _refuse_contradictions(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("bundle", "dataset_dir", "preset"):
        if found[key] != expected[key]:
            raise ValueError(f"{path}: found {key} {found[key]!r}, expected {expected[key]!r}; give another output_dir")
    numbers = ({key: study["numbers"].get(key) for key in FIXED} for study in (found, expected))
    if changed := differences(*numbers):
        raise ValueError(f"{path}: the preset has changed: {'; '.join(changed)}; give another output_dir")


def differences(found: Any, expected: Any, key: str = "") -> list[str]:
    """What differs in two mappings, however deep, as `found KEY a, expected b`."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(name for name in expected if name not in found)]
        return [d for name in keys for d in differences(found.get(name), expected.get(name), f"{key} {name}".strip())]
    return [] if found == expected else [f"found {key} {found!r}, expected {expected!r}"]


def _split(study: Study) -> None:
    """Write the data list: training, validation, and test cases that no run but a test ever reads."""
    layout = read_configs(config_files(study.segmentation, ()))["layout"]
    command = {"btcv": btcv, "brats": brats, "msd": msd}[layout]
    command(str(study.dataset_dir), str(study.datalist), **{"fold": 0, **study.preset.split})


def _add_unlabelled(study: Study) -> None:
    """Write the data list of pre-training: the images of training and validation cases, and the unlabelled scans.

    Raises:
        ValueError: there are none, or a scan of a test case is among them.
    """
    folder = study.dataset_dir / study.preset.pretraining.unlabelled
    unlabelled = find_scans(str(folder)) if folder.is_dir() else []
    if not unlabelled:
        raise ValueError(f"{folder}: found no scans, expected the unlabelled ones of the preset")
    names = [os.path.relpath(scan["image"], study.dataset_dir) for scan in unlabelled]
    if both := sorted({*names} & {os.path.normpath(case["image"]) for case in study.cases("test")}):
        raise ValueError(f"{folder}: found {both[0]}, a test case, expected scans that no test reads")
    listed = {part: [case["image"] for case in study.cases(part)] for part in ("training", "validation")}
    write_json(study.scans, {**listed, "training": [*listed["training"], *names]})


def _require_disjoint(study: Study) -> None:
    seen: dict[str, str] = {}
    for section in ("training", "validation", "test"):
        for case in study.cases(section):
            name = json.dumps(case["image"])
            if name in seen:
                raise ValueError(f"{study.datalist}: found {name} in {seen[name]} and {section}, expected it in one")
            seen[name] = section
    for section in ("training", "validation", "test"):
        if section not in seen.values():
            raise ValueError(f"{study.datalist}: found no case in {section}, expected at least one")


def config_files(bundle: str, overlays: Sequence[str]) -> tuple[str, ...]:
    """Paths from the root of the repository, train.yaml first."""
    return tuple(f"{bundle}/configs/{name}.yaml" for name in ("train", *overlays))


@cache
def read_configs(files: tuple[str, ...]) -> dict[str, Any]:
    """Top-level keys of configs, of which the later ones win.

    Raises:
        ValueError: there is no such file.
    """
    merged: dict[str, Any] = {}
    for file in files:
        if not (ROOT / file).is_file():
            raise ValueError(f"{file} does not exist, expected a config of the bundle")
        merged.update(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")))
    return merged
