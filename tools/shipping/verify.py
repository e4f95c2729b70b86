"""Runs the Model Zoo's checks of a bundle on this machine: no network, no data, no GPU.

The Zoo's checks are in `ci/verify_bundle.py` in Project-MONAI/model-zoo. This module calls MONAI's functions
(`verify_net_in_out`, `ckpt_export`, `check_properties`) if there are any; `verify_metadata` downloads the schema, so
`jsonschema` is called directly. The checks of files are our own, because the Zoo's script stops at the first problem.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, verify_net_in_out
from monai.data import load_net_with_metadata
from monai.networks.nets import SwinUNETR
from monai.utils import optional_import
from torch import nn

from tools.common.errors import root_cause
from tools.weights.checkpoints import check_weights

jsonschema, has_jsonschema = optional_import("jsonschema")

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
NECESSARY = ("LICENSE", "configs/inference.yaml", "configs/metadata.json", "configs/train.yaml", "docs/README.md")
ALONE = ("train.yaml", "inference.yaml")  # all other configs are overlays
OF_INFERENCE = ("dicom_seg.yaml", "flips.yaml", "torchscript.yaml")  # on inference.yaml; the others on train.yaml
META_KEYS = {
    **dict.fromkeys(("version", "monai_version", "pytorch_version", "numpy_version"), str),
    **dict.fromkeys(("name", "task", "description", "authors", "copyright", "intended_use"), str),
    **dict.fromkeys(("changelog", "required_packages_version", "optional_packages_version"), dict),
    "network_data_format": dict,
}
LARGE_FILES = "large_files.yml"
LARGE = 25 * 2**20  # bytes; what is larger belongs into `large_files.yml`
DIFFERENCE = 1e-4  # between a network and its export
WEIGHTS = "models/model.pt"


class BundleError(ValueError):
    """A bundle that is not fit for release."""


class Check(NamedTuple):
    """Result of a check.

    Attributes:
        title: name of the check.
        problems: problems, each in one sentence that names the file.
        skipped: why the check was skipped, or an empty text.
    """

    title: str
    problems: list[str]
    skipped: str = ""


def verify(*names: str, schema: str | None = None) -> None:
    """Check bundles as the Model Zoo does, and print the problems.

    Args:
        *names: names of bundles in `bundles/`, or folders of bundles; none: all bundles in `bundles/`.
        schema: JSON file with MONAI's metadata schema; without it, only the required keys are checked.

    Raises:
        BundleError: a bundle does not exist.
        SystemExit: status 1, if there are problems.
    """
    wrong = 0
    for folder in find_bundles(names):
        print(folder.name)
        checks = static_checks(folder, schema)
        if not any(check.problems for check in checks):  # otherwise MONAI would fail for the same reason
            checks += network_checks(folder)
        for check in checks:
            print(f"  {check.title:22}{check.skipped or ('wrong' if check.problems else 'ok')}", flush=True)
            for problem in check.problems:
                print(f"    {problem}")
            wrong += len(check.problems)
    if wrong:
        raise SystemExit(1)


def find_bundles(names: Sequence[str]) -> list[Path]:
    """Return the folders of bundles: each name is a bundle in `bundles/`, or a folder; without names, all bundles.

    Raises:
        BundleError: a bundle does not exist.
    """
    if not names:
        found = sorted(path.parents[1] for path in BUNDLES.glob("*/configs/metadata.json"))
        if not found:
            raise BundleError(f"found no bundle in {BUNDLES}, expected the names or folders of bundles")
        return found
    return [_find_bundle(str(name)) for name in names]


def _find_bundle(name: str) -> Path:
    for folder in (BUNDLES / name, Path(name).resolve()):
        if (folder / "configs").is_dir():
            return folder
    raise BundleError(f"{name}: no such bundle in {BUNDLES}, and no folder of a bundle (with configs/) either")


# ---- files, metadata, configs, documentation ------------------------------------------------------------------


def static_checks(folder: Path, schema: str | Path | None = None) -> list[Check]:
    """Check the files of a bundle, without building its network."""
    missing = [
        f"{folder / file}: does not exist, but is necessary" for file in NECESSARY if not (folder / file).is_file()
    ]
    if missing:
        return [Check("files", missing)]
    try:
        meta = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return [Check("metadata", [f"{folder / 'configs/metadata.json'}: is not valid JSON: {error}"])]
    if not isinstance(meta, dict):
        return [Check("metadata", [f"{folder / 'configs/metadata.json'}: is {type(meta).__name__}, expected keys"])]
    text = (folder / "LICENSE").read_text(encoding="utf-8")
    apache = "Apache License" in text and "Version 2.0" in text
    # that of the data is named in the README
    page = folder / "docs/README.md"
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")) if ":" not in link]
    lost = [f"{page}: {link} does not exist" for link in links if not (page.parent / link).exists()]
    return [
        Check("files", []),
        Check("metadata", _metadata_problems(folder, meta)),
        _schema_check(folder, meta, schema),
        Check("licence", [] if apache else [f"{folder / 'LICENSE'}: is not the Apache License, Version 2.0"]),
        Check("sizes", _size_problems(folder)),
        Check("configs", _config_problems(folder)),
        Check("links in README.md", lost),
    ]


def _metadata_problems(folder: Path, meta: dict[str, Any]) -> list[str]:
    """List metadata keys that are missing or have the wrong type, and a version that is not in the changelog."""
    file = folder / "configs/metadata.json"
    problems = [
        f"{file}: {key} is {type(meta.get(key)).__name__}, expected {kind.__name__}"
        for key, kind in META_KEYS.items()
        if not isinstance(meta.get(key), kind)
    ]
    if problems:
        return problems
    if not re.fullmatch(r"\d+\.\d+\.\d+", meta["version"]):
        problems.append(f"{file}: version is {meta['version']!r}, expected three numbers as in 0.1.0")
    if meta["version"] not in meta["changelog"]:
        problems.append(f"{file}: version {meta['version']} has no entry in changelog {list(meta['changelog'])}")
    if meta["required_packages_version"] != meta["optional_packages_version"]:
        problems.append(f"{file}: required_packages_version and optional_packages_version differ (MONAI merges them)")
    return problems


def _schema_check(folder: Path, meta: dict[str, Any], schema: str | Path | None) -> Check:
    title = "metadata schema"
    if schema is None:
        return Check(title, [], "skipped: no --schema")
    if not has_jsonschema:
        return Check(title, [], "skipped: jsonschema is not installed")
    content = json.loads(Path(schema).read_text(encoding="utf-8"))
    errors = jsonschema.validators.validator_for(content)(content).iter_errors(meta)
    where = folder / "configs/metadata.json"
    return Check(title, [f"{where}: {'/'.join(map(str, e.absolute_path))}: {e.message}" for e in errors])


def _size_problems(folder: Path) -> list[str]:
    """List files that are too large for Git, and entries of the list of large files that cannot be downloaded."""
    files = [path for part in ("configs", "docs", "scripts") for path in (folder / part).rglob("*") if path.is_file()]
    problems = [
        f"{path}: {path.stat().st_size / 2**20:.0f} MB, expected {LARGE // 2**20} MB at most"
        for path in files
        if path.stat().st_size > LARGE
    ]
    if not (folder / LARGE_FILES).is_file():
        return problems
    listed = ConfigParser.load_config_file(folder / LARGE_FILES).get("large_files", [])
    for entry in listed:
        missing = [key for key in ("path", "url", "hash_val", "hash_type") if not entry.get(key)]
        if missing:
            problems.append(f"{folder / LARGE_FILES}: {entry.get('path')} has no {', '.join(missing)}")
    return problems


def _config_problems(folder: Path) -> list[str]:
    """List configs that MONAI cannot read (overlays together with the config that they extend)."""
    problems = []
    for path in sorted((folder / "configs").glob("*.yaml")):
        base = path.with_name("inference.yaml" if path.name in OF_INFERENCE else "train.yaml")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Duplicate key")
                parser = ConfigParser()
                parser.read_config([path] if path.name in ALONE else [base, path])
                parser.parse()
        except Exception as error:  # of YAML, of MONAI's parser, of Python's
            problems.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}")
    return problems


# ---- network, export, workflows -------------------------------------------------------------------------------


def network_checks(folder: Path) -> list[Check]:
    """Build the bundle's network and workflows, and export the network."""
    checks: list[tuple[str, Callable[[Path], list[str]]]] = [
        ("network in and out", _shape_problems),
        ("TorchScript", _export_problems),
        ("workflow properties", _property_problems),
    ]
    if (folder / WEIGHTS).is_file():
        first = []
        checks.insert(0, ("weights", _weights_problems))
    else:
        first = [Check("weights", [], f"no {WEIGHTS}: the checks below take random ones")]
    with _own_scripts(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of every config that it reads, and logs what it is told
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            return first + [_guarded(title, check, folder) for title, check in checks]
        finally:
            logging.disable(before)


def _guarded(title: str, check: Callable[[Path], list[str]], folder: Path) -> Check:
    """Run a check; report an exception as a problem, so that the other checks continue."""
    try:
        return Check(title, check(folder))
    except Exception as error:
        cause = root_cause(error)
        return Check(title, [f"{folder}: {type(cause).__name__}: {' '.join(str(cause).split())}"])


@contextmanager
def _own_scripts(folder: Path) -> Iterator[None]:
    """Import `scripts` from this bundle, and unload it afterwards: other bundles have a package of the same name."""
    before = list(sys.path), sys.excepthook
    hidden = _take_scripts()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:], sys.excepthook = before
        _take_scripts()
        sys.modules.update(hidden)


