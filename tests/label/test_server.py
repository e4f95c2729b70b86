"""The segmentation bundles in a real MONAI Label server, over HTTP, as a viewer uses it.

MONAI Label has an environment of its own: `./runtests.sh --label` makes it and runs this file in it. The server reads
`train.yaml` and `inference.yaml` alone, so the copies of the bundles that are served here have a tiny network, window
and spacing written into these two files; nothing else in them is changed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from segmentation_bundles.bundles import NAMES, ROOT, SPACING, TINY, bundle, read

from image_files import write_dicom
from tools.data.cases import find_cases
from tools.samples.sample_data import sample_data

pytest.importorskip("monailabel", reason="needs MONAI Label: ./runtests.sh --label")
requests = pytest.importorskip("requests")  # MONAI Label needs it too

LABELS = {
    "btcv": {c.replace("_", " "): value for c, [value] in read("btcv", "train")["classes"].items()},
    "brats": {"necrotic and non-enhancing tumour core": 1, "peritumoral edema": 2, "enhancing tumour": 4},
    "liver": {"liver": 1, "tumour": 2},
    "spleen": {"spleen": 1},
    "hippocampus": {"anterior": 1, "posterior": 2},
}
STEP = 0.01  # learning rate of the trainings here


def served(name):
    return f"hybridmim_{name}_seg"


def network_of(folder):
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.yaml")
    return parser.get_parsed_content("network_def")


def tiny_bundle(name, parent):
    """A copy of a bundle with a tiny network, and random weights for it."""
    folder = parent / served(name)
    shutil.copytree(ROOT / bundle(name), folder, ignore=shutil.ignore_patterns("models", "eval"))
    small = {"unet_features": TINY["unet_features"], "roi_size": [32, 32, 32], "spacing": SPACING[name]}
    for config, changes in (("inference", small), ("train", {**small, "learning_rate": STEP, "warmup_epochs": 0})):
        file = folder / "configs" / f"{config}.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}, sort_keys=False))
    torch.manual_seed(1)  # a training draws its first weights with the seed 0
    (folder / "models").mkdir()
    torch.save(network_of(folder).state_dict(), folder / "models/model.pt")
    return folder


def as_one_file(image):
    """Channels in files of their own → one 4D image."""
    files = [nib.load(file) for file in image]
    return nib.Nifti1Image(np.stack([np.asarray(f.dataobj) for f in files], axis=-1), files[0].affine)


def turned(image):
    """The same scan, its patient turned by 20 degrees."""
    a = np.radians(20)
    turn = np.array([[np.cos(a), 0, np.sin(a), 0], [0, 1, 0, 0], [-np.sin(a), 0, np.cos(a), 0], [0, 0, 0, 1]])
    return nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """`cases["liver"]`: image and label files of three cases, `liver_0.nii.gz` …; flipped, and one of them oblique."""
    found = {}
    for name in NAMES:
        published, folder = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp(name)
        sample_data(str(published), name, cases=3)
        config = read(name, "train")
        found[name] = []
        for number, case in enumerate(find_cases(published, config["layout"], config["modalities"])):
            image = as_one_file(case["image"]) if isinstance(case["image"], list) else nib.load(case["image"])
            files = [folder / part / f"{name}_{number}.nii.gz" for part in ("images", "labels")]
            for file, content in zip(files, (image, nib.load(case["label"])), strict=True):
                file.parent.mkdir(exist_ok=True)
                nib.save(turned(content) if number == 2 else content, file)
            found[name].append(files)
    return found


class Server:
    """A running server: what a viewer asks of it."""

    def __init__(self, process, url, models, log):
        self.process = process
        self.url = url
        self.models = models
        self.log = log

    def ask(self, method, path, **options):
        return requests.request(method, f"{self.url}{path}", timeout=300, **options)

    def info(self):
        reply = self.ask("GET", "/info/")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def infer(self, name, study):
        return self.ask("POST", f"/infer/{served(name)}", params={"image": study, "output": "image"})

    def segment(self, name, study, folder):
        """The label map that the server returns."""
        reply = self.infer(name, study)
        assert reply.status_code == 200, f"{reply.text}\n{self.log.read_text()[-5000:]}"
        folder.mkdir(exist_ok=True)
        file = folder / f"{study}.nii.gz"
        file.write_bytes(reply.content)
        return nib.load(file)

    def submit(self, study, label):
        """Save a finished label, as a viewer does after correcting it."""
        with label.open("rb") as file:
            reply = self.ask("PUT", "/datastore/label", params={"image": study}, files={"label": (label.name, file)})
        assert reply.status_code == 200, reply.text

    def withdraw(self, study):
        assert self.ask("DELETE", "/datastore/label", params={"id": study, "tag": "final"}).status_code == 200

    def train(self, name, **options):
        """Train on the finished labels; what became of it, and the last lines of its output."""
        reply = self.ask("POST", f"/train/{served(name)}", json={"max_epochs": 1, **options})
        assert reply.status_code == 200, reply.text
        ends = time.monotonic() + 300
        while (task := self.ask("GET", "/train/").json())["status"] in ("SUBMITTED", "RUNNING"):
            assert time.monotonic() < ends, task
            time.sleep(0.5)
        return task["status"], "\n".join(task["details"])

    def weights(self, name):
        return torch.load(self.models / served(name) / "models/model.pt", weights_only=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory, cases):
    """A server with all five bundles, three studies for each, a DICOM series in a folder, and a damaged file."""
    folder = tmp_path_factory.mktemp("label")
    studies = folder / "studies"
    studies.mkdir()
    for name in NAMES:
        for image, _ in cases[name]:
            shutil.copy(image, studies)
    (studies / "damaged.nii.gz").write_bytes(cases["liver"][0][0].read_bytes()[:50_000])
    write_dicom(studies / "series", slices=8)
    bundles = [tiny_bundle(name, folder) for name in NAMES]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, models = folder / "server.log", folder / "apps/monaibundle/model"
    arguments = [folder / "apps", studies, *bundles, "--port", port, "--convert", "true"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools", "monailabel", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Server(process, f"http://127.0.0.1:{port}", models, log)
    try:
        ends = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < ends, log.read_text()
            try:
                running.info()
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield running
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def segment_by_command(command, server, tmp_path_factory):
    """`run inferring` with the bundle as it is in the server's app: study → label map."""

    def segment(name, scans):
        out, folder = tmp_path_factory.mktemp("out"), server.models / served(name)
        command(
            *("-m", "monai.bundle", "run", "inferring"),
            config_file=folder / "configs/inference.yaml",
            bundle_root=folder,
            dataset_dir=scans,
            output_dir=out,
            device="cpu",
            network="$@network_def.to(@device)",  # as the server's: faster layers round differently where classes tie
        )
        return {file.parent.name: nib.load(file) for file in out.rglob("*_seg.nii.gz")}

    return segment


