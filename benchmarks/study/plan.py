"""Which runs a study is made of.

A table has rows, a row is about an *arm*: a network, a pre-training method and what differs from its usual settings.
An arm is pre-trained with each seed, fine-tuned at label fractions with each seed, and tested. The same
settings are the same arm, whichever table asks for them, so what several tables share is run once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.study.settings import METHODS, MR, NETWORKS, PRETRAIN, Study, config_files, read_configs

Options = tuple[tuple[str, Any], ...]
Validation = Callable[[str], float | None]  # ID of a fine-tuning → its best validation Dice, if it has ended
KINDS = ("pretrain", "finetune", "test")


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        network: of `NETWORKS`.
        method: of `METHODS`.
        pretraining: options that differ from what the method has elsewhere in the study.
        finetuning: the same of the fine-tuning.
    """

    network: str
    method: str
    pretraining: Options = ()
    finetuning: Options = ()

    @property
    def baseline(self) -> Arm:
        """Training from scratch, at the same resolution."""
        spacing = tuple(option for option in self.finetuning if option[0] == "spacing")
        return Arm(self.network, "scratch", (), spacing)


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, its arm, and the label fractions at which this is fine-tuned and tested."""

    name: str
    arm: Arm
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        id: name of its folder; says what it is.
        kind: one of `KINDS`.
        arm: what it belongs to.
        seed: of the run.
        configs: files, from the root of the repository.
        options: of the command, beside paths.
        fraction: of the labels; None for a pre-training.
        rate: learning rate; None for a pre-training, and as long as the arm's best rate is not known.
        steps: of training.
        epochs: of training.
        needs: IDs of the runs whose weights it takes.
    """

    id: str
    kind: str
    arm: Arm
    seed: int
    configs: tuple[str, ...]
    options: Mapping[str, Any]
    fraction: float | None = None
    rate: float | None = None
    steps: int = 0
    epochs: int = 0
    needs: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether it can be started: a fine-tuning at the best rate has to wait until that is known."""
        return self.kind == "pretrain" or self.rate is not None


# -------------------------------------------------------------------------------------------------- rows of tables


def rows(study: Study, table: int) -> list[Row]:
    """The rows of a table, without methods that were not asked for."""
    made = [row for row in _ROWS[table](study) if row.arm.method in {*study.asked.methods, "scratch"}]
    return [row for row in made if row.arm.method != "scratch" or _needs_scratch(study, row, made)]


def _needs_scratch(study: Study, row: Row, made: Sequence[Row]) -> bool:
    """Training from scratch is what others are compared with."""
    return "scratch" in study.asked.methods or any(other.arm.baseline == row.arm for other in made if other != row)


def _main(study: Study) -> list[Row]:
    """Tables 1 and 2."""
    return [
        Row(METHODS[method], Arm(network, method), _fractions(study, fractions))
        for network, methods in study.preset.arms.items()
        for method, fractions in methods.items()
    ]


def _fractions(study: Study, preset: Sequence[float]) -> tuple[float, ...]:
    usual = preset if study.asked.preset_fractions else ()
    return tuple(sorted({*usual, *study.asked.label_fractions}))


def _ablation(study: Study) -> list[Row]:
    numbers = study.preset.ablation
    network, fractions = numbers["network"], tuple(numbers["fractions"])
    variants = [_row(study, {"network": network, "method": "hybridmim", **row}, fractions) for row in numbers["rows"]]
    return [Row(METHODS["scratch"], Arm(network, "scratch"), fractions), *filter(None, variants)]


def left_out(study: Study) -> list[str]:
    """Names of the rows of table 3 that the network cannot do at this size of crop."""
    made = {row.name for row in _ablation(study)}
    return [row["name"] for row in study.preset.ablation["rows"] if row["name"] not in made]


def _masks(study: Study) -> list[Row]:
    numbers = study.preset.masks
    made = []
    for patch, ratio in product(numbers["patch_size"], numbers["mask_ratio"]):
        options = {"mask_ratio": ratio, "patch_size": [patch] * 3}
        row = {"name": mask_name(ratio, patch), "network": numbers["network"], "method": "hybridmim"}
        made.append(_row(study, {**row, "pretraining": options}, tuple(numbers["fractions"])))
    return made


def mask_name(ratio: float, patch: int) -> str:
    """Name of a row of table 4."""
    return f"{ratio:g} masked, patches of {patch}×{patch}×{patch}"


def _cost(study: Study) -> list[Row]:
    usual = [Row(row.name, row.arm, ()) for row in _main(study) if row.arm.method != "scratch"]
    fractions = tuple(study.preset.cost["fractions"])
    return [*usual, *filter(None, (_row(study, row, fractions) for row in study.preset.cost["rows"]))]


def _resolution(study: Study) -> list[Row]:
    numbers = study.preset.resolution
    made = []
    for spacing, method in product(numbers["spacing"], numbers["methods"]):
        name = f"{METHODS[method]}, {'×'.join(f'{side:g}' for side in spacing)} mm"
        both = {"pretraining": {"spacing": spacing}, "finetuning": {"spacing": spacing}}
        row = {"name": name, "network": numbers["network"], "method": method, **both}
        made.append(_row(study, row, tuple(numbers["fractions"])))
    return made


_ROWS = {1: _main, 2: _main, 3: _ablation, 4: _masks, 5: _cost, 6: _resolution}


def _row(study: Study, row: Mapping[str, Any], fractions: tuple[float, ...]) -> Row | None:
    """A row of presets.yaml; None if its sizes do not fit the network."""
    usual = Arm(row["network"], row["method"])
    pretraining: Options = ()
    if row["method"] != "scratch":
        asked = _sizes(study, row["network"], row.get("pretraining", {}))
        if asked is None:
            return None
        pretraining = _changes(asked, _pretrain_files(study, usual), _pretrain_options(study, usual))
    finetuning = _changes(row.get("finetuning", {}), _finetune_files(study, usual), _finetune_options(study, usual))
    return Row(
        row["name"], Arm(row["network"], row["method"], pretraining, finetuning), tuple(row.get("fractions", fractions))
    )


def _changes(asked: Mapping[str, Any], files: tuple[str, ...], options: Mapping[str, Any]) -> Options:
    """What differs from the configs and the usual options, so that the same settings are the same arm."""
    usual = {**read_configs(files), **options}
    return tuple((key, _hashable(value)) for key, value in asked.items() if _hashable(value) != _hashable(usual[key]))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sizes(study: Study, network: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Put numbers in the place of `decode_size: whole | half | third` and `decode_box: last`; None if illegal."""
    sizes = study.preset.networks[network]
    stride = read_configs(_finetune_files(study, Arm(network, "scratch")))["stride"]
    options = dict(options)
    share = {"whole": 1, "half": 2, "third": 3}.get(str(options.get("decode_size")))
    if share:
        decoded = [side / share for side in sizes["roi_size"]]
        if any(side % stride or side < 2 * stride for side in decoded):
            return None
        options["decode_size"] = [int(side) for side in decoded]
    if options.get("decode_box") == "last":  # the published code's
        options["decode_box"] = [a - b for a, b in zip(sizes["roi_size"], sizes["decode_size"], strict=True)]
        if not any(options["decode_box"]):
            return None
    return options


