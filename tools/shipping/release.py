"""Writes the zip files of a release: each contains a bundle that runs on its own, including `tools`."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.apps.utils import check_hash
from monai.bundle import ConfigParser

from tools.common.cards import CardError, card_path
from tools.common.files import atomic_path, write_json
from tools.shipping.verify import LARGE_FILES, WEIGHTS, BundleError, find_bundles, require_weights, static_checks
from tools.weights.checkpoints import WeightsError

# released files of a bundle's folder, without run outputs, caches and data
CONTENT = ("LICENSE", "configs/*.conf", "configs/*.json", "configs/*.yaml", "docs/**/*", "scripts/**/*.py")
TOOLS = Path(__file__).resolve().parents[1]
TIME = (1980, 1, 1, 0, 0, 0)  # date of every file in a zip: the earliest of the format
MODE = 0o100644  # permissions of every file: readable by all
INFO = "model_info.json"
BLOCK = re.compile(r"^(\w+):.*\n(?:[ -].*\n)*", re.MULTILINE)  # a top-level key of a config and what belongs to it
MODEL_CARD = {"library_name": "monai", "license": "apache-2.0", "tags": ["monai", "medical"]}  # of Hugging Face


def release(
    *names: str,
    output: str = "dist",
    variant: str | None = None,
    base_url: str | None = None,
    weights: str | None = None,
) -> None:
    """Write `NAME_vVERSION.zip` for each bundle, and `model_info.json`.

    Either all or none of them are written. The same files give the same zip, byte for byte.

    Args:
        *names: names of bundles in `bundles/`, or folders of bundles; none: all bundles in `bundles/`.
        output: folder to write to.
        variant: overlay (`small`, or several: `small,swin_unetr`) to merge into the configs; the bundle is then called
            NAME_VARIANT, and needs no overlay, for instance in MONAI Label.
        base_url: base URL of the published zip files, for `model_info.json`.
        weights: file to release as `models/model.pt`, instead of that of the bundle; for a single bundle. Its card is
            released with it.

    Raises:
        BundleError: a bundle is not fit for release.
    """
    folders = find_bundles(names)
    if weights is not None and len(folders) != 1:
        raise BundleError(f"--weights: found {len(folders)} bundles, expected the name of one")
    with tempfile.TemporaryDirectory() as temporary:
        staged = [stage(folder, Path(temporary), variant, weights) for folder in folders]
        for folder in staged:
            _require_fit(folder)
        for folder in staged:
            archive = pack(folder, Path(output))
            print(f"{archive}  {archive.stat().st_size / 1e6:.1f} MB  SHA-256 {_digest(archive, 'sha256')}")
            _add_info(archive, base_url)


def stage(folder: Path, parent: Path, variant: str | None = None, weights: str | None = None) -> Path:
    """Copy the released files of a bundle to a new folder in `parent`.

    Args:
        folder: folder of the bundle.
        parent: folder in which the new folder is created.
        variant: as in `release`.
        weights: as in `release`.

    Returns:
        The new folder, with the name of the bundle.

    Raises:
        BundleError: large files are missing or have another hash, or the variant cannot be merged.
    """
    _require_large_files(folder)
    staged = parent / (folder.name if variant is None else f"{folder.name}_{variant.replace(',', '_')}")
    for pattern in CONTENT:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not path.name.startswith("."):
                _copy(path, staged / path.relative_to(folder))
    for path in sorted(TOOLS.rglob("*.py")):
        _copy(path, staged / "tools" / path.relative_to(TOOLS))
    source = folder / WEIGHTS if weights is None else Path(weights)
    if weights is not None or source.is_file():
        _copy(source, staged / WEIGHTS)
        if card_path(source).is_file():
            _copy(card_path(source), card_path(staged / WEIGHTS))
    if variant is not None:
        _merge_variant(staged, folder.name, variant)
    page = staged / "docs/README.md"
    if page.is_file():
        page.write_text(_without_links_out(page.read_text(encoding="utf-8")), encoding="utf-8")
        (staged / "README.md").write_text(_model_card(page.read_text(encoding="utf-8")), encoding="utf-8")
    return staged


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _require_large_files(folder: Path) -> None:
    """Check that the files in `large_files.yml` exist, because the zip contains them."""
    if not (folder / LARGE_FILES).is_file():
        return
    for entry in ConfigParser.load_config_file(folder / LARGE_FILES)["large_files"]:
        path = folder / entry["path"]
        if not path.is_file():
            raise BundleError(
                f"{path}: does not exist, but {LARGE_FILES} lists it; get it with "
                f"python -m monai.bundle download_large_files --bundle_path {folder}"
            )
        if not check_hash(path, entry["hash_val"], entry["hash_type"]):
            raise BundleError(f"{path}: found another {entry['hash_type']} than {LARGE_FILES} gives")


def _require_fit(folder: Path) -> None:
    """Refuse a bundle with wrong files, or with weights of another network."""
    problems = [problem for check in static_checks(folder) for problem in check.problems]
    if not problems and (folder / WEIGHTS).is_file():
        try:
            require_weights(folder)
        except (CardError, WeightsError) as error:
            problems = [str(error)]
    if problems:
        text = "\n".join([f"{folder.name} is not fit for release:", *problems])
        raise BundleError(text.replace(f"{folder.parent}{os.sep}", ""))  # the staged files are gone by then


# ---- variants -------------------------------------------------------------------------------------------------


def _merge_variant(staged: Path, name: str, variant: str) -> None:
    """Merge the overlays into `train.yaml` (which `evaluate.yaml` extends) and `inference.yaml`.

    Some clients, such as MONAI Label, read a single config.
    """
    configs = staged / "configs/train.yaml", staged / "configs/inference.yaml"
    before = {key: value for config in reversed(configs) for key, value in _read(config).items()}
    changes: dict[str, Any] = {}
    for overlay in variant.split(","):
        file = staged / "configs" / f"{overlay}.yaml"
        if not file.is_file():
            raise BundleError(f"--variant: {name} has no configs/{overlay}.yaml")
        changes |= _read(file)
        if unknown := changes.keys() - before.keys():
            raise BundleError(
                f"--variant: {overlay}.yaml sets {sorted(unknown)}, expected keys of {name}'s train.yaml or "
                "inference.yaml"
            )
        for config in configs:
            merged = merge_overlay(config.read_text(encoding="utf-8"), file.read_text(encoding="utf-8"))
            config.write_text(f"# {overlay}.yaml is merged into this file.\n{merged}", encoding="utf-8")
    _rename(staged, name, variant, {key: value for key, value in changes.items() if value != before[key]})


def _read(config: Path) -> dict[str, Any]:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def merge_overlay(config: str, overlay: str) -> str:
    """Replace the top-level keys that both texts have; keep comments and order.

    Args:
        config: YAML text.
        overlay: YAML text; keys that `config` does not have are ignored.

    Raises:
        BundleError: the result differs from MONAI's merge of the two, because the layout of the text is not supported.
    """
    blocks = {block[1]: block[0] for block in BLOCK.finditer(overlay)}
    merged = BLOCK.sub(lambda block: _with_comment(blocks.get(block[1], block[0]), block[0]), config)
    before, changes = yaml.safe_load(config), yaml.safe_load(overlay)
    if yaml.safe_load(merged) != {**before, **{key: value for key, value in changes.items() if key in before}}:
        raise BundleError("an overlay could not be merged; expected top-level keys that begin at the left margin")
    return merged


def _with_comment(new: str, old: str) -> str:
    """Keep the comment of a single-line key for its new value."""
    comment = re.search(r"\s+# .*\n\Z", old)
    if comment is None or new.count("\n") > 1 or old.count("\n") > 1 or "# " in new:
        return new
    return new.rstrip("\n") + comment[0]


def _rename(staged: Path, name: str, variant: str, changes: dict[str, Any]) -> None:
    """Let metadata and README tell of the variant."""
    file = staged / "configs/metadata.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    meta["name"] = f"{meta['name']} ({variant})"
    if "roi_size" in changes:
        data = meta["network_data_format"]
        data["inputs"]["image"]["spatial_shape"] = data["outputs"]["pred"]["spatial_shape"] = changes["roi_size"]
    file.write_text(json.dumps(meta, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

    page = staged / "docs/README.md"
    text = re.sub(rf"\b{name}\b", staged.name, page.read_text(encoding="utf-8"))
    plain = {key: value for key, value in changes.items() if not isinstance(value, dict)}
    text = with_defaults(text, plain)
    overlays = " and ".join(f"`{overlay}.yaml`" for overlay in variant.split(","))
    note = f"This is `{name}` with {overlays} merged into its configs."
    if plain:
        note += f" Values that differ on this page: {', '.join(f'`{key}` {value}' for key, value in plain.items())}."
    page.write_text(re.sub(r"\A(# .*\n)", rf"\1\n{note}\n", text), encoding="utf-8")


def with_defaults(page: str, values: Mapping[str, Any]) -> str:
    """Replace the defaults of keys in the table of a bundle's README."""
    for key, value in values.items():
        page = re.sub(rf"^(\| `{key}` \| )`.*?`", lambda row, v=value: f"{row[1]}`{v}`", page, flags=re.MULTILINE)
    return page


