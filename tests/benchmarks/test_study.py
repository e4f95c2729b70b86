import csv
import json
import math
import os
import signal
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from benchmarks.study import __main__ as main
from benchmarks.study import runs as runs_module
from benchmarks.study import settings
from benchmarks.study.findings import Findings
from benchmarks.study.plan import (
    Arm,
    candidates,
    chosen_rate,
    finetuning,
    grid,
    left_out,
    length,
    plan,
    pretraining,
    rows,
)
from benchmarks.study.report import write_report
from benchmarks.study.runs import command, execute, folder_of, is_done, last_lines, only_study, start
from benchmarks.study.settings import BUNDLES, METHODS, ROOT, open_study, read_preset, read_study
from benchmarks.study.statistics import Estimate, mean_difference
from benchmarks.study.statistics import estimate as mean_of

SCRATCH, HYBRIDMIM = Arm("UNet", "scratch"), Arm("UNet", "hybridmim")


@pytest.fixture(autouse=True)
def figures_are_drawn_by_one_test(request, monkeypatch):
    """They take longer than all the rest."""
    if request.function is not test_the_report_has_the_numbers_of_the_runs:
        monkeypatch.setattr("benchmarks.study.report.draw", lambda findings: {})


def unknown(run_id):
    return None


# ------------------------------------------------------------------------------------------------------ the cases


def test_the_split_is_disjoint_and_made_once(begin):
    study = begin()
    parts = [{case["image"] for case in study.cases(section)} for section in ("training", "validation", "test")]
    assert [len(part) for part in parts] == [152, 8, 50]
    assert len(set.union(*parts)) == 210
    before = study.datalist.read_bytes(), study.datalist.stat().st_mtime_ns
    begin(tables=[3])
    assert (study.datalist.read_bytes(), study.datalist.stat().st_mtime_ns) == before


def test_a_case_in_two_parts_is_refused(begin):
    study = begin()
    content = json.loads(study.datalist.read_text())
    content["training"].append(content["test"][0])
    study.datalist.write_text(json.dumps(content))
    settings._cases.cache_clear()
    with pytest.raises(ValueError, match=r"datalist\.json: found .* in training and test, expected it in one"):
        begin()


def test_every_run_takes_the_same_list_and_only_tests_take_its_test_cases(begin):
    study = begin()
    for run in plan(study, unknown):
        words = command(study, run)
        assert f"--datalist={study.datalist}" in words
        assert ("--evaluated=test" in words) == (run.kind == "test")


def few_labels(dataset, folder, preset="headneck"):
    """A preset of head-and-neck CT on the names of other cases, of which the last 30 have no labels."""
    (dataset / "imagesUn").mkdir()
    for number in range(180, 210):
        (dataset / f"imagesTr/hippocampus_{number:03d}.nii.gz").rename(dataset / f"imagesUn/un_{number:03d}.nii.gz")
        (dataset / f"labelsTr/hippocampus_{number:03d}.nii.gz").unlink()
    return open_study(str(folder), str(dataset), preset, None, None, None, None, None, 1)


def test_unlabelled_scans_are_for_pre_training_alone(dataset, tmp_path):
    study = few_labels(dataset, tmp_path / "study")
    assert study.bundle == "spleen"
    labelled = {part: {case["image"] for case in study.cases(part)} for part in ("training", "validation", "test")}
    listed = json.loads(study.scans.read_text())
    assert {name for name in listed["training"] if name.startswith("imagesUn/")} == {
        f"imagesUn/un_{number:03d}.nii.gz" for number in range(180, 210)
    }
    assert set(listed["training"]) > labelled["training"]
    assert set(listed["validation"]) == labelled["validation"]
    assert not {*listed["training"], *listed["validation"]} & labelled["test"]
    for run in plan(study, unknown):
        assert f"--datalist={study.scans if run.kind == 'pretrain' else study.datalist}" in command(study, run)


def test_a_test_case_among_the_unlabelled_scans_is_refused(dataset, tmp_path):
    study = few_labels(dataset, tmp_path / "study")
    study.scans.unlink()
    (dataset / "imagesUn").rename(dataset / "others")
    (dataset / "imagesUn").symlink_to(dataset / "imagesTr")
    content = json.loads(study.datalist.read_text())
    content["test"][0]["image"] = content["test"][0]["image"].replace("imagesTr", "imagesUn")
    study.datalist.write_text(json.dumps(content))
    settings._cases.cache_clear()
    with pytest.raises(ValueError, match=r"imagesUn: found imagesUn/hippocampus_\d+.nii.gz, a test case"):
        open_study(str(study.output_dir), str(dataset), "headneck", None, None, None, None, None, 1)


