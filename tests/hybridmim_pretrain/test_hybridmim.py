"""Backbones, heads and the pre-training step."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.nets import BasicUNet, SwinUNETR

from scripts.backbones import SwinUNETRBackbone, UNetBackbone, crop_level, dropout_active, pooled, whole
from scripts.hybridmim import VIEWS, HybridMIM, PretrainStep
from scripts.masking import Geometry, RandPatchMaskd, apply_mask
from tools.losses import HybridMIMLoss, Prediction

FEATURES = (8, 8, 16, 16, 32, 8)


def unet(in_channels=1, **kwargs):
    geometry = Geometry((48, 64, 48), (16, 32, 16), (8, 8, 16), (32, 32, 32), 16)
    return UNetBackbone(in_channels, FEATURES, **kwargs), geometry


def swin(in_channels=1, **kwargs):
    geometry = Geometry((64, 64, 64), (32, 32, 64), (16, 16, 32), (64, 64, 64), 32)
    return SwinUNETRBackbone(in_channels, 12, **kwargs), geometry


BOTH = pytest.mark.parametrize("make", [unet, swin])


def batch_of(geometry, n=2, channels=1, seed=0):
    torch.manual_seed(seed)
    transform = RandPatchMaskd(geometry)
    transform.set_random_state(seed)
    image = torch.rand(n, channels, *geometry.roi_size) * 0.9 + 0.05
    return image, torch.stack([transform({"image": x})["mask"] for x in image])


def plain_network(backbone, in_channels):
    if isinstance(backbone, UNetBackbone):
        return BasicUNet(3, in_channels, in_channels, FEATURES)
    return SwinUNETR(in_channels, in_channels, feature_size=12, use_v2=backbone.swinViT.use_v2)


def swin_v2(in_channels):
    return swin(in_channels, use_v2=True)


@pytest.mark.parametrize(("make", "in_channels"), [(unet, 1), (unet, 3), (swin, 2), (swin_v2, 1)])
def test_decode_of_encode_equals_the_monai_network(make, in_channels):
    backbone, geometry = make(in_channels)
    network = plain_network(backbone, in_channels)
    network.load_state_dict(backbone.state_dict(), strict=True)
    image, _ = batch_of(geometry, 1, in_channels)
    backbone.eval()
    network.eval()
    with torch.no_grad():
        expected = network(image)
        torch.testing.assert_close(backbone.decode(backbone.encode(image), whole(geometry.roi_size)), expected)
        torch.testing.assert_close(backbone(image), expected)


@BOTH
def test_decode_of_a_box_sees_that_box_of_every_level(make):
    backbone, geometry = make()
    if make is swin:  # room for a smaller box
        geometry = Geometry((64, 64, 96), (32, 32, 32), (16, 16, 16), (64, 64, 64), 32)
    backbone.eval()
    image, _ = batch_of(geometry, 1)
    box = tuple(slice(r - d, r) for r, d in zip(geometry.roi_size, geometry.decode_size, strict=True))
    with torch.no_grad():
        features = backbone.encode(image)
        cropped = [crop_level(f, box, s) for f, s in zip(features, backbone.level_strides, strict=True)]
        for feature, stride in zip(features, backbone.level_strides, strict=True):
            assert feature.shape[2:] == tuple(r // stride for r in geometry.roi_size)
        out = backbone.decode(features, box)
        assert out.shape == (1, 1, *geometry.decode_size)
        torch.testing.assert_close(out, backbone.decode(cropped, whole(geometry.decode_size)))


def test_an_unaligned_box_is_refused():
    backbone, geometry = unet()
    features = backbone.encode(batch_of(geometry, 1)[0])
    with pytest.raises(ValueError, match=r"box \[\(8, 40\), .* must be aligned to 16 voxels"):
        backbone.decode(features, (slice(8, 40), slice(0, 32), slice(0, 32)))


@BOTH
def test_every_term_has_a_gradient_to_its_head_and_to_the_encoder(make):
    backbone, geometry = make()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry).train()
    image, mask = batch_of(geometry)
    heads = {
        "loss_pr": ["backbone.out" if make is swin else "backbone.final_conv"],
        "loss_num": ["number_head"],
        "loss_loc": ["location_head"],
        "loss_con": ["number_head", "location_head"],
        "loss_cl": ["projection"],
    }
    encoder = "backbone.swinViT.layers4" if make is swin else "backbone.down_4"
    watched = {
        name: parameter
        for name, parameter in step.network_def.named_parameters()
        if name.startswith((encoder, *(part for parts in heads.values() for part in parts)))
    }
    terms = HybridMIMLoss()(step(image, mask), image, mask)
    for name, reached in heads.items():
        grads = torch.autograd.grad(terms[name], watched.values(), retain_graph=True, allow_unused=True)
        touched = {n for n, g in zip(watched, grads, strict=True) if g is not None and g.abs().max() > 0}
        for part in [*reached, encoder]:
            assert any(n.startswith(part) for n in touched), f"{name} does not reach {part}"
        others = {"number_head", "location_head", "projection"} - set(reached)
        assert not any(n.startswith(tuple(others)) for n in touched), f"{name} reaches another head"
    terms["loss"].backward()
    assert all(p.grad is not None for p in step.parameters())  # as DistributedDataParallel needs
    assert all(p.grad.abs().max() > 0 for n, p in watched.items() if n.endswith("weight"))


@pytest.mark.parametrize(("make", "bound"), [(unet, None), (unet, 0.5), (unet, 1e9), (swin, 0.5)])
def test_the_heads_push_the_encoder_no_harder_than_their_bound(make, bound, monkeypatch):
    backbone, geometry = make(dropout=0.0)
    network = HybridMIM(backbone, geometry)
    image, mask = batch_of(geometry, 2 if make is unet else 1)  # slow
    encode, bottlenecks = backbone.encode, []

    def watched(image):
        features = encode(image)
        if features[-1].requires_grad:
            features[-1].retain_grad()
            bottlenecks.append(features[-1])
        return features

    monkeypatch.setattr(backbone, "encode", watched)

    def gradients(head_gradient, **terms):
        """Of the bottleneck, and of every weight."""
        network.zero_grad()
        # under other masks, because two crops whose views are the same have no gradient in the contrastive term
        options = {"views": "other_masks", "head_gradient": head_gradient}
        step = PretrainStep(network, geometry, decode_box=(0, 0, 0), **options).train()
        HybridMIMLoss(**terms)(step(image, mask), image, mask)["loss"].backward()
        weights = [(n, p) for n, p in network.named_parameters() if n.endswith("weight")]  # a bias before a norm: 0
        return bottlenecks.pop().grad, {name: weight.grad.clone() for name, weight in weights}

    pixel, by_pixel = gradients(None, weight_num=0, weight_loc=0, weight_con=0, weight_cl=0)
    heads, by_heads = gradients(None, weight_pr=0)
    scale = 0.5 * float(pixel.norm() / heads.norm()) if bound == 0.5 else 1.0
    assert scale <= 1
    found, by_name = gradients(bound)
    torch.testing.assert_close(found, pixel + scale * heads, rtol=1e-3, atol=1e-3 * float(pixel.norm()))
    for name, gradient in by_name.items():
        share = scale if name.startswith("backbone") else 1.0  # the heads learn from all of it
        expected = by_pixel[name] + share * by_heads[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan"), True, "half"])
def test_an_impossible_bound_is_refused(bound):
    backbone, geometry = unet()
    with pytest.raises(ValueError, match=r"head_gradient must be above 0, or null for no bound .*; found"):
        PretrainStep(HybridMIM(backbone, geometry), geometry, head_gradient=bound)


@BOTH
def test_the_region_heads_see_their_own_region(make):
    backbone, geometry = make()
    network = HybridMIM(backbone, geometry)
    bottleneck = torch.randn(2, backbone.bottleneck_channels, *(r // backbone.stride for r in geometry.roi_size))
    number, location = network.perceive(bottleneck)
    extent = [r // backbone.stride for r in geometry.region_size]
    regions = [r // s for r, s in zip(geometry.roi_size, geometry.region_size, strict=True)]
    for region in itertools.product(*(range(n) for n in regions)):
        box = tuple(slice(i * e, (i + 1) * e) for i, e in zip(region, extent, strict=True))
        mean = bottleneck[(..., *box)].mean((2, 3, 4))
        for head, out in ((network.number_head, number), (network.location_head, location)):
            expected = mean @ head.weight.flatten(1).T + head.bias
            torch.testing.assert_close(out[(..., *region)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (0,)])
def test_unet_views_differ_by_dropout_only(stages):
    backbone, geometry = unet(dropout=0.3, dropout_stages=stages)
    step = PretrainStep(HybridMIM(backbone, geometry), geometry).train()
    image, mask = batch_of(geometry)
    first, second = step(image, mask).views
    assert not torch.allclose(first, second)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first, second = step(image, mask).views
    torch.testing.assert_close(first, second)


def test_swin_unetr_views_differ_by_dropout_only():
    image, mask = batch_of(swin()[1], 1)
    for dropout, same in ((0.3, False), (0.0, True)):
        backbone, geometry = swin(dropout=dropout)
        first, second = PretrainStep(HybridMIM(backbone, geometry), geometry).train()(image, mask).views
        assert torch.allclose(first, second, atol=1e-5) == same


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (0,)])
def test_the_second_view_of_unet_is_an_encoding_like_the_first(stages):
    backbone, geometry = unet(dropout=0.3, dropout_stages=stages)
    backbone.train()
    image, _ = batch_of(geometry)
    torch.manual_seed(1)
    expected = backbone.encode(image)
    first = backbone.encode(image)
    torch.manual_seed(1)
    again = backbone.encode_again(image, first)
    torch.testing.assert_close(again[-1], expected[-1])


def test_the_second_view_has_another_mask_and_another_fill():
    backbone, geometry = unet(dropout=0.0)
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, mask_fill="foreign", views="other_masks").train()
    image, mask = batch_of(geometry, 3)
    prediction = step(image, mask)
    assert torch.equal(prediction.visible, apply_mask(image, mask, "foreign"))
    for view, seen in zip(
        prediction.views,
        (prediction.visible, apply_mask(image, mask[[2, 0, 1]], "foreign", shift=-1)),
        strict=True,
    ):
        torch.testing.assert_close(view, step.network_def.project(backbone.encode(seen)[-1]))


def test_a_fill_is_never_from_another_crop_of_one_scan():
    backbone, geometry = unet()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, mask_fill="foreign", crops_per_volume=2).train()
    image, mask = batch_of(geometry, 4)
    assert torch.equal(step(image, mask).visible, apply_mask(image, mask, "foreign", shift=2))


def test_the_views_of_a_batch_in_evaluation_have_other_masks_too():
    backbone, geometry = unet(dropout=0.0)
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, views="other_masks").eval()
    image, mask = batch_of(geometry, 2)
    assert not torch.allclose(*step(image, mask).views)
    torch.testing.assert_close(*step(image, mask[:1].expand_as(mask)).views)


def test_a_single_crop_of_a_process_has_its_mirrored_mask_in_the_second_view():
    backbone, geometry = unet(dropout=0.0)
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, mask_fill="zero", views="other_masks").train()
    image, mask = batch_of(geometry, 1)
    seen = apply_mask(image, mask.flip(2, 3, 4), "zero")
    torch.testing.assert_close(step(image, mask).views[1], step.network_def.project(backbone.encode(seen)[-1]))


def test_unknown_views_are_refused():
    backbone, geometry = unet()
    with pytest.raises(ValueError, match="views: found 'crops', expected one of other_masks, dropout"):
        PretrainStep(HybridMIM(backbone, geometry), geometry, views="crops")


@pytest.mark.parametrize("views", VIEWS)
def test_the_second_view_gives_no_gradient_to_the_encoder(views):
    backbone, geometry = unet()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, views=views).train()
    image, mask = batch_of(geometry)
    _, second = step(image, mask).views
    second.sum().backward()
    assert step.network_def.projection.weight.grad is not None
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("views", VIEWS)
@BOTH
def test_evaluation_decodes_the_whole_crop_as_the_network_does(make, views):
    backbone, geometry = make()
    network = HybridMIM(backbone, geometry)
    step = PretrainStep(network, geometry, views=views).eval()
    image, mask = batch_of(geometry, 1)
    with torch.no_grad():
        prediction = step(image, mask)
        torch.testing.assert_close(prediction.reconstruction, network(apply_mask(image, mask)))
        again = step(image, mask)
    assert prediction.box == whole(geometry.roi_size)
    assert torch.equal(prediction.reconstruction, again.reconstruction)
    for view, other in zip(prediction.views, again.views, strict=True):
        assert not torch.allclose(view, other)  # dropout acts in the views
    assert not any(m.training for m in backbone.modules())  # and nowhere else


def test_random_boxes_reach_every_aligned_position():
    backbone, geometry = unet()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry).train()
    starts = {tuple(side.start for side in step.draw_box()) for _ in range(200)}
    assert starts == set(itertools.product((0, 16), (0, 16, 32), (0, 16)))


def test_a_fixed_box_stays():
    backbone, geometry = unet()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, decode_box=(16, 32, 0)).train()
    image, mask = batch_of(geometry)
    assert step(image, mask).box == (slice(16, 48), slice(32, 64), slice(0, 32))


@pytest.mark.parametrize("box", ["corner", (8, 0, 0), (32, 0, 0), (0, 0), (-16, 0, 0)])
def test_a_bad_box_is_refused(box):
    backbone, geometry = unet()
    with pytest.raises(ValueError, match=r"decode_box .*: expected `random`, or three multiples of 16"):
        PretrainStep(HybridMIM(backbone, geometry), geometry, decode_box=box)


def test_without_the_contrastive_term_there_are_no_views():
    backbone, geometry = unet()
    step = PretrainStep(HybridMIM(backbone, geometry), geometry, contrastive=False).train()
    image, mask = batch_of(geometry)
    prediction = step(image, mask)
    assert isinstance(prediction, Prediction)
    assert prediction.views is None
    assert HybridMIMLoss(weight_cl=0)(prediction, image, mask)["loss_cl"] == 0


def test_the_pooled_bottleneck_tells_crops_apart():
    # behind an instance normalisation the mean is nearly the same for every crop
    backbone, geometry = unet()
    backbone.eval()
    image = torch.cat([batch_of(geometry, 1, seed=s)[0] ** (1 + s) for s in range(4)])
    with torch.no_grad():
        bottleneck = backbone.encode(image)[-1]

    def closest(features):
        similarity = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
        return similarity[~torch.eye(4, dtype=torch.bool)].max()

    assert closest(bottleneck.mean((2, 3, 4))) > closest(pooled(bottleneck))


def test_dropout_active_restores_the_mode():
    backbone, _ = unet()
    backbone.eval()
    with dropout_active(backbone):
        assert backbone.down_1.convs.conv_0.adn.D.training
        assert not backbone.down_1.training
    assert not backbone.down_1.convs.conv_0.adn.D.training
