import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet

from benchmarks.linear_probe import (
    LEVELS,
    STRIDES,
    VOXELS,
    dice,
    features,
    fit,
    main,
    probe,
    random_splits,
    with_constant,
)
from tools.samples.sample_data import sample_data


def test_the_map_is_the_weighted_least_squares_solution():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    label = (x[:, 0] + 0.3 * torch.randn(300, generator=draw) > 0.8).long() + (x[:, 1] > 1)
    weight = np.array([1 / np.sqrt((label == c).sum().item()) for c in label])
    rows = np.column_stack([x.double().numpy(), np.ones(300)])
    slow, *_ = np.linalg.lstsq(rows * np.sqrt(weight)[:, None], np.eye(3)[label] * np.sqrt(weight)[:, None], rcond=None)
    np.testing.assert_allclose(fit(x, label, 3).numpy(), slow, atol=1e-4)


def test_features_that_tell_everything_and_nothing():
    label = torch.arange(3000) % 3
    told = torch.nn.functional.one_hot(label, 3).float()
    for x, least, most in ((told, 1.0, 1.0), (torch.zeros(3000, 3), 0.0, 0.6)):
        scores = torch.cat([x, torch.ones(3000, 1)], 1).double() @ fit(x, label, 3)
        found = dice(scores.argmax(1), label, 3)
        assert least <= sum(found) / 2 <= most


def test_dice_leaves_out_the_background_and_absent_classes():
    assert dice(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 0, 0]), 4) == [pytest.approx(2 / 3)]


def test_features_are_those_of_every_level():
    network = BasicUNet(3, 1, 3, features=[4, 4, 8, 8, 16, 4]).eval()
    image = torch.rand(1, 32, 48, 32)
    levels = features(network, image)
    assert [level.shape[1] for level in levels] == [4, 4, 8, 8, 16]
    assert all(len(level) == 32 * 48 * 32 for level in levels) and len(levels) == len(STRIDES)
    first = network.conv_0(image[None])
    torch.testing.assert_close(levels[0], first[0].flatten(1).T)


def test_a_class_that_the_first_level_shows_is_found():
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 32, 32, 32, generator=draw) for _ in range(3)]
    items = {number: (image, (image > 0.7).long().flatten()) for number, image in enumerate(images)}
    torch.manual_seed(0)
    network = BasicUNet(3, 1, 2, features=[16, 4, 8, 8, 16, 4])
    found, again = probe(network, items, [([0, 1], [2]), ([2, 1], [0])], 2)
    assert len(found) == len(LEVELS)
    assert found != again
    assert probe(network, items, [([0, 1], [2])], 2)[0] == pytest.approx(found)
    assert found[0] > 0.5 and found[-1] > 0.5  # white noise: the bottleneck cannot know
    assert found[4] < found[0]


@torch.no_grad()
def test_the_fitted_map_is_what_measures():
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 32, 32, 32, generator=draw) for _ in range(2)]
    items = {number: (image, (image > 0.7).long().flatten()) for number, image in enumerate(images)}
    torch.manual_seed(0)
    network = BasicUNet(3, 1, 2, features=[4, 4, 8, 8, 16, 4]).eval()
    first, second = (torch.cat(features(network, image), 1) for image in images)
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[:VOXELS]
    linear = fit(first[chosen], items[0][1][chosen], 2)
    expected = dice((with_constant(second) @ linear).argmax(1), items[1][1], 2)
    assert probe(network, items, [([0], [1])], 2)[0][-1] == pytest.approx(*expected, abs=1e-3)


def test_the_table(tmp_path, capsys):
    root = tmp_path / "data"
    sample_data(str(root), "hippocampus", 5)
    torch.manual_seed(0)
    torch.save(BasicUNet(3, 1, 1, features=[4, 4, 8, 8, 16, 4]).state_dict(), tmp_path / "backbone.pt")
    options = {"roi_size": [32, 32, 32], "unet_features": [4, 4, 8, 8, 16, 4]}
    main(str(root), str(tmp_path / "backbone.pt"), training_cases=2, measured_cases=1, splits=2, fresh=1, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    cells = [line.split(" | ") for line in lines[2:]]
    assert cells[1][0] == f"| {tmp_path / 'backbone.pt'}"
    for cell in (cell.rstrip(" |") for line in cells for cell in line[1:]):
        mean, half_width = map(float, cell.split(" ± "))
        assert 0 <= mean <= 1 and half_width >= 0


def test_splits_are_disjoint_repeatable_and_refused_if_there_are_too_few_cases():
    splits = random_splits(20, 12, 8, 5)
    assert splits == random_splits(20, 12, 8, 5)
    assert all(sorted([*fitted, *measured]) == list(range(20)) for fitted, measured in splits)
    assert len({tuple(fitted) for fitted, _ in splits}) == 5
    with pytest.raises(ValueError, match=r"found 12, 9 and 5, expected .*at most the 20 labelled cases"):
        random_splits(20, 12, 9, 5)


def test_another_network_is_refused(tmp_path):
    root = tmp_path / "data"
    sample_data(str(root), "hippocampus", 5)
    with pytest.raises(ValueError, match="overlays: found a SwinUNETR, expected a UNet"):
        main(str(root), overlays="small,swin_unetr", training_cases=1, measured_cases=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bundle": "heart"}, r"hybridmim_heart_seg/configs/train\.yaml: found no such file"),
        ({"overlays": "tiny"}, r"tiny\.yaml: found no such file"),
        ({"weights": "nowhere.pt"}, r"nowhere\.pt: found no such file"),
        ({"unet_feature": [4]}, r"options: found unet_feature, expected keys of"),
        ({"bundle": "brats"}, "bundle: brats has activation sigmoid, expected softmax"),
    ],
)
def test_wrong_input_is_refused_before_any_scan_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        main("nowhere", **options)