def test_seeds_share_pre_trainings_where_the_preset_says_so(dataset, tmp_path):
    study = few_labels(dataset, tmp_path / "study")
    assert [pretraining(study, HYBRIDMIM, seed).seed for seed in range(5)] == [0, 1, 2, 0, 1]
    tuned = finetuning(study, HYBRIDMIM, 0.15, 4, 0.01)
    assert (tuned.options["seed"], tuned.needs) == (4, (pretraining(study, HYBRIDMIM, 1).id,))
    fresh = [run for run in plan(study, unknown) if run.kind == "finetune" and run.arm == SCRATCH]
    assert {run.options["seed"] for run in fresh} == {0, 1, 2, 3, 4}


def test_every_run_has_the_data_of_the_preset(dataset, tmp_path):
    """The same grid and window in both stages, and in the test."""
    study = few_labels(dataset, tmp_path / "study")
    for run in plan(study, unknown):
        assert (run.options["spacing"], run.options["window"]) == (None, [-175, 250])
        assert run.kind == "pretrain" or list(run.options["classes"])[2:4] == ["right_parotid", "left_parotid"]
        assert run.kind != "finetune" or not any(run.options["flip_probability"])


def test_the_coarse_preset_is_coarse_in_both_stages(dataset, tmp_path):
    study = few_labels(dataset, tmp_path / "study", preset="headneck_coarse")
    assert all(run.options["spacing"] == [6, 6, 6] for run in plan(study, unknown))


# ------------------------------------------------------------------------------------------------------- the plan


def test_shared_runs_are_planned_once(begin):
    first = [run.id for run in plan(begin(tables=[1]), unknown)]
    assert len(set(first)) == len(first)
    assert [run.id for run in plan(begin(tables=[1, 2]), unknown)] == first
    assert {run.id for run in plan(begin(tables=[5]), unknown)} < set(first)
    both = [run.id for run in plan(begin(tables=[1, 3]), unknown)]
    third = {run.id for run in plan(begin(tables=[3]), unknown)}
    assert len(both) == len(set(both)) == len({*first, *third}) < len(first) + len(third)


def test_rows_that_change_nothing_are_the_method_as_configured(begin):
    arms = {row.name: row.arm for row in rows(begin(), 3)}
    assert arms["as configured"] == arms["encoder transferred"] == HYBRIDMIM
    assert arms["without contrastive learning"] == Arm("UNet", "hybridmim", (("weight_cl", 0),))
    # transfers share the pre-training
    assert arms["everything transferred"] == Arm("UNet", "hybridmim", (), (("pretrained_parts", "all"),))
    gpu = {row.name: row.arm for row in rows(begin_another(begin, "gpu"), 4)}
    assert gpu["0.4 masked, patches of 8×8×8"] == HYBRIDMIM


def begin_another(begin, preset):
    """A study of another preset, in a folder of its own."""
    study = begin()
    folder = study.output_dir.with_name(preset)
    return open_study(str(folder), str(study.dataset_dir), preset, "hippocampus", None, None, None, None, 1)


def test_the_laptop_preset_is_the_matrix_that_it_says(begin):
    planned = plan(begin(tables=[1]), unknown)
    kinds = [(run.kind, run.arm.method, run.arm.network) for run in planned]
    assert kinds.count(("pretrain", "hybridmim", "UNet")) == 2  # seeds
    # both rates at 5 % with seed 0, then the other seed and the other two fractions with both
    assert kinds.count(("finetune", "hybridmim", "UNet")) == 2 + 5
    assert kinds.count(("test", "hybridmim", "UNet")) == 6
    assert sum(kind == "pretrain" for kind, *_ in kinds) == 8
    assert len(planned) == 8 + 3 * 7 + 3 * 3 + 3 * 6 + 3 * 2  # UNETR has 5 % only


@pytest.mark.parametrize("preset", ["laptop", "gpu"])
def test_every_arm_is_fine_tuned_for_the_same_steps(begin, preset):
    study = begin_another(begin, preset)
    lengths = {}
    for run in plan(study, unknown):
        if run.kind == "finetune":
            lengths.setdefault(run.fraction, set()).add((run.steps, run.epochs, run.options["warmup_epochs"]))
            cases = max(1, round(run.fraction * len(study.cases("training"))))
            assert run.steps == run.epochs * math.ceil(cases / run.options["batch_size"])
            assert run.options["epochs"] == run.epochs
    assert all(len(found) == 1 for found in lengths.values())
    if preset == "laptop":  # 8, 38 and 152 cases, two at a time
        lengths = [length(study, fraction) for fraction in (0.02, 0.05, 0.25, 1.0)]
        assert lengths == [(160, 80), (160, 40), (152, 8), (228, 3)]
    else:  # 300 epochs of 144 cases, four at a time
        assert [length(study, fraction) for fraction in (0.05, 1.0)] == [(10800, 5400), (10800, 300)]