# ---- what is written ------------------------------------------------------------------------------------------


def _without_links_out(page: str) -> str:
    """Links to other bundles and pages of the repository keep their words; where they led does not exist any more."""
    return re.sub(r"\[([^\]]+)\]\(\.\./\.\./[^)\s]+\)", r"\1", page)


def _model_card(page: str) -> str:
    """Convert the README for Hugging Face: front matter, and links relative to the bundle's folder."""

    def from_root(link: re.Match[str]) -> str:
        target = link[1] if ":" in link[1] or link[1].startswith("#") else posixpath.normpath(f"docs/{link[1]}")
        return f"]({target})"

    return f"---\n{yaml.safe_dump(MODEL_CARD)}---\n\n" + re.sub(r"\]\(([^)\s]+)\)", from_root, page)


def pack(folder: Path, output: Path) -> Path:
    """Write a bundle's folder as `NAME_vVERSION.zip`.

    Files are stored without compression: weights hardly shrink, and compressors differ between machines.
    """
    version = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))["version"]
    archive = output / f"{folder.name}_v{version}.zip"
    with atomic_path(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as content:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix(), TIME)
            entry.create_system, entry.external_attr = 3, MODE << 16  # Unix, on any machine
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, content.open(entry, "w") as target:
                shutil.copyfileobj(source, target)
    return archive


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _add_info(archive: Path, base_url: str | None) -> None:
    """Add a zip file to `model_info.json`, in the format of the Model Zoo."""
    file = archive.with_name(INFO)
    info = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    source = "" if base_url is None else f"{base_url.rstrip('/')}/{archive.name}"
    info[archive.stem] = {"checksum": _digest(archive, "sha1"), "source": source}
    write_json(file, info, indent=4)
