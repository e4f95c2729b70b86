"""MAE, SimMIM and SimCLR: against slow, obvious versions, and through the same trainer as HybridMIM."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR, ViT

from scripts.backbones import SwinUNETRBackbone, UNetBackbone
from scripts.hybridmim import HybridMIM
from scripts.mae import MAE, MAEEncoder
from scripts.masking import Geometry, RandPatchMaskd, apply_mask, empty_patches
from scripts.simclr import SimCLR, SimCLRStep
from scripts.simmim import SimMIM
from scripts.steps import ReconstructionStep
from scripts.vit import ViTBackbone
from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.losses import ContrastiveLoss, MaskedL1Loss, Prediction
from tools.weights.transfer import load_pretrained

from .bundle import BUNDLE, TINY, config_files, places, two_and_one

ROI = (32, 48, 32)  # 2×3×2 tokens
VIT = {"hidden_size": 24, "mlp_size": 48, "heads": 2}
TOKENS = Geometry(ROI, (16, 16, 16), (16, 16, 16), ROI, 16)
SWIN = Geometry((64, 64, 64), (32, 32, 32), (16, 16, 16), (64, 64, 64), 32)
TINY_VIT = {"vit_hidden_size": 24, "vit_mlp_size": 48, "vit_heads": 2, "mae_decoder_size": 12, "mae_decoder_heads": 2}


def draw(geometry, seed=0, batch=2, channels=1):
    """Crops without padding, and masks of 3 in 4 patches."""
    torch.manual_seed(seed)
    image = torch.rand(batch, channels, *geometry.roi_size) * 0.9 + 0.05
    mask = RandPatchMaskd(geometry, 0.75, "uniform")
    mask.set_random_state(seed)
    return image, torch.stack([mask({"image": crop})["mask"] for crop in image])


def boxes(geometry):
    """(token, place in the grid, its voxels), in raster order."""
    grid = [r // p for r, p in zip(geometry.roi_size, geometry.patch_size, strict=True)]
    for number, place in enumerate(itertools.product(*map(range, grid))):
        yield number, place, tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, geometry.patch_size, strict=True))


# ------------------------------------------------------------------------------------------------------- losses


def test_the_masked_loss_is_the_mean_absolute_error_of_masked_voxels():
    image, mask = draw(TOKENS, channels=2)
    image[:, :, :5] = 0  # padding
    reconstruction = torch.rand_like(image)
    errors = []
    for b in range(2):
        for _, place, box in boxes(TOKENS):
            if mask[(b, 0, *place)]:
                difference = (reconstruction[(b, slice(None), *box)] - image[(b, slice(None), *box)]).abs()
                counted = (image[(b, slice(None), *box)] > 0).any(0)
                errors += [float(e) for channel in difference for e in channel[counted]]
    losses = MaskedL1Loss()(Prediction(reconstruction), image, mask)
    assert float(losses["loss"]) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert losses["loss_l1"] == losses["loss"]


def test_the_contrastive_loss_of_simclr_pairs_the_crops_of_a_scan():
    """-log of the partner's share among all others (arXiv 2002.05709, Eq. 1), in loops; partners are neighbours."""
    torch.manual_seed(0)
    network = SimCLR(UNetBackbone(1, (4, 4, 8, 8, 16, 4), dropout=0.0), projection_size=6)
    step = SimCLRStep(network, TOKENS)
    images = torch.rand(6, 1, 32, 32, 32)
    vectors = network(images).double()
    temperature, terms = 0.3, []
    for i in range(6):
        similar = [torch.cosine_similarity(vectors[i], vectors[j], dim=0) / temperature for j in range(6)]
        partner = i + 1 if i % 2 == 0 else i - 1
        terms.append(-math.log(similar[partner].exp() / sum(similar[j].exp() for j in range(6) if j != i)))
    losses = ContrastiveLoss(temperature)(step(images), images)
    assert float(losses["loss"]) == pytest.approx(sum(terms) / 6, rel=1e-5)
    assert losses["loss_cl"] == losses["loss"]