def test_both_stages_take_the_seed(begin):
    assert all(run.options["seed"] == run.seed for run in plan(begin(seeds=[3, 5]), unknown) if run.kind != "test")
    pretrained = {run.seed for run in plan(begin(seeds=[3, 5]), unknown) if run.kind == "pretrain"}
    assert pretrained == {0, 3, 5}  # 0: the rates are chosen with it


def test_fewer_methods_are_still_compared_with_scratch(begin):
    arms = {run.arm for run in plan(begin(methods=["mae"], tables=[1]), unknown)}
    assert arms == {Arm("UNETR", "scratch"), Arm("UNETR", "mae")}


def test_networks_and_methods_take_their_overlays(begin):
    study = begin_another(begin, "gpu")

    def names(run):
        return [Path(file).stem for file in run.configs]

    found = {
        (arm.network, arm.method): names(pretraining(study, arm, 0))
        for row in rows(study, 1)
        if (arm := row.arm).method != "scratch"
    }
    assert found == {
        ("UNet", "simclr"): ["train", "mri", "simclr"],
        ("UNet", "hybridmim"): ["train", "mri"],
        ("SwinUNETR", "simclr"): ["train", "mri", "swin_unetr", "simclr"],
        ("SwinUNETR", "simmim"): ["train", "mri", "swin_unetr", "simmim"],
        ("SwinUNETR", "hybridmim"): ["train", "mri", "swin_unetr"],
        ("UNETR", "simclr"): ["train", "mri", "vit", "simclr"],
        ("UNETR", "simmim"): ["train", "mri", "simmim"],
        ("UNETR", "mae"): ["train", "mri", "mae"],
    }
    assert names(finetuning(study, Arm("UNETR", "mae"), 0.1, 0, 0.001)) == ["train", "unetr"]


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu"])
def test_every_preset_plans_every_bundle(bundle, preset, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    parts = {"training": 40, "validation": 4, "test": 5}
    cases = {part: [{"image": f"{part}_{n}", "label": f"{n}"} for n in range(count)] for part, count in parts.items()}
    (folder / "datalist.json").write_text(json.dumps(cases))
    study = open_study(str(folder), str(tmp_path), preset, bundle, None, None, None, None, 1)
    planned = plan(study, unknown)
    channels = 4 if bundle == "brats" else 1
    for run in planned:
        assert all((ROOT / file).is_file() for file in run.configs)
        if run.kind == "pretrain":
            assert run.options["in_channels"] == channels
            assert any("/mri.yaml" in file for file in run.configs) == (bundle in ("hippocampus", "brats"))
            if bundle == "btcv" and preset == "gpu" and "spacing" not in dict(run.arm.pretraining):
                assert run.options["spacing"] == [1.5, 1.5, 2.0]  # that of fine-tuning


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_gpu_preset_has_the_numbers_of_the_bundle(bundle):
    _, preset, _ = read_preset("gpu", bundle)
    own = yaml.safe_load((ROOT / f"bundles/hybridmim_{bundle}_seg/configs/train.yaml").read_text())
    assert preset.finetuning.epochs == own["epochs"]
    for key in ("batch_size", "crops_per_volume"):
        assert preset.finetuning.options[key] == own[key]
    for network in ("UNet", "UNETR"):
        assert preset.networks[network]["roi_size"] == own["roi_size"]
    usual = yaml.safe_load((ROOT / "bundles/hybridmim_pretrain/configs/train.yaml").read_text())
    assert preset.pretraining.epochs == usual["epochs"]
    assert len(preset.seeds) >= 3


def test_boxes_that_do_not_fit_are_left_out(begin, tmp_path):
    gpu = begin_another(begin, "gpu")  # crops of 48×64×48
    assert left_out(gpu) == ["half of each side decoded", "a third of each side decoded"]
    arms = {row.name: dict(row.arm.pretraining) for row in rows(gpu, 3)}
    assert arms["whole crop decoded"] == {"decode_size": (48, 64, 48)}
    assert arms["the same box decoded at every step"] == {"decode_box": (16, 32, 16)}
    (tmp_path / "btcv").mkdir()
    (tmp_path / "btcv/datalist.json").write_text(gpu.datalist.read_text())
    btcv = open_study(str(tmp_path / "btcv"), str(tmp_path), "gpu", "btcv", None, None, None, None, 1)
    assert left_out(btcv) == []  # crops of 96×96×96, of which 64×64×64 are decoded
    arms = {row.name: dict(row.arm.pretraining) for row in rows(btcv, 3)}
    assert arms["half of each side decoded"] == {"decode_size": (48, 48, 48)}
    assert arms["a third of each side decoded"] == {"decode_size": (32, 32, 32)}
    assert arms["the same box decoded at every step"] == {"decode_box": (32, 32, 32)}  # the published one


# ------------------------------------------------------------------------------------------------ the learning rate


def test_the_rate_is_the_best_on_the_validation_cases(begin):
    study = begin()
    tried = grid(study, HYBRIDMIM, 1.0)
    assert [(run.rate, run.fraction, run.seed) for run in tried] == [(0.003, 0.05, 0), (0.01, 0.05, 0)]
    assert chosen_rate(study, HYBRIDMIM, 1.0, {tried[0].id: 0.7}.get) is None  # until both have ended
    for found, expected in (((0.7, 0.8), 0.01), ((0.8, 0.7), 0.003), ((0.8, 0.8), 0.003)):
        dice = dict(zip((run.id for run in tried), found, strict=True))
        assert chosen_rate(study, HYBRIDMIM, 1.0, dice.get) == expected


def test_the_rate_is_the_best_in_the_mean_over_seeds(dataset, tmp_path):
    study = few_labels(dataset, tmp_path / "study", preset="headneck_long")
    tried = grid(study, SCRATCH, 0.15)
    assert [(run.seed, run.rate) for run in tried] == [(s, r) for s in (0, 1, 2) for r in (0.001, 0.003)]
    dice = dict(zip((run.id for run in tried), (0.60, 0.61, 0.62, 0.63, 0.70, 0.60), strict=True))
    assert chosen_rate(study, SCRATCH, 0.15, dice.get) == 0.001  # two of the three seeds are better at 0.003
    assert candidates(study, SCRATCH, 0.15, dice.get)[0.003] == pytest.approx((0.61 + 0.63 + 0.60) / 3)
    del dice[tried[4].id]
    assert chosen_rate(study, SCRATCH, 0.15, dice.get) is None


def test_the_gpu_preset_chooses_a_rate_for_each_label_fraction(begin):
    study = begin_another(begin, "gpu")
    assert {run.fraction for run in grid(study, HYBRIDMIM, 0.25)} == {0.25}
    assert len(grid(study, HYBRIDMIM, 0.25)) == 3


def test_runs_at_the_best_rate_wait_for_it(begin, end):
    study = begin(tables=[1], methods=["scratch"], seeds=[0, 1])
    before = plan(study, unknown)
    assert sum(not run.known for run in before if run.arm == SCRATCH and run.kind == "finetune") == 5
    for run, dice in zip(grid(study, SCRATCH, 0.05), (0.7, 0.8), strict=True):
        end(study, run, dice)
    after = [run for run in plan(study, Findings(study).validation) if run.arm == SCRATCH]
    assert len(after) == sum(run.arm == SCRATCH for run in before)
    assert {run.rate for run in after if run.kind == "test"} == {0.01}
    assert all(run.known for run in after)


# ------------------------------------------------------------------------------------------------------ statistics


def test_an_interval_over_seeds():
    found = mean_of([1.0, 2.0, 3.0])  # standard deviation 1, Student's t 4.3027 for 2 degrees of freedom
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert mean_of([0.80, 0.82]).half_width == pytest.approx(12.7062 * 0.01, rel=1e-5)
    assert mean_of([0.5]) == Estimate(0.5, None, 1)
    assert mean_of([0.5, math.nan]) == Estimate(0.5, None, 1)
    assert mean_of([]) is None


def test_differences_are_of_the_same_cases():
    assert mean_difference({"a": 0.9, "b": 0.5, "c": 0.1}, {"b": 0.4, "a": 0.6, "d": 1.0}) == pytest.approx(0.2)
    assert math.isnan(mean_difference({"a": 1.0}, {"b": 1.0}))


# ------------------------------------------------------------------------------------------------------ the report


def dice_of(run):
    """Scratch 0.80 and 0.82, HybridMIM 0.04 and 0.03 more; the larger rate is a little better."""
    gain = {"scratch": 0, "simclr": 0.01, "hybridmim": 0.04 - 0.01 * run.seed}.get(run.arm.method, 0.0)
    return 0.80 + 0.02 * run.seed + gain + 0.3 * (run.rate or 0)


def cells(text, *first):
    """The cells of the lines of a table that begin with these cells, without them."""
    start = "| " + " | ".join(first) + " | "
    return [line.removeprefix(start).rstrip("| ").split(" | ") for line in text.splitlines() if line.startswith(start)]


def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_the_report_has_the_numbers_of_the_runs(begin, end_all):
    study = begin(tables=[1, 2, 3], methods=["simclr", "mae", "hybridmim"])
    end_all(study, dice_of, lambda run: run.arm.network == "UNet" and not run.arm.pretraining)
    write_report(study)
    text = (study.output_dir / "report.md").read_text()

    table = section(text, "Table 1.")
    scratch, *_ = cells(table, "UNet", "from scratch")
    # 0.803 and 0.823: mean 0.813, half of the interval 12.706 × 0.01
    assert scratch == ["0.813 ± 0.127"] * 3
    mean, difference = cells(table, "UNet", "HybridMIM")
    assert mean == ["0.848 ± 0.064"] * 3
    assert difference == ["+0.035 ± 0.064"] * 3
    assert cells(table, "UNETR", "from scratch")[0] == ["—"]  # planned at 5 % only
    # rate, then the classes: 0.02 below and above
    assert cells(table, "UNet", "0.05", "from scratch") == [["0.01", "0.793 ± 0.127", "0.833 ± 0.127", "0.813 ± 0.127"]]

    # scratch ends with 0.803 (0.823), in eighths; HybridMIM has 7/8 of 0.843 (0.853) before that
    table = section(text, "Table 2.")
    assert cells(table, "UNet", "0.05", "from scratch") == [["2 of 2", "160 ± 0", "40", "80", "160", "1.00×", "1.00×"]]
    assert cells(table, "UNet", "0.05", "HybridMIM") == [["2 of 2", "160 ± 0", "40", "80", "160", "1.00×", "1.00×"]]

    table = section(text, "Table 3.")
    assert cells(table, "from scratch", "0.05") == [["0.813 ± 0.127", "—", "-0.035 ± 0.064"]]
    assert cells(table, "as configured", "0.05") == [["0.848 ± 0.064", "+0.035 ± 0.064", "—"]]
    assert cells(table, "without contrastive learning", "0.05") == [["—", "—", "—"]]

    rates = section(text, "Learning rates")
    assert "chosen at label fraction 0.05, and used for the others; mean of the fine-tunings with seed 0." in rates
    assert cells(rates, "UNet", "HybridMIM", "") == [["0.8409", "0.8430", "0.01"]]
    assert cells(rates, "UNETR", "from scratch", "") == [["—", "—", "—"]]
    assert "152 training, 8 validation and 50 test cases" in text
    assert "means over 2 seeds" in text
    assert "a processor" in section(text, "Machine and versions")
    assert "learning_rates: [0.003, 0.01]" in section(text, "Numbers of the preset")
    for path in ("curves", "labels", "cost"):
        assert (study.output_dir / f"figures/{path}.png").stat().st_size > 10_000


def test_results_are_a_row_for_each_test_and_class(begin, end_all):
    study = begin(tables=[1], methods=["scratch", "hybridmim"])
    end_all(study, dice_of, lambda run: run.arm.network == "UNet")
    write_report(study)
    with (study.output_dir / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * 3 * 2 * 3  # methods, fractions, seeds, classes and their mean
    [row] = [
        row
        for row in found
        if (row["method"], row["label_fraction"], row["seed"], row["class"]) == ("hybridmim", "0.25", "1", "mean")
    ]
    assert float(row["dice"]) == pytest.approx(0.853)
    keys = ("learning_rate", "labelled_cases", "steps", "seconds")
    assert [row[key] for key in keys] == ["0.01", "38", "152", "86.0"]
    assert float(row["pretraining_seconds"]) == 0.5 * 20 * 38
    assert (study.output_dir / row["validation_curve"]).is_file()
    assert float(row["best_validation_dice"]) == pytest.approx(0.853)


def test_convergence(begin, end):
    """Of the curves' eighths, HybridMIM needs 6 to be where scratch ends, and SimCLR never gets there."""
    study = begin(tables=[1, 2], methods=["scratch", "simclr", "hybridmim"], seeds=[0])
    dice = {"scratch": 0.6, "simclr": 0.5, "hybridmim": 0.8}
    for method, value in dice.items():
        for run in grid(study, Arm("UNet", method), 0.05):
            end(study, run, value)
    findings = Findings(study)
    found = findings.reached(HYBRIDMIM, 0.05)[0]
    assert (found.steps, found.epochs, found.seconds) == (120, 30, 60.0)
    write_report(study)
    text = (study.output_dir / "report.md").read_text()
    assert "One seed: no interval is given" in text and "±" not in section(text, "Table 1.")
    table = section(text, "Table 2.")
    assert cells(table, "UNet", "0.05", "HybridMIM") == [["1 of 1", "120", "30", "60", "160", "1.33×", "—"]]
    assert cells(table, "UNet", "0.05", "SimCLR") == [["never", "—", "—", "—", "160", "—", "—"]]
    assert cells(table, "UNet", "1", "HybridMIM") == [["—", "—", "—", "—", "228", "—", "—"]]


def test_a_missing_seed_is_said(begin, end_all):
    study = begin(tables=[1], methods=["scratch"])
    end_all(study, dice_of, lambda run: run.seed == 0 or run.fraction == 1)
    write_report(study)
    table = section((study.output_dir / "report.md").read_text(), "Table 1.")
    assert cells(table, "UNet", "from scratch")[0] == ["0.803 (1 of 2 seeds)"] * 2 + ["0.813 ± 0.127"]


def test_the_report_of_a_gpu_study_has_all_tables(begin, end_all):
    study = begin_another(begin, "gpu")
    write_report(study)  # before the first run
    text = (study.output_dir / "report.md").read_text()
    assert cells(section(text, "Table 4."), "8") == [["—"] * 4]
    end_all(study, dice_of, lambda run: run.arm.network == "UNet" or run.kind == "pretrain")
    write_report(study)
    text = (study.output_dir / "report.md").read_text()
    assert cells(section(text, "Table 4."), "8")[0][1] == "0.850 ± 0.025"  # 0.840, 0.850, 0.860 of seeds 0 to 2
    cost = cells(section(text, "Table 5."), "UNETR", "MAE, decoder of 8 layers, 528 wide")
    assert cost == [["500", "0.500", "18.0", "150.0", "700 MB", "—"]]
    assert cells(section(text, "Table 6."), "HybridMIM, 1.5×1.5×1.5 mm", "0.1")[0][0] != "—"
    assert "Left out" in section(text, "Table 3.") and "a third of each side decoded" in section(text, "Table 3.")


def test_each_table_has_the_command_that_makes_it(begin):
    study = begin(tables=[1, 3], seeds=[0, 1, 2], methods=["scratch", "hybridmim"], jobs=2)
    write_report(study)
    text = (study.output_dir / "report.md").read_text()
    [line] = [line for line in section(text, "Table 3.").splitlines() if line.startswith("python -m benchmarks.study ")]
    for word in ("--preset laptop", "--tables '[3]'", "--seeds '[0, 1, 2]'", "--methods '[scratch,hybridmim]'"):
        assert word in line
    assert "--label_fractions" not in line


# ------------------------------------------------------------------------------------- continuation, contradiction


def test_a_study_grows_and_its_report_shows_all_of_it(begin):
    begin(tables=[1], methods=["scratch"], seeds=[0], label_fractions=[0.05])
    assert begin(tables=[3], methods=["hybridmim"], seeds=[1], label_fractions=[1]).asked.tables == (3,)
    asked = read_study(begin(tables=[3], seeds=[1], label_fractions=[1]).output_dir).asked
    assert (asked.tables, asked.seeds, asked.label_fractions) == ((1, 3), (0, 1), (0.05, 1))
    assert asked.methods == tuple(METHODS)
    assert not asked.preset_fractions
    assert read_study(begin().output_dir).asked.preset_fractions


def test_contradictions_are_refused(begin, tmp_path, monkeypatch):
    study = begin()
    places = str(study.output_dir), str(study.dataset_dir)
    rest = "hippocampus", None, None, None, None, 1
    with pytest.raises(ValueError, match=r"study\.json: found preset 'laptop', expected 'gpu'"):
        open_study(*places, "gpu", *rest)
    with pytest.raises(ValueError, match=r"found bundle 'hippocampus', expected 'spleen'"):
        open_study(*places, "laptop", "spleen", *rest[1:])
    with pytest.raises(ValueError, match=rf"found dataset_dir '{study.dataset_dir}', expected '/elsewhere'"):
        open_study(places[0], "/elsewhere", "laptop", *rest)
    presets = yaml.safe_load((ROOT / "benchmarks/study/presets.yaml").read_text())
    monkeypatch.setattr("benchmarks.study.settings.PRESETS", tmp_path / "presets.yaml")
    presets["laptop"]["ablation"]["rows"].append({"name": "more epochs", "pretraining": {"epochs": 90}})
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump(presets))
    grown = begin()
    row = rows(grown, 3)[-1]
    assert row.name == "more epochs"  # a table may grow
    longer, usual = (pretraining(grown, arm, 0) for arm in (row.arm, HYBRIDMIM))
    assert (longer.epochs, longer.options["epochs"], longer.options["checkpoint_interval"]) == (90, 90, 45)
    assert (longer.options["val_interval"], longer.options["val_share"]) == (longer.steps // 2, 1)  # both are exact
    assert longer.steps / usual.steps == longer.epochs / usual.epochs
    presets["laptop"]["finetuning"]["steps"][0.25] = 999
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump(presets))
    with pytest.raises(ValueError, match=r"preset has changed: found finetuning steps 0\.25 160, expected 999"):
        begin()
    assert read_study(study.output_dir).preset.finetuning.steps[0.25] == 160  # its report is still that of its runs


def test_a_run_with_other_settings_is_refused(begin, end):
    study = begin()
    run = pretraining(study, HYBRIDMIM, 0)
    end(study, run, 0)
    assert is_done(study, run)
    path = folder_of(study, run.id) / "done.json"
    record = json.loads(path.read_text())
    record["settings"]["options"]["epochs"] = 7
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"done\.json: found options epochs 7, expected 20"):
        is_done(study, run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["moco"]}, r"methods: found 'moco', expected one of scratch, simclr"),
        ({"tables": [7]}, r"tables: found 7, expected one of 1, 2"),
        ({"tables": [4]}, r"tables: found 4, for which this preset has no numbers; expected \[1, 2, 3\]"),
        ({"seeds": [-1]}, r"seeds: found -1, expected whole numbers"),
        ({"label_fractions": [1.5]}, r"label_fractions: found 1.5, expected numbers above 0"),
        ({"label_fractions": [0.1]}, r"label_fractions: found 0.1, expected one of 0.02, 0.05, 0.25, 1.0"),
        ({"jobs": 0}, r"jobs: found 0, expected a whole number of at least 1"),
        (
            {"preset": "large"},
            "preset: found 'large', expected one of smoke, laptop, headneck, headneck_coarse, headneck_short, "
            "headneck_long, headneck_swin, headneck_gpu, gpu",
        ),
    ],
)
def test_wrong_options(begin, options, message):
    with pytest.raises(ValueError, match=message):
        begin(**options)


