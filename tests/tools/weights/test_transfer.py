"""Every tensor of the network is loaded, adapted or left out for a reason; files that do not fit are refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, MaskedAutoEncoderViT, SwinUNETR, ViT

from scripts.backbones import UNetBackbone
from scripts.hybridmim import HybridMIM
from scripts.masking import Geometry
from tools.weights.checkpoints import WeightsError
from tools.weights.transfer import inspect, is_encoder, is_output, load_pretrained, match_names, scale_free_convolutions

FEATURES = (4, 4, 8, 8, 16, 4)
GEOMETRY = Geometry(roi_size=[32] * 3, region_size=[16] * 3, patch_size=[8] * 3, decode_size=[32] * 3, stride=16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unet(channels=1, classes=2, features=FEATURES):
    return BasicUNet(3, channels, classes, features)


def swin(channels=1, classes=2, feature_size=12):
    return SwinUNETR(channels, classes, feature_size=feature_size)


def unetr(channels=1, classes=2, roi=(32, 48, 32), hidden=24):
    return UNETR(channels, classes, roi, feature_size=6, hidden_size=hidden, mlp_dim=24, num_heads=2)


def vit(channels=1, roi=(32, 48, 32), hidden=24):
    return ViT(channels, roi, 16, hidden, 24, num_heads=2)


def mae(channels=1, roi=(32, 48, 32)):
    sizes = {"hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "decoder_hidden_size": 12, "decoder_mlp_dim": 12}
    return MaskedAutoEncoderViT(channels, roi, 16, **sizes, decoder_num_layers=1, decoder_num_heads=2)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path, content):
    torch.save(content, path)
    return str(path)


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def published_swin(network):
    """The names of MONAI's model_swinvit.pt."""
    state = {
        name.replace("swinViT.", "module.").replace(".mlp.linear", ".mlp.fc"): tensor
        for name, tensor in network.state_dict().items()
        if name.startswith("swinViT.")
    }
    heads = {"module.rotation_head.weight": torch.zeros(4, 192), "module.rotation_head.bias": torch.zeros(4)}
    return {"epoch": 3, "state_dict": state | heads, "optimizer": {"lr": 1e-4}}


def fates(transfer):
    return {tensor.name: tensor.fate for tensor in transfer.report.tensors}


# ------------------------------------------------------------------------------------------------- files and names


def test_no_file_leaves_the_network_at_random():
    network = unet()
    before = copied(network)
    transfer = load_pretrained(network, None)
    assert transfer.network is network
    assert transfer.report.lines() == [("pretrained", "no file given")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        lambda model: model.backbone.state_dict(),
        lambda model: model.state_dict(),
        lambda model: {"model": model.state_dict(), "optimizer": {}},
    ],
    ids=["backbone.pt", "model.pt", "checkpoint_epoch=N.pt"],
)
@pytest.mark.parametrize("parts", ["encoder", "all"])
def test_files_of_pretraining(tmp_path, content, parts):
    model = HybridMIM(UNetBackbone(1, FEATURES), GEOMETRY)
    network = unet()
    before, source = copied(network), model.backbone.state_dict()
    transfer = load_pretrained(network, saved(tmp_path / "weights.pt", content(model)), parts)
    for name, tensor in network.state_dict().items():
        loaded = is_encoder(name) or (parts == "all" and not is_output(name))
        assert torch.equal(tensor, (source if loaded else before)[name])
        assert fates(transfer)[name] == ("loaded" if loaded else "left out")
    assert transfer.report.filled == transfer.report.asked == (40 if parts == "encoder" else 80)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        (None, "module."),
        ("model", "_orig_mod.module."),
        ("state_dict", "net."),
        ("state_dict", "module.student.net."),
        ("network_weights", "encoder.backbone."),
        ("student", "backbone."),
    ],
)
def test_containers_and_prefixes(tmp_path, key, prefix):
    source, network = unet(), unet()
    state = {"head.weight": torch.ones(2, 2)}
    state |= {prefix + name: tensor for name, tensor in source.state_dict().items()}
    path = saved(tmp_path / "weights.pt", state if key is None else {key: state, "epoch": 3})
    transfer = load_pretrained(network, path, "all")
    assert transfer.report.filled == 80
    assert transfer.report.unused == {"head": 1}
    assert torch.equal(network.upcat_1.convs.conv_1.conv.weight, source.upcat_1.convs.conv_1.conv.weight)