def same(found, expected):
    return np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


@pytest.mark.parametrize("name", NAMES)
def test_info_lists_the_labels(server, name):
    model = server.info()["models"][served(name)]
    assert model["labels"] == LABELS[name]
    assert model["type"] == "segmentation" and model["dimension"] == 3
    assert served(name) in server.info()["trainers"]


@pytest.mark.parametrize("name", NAMES)
def test_same_label_map_as_on_the_command_line(server, cases, segment_by_command, tmp_path, name):
    expected = segment_by_command(name, cases[name][0][0].parent)
    assert len(expected) == 3
    for image, _ in cases[name]:
        study = image.name.removesuffix(".nii.gz")
        found, scan = server.segment(name, study, tmp_path), nib.load(image)
        assert found.shape == scan.shape[:3]
        np.testing.assert_allclose(found.affine, scan.affine, atol=1e-4)
        assert same(found, expected[study])
        values = set(np.unique(np.asarray(found.dataobj)))
        assert len(values) > 1 and values <= {0, *LABELS[name].values()}


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_from_the_model_and_is_used(server, cases, tmp_path, name):
    """And the bundle beside it gives what it gave before."""
    other = NAMES[NAMES.index(name) - 1]
    before = server.weights(name)
    own, others = server.segment(name, f"{name}_0", tmp_path), server.segment(other, f"{other}_0", tmp_path)
    for image, label in cases[name]:
        server.submit(image.name.removesuffix(".nii.gz"), label)
    status, output = server.train(name)
    for image, _ in cases[name]:
        server.withdraw(image.name.removesuffix(".nii.gz"))
    assert status == "DONE", output

    def largest_change(weights):
        return max(float((weights[key] - before[key]).abs().max()) for key in before)

    fresh = network_of(server.models / served(name)).state_dict()
    assert 0 < largest_change(server.weights(name)) < 10 * STEP < largest_change(fresh)
    assert not same(server.segment(name, f"{name}_0", tmp_path / "after"), own)
    assert same(server.segment(other, f"{other}_0", tmp_path / "after"), others)


def test_trained_model_on_the_command_line(server, cases, segment_by_command, tmp_path):
    """After another training by the server, `run inferring` with its model gives the server's label maps."""
    for image, label in cases["hippocampus"]:
        server.submit(image.name.removesuffix(".nii.gz"), label)
    status, output = server.train("hippocampus", val_split=0.4)
    for image, _ in cases["hippocampus"]:
        server.withdraw(image.name.removesuffix(".nii.gz"))
    assert status == "DONE", output
    for study, label_map in segment_by_command("hippocampus", cases["hippocampus"][0][0].parent).items():
        assert same(server.segment("hippocampus", study, tmp_path), label_map)


def test_a_dicom_series_in_a_folder_is_a_study_once_converted(server, segment_by_command, tmp_path):
    studies = server.log.parent / "studies"
    found = server.segment("spleen", "series", tmp_path)
    expected = segment_by_command("spleen", studies / "series")
    assert found.shape == (20, 24, 8)
    assert same(found, *expected.values())
    np.testing.assert_allclose(found.affine, nib.load(studies / "series.nii.gz").affine)


def test_damaged_study_is_an_error_and_the_server_lives(server, cases, tmp_path):
    before = server.segment("liver", "liver_0", tmp_path)
    reply = server.infer("liver", "damaged")
    assert reply.status_code == 500
    assert server.process.poll() is None
    assert same(server.segment("liver", "liver_0", tmp_path / "after"), before)


def test_training_on_a_damaged_study_says_so(server, cases):
    weights = server.weights("liver")
    for study in ("damaged", "liver_0"):
        server.submit(study, cases["liver"][0][1])
    status, output = server.train("liver", val_split=0.5)
    for study in ("damaged", "liver_0"):
        server.withdraw(study)
    assert status == "ERROR"
    assert "damaged.nii.gz" in output
    assert all(torch.equal(tensor, weights[key]) for key, tensor in server.weights("liver").items())
    assert served("liver") in server.info()["models"]