def test_a_folder_without_a_study_has_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"output_dir: found no study\.json in .*, expected the folder of a study"):
        main.report(str(tmp_path))


def test_a_study_of_an_earlier_version_is_named(begin):
    study = begin()
    path = study.output_dir / settings.STUDY
    content = json.loads(path.read_text())
    content["numbers"]["finetuning"]["rate_chosen_at"] = {"label_fraction": 0.05, "seed": 0}
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"study\.json: found finetuning rate_chosen_at .*'seed': 0.*, expected the keys"
    ):
        main.report(str(study.output_dir))
    with pytest.raises(ValueError, match=r"the preset has changed: found finetuning rate_chosen_at seed 0"):
        begin()


@pytest.mark.parametrize(
    ("content", "found"),
    [("", "no JSON"), ('{"bundle"', "no JSON"), ("{}", "nothing"), ("[]", "list"), ("é", "no JSON")],
)
def test_a_damaged_study_is_named(begin, content, found):
    study = begin()
    path = study.output_dir / settings.STUDY
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"study\.json: found {found}.*, expected an object with asked, bundle, "):
        main.report(str(study.output_dir))
    with pytest.raises(ValueError, match=rf"study\.json: found {found}"):
        begin()
    assert path.read_text(encoding="latin-1") == content