# ------------------------------------------------------------------------------------------------------- settings


def _pretrain_files(study: Study, arm: Arm) -> tuple[str, ...]:
    modality = ["mri"] if study.bundle in MR else []
    network = {"SwinUNETR": ["swin_unetr"], "UNETR": ["vit"] if arm.method == "simclr" else []}.get(arm.network, [])
    method = [] if arm.method == "hybridmim" else [arm.method]
    return config_files(PRETRAIN, (*modality, *network, *method, *study.preset.pretraining.overlays))


def _pretrain_options(study: Study, arm: Arm) -> dict[str, Any]:
    """As many channels as the fine-tuning has, its spacing and its data, and the preset's options."""
    numbers, files = study.preset.pretraining, _pretrain_files(study, arm)
    segmentation = read_configs(_finetune_files(study, arm))
    spacing = {"spacing": segmentation["spacing"]} if segmentation["spacing"] else {}
    data = {key: value for key, value in study.preset.data.items() if key in read_configs(files)}
    usual = {"in_channels": segmentation["in_channels"], **spacing, **data, "epochs": numbers.epochs, **numbers.options}
    return _with_sizes(study, arm, files, {**usual, **numbers.methods.get(arm.method, {})})


def _finetune_files(study: Study, arm: Arm, *overlays: str) -> tuple[str, ...]:
    preset = study.preset.finetuning.overlays
    return config_files(study.segmentation, (*NETWORKS[arm.network], *preset, *overlays))