def test_of_student_and_teacher_the_first_is_taken():
    expected = unet().state_dict()
    match = match_names([f"{who}.net.{name}" for who in ("student", "teacher") for name in expected], expected)
    assert match.prefix == "student.net."
    assert len(match.names) == len(expected)


@pytest.mark.parametrize("suffix", ["swinViT.", "swin_vit."])
def test_swin_encoder_under_its_own_name(tmp_path, suffix):
    source, network = swin(), swin()
    state = {f"module.{suffix}{name}": tensor for name, tensor in source.swinViT.state_dict().items()}
    assert load_pretrained(network, saved(tmp_path / "weights.pt", state)).report.filled == 126
    assert torch.equal(
        network.swinViT.layers4[0].blocks[1].attn.qkv.weight, source.swinViT.layers4[0].blocks[1].attn.qkv.weight
    )


def test_published_swin_encoder_loads_as_with_monai(tmp_path):
    content = published_swin(swin())
    network, reference = swin(), swin()
    reference.load_from(content)
    transfer = load_pretrained(network, saved(tmp_path / "model_swinvit.pt", content))
    for name, tensor in reference.swinViT.state_dict().items():
        assert torch.equal(network.swinViT.state_dict()[name], tensor), name
    assert transfer.report.counts()["encoder"] == {"loaded": 126}
    assert transfer.report.unused == {"module.rotation_head": 2}