# ------------------------------------------------------------------------------------------------------- execution

WORK = """
import csv, os, pathlib, sys, time
kind, folder, dice, how = sys.argv[1:5]
folder = pathlib.Path(folder)
if how == "fail":
    print("reading\\rreading more\\rboom: the disk is full")
    sys.exit(3)
if how == "sleep":
    (folder / "models").mkdir(exist_ok=True)
    time.sleep(60)
if how == "idle":
    sys.exit()
(folder / "models").mkdir(exist_ok=True)
for name in ("backbone.pt", "model.pt", "checkpoint_epoch=1.pt"):
    (folder / "models" / name).touch()
if kind == "finetune":
    (folder / "metrics.csv").write_text(f"epoch,loss,val_mean_dice\\n1,1.0,{dice}\\n")
if kind == "test":
    (folder / "evaluation_cases.csv").write_text(f"case,class,dice,hd95_mm\\na,anterior,{dice},1\\n")
    (folder / "evaluation.csv").write_text(
        f"class,dice_mean,hd95_mm_mean,cases,missed\\nanterior,{dice},1,1,0\\nmean,{dice},1,1,0\\n"
    )
"""


@pytest.fixture
def small_commands(tmp_path, monkeypatch):
    """Runs become commands that take no time; `how[id]` makes one fail, sleep, or write nothing."""
    (tmp_path / "work.py").write_text(WORK)
    how = {}

    def small(study, run):
        words = [run.kind, folder_of(study, run.id), dice_of(run), how.get(run.id, "well")]
        return [sys.executable, "-S", str(tmp_path / "work.py"), *map(str, words)]

    monkeypatch.setattr(runs_module, "command", small)
    return how


