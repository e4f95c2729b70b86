"""Run by torchrun from test_distributed.py: what two processes do, written to FOLDER/rank=N.pt.

two_processes.py FOLDER DATALIST
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from bundle import BUNDLE, ROOT, TINY, config_files, places
from ignite.engine import Events
from monai.bundle import create_workflow
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(ROOT / BUNDLE))

from scripts.backbones import UNetBackbone
from scripts.hybridmim import HybridMIM, PretrainStep
from scripts.masking import Geometry, RandPatchMaskd
from tools.losses import HybridMIMLoss


def make_step() -> PretrainStep:
    """Without dropout, and with a fixed box, so that one process and two compute the same."""
    torch.manual_seed(0)
    geometry = Geometry(*(TINY[key] for key in ("roi_size", "region_size", "patch_size", "decode_size")), 16)
    backbone = UNetBackbone(1, TINY["unet_features"], dropout=0.0)
    return PretrainStep(HybridMIM(backbone, geometry), geometry, decode_box=[0, 0, 0])


def crops(step: PretrainStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Four crops with their masks."""
    torch.manual_seed(1)
    image = torch.rand(4, 1, 32, 32, 32) * 0.9 + 0.05
    image += torch.nn.functional.interpolate(torch.rand(4, 1, 4, 4, 4), scale_factor=8) * 4
    mask = RandPatchMaskd(step.geometry)
    mask.set_random_state(0)
    return image / image.max(), torch.stack([mask({"image": x})["mask"] for x in image])


def losses_and_gradients(network: torch.nn.Module, image: torch.Tensor, mask: torch.Tensor) -> dict:
    losses = HybridMIMLoss(weight_cl=1.0)(network(image, mask), image, mask)
    losses["loss"].backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
    return {"losses": {name: float(x) for name, x in losses.items()}, "gradients": gradients}


def gather() -> dict:
    """The losses and gradients of four crops in one process, of two of them alone, and of two in each process."""
    image, mask = crops(make_step())
    joint = losses_and_gradients(make_step(), image, mask)
    alone = losses_and_gradients(make_step(), image[:2], mask[:2])
    dist.init_process_group("gloo")
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    split = losses_and_gradients(DistributedDataParallel(make_step()), image[mine], mask[mine])
    return {"joint": joint, "alone": alone, "split": split}


def train(folder: Path, datalist: str) -> dict:
    """Which scans each epoch trained and validated on, with the losses of every step, and the weights at the end."""
    flow = create_workflow(
        config_file=[str(ROOT / name) for name in config_files(["train", "small", "multi_gpu_train"])],
        workflow_type="train",
        logging_file=False,
        **places(folder),
        **{**TINY, "epochs": 3, "batch_size": 1},
        datalist=datalist,
    )
    seen = []

    def note(engine, kind: str) -> None:
        files = [Path(name).name for name in engine.state.batch["file"]]
        seen.append((kind, engine.state.epoch, files, float(engine.state.output[0]["loss"])))

    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, note, "training")
    validator = flow.parser.get_parsed_content("validate#evaluator")
    validator.add_event_handler(Events.ITERATION_COMPLETED, note, "validation")
    flow.run()
    weights = flow.network_def.state_dict()
    flow.finalize()
    return {"seen": seen, "weights": weights}


if __name__ == "__main__":
    folder, datalist = sys.argv[1:]
    torch.save({**gather(), **train(Path(folder), datalist)}, Path(folder) / f"rank={os.environ['RANK']}.pt")
