"""Download and installation from a server on 127.0.0.1, and released bundles where there is nothing but MONAI."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import threading
import venv
import zipfile
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from packaging.requirements import Requirement

from tools.samples.sample_data import sample_data
from tools.shipping.install import InstallError, install
from tools.shipping.release import release

NAME = "hybridmim_hippocampus_seg"
TINY = {"unet_features": [4, 4, 8, 8, 16, 4], "roi_size": [32, 32, 32]}
TINY_TRAINING = {**TINY, "epochs": 1, "batch_size": 2, "num_workers": 0}
TINY_PRETRAINING = {**TINY_TRAINING, "region_size": [16, 16, 16], "patch_size": [8, 8, 8], "decode_size": [32, 32, 32]}


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; below /broken/ the connection ends halfway through a file."""

    def do_GET(self):
        if not self.path.startswith("/broken/"):
            return super().do_GET()
        content = Path(self.directory, self.path.rpartition("/")[2]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def dist(sources, tmp_path_factory):
    """Two released bundles."""
    folder = tmp_path_factory.mktemp("dist")
    release(str(sources / NAME), str(sources / "hybridmim_pretrain"), output=str(folder))
    return folder


@pytest.fixture(scope="module")
def server(dist):
    """Base URL of a server of `dist`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(dist))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- install


@pytest.mark.parametrize("from_server", [True, False])
def test_a_bundle_is_installed_as_it_was_released(server, dist, tmp_path, from_server, capsys):
    path, folder = dist / f"{NAME}_v0.1.0.zip", tmp_path / "new/folder"
    install(f"{server}/{path.name}" if from_server else path.as_uri(), sha256(path).upper(), str(folder))
    assert capsys.readouterr().out.endswith(f"installed {folder / NAME}\n")
    content = zipfile.ZipFile(path)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == set(content.namelist())
    assert all((folder / name).read_bytes() == content.read(name) for name in found)
    assert [file.name for file in folder.iterdir()] == [NAME]


def refused(url, digest, folder, match):
    with pytest.raises(InstallError, match=match):
        install(url, digest, str(folder))
    assert list(folder.iterdir()) == []


def zipped(*members, compressed=False):
    """The bytes of a zip file of these members: names, or `ZipInfo`, and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as content:
        for member, text in members:
            content.writestr(member, text)
    return buffer.getvalue()


def with_a_changed_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


METADATA = ("b/configs/metadata.json", "{}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_a_changed_byte, "Bad CRC-32"),  # with the hash of the wrong file: every member has a checksum
        (lambda content: content[: len(content) // 2], "File is not a zip file"),
        (lambda content: zipped(("a/configs/metadata.json", "{}"), ("b/x", "")), r"holds \['a', 'b'\]"),
        (lambda content: zipped(("a/x", "")), r"holds \['a'\], expected .* configs/metadata\.json"),
        (lambda content: zipped((".b/configs/metadata.json", "{}")), r"holds \['\.b'\]"),
        (lambda content: zipped(METADATA, ("b/x", bytes(10_000_000)), compressed=True), "unpacks to 10 MB from"),
        (lambda content: zipped(), r"holds \[\], expected the folder of one bundle"),
    ],
)
def test_a_file_that_is_no_single_bundle_is_refused(server, dist, tmp_path, change, match):
    (dist / "other.zip").write_bytes(change((dist / f"{NAME}_v0.1.0.zip").read_bytes()))
    refused(f"{server}/other.zip", sha256(dist / "other.zip"), tmp_path, match)


@pytest.mark.parametrize("member", ["../evil.txt", "b/../../evil.txt", "/tmp/evil_of_a_bundle.txt", "link"])
def test_nothing_is_written_outside_of_the_folder(server, dist, tmp_path, member):
    """Whether MONAI and Python refuse such a path or shorten it; a link becomes an ordinary file."""
    if member == "link":
        member = zipfile.ZipInfo("b/link")
        member.create_system, member.external_attr = 3, 0o120777 << 16
    (dist / "evil.zip").write_bytes(zipped(METADATA, (member, "/etc/passwd")))
    (tmp_path / "bundles").mkdir()
    with suppress(InstallError):
        install(f"{server}/evil.zip", sha256(dist / "evil.zip"), str(tmp_path / "bundles"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundles"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not Path("/tmp/evil_of_a_bundle.txt").exists()


@pytest.mark.parametrize(
    ("url", "digest", "match"),
    [
        ("{server}/{file}", "0" * 64, "check of downloaded file failed: .*expected sha256=0000"),
        ("{server}/{file}", "abc", "expected sha256=abc"),
        ("{server}/broken/{file}", "0" * 64, r"retrieval incomplete: got only \d+ out of \d+ bytes"),
        ("{server}/nosuch.zip", "0" * 64, "nosuch.zip: HTTP Error 404"),
        ("http://127.0.0.1:9/a.zip", "0" * 64, "http://127.0.0.1:9/a.zip: .*refused"),
        ("a.zip", "0" * 64, "unknown url type: 'a.zip'"),
    ],
)
def test_a_download_that_is_not_the_file_is_refused(server, tmp_path, url, digest, match):
    refused(url.format(server=server, file=f"{NAME}_v0.1.0.zip"), digest, tmp_path, match)


def test_a_bundle_that_is_there_is_left_alone(server, dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine.txt").write_text("mine")
    with pytest.raises(InstallError, match="exists already"):
        install(f"{server}/{path.name}", sha256(path), str(tmp_path))
    assert [file.name for file in tmp_path.rglob("*")] == [NAME, "mine.txt"]


def test_the_three_commands_follow_each_other(command, server, sources, tmp_path):
    """As a user types them: release, install (first with a wrong hash), verify."""
    done = command("-m", "tools", "release", sources / NAME, output=tmp_path / "dist", base_url=server)
    digest = re.search(r"SHA-256 (\w{64})", done.stdout)[1]
    url = json.loads((tmp_path / "dist/model_info.json").read_text())[f"{NAME}_v0.1.0"]["source"]
    assert url == f"{server}/{NAME}_v0.1.0.zip"
    options = {"bundle_dir": tmp_path / "bundles", "check": False}
    failed = command("-m", "tools", "install", url, sha256="0" * 63 + "1", **options)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"InstallError: {url}: ")
    assert digest in failed.stdout  # what was found
    assert command("-m", "tools", "install", url, sha256=digest, **options).returncode == 0
    done = command("-m", "tools", "verify", tmp_path / "bundles" / NAME)
    assert "wrong" not in done.stdout


# ------------------------------------------------------------------------------ with MONAI alone


def packages(names):
    """These distributions and all that they require, without extras."""
    found, wanted = {}, list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name not in found:
            found[name] = distribution(name)
            needed = [Requirement(text) for text in found[name].requires or []]
            wanted += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


@pytest.fixture(scope="module")
def far(tmp_path_factory, dist):
    """Runs Python in a virtual environment that has only what the bundles' metadata names, in another folder.

    The environment is a new one. Its site-packages hold links to the files of exactly those distributions, and of
    what they require: neither this project nor anything else that is installed here can be imported.
    """
    folder = tmp_path_factory.mktemp("far")
    names = {"monai", "torch", "numpy"}
    for archive_path in dist.glob("hybridmim_*.zip"):
        content = zipfile.ZipFile(archive_path)
        meta = json.loads(content.read(f"{archive_path.stem.rpartition('_v')[0]}/configs/metadata.json"))
        names |= set(meta["required_packages_version"])
    venv.create(folder / "venv", symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    for package in packages(names):
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments, cwd=folder, check=True, **options):
        line = [folder / "venv/bin/python", *map(str, arguments)]
        line += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0 or not check, f"{line}\n{done.stdout}\n{done.stderr}"
        return done

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def downloaded(far, server):
    """The folder in which MONAI's own client has put both bundles."""
    for name in (NAME, "hybridmim_pretrain"):
        url = f"{server}/{name}_v0.1.0.zip"
        far("-m", "monai.bundle", "download", name=name, url=url, bundle_dir="bundles")
    return far.folder / "bundles"


@pytest.fixture(scope="module")
def cases(far):
    folder = far.folder / "cases"
    sample_data(str(folder), "hippocampus", cases=5)
    return folder


@pytest.fixture(scope="module")
def trained(far, downloaded, cases):
    """The downloaded bundle after a training that was started from another folder."""
    root = f"bundles/{NAME}"
    config = f"{root}/configs/train.yaml"
    options = {"config_file": config, "bundle_root": root, "dataset_dir": cases, **TINY_TRAINING}
    far("-m", "monai.bundle", "run", "training", **options)
    assert (downloaded / NAME / "models/model.pt").is_file()
    return downloaded / NAME


def test_nothing_else_can_be_imported(far):
    others = ("tools", "scripts", "mlflow", "onnx", "jsonschema", "pytest")
    code = f"import importlib.util as u; print([name for name in {others} if u.find_spec(name)])"
    assert far("-c", code).stdout == "[]\n"


@pytest.mark.slow
def test_a_downloaded_bundle_segments_after_its_training(far, trained, cases):
    """Inside the bundle's folder this time."""
    options = {"config_file": "configs/inference.yaml", "dataset_dir": cases / "imagesTr", **TINY}
    far("-m", "monai.bundle", "run", "inferring", cwd=trained, **options)
    written = sorted((trained / "eval").rglob("*_seg.nii.gz"))
    assert len(written) == 5
    for file in written:
        image = nib.load(cases / "imagesTr" / file.name.replace("_seg", ""))
        label = nib.load(file)
        assert label.shape == image.shape
        assert np.allclose(label.affine, image.affine, atol=1e-4)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}


CLIENT = f"""
import torch
from monai.bundle import ckpt_export, load, verify_net_in_out
from monai.data import load_net_with_metadata
from monai.networks.nets import BasicUNet

features = {TINY["unet_features"]}
network = load("{NAME}", bundle_dir="bundles", model=BasicUNet(3, 1, 3, features)).eval()
weights = torch.load("bundles/{NAME}/models/model.pt", weights_only=True)
assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())

for name in ("{NAME}", "hybridmim_pretrain"):
    root = f"bundles/{{name}}"
    verify_net_in_out("network_def", f"{{root}}/configs/metadata.json", f"{{root}}/configs/inference.yaml",
                      device="meta", bundle_root=root, unet_features=features)

root = "bundles/{NAME}"
ckpt_export("network_def", config_file=f"{{root}}/configs/inference.yaml", bundle_root=root, unet_features=features)
exported, meta, _ = load_net_with_metadata(f"{{root}}/models/model.ts")
image = torch.rand(1, 1, 32, 32, 32)
with torch.no_grad():
    assert torch.allclose(exported.eval()(image), network(image), atol=1e-4)
assert meta["version"] == "0.1.0"
print("all is well")
"""


def test_monais_client_loads_verifies_and_exports_it(far, trained):
    assert "all is well" in far("-c", CLIENT).stdout


def test_the_downloaded_tools_are_commands_too(far, downloaded, cases):
    done = far("-m", "tools", "check", cwd=downloaded / NAME, bundle=".", dataset_dir=cases, workers=0)
    assert "5 readable, 0 unreadable" in done.stdout


def test_the_pre_training_bundle_runs_with_its_scripts(far, downloaded, cases):
    root = "bundles/hybridmim_pretrain"
    configs = f"['{root}/configs/train.yaml','{root}/configs/mri.yaml','{root}/configs/small.yaml']"
    options = {"config_file": configs, "bundle_root": root, "dataset_dir": cases / "imagesTr", **TINY_PRETRAINING}
    far("-m", "monai.bundle", "run", "training", **options)
    assert (far.folder / root / "models/backbone.pt").is_file()
