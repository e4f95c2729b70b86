"""Each term of the loss against a slow, obvious implementation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.losses import DiceCELoss

from tools.losses import (
    BalancedDiceCELoss,
    ConsistencyLoss,
    HybridMIMLoss,
    LocationLoss,
    NTXentLoss,
    NumberLoss,
    PartialRegionLoss,
    Prediction,
    expand_mask,
    patches_by_region,
    region_targets,
    scan_voxels,
)

# roi, region, patch: cubic, anisotropic, and more patches than regions along one axis only
GEOMETRIES = [
    ((32, 32, 32), (16, 16, 16), (8, 8, 8)),
    ((16, 24, 32), (8, 12, 32), (4, 12, 8)),
    ((12, 8, 8), (4, 8, 8), (2, 4, 8)),
]


def draw(geometry, seed=0, batch=2, channels=2, padded=False):
    roi, region, patch = geometry
    g = torch.Generator().manual_seed(seed)
    image = torch.rand((batch, channels, *roi), generator=g) * 0.9 + 0.05
    if padded:  # one patch and a half of padding at the start of the first axis, and a patch of air at its end
        image[:, :, : patch[0] + patch[0] // 2] = 0
        image[:, :, -patch[0] :, : patch[1], : patch[2]] = 0.001
    mask = torch.rand((batch, 1, *(r // p for r, p in zip(roi, patch, strict=True))), generator=g) < 0.4
    regions = [r // s for r, s in zip(roi, region, strict=True)]
    m = math.prod(s // p for s, p in zip(region, patch, strict=True))
    prediction = Prediction(
        reconstruction=torch.rand(image.shape, generator=g),
        box=tuple(slice(0, s) for s in roi),
        number=torch.randn((batch, m + 1, *regions), generator=g),
        location=torch.randn((batch, m, *regions), generator=g),
        views=(torch.randn((batch, 7), generator=g), torch.randn((batch, 7), generator=g)),
    )
    return image, mask, prediction


def voxels(size):
    return itertools.product(*(range(s) for s in size))


def region_facts(image, mask, geometry):
    """For each sample and region: [(masked, of more than one intensity)] of its patches, from voxel coordinates."""
    roi, region, patch = geometry
    facts = {}
    for b in range(len(image)):
        for v in voxels(roi):
            r = tuple(x // s for x, s in zip(v, region, strict=True))
            p = tuple(x // s for x, s in zip(v, patch, strict=True))
            value = tuple(image[(b, slice(None), *v)].tolist())
            entry = facts.setdefault((b, r), {}).setdefault(p, [bool(mask[(b, 0, *p)]), set()])
            entry[1].add(value)
    return {
        key: [(masked, len(values) > 1) for _, (masked, values) in sorted(patches.items())]
        for key, patches in facts.items()
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_region_targets_equal_brute_force_over_voxels(geometry, padded):
    image, mask, prediction = draw(geometry, padded=padded)
    targets = region_targets(image, mask, prediction.number.shape[2:])
    facts = region_facts(image, mask, geometry)
    assert len(facts) == targets.number.numel()
    for (b, r), patches in facts.items():
        assert targets.location[(b, slice(None), *r)].tolist() == [masked for masked, _ in patches]
        assert targets.number[(b, *r)] == sum(masked for masked, _ in patches)
        assert targets.location_counts[(b, slice(None), *r)].tolist() == [scan for _, scan in patches]
        assert targets.number_counts[(b, *r)] == all(scan for _, scan in patches)


def test_a_run_of_patches_in_raster_order_is_not_a_region():
    # the published code takes 8 patches that follow each other for the 2×2×2 patches of a region
    mask = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    mask[..., :2, :2, :2] = True
    assert patches_by_region(mask, (2, 2, 2)).sum(1).flatten().tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_expand_mask(geometry):
    image, mask, _ = draw(geometry)
    expanded = expand_mask(mask, image.shape[2:])
    patch = geometry[2]
    for v in voxels(geometry[0]):
        p = tuple(x // s for x, s in zip(v, patch, strict=True))
        assert torch.equal(expanded[(..., *v)], mask[(..., *p)])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_partial_region_counts_masked_voxels_of_the_box_only(geometry, padded):
    image, mask, prediction = draw(geometry, padded=padded)
    box = tuple(slice(s // 4, s // 4 + s // 2) for s in geometry[0])
    prediction = prediction._replace(box=box, reconstruction=prediction.reconstruction[(..., *box)])
    errors = []
    for b in range(len(image)):
        for v in itertools.product(*(range(side.start, side.stop) for side in box)):
            p = tuple(x // s for x, s in zip(v, geometry[2], strict=True))
            if mask[(b, 0, *p)] and (image[(b, slice(None), *v)] > 0).any():
                at = tuple(x - side.start for x, side in zip(v, box, strict=True))
                painted, true = prediction.reconstruction[(b, slice(None), *at)], image[(b, slice(None), *v)]
                errors += ((painted - true) ** 2).tolist()
    assert errors
    assert PartialRegionLoss()(prediction, image, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_region_losses_equal_their_definitions(geometry, padded):
    image, mask, prediction = draw(geometry, padded=padded)
    number, location, consistency = [], [], []
    for (b, r), patches in region_facts(image, mask, geometry).items():
        logits = prediction.number[(b, slice(None), *r)]
        sigmoid = torch.sigmoid(prediction.location[(b, slice(None), *r)])
        for p, (masked, scan) in zip(sigmoid.tolist(), patches, strict=True):
            if scan:
                location.append(-math.log(p if masked else 1 - p))
        if all(scan for _, scan in patches):
            softmax = (logits.exp() / logits.exp().sum()).tolist()
            number.append(-math.log(softmax[sum(masked for masked, _ in patches)]))
            expected = sum(n * p for n, p in enumerate(softmax))
            consistency.append((expected - sigmoid.sum().item()) ** 2)
    targets = region_targets(image, mask, prediction.number.shape[2:])

    def mean(values):
        return pytest.approx(sum(values) / max(len(values), 1), rel=1e-4)

    assert NumberLoss()(prediction.number, targets).item() == mean(number)
    assert LocationLoss()(prediction.location, targets).item() == mean(location)
    assert ConsistencyLoss()(prediction.number, prediction.location, targets).item() == mean(consistency)


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.5), (2, 0.5), (5, 0.1)])
def test_ntxent_equals_its_textbook_definition(n, temperature):
    """For views without their mean."""
    g = torch.Generator().manual_seed(n)
    first, second = torch.randn((n, 6), generator=g), torch.randn((n, 6), generator=g)
    mean = torch.cat([first, second]).mean(0)
    z = [view - mean for view in (*first, *second)]

    def similarity(i, k):
        return math.exp(float(z[i] @ z[k] / (z[i].norm() * z[k].norm())) / temperature)

    terms = [
        -math.log(similarity(i, (i + n) % (2 * n)) / sum(similarity(i, k) for k in range(2 * n) if k != i))
        for i in range(2 * n)
    ]
    assert NTXentLoss(temperature)(first, second).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_what_all_views_have_in_common_does_not_hide_which_belong_together():
    """As at the start of a training, when the vectors of all crops are nearly the same."""
    g = torch.Generator().manual_seed(0)
    own, common = torch.randn((4, 6), generator=g), 1000 * torch.ones(6)
    apart = NTXentLoss()(own, own + 0.1)
    assert apart < 0.6 * math.log(7)  # chance
    torch.testing.assert_close(NTXentLoss()(common + own, common + own + 0.1), apart, rtol=1e-3, atol=0)


def test_total_is_the_weighted_sum_of_the_named_terms():
    image, mask, prediction = draw(GEOMETRIES[0])
    weights = {"weight_pr": 2.0, "weight_num": 0.3, "weight_loc": 0.5, "weight_con": 0.7, "weight_cl": 0.0}
    terms = HybridMIMLoss(**weights)(prediction, image, mask)
    assert list(terms) == ["loss", "loss_pr", "loss_num", "loss_loc", "loss_con", "loss_cl"]
    total = sum(weight * terms[f"loss_{name.partition('_')[2]}"] for name, weight in weights.items())
    assert terms["loss"] == pytest.approx(total.item())
    published = HybridMIMLoss()(prediction, image, mask)
    assert published["loss"].item() == pytest.approx(
        (
            published["loss_pr"]
            + 0.1 * published["loss_num"]
            + 0.1 * published["loss_loc"]
            + 0.01 * published["loss_con"]
            + 0.1 * published["loss_cl"]
        ).item()
    )


def test_consistency_has_a_gradient_to_both_heads():
    image, mask, prediction = draw(GEOMETRIES[0])
    number, location = prediction.number.requires_grad_(), prediction.location.requires_grad_()
    ConsistencyLoss()(number, location, region_targets(image, mask, number.shape[2:])).backward()
    assert number.grad.abs().max() > 0
    assert location.grad.abs().max() > 0


def test_nothing_but_padding_gives_zero_with_a_gradient():
    image, mask, prediction = draw(GEOMETRIES[0])
    number = prediction.number.requires_grad_()
    terms = HybridMIMLoss(weight_cl=0)(prediction, torch.zeros_like(image), mask)
    terms["loss"].backward()
    assert all(terms[name] == 0 for name in ("loss_pr", "loss_num", "loss_loc", "loss_con"))
    assert torch.equal(number.grad, torch.zeros_like(number))
    assert not scan_voxels(torch.zeros_like(image)).any()


@pytest.mark.parametrize("weights", [{"weight_pr": -1.0}, dict.fromkeys(HybridMIMLoss().weights, 0)])
def test_bad_weights_are_refused(weights):
    weights = {name.replace("loss_", "weight_"): value for name, value in weights.items()}
    with pytest.raises(ValueError, match="loss weights must be 0 or more"):
        HybridMIMLoss(**weights)


class TestBalancedDiceCE:
    """A voxel of a rare class counts more in the cross-entropy, as long as the class is not found."""

    @staticmethod
    def batch():
        g = torch.Generator().manual_seed(0)
        label = torch.zeros(2, 1, 8, 8, 8)
        label[0, 0, :4, :4, :4] = 1
        label[1, 0, 2, 3, 4:6] = 2  # two voxels, all of them in one crop; class 3 is in none
        return torch.randn(2, 4, 8, 8, 8, generator=g), label

    def test_without_balance_it_is_that_of_monai(self):
        logits, label = self.batch()
        theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        assert BalancedDiceCELoss(0)(logits, label).item() == pytest.approx(theirs(logits, label).item(), rel=1e-6)

    @pytest.mark.parametrize("balance", [0.5, 1])
    def test_a_voxel_counts_by_how_rare_and_how_lost_its_class_is(self, balance):
        logits, label = self.batch()
        counts, dice = {0: 1024 - 64 - 2, 1: 64, 2: 2}, {0: 0.0}
        probability = logits.softmax(1)
        for k in (1, 2, 3):
            overlap = probability[:, k][label[:, 0] == k].sum().item()
            dice[k] = 1 - 2 * overlap / (probability[:, k].sum().item() + counts.get(k, 0))
        total = weights = 0.0
        for b, x, y, z in itertools.product(range(2), range(8), range(8), range(8)):
            true = int(label[b, 0, x, y, z])
            weight = (counts[0] / counts[true]) ** (balance * dice[true])
            total -= weight * math.log(probability[b, true, x, y, z])
            weights += weight
        expected = (dice[1] + dice[2] + dice[3]) / 3 + total / weights
        assert BalancedDiceCELoss(balance)(logits, label).item() == pytest.approx(expected, rel=1e-4)

    def test_what_is_found_counts_like_background(self):
        _, label = self.batch()
        logits = 12 * torch.nn.functional.one_hot(label[:, 0].long(), 4).movedim(-1, 1).float()
        logits[0, :, 7, 7, 7] = torch.tensor([0.0, 3, 0, 0])  # a single voxel of background is wrong
        found = [BalancedDiceCELoss(balance)(logits, label).item() for balance in (0, 1)]
        assert found[1] == pytest.approx(found[0], rel=0.05)

    def test_a_batch_of_one_class(self):
        logits, label = self.batch()
        for value in (0, 3):
            assert BalancedDiceCELoss(0.5)(logits, torch.full_like(label, value)).isfinite()

    @pytest.mark.parametrize("balance", [-0.1, 1.5, math.nan, "much", None])
    def test_what_is_no_share_is_refused(self, balance):
        with pytest.raises(ValueError, match=f"class_balance must be a number from 0 to 1; found {balance!r}"):
            BalancedDiceCELoss(balance)