# ---------------------------------------------------------------------------------------------------------- MAE


def slow_mae(mae, image, mask):
    """One crop and one token at a time."""
    painted = torch.zeros_like(image)
    for b, crop in enumerate(image):
        embed = mae.patch_embedding
        places = list(boxes(TOKENS))
        visible = [n for n, place, _ in places if not mask[(b, 0, *place)]]
        tokens = [mae.cls_token[0, 0]]
        for n, _, box in places:
            if n in visible:
                weight = embed.patch_embeddings.weight.flatten(1)
                token = weight @ crop[(slice(None), *box)].flatten() + embed.patch_embeddings.bias
                tokens.append(token + embed.position_embeddings[0, n])
        encoded = mae.decoder_embed(mae.blocks(torch.stack(tokens)[None]))[0]
        every = [encoded[0]]
        for n, _, _ in places:
            token = encoded[1 + visible.index(n)] if n in visible else mae.mask_tokens[0, 0]
            every.append(token + mae.decoder_pos_embedding[0, n])
        decoded = mae.decoder_pred(mae.decoder_blocks(torch.stack(every)[None]))[0, 1:]
        for n, _, box in places:
            painted[(b, slice(None), *box)] = decoded[n].view(image.shape[1], 16, 16, 16)
    return painted


def make_mae(channels=1):
    torch.manual_seed(3)
    return MAE(ROI, channels, **VIT, decoder_size=12, decoder_layers=2, decoder_heads=2)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2])