@pytest.mark.parametrize(
    ("content", "unused"),
    [
        (lambda state: state, {}),
        (lambda state: prefixed("vit.", state), {}),
        (
            lambda state: {
                "model": {
                    **{"mask_token": torch.zeros(1), "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)},
                    **prefixed("backbone.", state),
                },
                "optimizer": {},
            },
            {"mask_token": 1, "head": 2},
        ),
        (lambda state: {"state_dict": prefixed("module.encoder.", state)}, {}),
        (
            lambda state: {"blocks.0.cross_attn.to_q.weight": torch.zeros(24, 24), **state},  # of MONAI 1.5
            {"blocks.0.cross_attn": 1},
        ),
    ],
    ids=["backbone.pt", "vit.", "checkpoint_epoch=N.pt", "prefixes", "MONAI 1.5"],
)
def test_vit_becomes_the_encoder_of_a_unetr(tmp_path, content, unused):
    source, network = vit(), unetr()
    before = copied(network)
    transfer = load_pretrained(network, saved(tmp_path / "weights.pt", content(source.state_dict())))
    for name, tensor in network.state_dict().items():
        part, _, rest = name.partition(".")
        assert torch.equal(tensor, source.state_dict()[rest] if part == "vit" else before[name]), name
        assert fates(transfer)[name] == ("loaded" if part == "vit" else "left out")
    assert transfer.report.filled == transfer.report.asked == 161
    assert transfer.report.unused == unused


@pytest.mark.parametrize("prefix", ["", "module."])
def test_masked_autoencoder_becomes_the_encoder_of_a_unetr(tmp_path, prefix):
    source, network = mae(), unetr()
    torch.nn.init.uniform_(source.blocks[12].weight)  # the last norm, which ViT keeps outside of its blocks
    torch.nn.init.uniform_(source.blocks[12].bias)
    state = prefixed(prefix, source.state_dict())
    transfer = load_pretrained(network, saved(tmp_path / "model.pt", {"model": state}))
    assert transfer.report.counts()["encoder"] == {"loaded": 161}
    unused = {name for name in source.state_dict() if not name.startswith(("patch_embedding.", "blocks."))}
    assert sum(transfer.report.unused.values()) == len(unused)
    single = {"cls_token", "mask_tokens", "decoder_pos_embedding", "decoder_embed", "decoder_pred"}
    assert {prefix + name for name in single} <= transfer.report.unused.keys()
    image = torch.rand(2, 1, 32, 48, 32)
    with torch.no_grad():
        tokens, _ = network.eval().vit(image)
        torch.testing.assert_close(tokens, source.eval().blocks(source.patch_embedding(image)))


# ------------------------------------------------------------------------------------------------ position embeddings

POSITIONS = "vit.patch_embedding.position_embeddings"


def slowly_interpolated(positions, old, new):
    """Embeddings [1, tokens, E]: the eight neighbours of each new token's centre, weighted by their distances."""
    places = {place: positions[0, n] for n, place in enumerate(itertools.product(*map(range, old)))}
    tokens = []
    for place in itertools.product(*map(range, new)):
        token = torch.zeros(positions.shape[2])
        centre = [(p + 0.5) * a / b - 0.5 for p, a, b in zip(place, old, new, strict=True)]
        centre = [min(max(c, 0), a - 1) for c, a in zip(centre, old, strict=True)]
        for neighbour, embedding in places.items():
            weights = [max(0, 1 - abs(c - n)) for c, n in zip(centre, neighbour, strict=True)]
            token += math.prod(weights) * embedding
        tokens.append(token)
    return torch.stack(tokens)[None]


@pytest.mark.parametrize(
    ("crop", "given", "roi"),
    [
        ((48, 48, 48), None, (32, 64, 48)),  # a cube is seen
        ((48, 48, 48), (48, 48, 48), (96, 32, 32)),
        ((32, 16, 48), (32, 16, 48), (64, 64, 64)),
        ((64, 16, 32), (64, 16, 32), (32, 64, 16)),  # as many tokens, elsewhere
        ((128, 128, 16), (128, 128, 16), (64, 64, 64)),  # would pass for the network's own
    ],
)
@pytest.mark.parametrize("make", [vit, mae])
def test_position_embeddings_are_interpolated_to_another_window(tmp_path, make, crop, given, roi):
    source, network = make(roi=crop), unetr(roi=roi)
    path = saved(tmp_path / "backbone.pt", source.state_dict())
    transfer = load_pretrained(network, path, roi_size=given)
    old, new = ([side // 16 for side in window] for window in (crop, roi))
    expected = slowly_interpolated(source.patch_embedding.position_embeddings, old, new)
    assert not torch.equal(expected, source.patch_embedding.position_embeddings)
    torch.testing.assert_close(network.vit.patch_embedding.position_embeddings.data, expected.detach())
    (adapted,) = (tensor for tensor in transfer.report.tensors if tensor.fate == "adapted")
    assert adapted.name == POSITIONS
    assert adapted.why == "position embeddings of {}×{}×{} tokens → {}×{}×{}".format(*old, *new)
    assert transfer.report.filled == transfer.report.asked


@pytest.mark.parametrize("given", [None, [32, 48, 32]])
def test_position_embeddings_of_the_same_window_stay(tmp_path, given):
    source, network = vit(), unetr()
    path = saved(tmp_path / "backbone.pt", source.state_dict())
    transfer = load_pretrained(network, path, roi_size=given)
    assert fates(transfer)[POSITIONS] == "loaded"
    assert torch.equal(network.vit.patch_embedding.position_embeddings, source.patch_embedding.position_embeddings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ["has 12 tokens", "neither the network's 2×2×2 nor a cube", "pretrained_roi_size: found null"]),
        ([48, 48, 48], ["has 12 tokens", "pretrained_roi_size: found [48, 48, 48], which has 3×3×3 = 27 tokens"]),
    ],
)
def test_position_embeddings_of_an_unknown_or_another_crop_are_refused(tmp_path, given, words):
    path = saved(tmp_path / "backbone.pt", prefixed("net.", vit(roi=(32, 48, 32)).state_dict()))
    network = unetr(roi=(32, 32, 32))
    before = copied(network)
    with pytest.raises(WeightsError) as error:
        load_pretrained(network, path, roi_size=given)
    for word in [f"{path}: net.patch_embedding.position_embeddings", "expected the crop of its pre-training", *words]:
        assert word in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --------------------------------------------------------------------------------------------------- parts, levels


def test_parts_by_name():
    names = [name for make in (unet, swin, unetr) for name in make().state_dict()]
    encoder = {name.split(".")[0] for name in names if is_encoder(name)}
    assert encoder == {"conv_0", "down_1", "down_2", "down_3", "down_4", "swinViT", "vit"}
    assert {name.split(".")[0] for name in names if is_output(name)} == {"final_conv", "out"}


@pytest.mark.parametrize(
    ("make", "levels"),
    [
        (unet, ["upcat_4", "upcat_3", "upcat_2", "upcat_1"]),
        (swin, ["encoder10 decoder5", *(f"encoder{i} decoder{i}" for i in (4, 3, 2, 1))]),
        (unetr, [f"encoder{i} decoder{i + 1}" for i in (4, 3, 2, 1)]),
    ],
)
def test_decoder_levels_from_the_deepest(tmp_path, make, levels):
    path = saved(tmp_path / "weights.pt", make().state_dict())
    for count in range(1, len(levels) + 1):
        transfer = load_pretrained(make(), path, "all", decoder_levels=count)
        loaded = {name.split(".")[0] for name, fate in fates(transfer).items() if fate == "loaded"}
        assert loaded - {"conv_0", "down_1", "down_2", "down_3", "down_4", "swinViT", "vit"} == {
            module for level in levels[:count] for module in level.split()
        }
        assert transfer.report.filled == transfer.report.asked
    with pytest.raises(ValueError, match=f"must be 1 … {len(levels)}.* found {len(levels) + 1}"):
        load_pretrained(make(), path, "all", decoder_levels=len(levels) + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": "decoder"}, "pretrained_parts must be one of encoder, all; found 'decoder'"),
        ({"decoder_levels": 2}, "pretrained_decoder_levels 2 has no effect"),
        ({"parts": "all", "decoder_levels": 0}, "must be 1 … 4"),
        ({"min_fraction": 90}, "from 0 to 1; found 90"),
        ({"rescale": "maybe"}, "found 'maybe', expected true or false"),
        (
            {"roi_size": [96, 96]},
            r"pretrained_roi_size must be three multiples of 16 voxels, or null; found \[96, 96\]",
        ),
        ({"roi_size": [96, 96, 100]}, r"multiples of 16 voxels, or null; found \[96, 96, 100\]"),
        ({"roi_size": 96}, "multiples of 16 voxels, or null; found 96"),
    ],
)
def test_wrong_settings_are_refused_even_without_a_file(settings, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(unet(), None, **settings)


def test_other_kinds_of_network_are_refused():
    with pytest.raises(
        ValueError, match=r"BasicUNet, SwinUNETR or UNETR, found a Conv3d with the modules weight, bias"
    ):
        load_pretrained(torch.nn.Conv3d(1, 1, 1), None)


# --------------------------------------------------------------------------------------------------- channels, shapes


def input_convolutions(network):
    if isinstance(network, BasicUNet):
        return [network.conv_0.conv_0.conv]
    swin = isinstance(network, SwinUNETR)
    tokens = network.swinViT.patch_embed.proj if swin else network.vit.patch_embedding.patch_embeddings
    block = network.encoder1.layer
    return [tokens, block.conv1, block.conv3]


@pytest.mark.parametrize("make", [unet, swin, unetr])
@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 4), (4, 1), (4, 2)])
def test_other_number_of_channels_keeps_the_response_to_repeated_ones(tmp_path, make, old, new):
    source, network = make(old), make(new)
    transfer = load_pretrained(network, saved(tmp_path / "weights.pt", source.state_dict()), "all")
    few = torch.rand(1, min(old, new), 16, 16, 16)
    image = {channels: few.repeat(1, channels // min(old, new), 1, 1, 1) for channels in (old, new)}
    layers = list(zip(input_convolutions(source), input_convolutions(network), strict=True))
    for before, after in layers:
        torch.testing.assert_close(after(image[new]), before(image[old]))
    adapted = [tensor for tensor in transfer.report.tensors if tensor.fate == "adapted"]
    assert len(adapted) == len(layers)
    assert all(f"{old} → {new} input channels" in tensor.why for tensor in adapted)
    assert transfer.report.filled == transfer.report.asked


def test_channels_without_a_common_factor_are_left_out(tmp_path):
    path = saved(tmp_path / "weights.pt", unet(3).state_dict())
    transfer = load_pretrained(unet(2), path)
    (left_out,) = (t for t in transfer.report.tensors if t.asked and t.fate == "left out")
    assert left_out.name == "conv_0.conv_0.conv.weight"
    assert left_out.why == "shape [4, 3, 3, 3, 3] in the file, [4, 2, 3, 3, 3] in the network"


def test_half_precision_is_widened(tmp_path):
    source, network = unet(), unet()
    load_pretrained(network, saved(tmp_path / "weights.pt", source.half().state_dict()))
    assert network.down_4.convs.conv_1.conv.weight.dtype == torch.float32
    assert torch.equal(network.down_4.convs.conv_1.conv.weight.half(), source.down_4.convs.conv_1.conv.weight)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "parts", "words"),
    [
        (
            lambda: swin().state_dict(),
            "encoder",
            ["looks like a SwinUNETR with 1", "fills 0 of the 40", "not in the file", "and 30 more"],
        ),
        (
            lambda: unet(features=(8, 8, 8, 8, 16, 8)).state_dict(),
            "encoder",
            ["8 features", "fills 23 of the 40", "shape [8] in the file, [4] in the network", "configs/small.yaml"],
        ),
        (
            lambda: vit().state_dict(),
            "encoder",
            ["a ViT with 1 input channel(s) and 24 features", "configs/unetr.yaml"],
        ),
    ],
)
def test_other_networks_are_refused_and_nothing_is_loaded(tmp_path, content, parts, words):
    path, network = saved(tmp_path / "weights.pt", content()), unet()
    before = copied(network)
    with pytest.raises(WeightsError) as error:
        load_pretrained(network, path, parts)
    for word in [path, "expected at least 90%", "--pretrained_min_fraction", *words]:
        assert word in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_an_encoder_alone_is_refused_for_all_parts_with_a_way_out(tmp_path):
    path = saved(tmp_path / "model_swinvit.pt", published_swin(swin()))
    with pytest.raises(WeightsError, match=r"(?s)fills 126 of the 157.*encoder1\.layer.*`--pretrained_parts encoder`"):
        load_pretrained(swin(), path, "all")


