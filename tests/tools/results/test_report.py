"""The page of a run: what it shows is what the folder holds; looked at in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tools.results.figures import reconstruction_figure, segmentation_figure
from tools.results.report import report, report_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METRICS = """epoch,loss,val_loss,val_masked_mse,val_mean_mse,val_location_auroc,\
val_retrieval_accuracy,val_retrieval_chance
1,0.9,0.8,0.06,0.055,0.4,0.1,0.14285714
2,0.7,,,,,,
3,0.6,0.5,0.04,0.0512345,0.71,0.5,0.14285714
4,0.5,,,,,,
"""
EVALUATION = """class,dice_mean,dice_std,cases,missed
spleen,0.91234567,0.01,2,0
<liver & "bile">,,,2,2
"""
LOOK = """<script>addEventListener("load", () => { const found = {
  pictures: [...document.images].map(i => [i.alt, i.complete ? i.naturalWidth : 0]),
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  tables: [...document.querySelectorAll("table")].map(t => [...t.rows].map(r => [...r.cells].map(c => c.innerText))),
  headings: [...document.querySelectorAll("h2")].map(h => h.innerText),
  wide: document.documentElement.scrollWidth > innerWidth,
}; document.body.dataset.found = JSON.stringify(found); });</script>"""


@pytest.fixture
def run(tmp_path):
    """The folder of a run with everything that a page shows."""
    folder = tmp_path / "runs" / "mine"
    (folder / "figures/evaluation").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "evaluation.csv").write_text(EVALUATION)
    (folder / "models/model.json").write_text(json.dumps({"versions": {"bundle": "my bundle 0.1.0"}}))
    volume = np.random.default_rng(0).random((16, 16, 16), np.float32)
    for epoch in (1, 3):
        reconstruction_figure(
            folder / f"figures/reconstruction_epoch={epoch:04d}.png", volume, volume, volume, title=f"epoch {epoch}"
        )
    for which in ("best", "worst"):
        path = folder / f"figures/evaluation/{which}_a.png"
        segmentation_figure(path, volume, {"label": volume[None] > 0.5}, ["spleen"], which)
    return folder


def seen(page: str, tmp_path) -> dict:
    """What a real browser makes of the page."""
    if BROWSER is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    file = tmp_path / "looked_at.html"
    file.write_text(page.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom)[1]))


def test_a_browser_shows_every_picture_and_table_without_asking_for_anything(run, tmp_path):
    report(str(run))
    found = seen((run / "report.html").read_text("utf-8"), tmp_path)
    assert found["requests"] == []
    assert not found["wide"]
    assert dict(found["pictures"]).keys() == {"Curves", "Reconstruction", "Best case", "Worst case"}
    assert all(width > 100 for _, width in found["pictures"])
    facts, chance, evaluation = found["tables"]
    assert {"command", "machine", "versions"} <= {row[0] for row in facts}
    assert [row[:1] + row[2:4] + row[5:] for row in chance[1:]] == [  # the last validation, not the last epoch
        ["masked voxels", "0.040", "0.051", "3"],
        ["location of masked patches", "0.710", "0.500", "3"],
        ["retrieval of the other view", "0.500", "0.143", "3"],
    ]
    assert evaluation[1:] == [["spleen", "0.912", "0.010", "2", "0"], ['<liver & "bile">', "", "", "2", "2"]]


def test_the_browser_sees_a_damaged_picture(run, tmp_path):
    report(str(run))
    page = (run / "report.html").read_text("utf-8").replace("base64,iVBOR", "base64,AAAAA", 1)
    assert [width for _, width in seen(page, tmp_path)["pictures"]].count(0) == 1


def test_the_last_picture_of_a_kind_is_shown_as_it_is(run):
    report(str(run))
    page = (run / "report.html").read_text("utf-8")
    assert base64.b64encode((run / "figures/reconstruction_epoch=0003.png").read_bytes()).decode() in page
    assert base64.b64encode((run / "figures/reconstruction_epoch=0001.png").read_bytes()).decode() not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import""", page)


def test_only_what_the_folder_holds(run):
    for path in (run / "metrics.csv", *run.rglob("*.png")):
        path.unlink()
    report(str(run))
    page = (run / "report.html").read_text("utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Evaluation"]
    assert "<img" not in page
    assert "<h1>mine: my bundle 0.1.0</h1>" in page


def test_the_command_of_the_training_is_that_of_its_run_json(run):
    command = "python -m monai.bundle run training --config_file \"['a.yaml']\" --epochs 3"
    content = {"command": command, "time": "2026-01-02 03:04:05", "host": "station", "versions": {"torch": "2.13.0"}}
    (run / "run.json").write_text(json.dumps(content))
    report(str(run))
    page = html.unescape((run / "report.html").read_text("utf-8"))
    assert f"<th>training command</th><td><code>{command}</code>" in page
    assert "2026-01-02 03:04:05 on station" in page
    assert "torch 2.13.0" in page and "<th>continued</th>" not in page


def test_the_command_of_a_run_that_was_continued_is_its_first(run):
    earlier = [{"command": "the first", "time": "2026-01-01 00:00:00", "host": "a"}]
    content = {"command": "the second", "time": "2026-01-02 00:00:00", "host": "b", "earlier": earlier}
    (run / "run.json").write_text(json.dumps(content))
    report(str(run))
    page = (run / "report.html").read_text("utf-8")
    assert "<th>training command</th><td><code>the first</code>" in page
    assert "<th>continued</th><td><code>1 ×, last 2026-01-02 00:00:00 on b</code>" in page


def test_the_plan_of_the_bundle_is_shown(run, tmp_path):
    row = {"what": "spacing", "found": "1 x 1 x 5 mm", "decided": "2×2×5 mm", "why": "median; coarser"}
    for folder in (tmp_path / "my_bundle/docs", run / "other_bundle/docs"):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps({"decisions": [{**row, "found": folder.parent.name}]}))
    report(str(run))
    assert "<td>other_bundle</td><td>2×2×5 mm</td>" in (run / "report.html").read_text("utf-8")
    (run / "config.yaml").write_text(f"bundle_root: {tmp_path / 'my_bundle'}\n")
    report(str(run))
    page = (run / "report.html").read_text("utf-8")
    assert "<h2>Plan</h2>" in page
    assert "<td>my_bundle</td><td>2×2×5 mm</td><td>median; coarser</td>" in page and "other_bundle" not in page


def test_a_table_of_many_cases_is_folded(run):
    rows = [f"case_{number},spleen,0.5" for number in range(40)]
    (run / "evaluation_cases.csv").write_text("\n".join(["case,class,dice", *rows]) + "\n")
    report(str(run))
    assert "<summary>40 rows</summary>" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["run.json", "models/model.json", "metrics.csv", "evaluation.csv"])
@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"[1]\n2,3\n"])
def test_a_damaged_file_is_named_and_leaves_the_old_page(run, name, content):
    (run / "report.html").write_text("old")
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{run / name}: found ")):
        report(str(run))
    assert (run / "report.html").read_text() == "old"


def test_a_run_that_has_ended_well_does_not_fail_for_want_of_a_page(run, caplog):
    (run / "run.json").write_text("{")
    report_run(run)
    assert f"{run / 'report.html'} is not written, everything else is: {run / 'run.json'}: found no JSON" in caplog.text


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds none of metrics.csv, evaluation.csv"):
        report(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        report(str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())