def execute_all(study):
    with only_study(study.output_dir) as lock:
        return [(news, run.id) for run, news in execute(study, lambda: plan(study, Findings(study).validation), lock)]


def test_everything_is_run_once_and_not_again(begin, small_commands):
    study = begin("smoke", jobs=3)
    lines = execute_all(study)
    planned = plan(study, Findings(study).validation)
    assert [run_id for word, run_id in lines if word == "started"] and len(lines) == 2 * len(planned)
    assert all(is_done(study, run) for run in planned)
    ended = []
    for word, run_id in lines:  # what a run needs has ended before it starts, and never more than three run
        if word == "started":
            [run] = [run for run in planned if run.id == run_id]
            assert set(run.needs) <= set(ended)
        else:
            ended.append(run_id)
        assert sum(w == "started" for w, _ in lines[: lines.index((word, run_id)) + 1]) - len(ended) <= 3
    assert execute_all(study) == []
    folder = folder_of(study, pretraining(study, HYBRIDMIM, 0).id)
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["backbone.pt", "model.pt"]
    record = json.loads((folder / "done.json").read_text())
    assert record["machine"]["python"] and record["steps"] == pretraining(study, HYBRIDMIM, 0).steps
    assert (folder / "command.sh").read_text().startswith(f"cd {ROOT}\n")