def _take_scripts() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0] == "scripts"]
    return {name: sys.modules.pop(name) for name in names}


def build_network(folder: Path) -> nn.Module:
    """Build the bundle's network for inference, with random weights."""
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.yaml")
    parser["bundle_root"] = str(folder)
    return parser.get_parsed_content("network_def")


def _weights_problems(folder: Path) -> list[str]:
    check_weights(folder / WEIGHTS, build_network(folder), folder)
    return []


def require_weights(folder: Path) -> None:
    """Refuse a `models/model.pt` that does not fit the network of `configs/inference.yaml`.

    Raises:
        WeightsError: tensors do not fit; the message lists them.
    """
    with _own_scripts(folder):
        _weights_problems(folder)


def _files(folder: Path) -> dict[str, str]:
    """Arguments of the commands of `monai.bundle` for a bundle."""
    return {
        "config_file": str(folder / "configs/inference.yaml"),
        "meta_file": str(folder / "configs/metadata.json"),
        "bundle_root": str(folder),
    }


def _shape_problems(folder: Path) -> list[str]:
    # on the meta device nothing is computed: only shapes and types, at the full size of the window
    verify_net_in_out(net_id="network_def", device="meta", **_files(folder))
    return []


def _export_problems(folder: Path) -> list[str]:
    """Export to TorchScript, load, and compare on the smallest window of the network, or the only one of a ViT."""
    network = build_network(folder).eval()
    swin = any(isinstance(module, SwinUNETR) for module in network.modules())  # MONAI's cannot be scripted
    fixed = any(name.endswith(".position_embeddings") for name in network.state_dict())
    form = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
    form = form["network_data_format"]["inputs"]["image"]
    shape = (1, form["num_channels"], *(form["spatial_shape"] if fixed else [64 if swin else 32] * 3))
    with tempfile.TemporaryDirectory() as temporary:
        weights, exported = folder / WEIGHTS, Path(temporary, "model.ts")
        if weights.is_file():
            network.load_state_dict(check_weights(weights, network, folder))
        else:
            weights = Path(temporary, "model.pt")
            torch.save(network.state_dict(), weights)
        # no check_trace, which runs the network again: the comparison below is enough
        tracing = {"use_trace": True, "input_shape": shape, "converter_kwargs": {"check_trace": False}} if swin else {}
        ckpt_export(net_id="network_def", filepath=str(exported), ckpt_file=str(weights), **tracing, **_files(folder))
        loaded, meta, extra = load_net_with_metadata(str(exported), more_extra_files=("inference.json",))
    image = torch.rand(shape)
    with torch.no_grad():
        difference = float((loaded.eval()(image) - network(image)).abs().max())
    problems = [] if "version" in meta and extra["inference.json"] else [f"{folder}: export without metadata or config"]
    if not difference <= DIFFERENCE:
        problems.append(f"{folder}: the export differs from the network by {difference:g}, expected {DIFFERENCE:g}")
    return problems


def _property_problems(folder: Path) -> list[str]:
    """Check the properties that MONAI's clients use, in training, evaluation and inference."""
    case = [{"image": "image.nii.gz", "label": "label.nii.gz"}]  # never read: nothing is cached
    training = {"train#dataset#data": case, "validate#dataset#data": case, "cache": "none"}
    workflows = [
        ("train", ["train"], training),
        ("train", ["train", "evaluate"], training),
        ("infer", ["inference"], {"dataset#data": case}),
    ]
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        places = {"dataset_dir": temporary, "output_dir": temporary, "bundle_root": str(folder)}
        for kind, configs, overrides in workflows:
            files = [str(folder / f"configs/{config}.yaml") for config in configs]
            workflow = create_workflow(
                config_file=files,
                meta_file=str(folder / "configs/metadata.json"),
                logging_file=False,
                workflow_type=kind,
                **places,
                **overrides,
            )
            problems += [f"{' + '.join(files)}: property {name} is wrong" for name in workflow.check_properties() or []]
    return problems
