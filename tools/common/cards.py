"""Cards of weights: `backbone.json` beside `backbone.pt` says what the weights are and how their scans were prepared.

The SHA-256 in a card is that of the tensors, not of the file: it also holds for the same weights in a training
checkpoint or in a TorchScript export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from tools.common.files import atomic_path, write_tensors

FORMAT = 1  # of the cards written here; higher if an older reader would misunderstand them
NUMBER = (int, float)
# key → type, types, [type of the values of a list], or keys of the inner level; cards have more keys, for people
CONTENT = {
    "sha256": str,
    "network": {"name": str},
    "preparation": {
        "orientation": str,
        "spacing": (list, NoneType),
        "intensity": {"scaling": str},
        "foreground_above": (*NUMBER, str, NoneType),
    },
    "roi_size": [int],
    "versions": dict,
}


class CardError(ValueError):
    """A card that is damaged, of a later version, or of other weights."""


def card_path(weights: str | Path) -> Path:
    """Return the path of the card of a weights file, which need not exist."""
    return Path(weights).with_suffix(".json")


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors of a state dict: names, types, shapes and values, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_weights(path: str | Path, state: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a bare state dict and its card, so that no reader takes the one for that of another.

    Both are written completely before they take their places: the card, then the weights. If the process is killed
    between the two, the card does not belong to the weights that are there, which readers refuse. (In the other order,
    the first weights of a run could be left without a card.)
    """
    content = {"format": FORMAT, "sha256": digest(state), **card}
    with atomic_path(path) as weights:
        write_tensors(weights, state)
        with atomic_path(card_path(path)) as beside:  # takes its place first
            beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_card(weights: str | Path) -> dict[str, Any] | None:
    """Read the card of a weights file; None if there is none.

    Raises:
        CardError: the card is damaged or of a later version.
    """
    path = card_path(weights)
    if not path.is_file():
        return None
    way_out = f"copy both files anew from where they were trained, or use the weights without a card: remove {path}"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(
            f"{path}: found no JSON ({error}), expected the card of {Path(weights).name}; {way_out}"
        ) from error
    number = card.get("format") if isinstance(card, dict) else None
    if type(number) is not int or number < 1:
        raise CardError(f"{path}: format: found {number!r}, expected {FORMAT} in the card of weights; {way_out}")
    if number > FORMAT:
        raise CardError(
            f"{path}: format: found {number}, expected {FORMAT} at most: a later version wrote it; "
            f"use that version or remove {path}, and with it what is known of the weights"
        )
    problems = list(_problems(card, CONTENT))
    if problems:
        raise CardError(f"{path}: {'; '.join(problems)}; {way_out}")
    return card


def _problems(found: Mapping[str, Any], expected: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for key, kind in expected.items():
        kinds = kind if isinstance(kind, tuple) else (type(kind),) if isinstance(kind, dict | list) else (kind,)
        value = found.get(key)
        values = value if isinstance(kind, list) and isinstance(value, list) else []
        if key not in found or type(value) not in kinds or any(type(v) is not kind[0] for v in values):
            said = f"found {value!r}" if key in found else "is missing"
            what = f"a list of {kind[0].__name__}" if isinstance(kind, list) else " or ".join(k.__name__ for k in kinds)
            yield f"{inside}{key}: {said}, expected {what}"
        elif isinstance(kind, dict):
            yield from _problems(value, kind, f"{inside}{key}.")


def require_own(weights: str | Path, card: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Check that a card belongs to the weights beside it.

    Raises:
        CardError: the SHA-256 of the tensors is another.
    """
    found = digest(state)
    if found != card["sha256"]:
        path = card_path(weights)
        raise CardError(
            f"{path}: belongs to other weights: {Path(weights).name} has the SHA-256 {found[:16]}…, expected "
            f"{card['sha256'][:16]}…: one of the two was replaced, or a run was killed while it saved them. Copy both "
            f"anew, resume that run, or use the weights without a card: remove {path}"
        )