def test_a_failing_run_is_survived(begin, small_commands, capsys):
    study = begin("smoke")
    bad = pretraining(study, HYBRIDMIM, 0).id
    silent = pretraining(study, Arm("UNETR", "simmim"), 0).id
    small_commands.update({bad: "fail", silent: "idle"})
    options = str(study.dataset_dir), str(study.output_dir), "smoke"
    with pytest.raises(SystemExit) as ended:
        main.study(*options)
    # its two fine-tunings and their tests
    assert str(ended.value).startswith("2 run(s) failed, 4 that depend on them were left out: ")
    assert bad in str(ended.value)
    printed = capsys.readouterr()
    assert f"{bad}: exit status 3; its log ends with\nboom: the disk is full" in printed.err
    assert f"{silent}: it did not write models/backbone.pt" in printed.err
    text = (study.output_dir / "report.md").read_text()
    assert cells(section(text, "Table 1."), "UNet", "from scratch")[0][1] == "0.801"
    assert cells(section(text, "Table 1."), "UNet", "HybridMIM")[0][1] == "—"

    small_commands.clear()  # the disk has room again
    main.study(*options)
    printed = capsys.readouterr().out
    assert printed.count("started") == 2 + 4 and "runs are done" in printed
    main.study(*options)
    assert "started" not in capsys.readouterr().out


