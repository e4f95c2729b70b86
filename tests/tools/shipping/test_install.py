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


def archive(dist, name, members):
    """A zip file of these members: names, or `ZipInfo`, and contents."""
    path = dist / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as content:
        for member, text in members:
            content.writestr(member, text)
    return path


# ---------------------------------------------------------------------------------------------------- install


@pytest.mark.parametrize("upper", [False, True])
def test_a_bundle_is_installed_as_it_was_released(server, dist, tmp_path, upper, capsys):
    path = dist / f"{NAME}_v0.1.0.zip"
    digest = sha256(path).upper() if upper else sha256(path)
    install(f"{server}/{path.name}", digest, str(tmp_path / "new/folder"))
    assert capsys.readouterr().out == f"installed {tmp_path / 'new/folder' / NAME}\n"
    content = zipfile.ZipFile(path)
    folder = tmp_path / "new/folder"
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == set(content.namelist())
    assert all((folder / name).read_bytes() == content.read(name) for name in found)
    assert [file.name for file in folder.iterdir()] == [NAME]


def test_a_file_url_will_do(dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    install(path.as_uri(), sha256(path), str(tmp_path))
    assert (tmp_path / NAME / "configs/train.yaml").is_file()


def refused(url, digest, folder, match, error=InstallError):
    with pytest.raises(error, match=match):
        install(url, digest, str(folder))
    assert list(folder.iterdir()) == []


def test_another_hash_is_refused(server, dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    refused(f"{server}/{path.name}", "0" * 64, tmp_path, f"its SHA-256 is {sha256(path)}, expected 0000")


def test_a_zip_that_was_tampered_with_is_refused(server, dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (dist / "tampered.zip").write_bytes(content)
    refused(f"{server}/tampered.zip", sha256(path), tmp_path, "its SHA-256 is")
    # somebody who trusts the wrong file is still told: every member has a checksum
    refused(f"{server}/tampered.zip", sha256(dist / "tampered.zip"), tmp_path, "is not a zip file that can be unpacked")


def test_a_download_that_breaks_off_is_refused(server, dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    refused(f"{server}/broken/{path.name}", sha256(path), tmp_path, "the download broke off")


def test_half_a_zip_is_refused(server, dist, tmp_path):
    content = (dist / f"{NAME}_v0.1.0.zip").read_bytes()
    (dist / "half.zip").write_bytes(content[: len(content) // 2])
    refused(f"{server}/half.zip", sha256(dist / "half.zip"), tmp_path, "is not a zip file that can be unpacked")


def test_a_missing_file_and_a_silent_server_are_refused(server, tmp_path):
    refused(f"{server}/nosuch.zip", "0" * 64, tmp_path, "404", error=OSError)
    refused("http://127.0.0.1:9/a.zip", "0" * 64, tmp_path, "refused", error=OSError)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "b/../../evil.txt", "b\\..\\evil.txt", "C:evil.txt"])
def test_a_path_that_leads_out_is_refused(server, dist, tmp_path, name):
    members = [("b/configs/metadata.json", "{}"), (name, "x")]
    path = archive(dist, "evil", members)
    refused(f"{server}/evil.zip", sha256(path), tmp_path, "expected files inside one folder, and no links")


def test_a_link_is_refused(server, dist, tmp_path):
    link = zipfile.ZipInfo("b/link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    path = archive(dist, "link", [("b/configs/metadata.json", "{}"), (link, "/etc/passwd")])
    refused(f"{server}/link.zip", sha256(path), tmp_path, "no links")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a/configs/metadata.json", "{}"), ("b/x", "")], r"holds \['a', 'b'\]"),
        ([("a/x", "")], r"has no a/configs/metadata\.json"),
        ([], r"holds \[\]"),
    ],
)
def test_what_is_no_single_bundle_is_refused(server, dist, tmp_path, members, match):
    path = archive(dist, "other", members)
    refused(f"{server}/other.zip", sha256(path), tmp_path, match)


def test_what_needs_more_than_the_disk_has_is_refused(server, dist, tmp_path):
    """The size of a member is read from the archive's own list, before anything is unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        content.writestr("a/configs/metadata.json", "{}")
        content.getinfo("a/configs/metadata.json").file_size = 2**60
    (dist / "bomb.zip").write_bytes(buffer.getvalue())
    refused(f"{server}/bomb.zip", sha256(dist / "bomb.zip"), tmp_path, f"needs {2**60} bytes")


def test_a_bundle_that_is_there_is_left_alone(server, dist, tmp_path):
    path = dist / f"{NAME}_v0.1.0.zip"
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine.txt").write_text("mine")
    with pytest.raises(InstallError, match="exists already"):
        install(f"{server}/{path.name}", sha256(path), str(tmp_path))
    assert [file.name for file in tmp_path.rglob("*")] == [NAME, "mine.txt"]


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, 12])
def test_what_is_no_hash_is_refused(tmp_path, digest):
    refused("http://127.0.0.1:9/a.zip", digest, tmp_path, "expected 64 hexadecimal digits")


@pytest.mark.parametrize("url", ["a.zip", "ftp://127.0.0.1/a.zip", "data:,a"])
def test_other_urls_are_refused(tmp_path, url):
    refused(url, "0" * 64, tmp_path, "expected a URL that begins with http, https, file")


def test_the_three_commands_follow_each_other(command, server, sources, tmp_path):
    """As a user types them: release, install (first with a wrong hash), verify."""
    done = command("-m", "tools", "release", sources / NAME, output=tmp_path / "dist", base_url=server)
    digest = re.search(r"SHA-256 (\w{64})", done.stdout)[1]
    url = json.loads((tmp_path / "dist/model_info.json").read_text())[f"{NAME}_v0.1.0"]["source"]
    assert url == f"{server}/{NAME}_v0.1.0.zip"
    options = {"bundle_dir": tmp_path / "bundles", "check": False}
    failed = command("-m", "tools", "install", url, sha256="0" * 63 + "1", **options)
    assert failed.returncode == 1
    assert failed.stderr.endswith(f"InstallError: {url}: its SHA-256 is {digest}, expected {'0' * 63}1\n")
    assert command("-m", "tools", "install", url, sha256=digest, **options).returncode == 0
    done = command("-m", "tools", "verify", tmp_path / "bundles" / NAME)
    assert "wrong" not in done.stdout


# ------------------------------------------------------------------------------ with MONAI alone, far from here


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
    """Runs Python in a virtual environment that has only what the bundles' metadata names, in a folder far from here.

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


@pytest.mark.parametrize("module", ["tools", "scripts", "mlflow", "onnx", "jsonschema", "pytest"])
def test_nothing_else_can_be_imported(far, module):
    assert f"No module named '{module}'" in far("-c", f"import {module}", check=False).stderr


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