def test_mae_against_a_slow_version(channels):
    mae = make_mae(channels)
    image, mask = draw(TOKENS, channels=channels)
    torch.testing.assert_close(mae(image, mask), slow_mae(mae, image, mask), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mae_of_a_scan_that_is_masked_already():
    """As in inference, where the number of hidden tokens differs from window to window."""
    mae = make_mae()
    image, mask = draw(TOKENS)
    mask[1] = False
    mask[1, 0, 0, 0, 0] = True
    masked = apply_mask(image, mask)
    assert torch.equal(empty_patches(masked, TOKENS.patch_size), mask)
    torch.testing.assert_close(mae(masked), slow_mae(mae, image, mask), rtol=1e-4, atol=1e-5)


def test_mae_refuses_a_mask_of_another_grid():
    image, _ = draw(TOKENS)
    with pytest.raises(ValueError, match=r"found \[4, 6, 4\] patches, expected the \[2, 3, 2\] tokens"):
        make_mae()(image, torch.zeros(2, 1, 4, 6, 4, dtype=torch.bool))


def test_the_encoder_of_a_mae_is_a_plain_vit_and_shares_its_parameters():
    mae = make_mae()
    encoder = MAEEncoder(mae)
    plain = ViT(1, ROI, 16, 24, 48, 12, 2)
    plain.load_state_dict(encoder.state_dict(), strict=True)
    assert {*encoder.parameters()} < {*mae.parameters()}
    assert {name for name, p in mae.named_parameters() if p not in {*encoder.parameters()}} == {
        name for name, _ in mae.named_parameters() if name.startswith(("decoder", "cls_token", "mask_tokens"))
    }


# ------------------------------------------------------------------------------------------------------- SimMIM


class Instead(torch.nn.Module):
    """A token embedding that answers with given tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, image):
        return self.tokens


def slow_simmim(simmim, geometry, image, mask):
    """Tokens replaced one by one, and voxels painted one block at a time."""
    backbone = simmim.backbone
    embedding, stride = backbone.token_embedding, backbone.stride
    tokens = embedding(image)
    size = embedding.stride[0]
    for b in range(len(image)):
        for place in itertools.product(*map(range, tokens.shape[2:])):
            if mask[(b, 0, *(i * size // p for i, p in zip(place, geometry.patch_size, strict=True)))]:
                tokens[(b, slice(None), *place)] = simmim.mask_token.flatten()
    owner, name = (
        (backbone.patch_embedding, "patch_embeddings")
        if isinstance(backbone, ViTBackbone)
        else (backbone.swinViT.patch_embed, "proj")
    )
    setattr(owner, name, Instead(tokens))
    bottleneck = backbone.encode(image)[-1]
    setattr(owner, name, embedding)
    painted = torch.zeros_like(image)
    for b in range(len(image)):
        for place in itertools.product(*map(range, bottleneck.shape[2:])):
            voxels = simmim.head.weight.flatten(1) @ bottleneck[(b, slice(None), *place)] + simmim.head.bias
            box = tuple(slice(i * stride, (i + 1) * stride) for i in place)
            painted[(b, slice(None), *box)] = voxels.view(image.shape[1], *[stride] * 3)
    return painted


def make_simmim(kind):
    torch.manual_seed(4)
    if kind == "vit":
        return SimMIM(ViTBackbone(ROI, 2, **VIT), TOKENS), TOKENS
    return SimMIM(SwinUNETRBackbone(2, 12, dropout=0.0), SWIN), SWIN


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_simmim_against_a_slow_version(kind):
    simmim, geometry = make_simmim(kind)
    simmim.eval()
    image, mask = draw(geometry, channels=2)
    painted = simmim(image, mask)
    torch.testing.assert_close(painted, slow_simmim(simmim, geometry, image, mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(simmim(apply_mask(image, mask)), painted)  # masked already, as in inference


@torch.no_grad()
@pytest.mark.parametrize("make", [make_mae, lambda: make_simmim("vit")[0], lambda: make_simmim("swin")[0]])
def test_what_is_hidden_is_not_seen(make):
    network = make().eval()
    geometry = SWIN if isinstance(getattr(network, "backbone", None), SwinUNETRBackbone) else TOKENS
    image, mask = draw(geometry, channels=2 if isinstance(network, SimMIM) else 1)
    other = torch.where(apply_mask(torch.ones_like(image), mask) > 0, image, torch.rand_like(image))
    assert not torch.equal(image, other)
    torch.testing.assert_close(network(image, mask), network(other, mask))
    assert not torch.allclose(network(image, mask), network(image + 0.1, mask))


def test_simmim_refuses_what_has_no_tokens_and_patches_that_cut_them():
    with pytest.raises(ValueError, match="found a UNetBackbone, expected a ViT or SwinUNETR"):
        SimMIM(UNetBackbone(1, (4, 4, 8, 8, 16, 4)), TOKENS)
    halves = Geometry(ROI, (16, 16, 16), (8, 8, 8), ROI, 16)
    with pytest.raises(ValueError, match=r"token_size \[8, 8, 8\] must be a multiple of .* \[16, 16, 16\] voxels"):
        SimMIM(ViTBackbone(ROI, 1, **VIT), halves)


def test_hybridmim_refuses_a_backbone_without_a_decoder_and_another_stride():
    with pytest.raises(ValueError, match="found a ViTBackbone, which has none"):
        HybridMIM(ViTBackbone(ROI, 1, **VIT), TOKENS)
    with pytest.raises(ValueError, match="stride: found 32, the UNetBackbone has 16"):
        HybridMIM(UNetBackbone(1, (4, 4, 8, 8, 16, 4)), SWIN)


# ----------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_the_hidden_part_of_a_crop_is_learnt(kind):
    """A few crops by heart: far below what painting the mean would leave."""
    torch.manual_seed(0)
    network = make_mae() if kind == "mae" else SimMIM(ViTBackbone(ROI, 1, **VIT), TOKENS)
    step = ReconstructionStep(network, TOKENS)
    _, mask = draw(TOKENS)
    ramp = torch.linspace(0.1, 0.9, ROI[1]).view(1, 1, 1, -1, 1).expand(2, 1, *ROI)
    image = torch.stack([ramp[0], ramp[1].flip(2)])
    loss, optimizer = MaskedL1Loss(), torch.optim.Adam(step.parameters(), lr=0.003)
    for _ in range(120):
        optimizer.zero_grad()
        value = loss(step(image, mask), image, mask)["loss"]
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.5 * float((image - image.mean()).abs().mean())


def test_simclr_tells_scans_apart_that_look_much_the_same():
    """From chance, ln 7; without norms in its head it has come half as far after these steps."""
    torch.manual_seed(0)
    step = SimCLRStep(SimCLR(UNetBackbone(1, (4, 4, 8, 8, 16, 4), dropout=0.0), projection_size=16), TOKENS)
    scans = (
        0.5
        + 0.1 * torch.rand(1, 1, 32, 32, 32)
        + 0.1 * torch.nn.functional.interpolate(torch.rand(4, 1, 4, 4, 4), scale_factor=8)
    )
    loss, optimizer = ContrastiveLoss(), torch.optim.Adam(step.parameters(), lr=0.001)
    for _ in range(40):
        views = scans.repeat_interleave(2, 0) + 0.02 * torch.randn(8, 1, 32, 32, 32)
        optimizer.zero_grad()
        value = loss(step(views), views)["loss"]
        value.backward()
        optimizer.step()
    assert float(value.detach()) < math.log(7) - 1.2


# ------------------------------------------------------------------------------------------------- in the bundle


def plain(kind, size):
    return {
        "unet": lambda: BasicUNet(3, 1, 1, TINY["unet_features"]),
        "swin": lambda: SwinUNETR(1, 1, feature_size=12),
        "vit": lambda: ViT(1, size, 16, 24, 48, 12, 2),
    }[kind]()


@pytest.mark.parametrize(
    ("overlays", "kind", "metric"),
    [
        (["mae"], "vit", "val_masked_mse"),
        (["simmim"], "vit", "val_masked_mse"),
        (["swin_unetr", "simmim"], "swin", "val_masked_mse"),
        (["simclr"], "unet", "val_retrieval_accuracy"),
        (["simclr", "vit"], "vit", "val_retrieval_accuracy"),
        pytest.param(["swin_unetr", "simclr"], "swin", "val_retrieval_accuracy", marks=pytest.mark.slow),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_every_method_trains_validates_and_evaluates(workflow, ct_scans, tmp_path, capsys, overlays, kind, metric):
    size = [64] * 3 if kind == "swin" else [32] * 3
    options = {**TINY, **TINY_VIT, "swin_feature_size": 12, "roi_size": size, "decode_size": size, "epochs": 1}
    options |= {"warmup_epochs": 0, "dataset_dir": str(ct_scans)}
    if kind == "swin":  # as few crops as can be, for the time they take
        options |= {"region_size": [32] * 3, "patch_size": [16] * 3, "crops_per_volume": 1}
        options["datalist"] = two_and_one(tmp_path, "ct")
    flow = workflow("train", ["train", *overlays], **options)
    before = {name: p.clone() for name, p in flow.network_def.named_parameters()}
    flow.run()
    unchanged = {name for name, p in flow.network_def.named_parameters() if torch.equal(before[name], p)}
    # positions are fixed, decoders are not asked for, and MONAI's transformer blocks hold a norm that nothing uses
    idle = ("norm_cross_attn", "position_embeddings", "decoder_pos_embedding")
    idle += ("backbone.upcat", "backbone.final_conv", "backbone.encoder", "backbone.decoder", "backbone.out")
    assert [name for name in unchanged if not any(part in name for part in idle)] == []
    (row,) = read_metrics(tmp_path / "out/metrics.csv")
    assert 0 <= float(row[metric]) < 10
    (picture,) = (tmp_path / "out/figures").glob("*.png")
    assert picture.stat().st_size > 10_000
    weights = torch.load(tmp_path / "models/backbone.pt", weights_only=True)
    plain(kind, size).load_state_dict(weights, strict=True)
    for file in ("backbone.pt", "model.pt") if kind == "vit" else ():
        unetr = UNETR(1, 3, size, 4, 24, 48, 2)
        report = load_pretrained(unetr, str(tmp_path / "models" / file)).report
        assert report.filled == report.asked == len(weights)
        assert all(torch.equal(tensor, unetr.vit.state_dict()[name]) for name, tensor in weights.items())

    workflow("train", ["train", *overlays, "evaluate"], **options).run()
    (alone,) = read_metrics(tmp_path / "out/evaluation.csv")
    assert float(alone[metric.removeprefix("val_")]) == pytest.approx(float(row[metric]), rel=1e-4)
    assert re.search(r"^ *weights +new, at random$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_inference_paints_a_whole_scan(workflow, ct_scans, tmp_path, method):
    options = {**TINY_VIT, "roi_size": [32, 32, 32], "dataset_dir": str(ct_scans), "num_workers": 0}
    flow = workflow("infer", ["inference", method], region_size=[16] * 3, **options)
    torch.save(flow.network_def.state_dict(), tmp_path / "model.pt")
    flow.parser["ckpt_path"] = str(tmp_path / "model.pt")
    flow.initialize()
    flow.run()
    assert len(list((tmp_path / "out").rglob("*_reconstruction.nii.gz"))) == 6


@pytest.mark.parametrize(
    ("overlays", "said"),
    [
        (["mae", "vit"], "found a ViTBackbone that the MAE does not train"),
        (["mae", "swin_unetr"], "found a SwinUNETRBackbone that the MAE does not train"),
        (["vit"], "HybridMIM trains a decoder: found a ViTBackbone"),
    ],
    ids=["mae+vit", "mae+swin_unetr", "vit"],
)
def test_overlays_that_do_not_go_together_are_refused(workflow, ct_scans, overlays, said):
    sizes = {"region_size": [32] * 3, "roi_size": [64] * 3, "patch_size": [16] * 3, "decode_size": [64] * 3}
    flow = workflow(
        "train", ["train", *overlays], **{**TINY, **TINY_VIT, **sizes}, swin_feature_size=12, dataset_dir=str(ct_scans)
    )
    with pytest.raises(Exception) as refused:  # the config parser wraps it
        flow.run()
    assert said in str(root_cause(refused.value))


@pytest.mark.slow
def test_simclr_in_two_processes(command, ct_scans, tmp_path):
    """Views of both processes are compared; UNet's decoder gets no gradient, which DDP must be told."""
    done = command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "monai.bundle", "run", "training"),
        config_file=config_files(["train", "simclr", "multi_gpu_train"]),
        bundle_root=BUNDLE,
        dataset_dir=ct_scans,
        output_dir=tmp_path / "out",
        ckpt_dir=tmp_path / "models",
        **{**TINY, "epochs": 1, "crops_per_volume": 1, "temperature": 100},  # the vectors hardly matter
    )
    assert "two crops of each scan" in done.stdout
    (row,) = read_metrics(tmp_path / "out/metrics.csv")
    assert float(row["loss_cl"]) == pytest.approx(math.log(7), abs=0.1)  # eight views of four pairs


def test_a_resumed_mae_ends_as_the_uninterrupted_one(workflow, ct_scans, tmp_path, capsys):
    options = {**TINY, **TINY_VIT, "dataset_dir": str(ct_scans), "epochs": 3}

    def train(folder, **more):
        workflow("train", ["train", "mae"], **options, **places(tmp_path / folder), **more).run()
        return torch.load(tmp_path / folder / "models/checkpoint_epoch=3.pt", weights_only=True)["model"]

    whole = train("whole")
    first = workflow("train", ["train", "mae"], **options, **places(tmp_path / "cut"))
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), first.trainer.terminate)
    first.run()
    resumed = train("cut", resume=True)
    assert "resumed from" in capsys.readouterr().out
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
