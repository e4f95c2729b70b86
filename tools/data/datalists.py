"""Reads data lists: Decathlon-style JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.data.scans import ScanError, files_of, series_folder


def read_datalist(
    datalist: str | Path, dataset_dir: str | Path | None, section: str, labels: bool = False
) -> list[dict]:
    """Read one section of a Decathlon-style JSON file, and check that its files exist.

    Args:
        datalist: JSON file. Entries are paths, or objects whose `image` is a path or a list of paths (one per
            channel), and whose `label` is a path; other keys of an entry are ignored.
        dataset_dir: base folder of relative paths; None for the folder of the datalist.
        section: `training`, `validation` or `test`.
        labels: whether to keep the labels.

    Returns:
        One `{"image": path or list of paths}` per entry, in the order of the file, with `labels` also
        `"label": path`; an empty list if the section is missing and is not `training`.

    Raises:
        ScanError: the file does not exist or is not JSON, an entry is malformed, there is no training entry, or files
            are missing.
    """
    items = datalist_items(datalist, dataset_dir, section, labels)
    missing = [path for item in items for path in files_of(item) if not series_folder(path).exists()]
    if missing:
        first = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ScanError(
            f"{datalist}: {section!r}: {len(missing)} {'image or label' if labels else 'image'} files do not exist: "
            f"{first}; expected them below {_base(datalist, dataset_dir)}"
        )
    return items


def datalist_items(
    datalist: str | Path, dataset_dir: str | Path | None, section: str, labels: bool = False
) -> list[dict]:
    """Do as `read_datalist`, without checking that the files exist."""
    content = load_datalist(datalist)
    if section not in content:
        if is_nnunet(content):
            raise ScanError(
                f"{datalist}: is a dataset.json of nnU-Net, which lists no files, expected 'training' with paths: "
                "leave the datalist out, or write one with `python -m tools datalist msd`"
            )
        if section == "training":
            raise ScanError(f"{datalist}: found the keys {sorted(content)}, expected 'training' among them")
        return []
    entries = content[section]
    if not isinstance(entries, list) or (section == "training" and not entries):
        found = "an empty list" if entries == [] else type(entries).__name__
        raise ScanError(f"{datalist}: {section!r}: found {found}, expected a list of entries")
    base = _base(datalist, dataset_dir)
    items = []
    for number, entry in enumerate(entries):
        where = f"{datalist}: {section!r}, entry {number} (counted from 0)"
        items.append({"image": _entry_image(entry, base, where)})
        if labels and isinstance(entry, dict) and entry.get("label") is not None:
            items[-1]["label"] = _entry_label(entry["label"], base, where)
    return items


def is_nnunet(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of a `dataset.json` of nnU-Net, which describes files but lists none."""
    return "training" not in content and bool({"channel_names", "file_ending"} & content.keys())


def load_datalist(datalist: str | Path) -> dict:
    """Read the whole JSON object of a data list.

    Raises:
        ScanError: the file does not exist, or is not a JSON object.
    """
    path = Path(datalist)
    if not path.is_file():
        raise ScanError(
            f"datalist: {path} {'is a folder' if path.is_dir() else 'does not exist'}, expected a JSON file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ScanError(f"{path}: found text that is not JSON ({error}), expected a JSON object") from error
    if not isinstance(content, dict):
        raise ScanError(f"{path}: found {type(content).__name__}, expected an object with the key 'training'")
    return content


def _base(datalist: str | Path, dataset_dir: str | Path | None) -> Path:
    return Path(datalist).parent if dataset_dir is None else Path(dataset_dir)


def _entry_image(entry: object, base: Path, where: str) -> str | list[str]:
    image = entry
    if isinstance(entry, dict):
        if "image" not in entry:
            raise ScanError(f"{where}: found the keys {sorted(entry)}, expected 'image' among them")
        image = entry["image"]
    if isinstance(image, str) and image:
        return str(base / image)
    if isinstance(image, list) and image and all(isinstance(path, str) and path for path in image):
        return [str(base / path) for path in image]
    raise ScanError(f"{where}: found the image {image!r}, expected a path or a list of paths")


def _entry_label(label: object, base: Path, where: str) -> str:
    if isinstance(label, str) and label:
        return str(base / label)
    raise ScanError(f"{where}: found the label {label!r}, expected a path")