def test_a_vit_of_another_width_is_refused_for_that_reason(tmp_path):
    path = saved(tmp_path / "backbone.pt", vit(hidden=36, roi=(32, 16, 48)).state_dict())
    with pytest.raises(
        WeightsError, match=r"(?s)36 features.*position_embeddings: shape \[1, 6, 36\] in the file, \[1, 12, 24"
    ):
        load_pretrained(unetr(), path)


def swin_with(**options):
    return SwinUNETR(1, 2, feature_size=12, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: swin_with(use_v2=True),
            "SwinUNETR v2 .*8 tensors of its encoder are not in this network",
        ),
        (lambda: swin_with(depths=(2, 2, 4, 2)), "28 tensors of its encoder are not in this network .*layers3"),
        (
            lambda: swin_with(num_heads=(3, 6, 12, 12)),
            "tensors of its encoder have another shape .*relative_position",
        ),
        (lambda: swin_with(window_size=4), "tensors of its encoder have another shape .*--swin_window_size"),
    ],
    ids=["v2", "depth", "heads", "window"],
)
def test_an_encoder_that_computes_something_else_is_refused(tmp_path, make, words):
    """Almost all of its tensors fit, so that it would count as filled."""
    network = swin()
    before = copied(network)
    for state in (prefixed("module.", make().state_dict()), published_swin(make())["state_dict"]):
        with pytest.raises(WeightsError, match=words):
            load_pretrained(network, saved(tmp_path / "weights.pt", state), min_fraction=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_v2_fills_a_network_of_its_kind(tmp_path):
    source, network = swin_with(use_v2=True), swin_with(use_v2=True)
    report = load_pretrained(network, saved(tmp_path / "weights.pt", source.state_dict())).report
    assert report.filled == report.asked == 134
    assert all(
        torch.equal(a, b) for a, b in zip(source.swinViT.parameters(), network.swinViT.parameters(), strict=True)
    )


def test_a_deeper_unet_or_vit_is_refused(tmp_path):
    deep = ViT(1, (32, 48, 32), 16, 24, 24, num_layers=13, num_heads=2).state_dict()
    with pytest.raises(WeightsError, match="tensors of its encoder are not in this network"):
        load_pretrained(unetr(), saved(tmp_path / "weights.pt", deep))
    state = unet().state_dict()
    more = {name.replace("down_4", "down_5"): tensor for name, tensor in state.items() if "down_4" in name}
    with pytest.raises(WeightsError, match="tensors of its encoder are not in this network"):
        load_pretrained(unet(), saved(tmp_path / "weights.pt", {**state, **more}))


def test_min_fraction(tmp_path):
    state = dict(list(unet().state_dict().items())[:30])  # of the encoder's 40
    path = saved(tmp_path / "weights.pt", state)
    assert load_pretrained(unet(), path, min_fraction=0.75).report.filled == 30
    with pytest.raises(WeightsError, match=r"fills 30 of the 40 .* at least 76%"):
        load_pretrained(unet(), path, min_fraction=0.76)
    with pytest.raises(WeightsError, match="fills 0 of the 126"):
        load_pretrained(swin(), path, min_fraction=0)


def test_values_that_are_not_finite_are_refused(tmp_path):
    source, network = unet(), unet()
    source.down_2.convs.conv_0.conv.weight.data[0, 0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    before = copied(network)
    with pytest.raises(WeightsError, match=r"weights.pt: net.down_2.convs.conv_0.conv.weight has 2 NaN or infinite"):
        state = {f"net.{name}": tensor for name, tensor in source.state_dict().items()}
        load_pretrained(network, saved(tmp_path / "weights.pt", state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# ------------------------------------------------------------------------------------------------------- rescaling


@pytest.mark.parametrize(("make", "size", "count"), [(unet, 32, 18), (swin, 64, 26), (unetr, (32, 48, 32), 21)])
def test_rescaling_changes_the_weights_but_not_the_output(tmp_path, make, size, count):
    source, plain, rescaled = make(), make(), make()
    rescaled.load_state_dict(plain.state_dict())
    fresh = copied(plain)
    names = scale_free_convolutions(source)
    assert len(names) == count
    for name in names:
        source.get_submodule(name).weight.data *= 3
    path = saved(tmp_path / "weights.pt", source.state_dict())
    load_pretrained(plain, path, "all")
    transfer = load_pretrained(rescaled, path, "all", rescale=True)
    assert transfer.report.rescaled == count
    for name in names:
        weight = rescaled.get_submodule(name).weight
        torch.testing.assert_close(weight.norm(), fresh[f"{name}.weight"].norm())
        assert plain.get_submodule(name).weight.norm() > 2 * weight.norm()
    for module in [*plain.modules(), *rescaled.modules()]:
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.eps = 1e-12  # the usual one is felt where a channel hardly varies
    image = torch.rand(1, 1, *(size if isinstance(size, tuple) else [size] * 3))
    with torch.no_grad():
        expected, found = plain.eval()(image), rescaled.eval()(image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_only_what_was_loaded_is_rescaled(tmp_path):
    network = unet()
    before = copied(network)
    path = saved(tmp_path / "weights.pt", {name: 3 * tensor for name, tensor in unet().state_dict().items()})
    assert load_pretrained(network, path, rescale=True).report.rescaled == 10
    assert torch.equal(network.upcat_4.convs.conv_0.conv.weight, before["upcat_4.convs.conv_0.conv.weight"])


# ------------------------------------------------------------------------------------------------------- the command

TRAIN = """
bundle_root: .
in_channels: 4
features: [4, 4, 8, 8, 16, 4]
network_def:
  _target_: BasicUNet
  spatial_dims: 3
  in_channels: '@in_channels'
  out_channels: 3
  features: '@features'
pretrained: null
pretrained_parts: encoder
pretrained_decoder_levels: null
pretrained_min_fraction: 0.9
pretrained_rescale: false
pretrained_roi_size: null
"""

UNETR_OVERLAY = """
network_def:
  _target_: UNETR
  in_channels: '@in_channels'
  out_channels: 3
  img_size: [32, 48, 32]
  feature_size: 6
  hidden_size: 24
  mlp_dim: 24
  num_heads: 2
"""


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/train.yaml").write_text(TRAIN)
    (folder / "configs/small.yaml").write_text("in_channels: 1\npretrained_parts: all\npretrained_rescale: true\n")
    (folder / "configs/wide.yaml").write_text("features: [8, 8, 8, 8, 16, 8]\n")
    (folder / "configs/unetr.yaml").write_text(UNETR_OVERLAY)
    return folder


@pytest.fixture
def model(tmp_path):
    model = HybridMIM(UNetBackbone(1, FEATURES), GEOMETRY)
    return saved(tmp_path / "checkpoint_epoch=2.pt", {"model": model.state_dict(), "optimizer": {}})


def rows(capsys):
    return dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if line)


def test_inspect_says_what_a_file_holds(model, capsys):
    inspect(model)
    found = {name: text.strip() for name, text in rows(capsys).items()}
    assert f"{model}: 88 tensors, " in found["file"]
    assert "under the key `model`" in found["file"]
    assert found["looks like"] == "a UNet (BasicUNet) with 1 input channel(s) and 4 features"
    assert found["names"] == "begin with `backbone.`"
    assert [found[part] for part in ("encoder", "decoder", "output")] == ["40 tensors", "40 tensors", "2 tensors"]
    assert found["other"] == "2 of number_head, 2 of location_head, 2 of projection"


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (
            lambda: published_swin(swin()),
            {
                "looks like": "the encoder of a SwinUNETR with 1 input channel(s) and 12 features",
                "names": "begin with `module.` in place of `swinViT.`",
                "encoder": "126 tensors",
                "decoder": "0 tensors",
            },
        ),
        (
            lambda: prefixed("backbone.", vit(roi=(48, 48, 48)).state_dict()),
            {
                "looks like": "a ViT with 1 input channel(s) and 24 features",
                "names": "begin with `backbone.` in place of `vit.`",
                "encoder": "161 tensors",
                "decoder": "0 tensors",
                "tokens": "27: 3×3×3 if the crop was a cube (not stored in the file)",
            },
        ),
        (
            lambda: mae(channels=4).state_dict(),
            {
                "looks like": "a masked autoencoder (MaskedAutoEncoderViT) with 4 input channel(s) and 24 features",
                "names": "lack `vit.`",
                "encoder": "161 tensors",
                "tokens": "12: the crop was no cube (not stored in the file)",
                "other": "1 of cls_token, 1 of mask_tokens, 1 of decoder_pos_embedding, 2 of decoder_embed, "
                "4 of decoder_blocks.0.mlp, …",
            },
        ),
        (
            lambda: unetr(classes=3).state_dict(),
            {
                "looks like": "a UNETR with 1 input channel(s) and 24 features",
                "names": "as MONAI's",
                "encoder": "161 tensors",
                "decoder": "31 tensors",
                "output": "2 tensors",
            },
        ),
    ],
    ids=["SwinViT", "ViT", "MaskedAutoEncoderViT", "UNETR"],
)
def test_inspect_knows_encoders(tmp_path, capsys, state, found):
    inspect(saved(tmp_path / "weights.pt", state()))
    said = {name: text.strip() for name, text in rows(capsys).items()}
    assert {name: said[name] for name in found} == found


def test_inspect_says_what_a_unetr_would_take(bundle, tmp_path, capsys):
    configs = [str(bundle / "configs" / name) for name in ("train.yaml", "unetr.yaml")]
    path = saved(tmp_path / "backbone.pt", mae(roi=(64, 64, 32)).state_dict())
    with pytest.raises(WeightsError, match="has 32 tokens, found neither"):
        inspect(path, config_file=configs)
    capsys.readouterr()
    (bundle / "configs/crop.yaml").write_text("pretrained_roi_size: [64, 64, 32]\n")
    inspect(path, config_file=[*configs, str(bundle / "configs/crop.yaml")])
    found = {name: text.strip() for name, text in rows(capsys).items()}
    assert found["vit"] == (
        "159 loaded, 2 adapted (position embeddings of 4×4×2 tokens → 2×3×2; "
        "1 → 4 input channels: repeated, divided by 4)"
    )
    assert found["total"] == "encoder 161 of 161, decoder 0 of 31, output 0 of 2 tensors filled"


def test_inspect_prints_the_table_of_a_bundle(model, bundle, capsys):
    inspect(model, into=str(bundle))
    found = {name: text.strip() for name, text in rows(capsys).items()}
    assert found["conv_0"] == "7 loaded, 1 adapted (1 → 4 input channels: repeated, divided by 4)"
    assert found["upcat_4"] == "10 left out (the decoder was not requested)"
    assert found["total"] == "encoder 40 of 40, decoder 0 of 40, output 0 of 2 tensors filled"
    report = load_pretrained(unet(4, 3), model).report
    assert {name: found[name] for name, _ in report.lines()} == dict(report.lines())
    inspect(model, config_file=[str(bundle / "configs/train.yaml"), str(bundle / "configs/small.yaml")])
    found = {name: text.strip() for name, text in rows(capsys).items()}
    assert found["upcat_1"] == "10 loaded"
    assert found["rescaled"] == "18 convolutions, to their initial norm"


def test_inspect_shows_the_table_of_a_file_that_does_not_fit(model, bundle, capsys):
    with pytest.raises(WeightsError, match="of the 40 requested tensors"):
        inspect(model, config_file=[str(bundle / "configs/train.yaml"), str(bundle / "configs/wide.yaml")])
    assert "8 left out (shape [4, 1, 3, 3, 3] in the file, [8, 4, 3, 3, 3] in" in rows(capsys)["conv_0"]


def test_inspect_refuses_what_is_no_bundle(model, bundle, tmp_path):
    with pytest.raises(ValueError, match="expected one of them"):
        inspect(model, into=str(bundle), config_file="train.yaml")
    with pytest.raises(ValueError, match=r"configs/train.yaml: no such config file"):
        inspect(model, into=str(tmp_path))
    with pytest.raises(ValueError, match=r"small.yaml: found no network_def, pretrained_decoder_levels"):
        inspect(model, config_file=str(bundle / "configs/small.yaml"))
