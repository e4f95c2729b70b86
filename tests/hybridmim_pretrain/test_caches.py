"""Every cache draws the crops and masks that are drawn without one, from the files to the batch."""

from __future__ import annotations

import blosc2
import pytest
import torch

from .bundle import TINY


@pytest.fixture
def batches(parse, ct_scans, tmp_path):
    """Batches of two epochs of training or validation."""

    def draw(overlays, part, cache, workers):
        options = {**TINY, "num_workers": workers, "crops_per_volume": 2}
        parser = parse(
            ["train", "small", *overlays],
            dataset_dir=str(ct_scans),
            cache=cache,
            cache_dir=str(tmp_path / "c"),
            **options,
        )
        loader = parser.get_parsed_content(f"{part}#dataloader")
        drawn = []
        for epoch in range(2):
            if part == "train":
                loader.sampler.set_epoch(epoch)  # as the engine does
            drawn += list(loader)
        return drawn

    return draw


@pytest.mark.parametrize(
    ("overlays", "part", "workers"),
    [
        ([], "train", 0),
        ([], "train", 2),
        ([], "validate", 0),
        (["simclr"], "train", 0),
        (["simclr"], "validate", 0),
    ],
)
def test_caches_draw_what_is_drawn_without(batches, tmp_path, overlays, part, workers):
    expected = batches(overlays, part, "none", workers)
    for cache in ("memory", "disk"):
        drawn = batches(overlays, part, cache, workers)
        assert len(drawn) == len(expected)
        for batch, truth in zip(drawn, expected, strict=True):
            assert batch.keys() - truth.keys() == set()
            assert torch.equal(batch["image"].as_tensor(), truth["image"].as_tensor())
            assert batch["file"] == truth["file"]
            if "mask" in truth:
                assert torch.equal(torch.as_tensor(batch["mask"]), torch.as_tensor(truth["mask"]))
    stored = list((tmp_path / "c").glob("*.b2nd"))
    assert stored
    assert all(blosc2.open(str(path)).dtype == "uint16" for path in stored)  # which is exact
