"""Every cache draws the crops and labels that are drawn without one, from the files to the batch."""

from __future__ import annotations

import blosc2
import pytest
import torch

from .bundles import TINY


@pytest.fixture
def batches(parse, samples, tmp_path):
    """Batches of two epochs of training or validation."""

    def draw(name, part, cache, workers, spacing):
        parser = parse(
            name,
            ["train", "small"],
            dataset_dir=str(samples(name)),
            cache_dir=str(tmp_path / "c"),
            **{**TINY, "num_workers": workers, "cache": cache, "spacing": spacing, "crops_per_volume": 2},
            roi_size=[32, 32, 32],
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
    ("name", "part", "workers", "spacing"),
    [
        ("hippocampus", "train", 0, None),
        ("hippocampus", "train", 2, None),
        ("hippocampus", "validate", 0, None),
        ("brats", "train", 0, None),
        ("spleen", "train", 0, [5.0, 5.0, 5.0]),
    ],
)
def test_caches_draw_what_is_drawn_without(batches, tmp_path, name, part, workers, spacing):
    expected = batches(name, part, "none", workers, spacing)
    for cache in ("memory", "disk"):
        drawn = batches(name, part, cache, workers, spacing)
        for batch, truth in zip(drawn, expected, strict=True):
            assert batch.keys() == truth.keys()
            assert batch["file"] == truth["file"]
            image, true_image = (torch.as_tensor(b["image"]) for b in (batch, truth))
            assert torch.equal(torch.as_tensor(batch["label"]), torch.as_tensor(truth["label"]))
            if spacing is None:
                assert torch.equal(image, true_image)
            else:  # in 16 bit
                assert torch.allclose(image, true_image, atol=2**-11)
    kinds = {blosc2.open(str(path)).dtype.name for path in (tmp_path / "c").glob("*.b2nd")}
    assert kinds == {"uint8", "uint16" if spacing is None else "float16"}