def _finetune_options(study: Study, arm: Arm) -> dict[str, Any]:
    numbers = study.preset.finetuning
    options = {**study.preset.data, **numbers.options}
    return _with_sizes(study, arm, _finetune_files(study, arm), options)


def _with_sizes(study: Study, arm: Arm, files: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's sizes of the network, as far as the configs have such keys, and options.

    Raises:
        ValueError: an option is no key of the configs.
    """
    keys = read_configs(files)
    unknown = [key for key in options if key not in keys]
    if unknown:
        raise ValueError(f"presets.yaml: found {', '.join(unknown)}, expected keys of {', '.join(files)}")
    sizes = {key: value for key, value in study.preset.networks[arm.network].items() if key in keys}
    return {**sizes, **options}


# ------------------------------------------------------------------------------------------------------------ runs


def pretraining(study: Study, arm: Arm, seed: int) -> Run:
    """The pre-training of an arm."""
    numbers = study.preset.pretraining
    seed %= numbers.seeds or seed + 1
    options = {**_pretrain_options(study, arm), **dict(arm.pretraining)}
    epochs = options["epochs"]
    # an incomplete batch is left out
    steps = epochs * max(1, study.pretraining_scans() // options["batch_size"])
    options |= {**_rhythm(steps, epochs, numbers.validations), "seed": seed}
    return Run(
        id="_".join(["pretrain", arm.network, arm.method, *_slugs(arm.pretraining), f"seed{seed}"]),
        kind="pretrain",
        arm=Arm(arm.network, arm.method, arm.pretraining),
        seed=seed,
        configs=_pretrain_files(study, arm),
        options=options,
        steps=steps,
        epochs=epochs,
    )


def finetuning(study: Study, arm: Arm, fraction: float, seed: int, rate: float | None) -> Run:
    """The fine-tuning of an arm; without a rate, that at the best one."""
    numbers = study.preset.finetuning
    steps, epochs = length(study, fraction)
    options = {
        **_finetune_options(study, arm),
        **_rhythm(steps, epochs, numbers.validations),
        "warmup_epochs": round(numbers.warmup * epochs, 3),
        "seed": seed,
        "label_fraction": fraction,
        "learning_rate": rate,
        **dict(arm.finetuning),
    }
    return Run(
        id=_finetune_id("finetune", arm, fraction, seed, rate),
        kind="finetune",
        arm=arm,
        seed=seed,
        fraction=fraction,
        rate=rate,
        configs=_finetune_files(study, arm),
        options=options,
        steps=steps,
        epochs=epochs,
        needs=() if arm.method == "scratch" else (pretraining(study, arm, seed).id,),
    )


def testing(study: Study, arm: Arm, fraction: float, seed: int, rate: float | None) -> Run:
    """The test of a fine-tuned network."""
    files = _finetune_files(study, arm, "evaluate")
    workers = {key: value for key, value in study.preset.finetuning.options.items() if key == "num_workers"}
    spacing = {key: value for key, value in arm.finetuning if key == "spacing"}
    return Run(
        id=_finetune_id("test", arm, fraction, seed, rate),
        kind="test",
        arm=arm,
        seed=seed,
        fraction=fraction,
        rate=rate,
        configs=files,
        options={**_with_sizes(study, arm, files, {**study.preset.data, **workers}), "evaluated": "test", **spacing},
        needs=(_finetune_id("finetune", arm, fraction, seed, rate),),
    )


def _finetune_id(kind: str, arm: Arm, fraction: float, seed: int, rate: float | None) -> str:
    parts = [kind, arm.network, arm.method, *_slugs(arm.pretraining), *_slugs(arm.finetuning)]
    return "_".join([*parts, f"labels{fraction:g}", f"seed{seed}", f"rate{'best' if rate is None else f'{rate:g}'}"])


def _slugs(options: Options) -> list[str]:
    return [
        "-".join([key, *map(str, value)]) if isinstance(value, tuple) else f"{key}-{value}" for key, value in options
    ]


def _rhythm(steps: int, epochs: int, validations: int) -> dict[str, int]:
    interval = max(1, round(epochs / validations))
    every = {"val_interval": interval * steps // epochs, "val_share": 1, "checkpoint_interval": interval}
    every |= {"log_interval": 1}  # the time of a step is read from the curves
    return {"epochs": epochs, **every}


def length(study: Study, fraction: float) -> tuple[int, int]:
    """Steps and epochs of a fine-tuning, the same for every arm: steps = epochs × ceil(labelled cases / batch).

    The steps asked for are rounded to whole epochs.
    """
    numbers = study.preset.finetuning
    batch = numbers.options["batch_size"]
    per_epoch = math.ceil(study.labelled(fraction) / batch)
    wanted = numbers.steps[fraction] if numbers.steps else numbers.epochs * math.ceil(study.labelled(1.0) / batch)
    epochs = max(1, round(wanted / per_epoch))
    return epochs * per_epoch, epochs


# ------------------------------------------------------------------------------------------------------------ plan


def chosen_rate(study: Study, arm: Arm, fraction: float, validation: Validation) -> float | None:
    """The arm's learning rate of best validation Dice, the smaller one of equals; None as long as it is not known."""
    rates = study.preset.finetuning.learning_rates
    if len(rates) == 1:
        return rates[0]
    found = candidates(study, arm, fraction, validation)
    if None in found.values():
        return None
    return max(sorted(found), key=lambda rate: found[rate])


def candidates(study: Study, arm: Arm, fraction: float, validation: Validation) -> dict[float, float | None]:
    """The mean of the best validation Dice over the seeds, by rate; None as long as a fine-tuning is missing."""
    found: dict[float, list[float | None]] = {}
    for run in grid(study, arm, fraction):
        found.setdefault(run.rate, []).append(validation(run.id))
    return {rate: None if None in dice else sum(dice) / len(dice) for rate, dice in found.items()}


def grid(study: Study, arm: Arm, fraction: float) -> list[Run]:
    """The fine-tunings by which the rate for a label fraction is chosen; none if there is no choice."""
    numbers = study.preset.finetuning
    if len(numbers.learning_rates) == 1:
        return []
    at = numbers.rate_chosen_at
    where = fraction if at["label_fraction"] == "each" else at["label_fraction"]
    return [finetuning(study, arm, where, *each) for each in product(at["seeds"], numbers.learning_rates)]


def plan(study: Study, validation: Validation) -> list[Run]:
    """Every run that was asked for, each once, after those that it needs.

    Fine-tunings and tests at an arm's best rate have no rate until that is known: then a new plan has them.
    """
    runs: dict[str, Run] = {}
    for run in _all(study, validation):
        runs.setdefault(run.id, run)
    return list(runs.values())


def _all(study: Study, validation: Validation) -> Iterator[Run]:
    for table, seed in product(study.asked.tables, study.asked.seeds):
        for row in rows(study, table):
            if row.arm.method != "scratch":
                yield pretraining(study, row.arm, seed)
            for fraction in row.fractions:
                tried = grid(study, row.arm, fraction)
                for run in tried:
                    if run.needs:
                        yield pretraining(study, row.arm, run.seed)
                    yield run
                rate = chosen_rate(study, row.arm, fraction, validation)
                if rate is not None or (fraction, seed) not in {(run.fraction, run.seed) for run in tried}:
                    yield finetuning(study, row.arm, fraction, seed, rate)  # else one of those is it
                yield testing(study, row.arm, fraction, seed, rate)