def test_ctrl_c_ends_the_runs_and_the_study_continues(begin, small_commands):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    study = begin("smoke", jobs=2)
    first = [run.id for run in plan(study, unknown) if not run.needs][:2]
    small_commands.update(dict.fromkeys(first, "sleep"))
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        execute_all(study)
    signal.signal(signal.SIGINT, before)
    assert not any((folder_of(study, run_id) / "done.json").exists() for run_id in first)
    small_commands.clear()
    with only_study(study.output_dir):  # no child holds the folder any more
        pass
    lines = execute_all(study)
    assert {news for news, _ in lines} == {"started", "done"} and ("done", first[0]) in lines


def test_two_studies_never_share_a_folder(begin):
    study = begin()
    with (
        only_study(study.output_dir),
        pytest.raises(ValueError, match="found a study, or a run that it left, at work"),
        only_study(study.output_dir),
    ):
        pass


@pytest.mark.parametrize("interrupted", ["with a checkpoint", "with other options", "before the first checkpoint"])
def test_an_interrupted_run_is_resumed_from_its_checkpoint_or_begins_afresh(begin, small_commands, interrupted):
    study = begin()
    run = pretraining(study, HYBRIDMIM, 0)
    models = folder_of(study, run.id) / "models"
    small_commands[run.id] = "idle"
    with only_study(study.output_dir) as lock:
        start(study, run, lock).process.wait()
        models.mkdir(exist_ok=True)
        (models.parent / "metrics.csv").write_text("left behind")
        if interrupted != "before the first checkpoint":
            with zipfile.ZipFile(models / "checkpoint_epoch=2.pt", "w") as file:
                file.writestr("data", "")
        if interrupted == "with other options":  # it would be another run
            small_commands[run.id] = "idle again"
        child = start(study, run, lock)
        child.process.wait()
    resumed = interrupted == "with a checkpoint"
    assert child.resumed == ("--resume=true" in child.process.args) == resumed
    assert (models / "checkpoint_epoch=2.pt").exists() == (models.parent / "metrics.csv").exists() == resumed


def test_cores_are_shared_out(begin, monkeypatch):
    study = begin(jobs=2)
    run = pretraining(study, HYBRIDMIM, 0)
    words = [sys.executable, "-S", "-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"]
    monkeypatch.setattr(runs_module, "command", lambda study, run: words)
    monkeypatch.setattr(runs_module, "cores", lambda: 9)
    with only_study(study.output_dir) as lock:
        start(study, run, lock).process.wait()
    assert last_lines(folder_of(study, run.id) / "log.txt") == "threads 4"


def test_commands_are_those_of_the_bundles(begin):
    study = begin()
    arm = Arm("UNETR", "mae")
    weights = folder_of(study, pretraining(study, arm, 1).id) / "models/backbone.pt"
    words = command(study, finetuning(study, arm, 0.25, 1, 0.01))
    assert words[1:5] == ["-m", "monai.bundle", "run", "training"]
    for word in (
        "--bundle_root=bundles/hybridmim_hippocampus_seg",
        f"--pretrained={weights}",
        "--label_fraction=0.25",
        "--learning_rate=0.01",
        "--roi_size=[32,48,32]",
        "--seed=1",
    ):
        assert word in words
    assert not any(word.startswith("--pretrained") for word in command(study, finetuning(study, SCRATCH, 1.0, 0, 0.1)))
