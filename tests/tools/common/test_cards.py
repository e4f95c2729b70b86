"""Cards of weights: the pair always agrees, and a card that cannot be trusted is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.networks.nets import BasicUNet

from tools.common.cards import CardError, digest, read_card, require_own, save_weights

CARD = {
    "network": {"name": "UNet"},
    "preparation": {
        "orientation": "RAS",
        "spacing": None,
        "intensity": {"scaling": "z_score"},
        "foreground_above": None,
    },
    "roi_size": [32, 32, 32],
    "versions": {"torch": "2"},
}


def state(value):
    return {"b": torch.full((2, 3), float(value)), "a": torch.tensor(3)}


def test_a_card_is_read_as_it_was_written(tmp_path):
    save_weights(tmp_path / "backbone.pt", state(1), CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.pt"]
    card = read_card(tmp_path / "backbone.pt")
    assert card == {"format": 1, "sha256": digest(state(1)), **CARD}
    loaded = torch.load(tmp_path / "backbone.pt", weights_only=True)  # bare
    require_own(tmp_path / "backbone.pt", card, loaded)
    assert read_card(tmp_path / "model.pt") is None


def test_the_hash_is_that_of_names_types_shapes_and_values():
    same = {"a": torch.tensor(3), "b": torch.ones(3, 2).T}
    assert digest(state(1)) == digest(same)
    others = [
        state(2),
        {"c": state(1)["b"], "a": torch.tensor(3)},
        {"b": torch.ones(3, 2), "a": torch.tensor(3)},
        {"b": torch.ones(2, 3), "a": torch.tensor(3, dtype=torch.int32)},
    ]
    assert len({digest(other) for other in (state(1), *others)}) == 5


def test_an_exported_network_has_the_hash_of_its_weights(tmp_path):
    network = BasicUNet(3, 1, 2, (4, 4, 8, 8, 16, 4))
    torch.jit.script(network).save(tmp_path / "model.ts")
    assert digest(torch.jit.load(tmp_path / "model.ts").state_dict()) == digest(network.state_dict())


@pytest.mark.parametrize("first", [True, False], ids=["first weights of a run", "better weights"])
def test_a_run_that_is_killed_between_weights_and_card_leaves_no_pair_that_is_believed(tmp_path, monkeypatch, first):
    path, replace, moved = tmp_path / "backbone.pt", Path.replace, []
    if not first:
        save_weights(path, state(1), CARD)

    def killed_after_one(self, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        save_weights(path, state(2), CARD)
    card = read_card(path)
    assert card is not None  # weights are never without a card
    if first:
        assert not path.exists()
    else:
        with pytest.raises(CardError, match=r"belongs to other weights: backbone\.pt has the SHA-256"):
            require_own(path, card, torch.load(path, weights_only=True))


def changed(**changes):
    return json.dumps({"format": 1, "sha256": "0", **CARD, **changes})


BAD = {
    "no JSON": ('{"format": 1,', r"found no JSON \(Expecting"),
    "no card": ("[1, 2]", r"format: found None, expected 1"),
    "no version": (changed(format="1"), r"format: found '1', expected 1"),
    "later": (changed(format=2), r"format: found 2, expected 1 at most: a later version wrote it"),
    "wrong type": (changed(roi_size=32), r"roi_size: found 32, expected a list of int"),
    "no sides": (changed(roi_size=[32, "32", 32]), r"roi_size: found \[32, '32', 32\], expected a list of int"),
    "no number": (changed(preparation={**CARD["preparation"], "spacing": True}), r"preparation\.spacing: found True"),
    "inner key": (changed(network={}), r"network\.name: is missing, expected str"),
    "several": (changed(network=None, sha256=1), r"sha256: found 1, expected str; network: found None, expected dict"),
}


@pytest.mark.parametrize(("content", "told"), BAD.values(), ids=BAD)
def test_a_damaged_or_later_card_is_refused_by_name(tmp_path, content, told):
    (tmp_path / "backbone.json").write_text(content)
    with pytest.raises(CardError, match=told) as error:
        read_card(tmp_path / "backbone.pt")
    assert str(error.value).startswith(f"{tmp_path / 'backbone.json'}: ")
    assert f"remove {tmp_path / 'backbone.json'}" in str(error.value)
