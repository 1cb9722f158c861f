"""Scores a model on faces it has not learned from: metrics with intervals, fairness, calibration, mistakes.

    python evaluate.py
    python evaluate.py model.pt --data dataset/processed_split --split test --out results
    python evaluate.py weights/age_multitask.pt --unseen

Writes to --out: metrics.json, predictions.csv, confusion_matrix.png, subgroups.csv and .png (by age group,
gender and race), reliability.png (calibration) and mistakes.png (the most confident ones; it shows faces of
the data set, so keep it to yourself). tools/table.py compares several models.
"""

import csv
import json
import os
import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell names a backend that this Python may not have

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cli import (
    UserError,
    add_device_flags,
    atomic_path,
    check_writable,
    progress,
    run,
    script_parser,
    write_csv,
)
from common import YEARS, FaceDataset, Scores, load_model, score_dataset
from devices import choose_device, choose_precision
from metrics import (
    BINS,
    IN_YEARS,
    METRICS,
    RESAMPLES,
    SHARES,
    balanced_accuracy,
    confusion_matrix,
    effective_faces,
    gap_p_value,
    interval,
    logit_interval,
    measure_calibration,
    resample,
    score,
    wilson,
)
from utkface import GENDERS, GROUP_NAMES, RACES, Face, read_image

SMALL = 100  # faces below which a subgroup is marked
SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "within_one_group", "range_coverage")

# ------------------------------------------------------------------------------------------------------------
# A model's answers
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """A checkpoint and what it says of N faces of a folder; `measure` adds all metrics."""

    path: Path
    checkpoint: dict
    folder: Path
    faces: list[Face]
    scores: Scores
    clusters: np.ndarray  # int (N,), which near-duplicates share
    leaked: np.ndarray  # bool (N,): the model has learned from a near-duplicate, by split.csv
    summary: dict  # what metrics.json holds
    metrics: dict[str, float] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)  # bootstrap, (RESAMPLES,) of each metric
    subgroups: list[dict] = field(default_factory=list)  # rows of subgroups.csv

    def __post_init__(self):
        self.groups = np.array([face.group for face in self.faces])  # true, int (N,)
        self.probabilities = self.scores.logits.double().softmax(dim=1).numpy()  # N×6
        self.predicted, self.confidence = self.probabilities.argmax(axis=1), self.probabilities.max(axis=1)
        self.right = self.predicted == self.groups
        self.per_face = per_face_metrics(self.scores, self.faces)


def per_face_metrics(scores, faces):
    """The metrics that are means over faces: {metric: (N,)}.

    Errors in years count from the nearest year of a range; a range tells no coverage.
    """
    found, true = {}, np.array([face.age for face in faces])
    spread = np.array([face.spread for face in faces])
    if scores.ages is not None:
        ages, low, high = (x.double().numpy() for x in (scores.ages, scores.age_low, scores.age_high))
        error = np.maximum(np.abs(ages - true) - spread, 0)
        found = {"mae_years": error, "within_five_years": (error <= 5).astype(float)}
        if not spread.any():
            year = np.minimum(np.floor(true + 0.5), YEARS - 1)  # as the model learns it
            found["range_coverage"] = ((low <= year) & (year <= high)).astype(float)
        found["range_width"] = high - low
    if scores.mask_iou is not None:
        found |= {"mask_iou": scores.mask_iou.numpy(), "mask_dice": scores.mask_dice.numpy()}
    return found


def read_split_table(data, files):
    """What `split.csv`, if there is one in the folder `data`, says of N files.

    Returns their near-duplicate groups, int (N,), and whether each lies outside train, or outside val, while
    another face of its group lies inside, bool (N,) each; split.py allows that only with --random. UserError
    if the table is one of other faces.
    """
    path, rows = Path(data) / "split.csv", {}
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")  # spreadsheets add a byte order mark, and semicolons
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            for row in csv.DictReader(text.splitlines(), delimiter=delimiter):
                rows[row["file"]] = (row["duplicate_of"] or row["file"], row["split"])
        except (OSError, ValueError, KeyError, csv.Error):
            rows = {}
        if not rows.keys() & set(files):
            raise UserError(f"{path} is no table of these faces: run split.py again, or remove it")
    own = [rows.get(name, (name, "")) for name in files]
    near = []
    for part in ("train", "val"):
        inside = {group for group, split in rows.values() if split == part}
        near.append(np.array([group in inside and split != part for group, split in own]))
    return np.unique([group for group, _ in own], return_inverse=True)[1], *near


def score_model(path, folder, device, dtype, workers=0, unseen=False, read=FaceDataset):
    """Runs the model of a checkpoint on the faces of a folder, such as `split/test`: an `Evaluation`.

    A face whose range of ages crosses groups is left out. unseen: so are the faces that the model has learned
    from or that its epoch was selected on, and their near-duplicates. read: how faces are read, so that the
    caller of several models can keep them. Raises UserError if the checkpoint, the folder or its table is not
    as it should be, or if no face is left.
    """
    model, checkpoint = load_model(path, device)
    size, with_masks = checkpoint["preprocessing"]["image_size"], model.decoder is not None
    dataset = read(folder, size, with_masks=with_masks, workers=workers)
    files = [f"{face.stem}_image.png" for face in dataset.faces]
    clusters, near_train, near_val = read_split_table(folder.parent, files)
    hashes = (np.asarray(checkpoint.get(name, [])) for name in ("train_hashes", "val_hashes"))
    learned, selected_on = (np.isin(dataset.hashes.numpy(), values) for values in hashes)
    selected_on &= ~learned
    # With --final, be it of finetune.py or of what the model started from, it has learned from val, too.
    final = any(checkpoint[stage].get("final") for stage in ("config", "pretraining"))
    leaked = (near_train | near_val if final else near_train) & ~learned
    one_group = np.array([face.group >= 0 for face in dataset.faces])
    seen = np.isin(clusters, clusters[learned | selected_on]) | near_train | near_val
    kept = one_group & ~seen if unseen else one_group
    summary = {
        "n": int(kept.sum()),
        "left_out_across_groups": int((~one_group).sum()),
        "left_out_by_unseen": int((one_group & ~kept).sum()),
        "seen_in_training": int(learned[kept].sum()),
        "chose_the_epoch": int(selected_on[kept].sum()),
        "classes_never_learned": checkpoint.get("missing_groups", []),
    }
    if not kept.any():
        raise UserError(
            f"0 of {len(kept)} faces of {folder} remain for {path}: the range of ages of "
            f"{summary['left_out_across_groups']} crosses groups, and --unseen leaves out the others"
        )
    dataset = copy(dataset)
    dataset.faces = [face for face, keep in zip(dataset.faces, kept) if keep]
    dataset.images = dataset.images[kept]
    dataset.masks = None if dataset.masks is None else dataset.masks[kept]
    scores = score_dataset(model, dataset, device, dtype)
    del checkpoint["weights"]  # a table keeps many
    return Evaluation(path, checkpoint, folder, dataset.faces, scores, clusters[kept], leaked[kept], summary)


# ------------------------------------------------------------------------------------------------------------
# Metrics, subgroups and calibration
# ------------------------------------------------------------------------------------------------------------


def label_subgroups(faces, groups):
    """{kind: (the label of each of N faces; the names of the kind's subgroups)}; unknown is no subgroup."""
    genders = np.array([*GENDERS, "unknown"])[[face.gender for face in faces]]  # -1 is the last
    races = np.array([*RACES, "unknown"])[[face.race for face in faces]]
    both = [f"{race}, {gender}" for race, gender in zip(races, genders)]
    return {
        "age group": (np.array(GROUP_NAMES)[groups], GROUP_NAMES),  # where accuracy is recall
        "gender": (genders, GENDERS),
        "race": (races, RACES),
        "race and gender": (np.array(both), [f"{race}, {gender}" for race in RACES for gender in GENDERS]),
    }


def score_subgroup(evaluation, at):
    """A row of subgroups.csv: `SUBGROUP_METRICS` of the faces at indices `at`, with 95 % intervals."""
    right, groups, clusters = evaluation.right[at], evaluation.groups[at], evaluation.clusters[at]
    count, within_one = effective_faces(clusters), np.abs(evaluation.predicted[at] - groups) <= 1
    estimates = {
        "accuracy": (right.mean(), count),
        "balanced_accuracy": balanced_accuracy(right, groups, clusters),
        "within_one_group": (within_one.mean(), count),
    }
    row = {"n": len(at), "small": int(len(at) < SMALL)}
    if "range_coverage" in evaluation.per_face:
        estimates["range_coverage"] = (evaluation.per_face["range_coverage"][at].mean(), count)
        row["range_width"] = round(float(evaluation.per_face["range_width"][at].mean()), 6)
    for metric, (value, faces) in estimates.items():
        ends = (value, *wilson(value, faces))
        row |= {metric + end: round(float(x), 6) for end, x in zip(("", "_low", "_high"), ends)}
    return row


def score_subgroups(evaluation, seed=0):
    """Accuracies by age group, gender, race and the last two: a row a subgroup, and the widest gap of each.

    A gap lies between the highest and the lowest accuracy among subgroups of at least `SMALL` faces, and
    stands there with its `gap_p_value`.
    """
    rows, gaps = [], []
    for by, (labels, names) in label_subgroups(evaluation.faces, evaluation.groups).items():
        own = []
        for name in names:
            at = np.flatnonzero(labels == name)
            if len(at):
                own.append({"by": by, "subgroup": name} | score_subgroup(evaluation, at))
        large = sorted((row for row in own if not row["small"]), key=lambda row: row["accuracy"])
        p = ""
        if len(large) > 1:
            lowest, highest = large[0], large[-1]
            at = np.isin(labels, [row["subgroup"] for row in large])
            p = gap_p_value(evaluation.right[at], labels[at], evaluation.clusters[at], seed)
            difference = round(highest["accuracy"] - lowest["accuracy"], 6)
            gap = {"by": by, "highest": highest["subgroup"], "lowest": lowest["subgroup"]}
            gaps.append(gap | {"difference": difference, "p": p})
        rows += [row | {"p_no_gap": p} for row in own]
    return rows, gaps


def measure(evaluation, seed):
    """Fills in the metrics of an `Evaluation`, their draws and summary, and its subgroups."""
    e, weights = evaluation, resample(evaluation.clusters, seed=seed)
    effective = effective_faces(e.clusters)
    values = score(e.probabilities, e.groups, np.ones((1, len(e.faces))), e.per_face)
    e.metrics = {name: float(value) for name, [value] in values.items()}
    parts = np.array_split(weights, RESAMPLES // 50)  # of which each fits the memory
    bar = progress(parts, "bootstrap")
    draws = [score(e.probabilities, e.groups, part, e.per_face) for part in bar]
    e.draws = {name: np.concatenate([part[name] for part in draws]) for name in values}
    for name, value in e.metrics.items():
        ends = wilson(value, effective) if name in SHARES else interval(e.draws[name])
        if name == "ap_macro":
            ends = logit_interval(value, e.draws[name])
        numbers = [None if np.isnan(x) else round(x, 6) for x in (value, *ends)]
        e.summary[name] = {"value": numbers[0], "ci95": numbers[1:]}
    e.subgroups, gaps = score_subgroups(e, seed)
    present, guessed = ({GROUP_NAMES[group] for group in groups} for groups in (e.groups, e.predicted))
    e.summary |= {
        "effective_n": round(effective, 1),
        "absent_classes": [name for name in GROUP_NAMES if name not in present],
        "classes_of_f1_and_precision": [name for name in GROUP_NAMES if name in present | guessed],
        "unknown_gender": sum(face.gender < 0 for face in e.faces),
        "unknown_race": sum(face.race < 0 for face in e.faces),
        "ages_in_ranges": sum(face.spread > 0 for face in e.faces),
        "range_by_group": {
            row["subgroup"]: {"coverage": row["range_coverage"], "width": row["range_width"]}
            for row in e.subgroups
            if row["by"] == "age group" and "range_coverage" in row
        },
        **measure_calibration(e.confidence, e.right, e.clusters, seed),
        "widest_gaps": gaps,
        "near_duplicates_in_train": {
            "n": int(e.leaked.sum()),
            "accuracy": float(e.right[e.leaked].mean()) if e.leaked.any() else None,
            "accuracy_of_the_rest": None if e.leaked.all() else float(e.right[~e.leaked].mean()),
        },
        "checkpoint": str(e.path),
        "split": e.folder.name,
        "bootstrap_resamples": RESAMPLES,
    }


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def plot_confusion_matrix(evaluation):
    """How many faces of each true group (rows) were taken for which (columns), and their share."""
    e = evaluation
    [counts] = confusion_matrix(e.predicted, e.groups, np.ones((1, len(e.faces)))).astype(int)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(7.6, 6.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text, color = f"{counts[row, column]}\n{share:.1%}", "white" if share > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(len(GROUP_NAMES)), GROUP_NAMES, rotation=30, ha="right")
    axis.set_yticks(range(len(GROUP_NAMES)), GROUP_NAMES)
    title = f"{len(e.faces)} faces, accuracy {e.right.mean():.1%}"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, label="share of the true group", fraction=0.046)
    return figure


def plot_subgroups(evaluation):
    """Accuracies and coverage of subgroups with their intervals, small subgroups hollow."""
    rows = evaluation.subgroups
    metrics = [metric for metric in SUBGROUP_METRICS if metric in rows[0]]
    figure = Figure(figsize=(4.3 * len(metrics), 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True)
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    colors = [f"C{kinds.index(row['by'])}" for row in rows]
    faces = ["white" if row["small"] else color for row, color in zip(rows, colors)]
    for axis, metric in zip(axes, metrics):
        value, low, high = ([row[metric + end] for row in rows] for end in ("", "_low", "_high"))
        axis.axvline(evaluation.metrics[metric], color="0.6", linestyle="--")
        axis.hlines(range(len(rows)), low, high, colors=colors)
        axis.scatter(value, range(len(rows)), edgecolors=colors, facecolors=faces, zorder=2)
        axis.set(title=metric.replace("_", " "), ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.grid(alpha=0.3)
    labels = [f"{row['subgroup']} ({row['n']}{', small' if row['small'] else ''})" for row in rows]
    axes[0].set_yticks(range(len(rows)), labels)
    figure.supxlabel(f"95 % intervals; dashed: all faces; hollow: fewer than {SMALL} faces", fontsize=9)
    return figure


def plot_reliability(evaluation):
    """Accuracy against confidence, in bins, and the number of faces in each."""
    e, error = evaluation, evaluation.summary["expected_calibration_error"]
    low, high = e.summary["calibration_error_if_perfect"]["range95"]
    counts, edges = np.histogram(e.confidence, BINS, (0, 1))
    sums = (np.histogram(e.confidence, edges, weights=x)[0] for x in (e.confidence, e.right.astype(float)))
    confidence, accuracy = (total[counts > 0] / counts[counts > 0] for total in sums)
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    label = f"the model: calibration error {error:.1%}\n(a perfect one's: {low:.1%} to {high:.1%})"
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
    top.plot(confidence, accuracy, "o-", color="C0", label=label)
    top.set(ylabel="accuracy", title=f"{len(e.faces)} faces", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left", fontsize=9)
    top.grid(alpha=0.3)
    bottom.stairs(counts, edges, linewidth=1.5)
    bottom.set(xlabel="confidence in the predicted group", ylabel="faces")
    bottom.grid(alpha=0.3)
    return figure


def plot_mistakes(evaluation, count=40):
    """The `count` wrong predictions of highest confidence with their labels."""
    e, wrong = evaluation, np.flatnonzero(~evaluation.right)
    chosen = wrong[np.argsort(-e.confidence[wrong], kind="stable")][:count]
    columns, rows = 8, max(1, -(-len(chosen) // 8))
    figure = Figure(figsize=(1.75 * columns, 2.25 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, chosen):
        axis.imshow(read_image(e.folder / f"{e.faces[i].stem}_image.png")[:, :, ::-1])
        true, taken = f"{GROUP_NAMES[e.groups[i]]} ({e.faces[i].age})", GROUP_NAMES[e.predicted[i]]
        axis.set_title(f"{true}\ntaken for {taken}\n{e.confidence[i]:.0%} sure", fontsize=8)
    figure.suptitle(f"{len(chosen)} of {len(wrong)} mistakes, the most confident first; labels may be wrong")
    return figure


# ------------------------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------------------------


def write_results(evaluation, out):
    """Writes the files of one model that `measure` has been through."""
    e, out, rows = evaluation, Path(out), []
    with atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(e.summary, indent=2) + "\n", encoding="utf-8")
    years = {"predicted_age": e.scores.ages, "age_low": e.scores.age_low, "age_high": e.scores.age_high}
    for i, face in enumerate(e.faces):
        row = {"file": f"{face.stem}_image.png", "age": face.age}
        row |= {"true": e.groups[i], "predicted": e.predicted[i]}
        row |= {name: f"{values[i]:.1f}" for name, values in years.items() if values is not None}
        rows.append(row | {f"p{group}": f"{p:.6f}" for group, p in enumerate(e.probabilities[i])})
    write_csv(out / "predictions.csv", rows)
    write_csv(out / "subgroups.csv", e.subgroups)
    figures = {
        "confusion_matrix": plot_confusion_matrix(e),
        "subgroups": plot_subgroups(e),
        "reliability": plot_reliability(e),
        "mistakes": plot_mistakes(e),
    }
    for name, figure in figures.items():
        with atomic_path(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=130)


def warn_of_seen(evaluation):
    """Warns of faces that the model was trained on, or that its epoch was selected on."""
    for key, what in (
        ("seen_in_training", "was trained on"),
        ("chose_the_epoch", "had its epoch selected on"),
    ):
        if evaluation.summary[key]:
            counts = f"{evaluation.summary[key]} of these {len(evaluation.faces)} faces"
            print(f"warning: {evaluation.path} {what} {counts}; --unseen leaves them out", file=sys.stderr)


def print_results(evaluation):
    """Prints what `measure` has found of one model: metrics, calibration, leaks, subgroups and gaps."""
    summary, leaks = evaluation.summary, evaluation.summary["near_duplicates_in_train"]
    print(f"{evaluation.path} on {summary['n']} faces of {evaluation.folder}, 95 % intervals:")
    for name, label in METRICS.items():
        if name in summary:
            form = ".2f" if name in IN_YEARS else ".2%"
            numbers = (summary[name]["value"], *summary[name]["ci95"])
            value, low, high = ("–" if x is None else format(x, form) for x in numbers)
            print(f"  {label:34}{value:>7}  [{low}, {high}]")
    perfect = summary["calibration_error_if_perfect"]
    low, high = perfect["range95"]
    print(f"  {'expected calibration error':34}{summary['expected_calibration_error']:7.2%}", end="  ")
    print(f"(perfectly calibrated: {perfect['mean']:.2%} [{low:.2%}, {high:.2%}])")
    absent = ", ".join(summary["absent_classes"])
    notes = {
        "absent from the truth and left out of the other macro averages": absent,
        "F1 and precision average over": absent and ", ".join(summary["classes_of_f1_and_precision"]),
        "the model was trained without": ", ".join(summary["classes_never_learned"]),
        "left out, since the range of ages crosses groups": summary["left_out_across_groups"],
        "left out by --unseen, near-duplicates included": summary["left_out_by_unseen"],
        "left out of subgroups by gender, since it is unknown": summary["unknown_gender"],
        "left out of subgroups by race, since it is unknown": summary["unknown_race"],
        "ages that are ranges, where errors count from the nearest year": summary["ages_in_ranges"],
    }
    for what, value in notes.items():
        if value:
            print(f"  {what}: {value}")
    if leaks["n"]:
        accuracies = f"accuracy {leaks['accuracy']:.2%} on them"
        if leaks["accuracy_of_the_rest"] is not None:
            accuracies += f", {leaks['accuracy_of_the_rest']:.2%} on the rest"
        print(f"  {leaks['n']} faces have a near-duplicate that the model has learned from: {accuracies}")
    metrics = [metric for metric in SUBGROUP_METRICS if metric in evaluation.subgroups[0]]
    print(f"\n  {'':16}{'faces':>6}" + "".join(f"{metric.replace('_', ' '):>24}" for metric in metrics))
    for row in evaluation.subgroups:
        cells = (f"{row[m]:.1%} [{row[m + '_low']:.1%}, {row[m + '_high']:.1%}]" for m in metrics)
        name = f"{row['subgroup']:16}{row['n']:5}{'*' if row['small'] else ' '}"
        print(f"  {name}" + "".join(f"{cell:>24}" for cell in cells))
    if any(row["small"] for row in evaluation.subgroups):
        print(f"  * fewer than {SMALL} faces: little can be said")
    for gap in summary["widest_gaps"]:
        points = f"{100 * gap['difference']:.1f} points of accuracy"
        found = f"{gap['highest']} above {gap['lowest']} by {points}"
        if gap["p"] > 0.05:
            found = f"at most {points} apart, no more than chance may give"
        print(f"  by {gap['by']}: {found} (p = {gap['p']:.3f})")


def get_parser():
    parser = script_parser("evaluate", __doc__)
    # fmt: off
    add = parser.add_argument
    add("checkpoint", nargs="?", default="model.pt", help="model written by finetune.py")
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--split", choices=["train", "val", "test"], default="test", help="part to score")
    add("--out", default="results", help="folder to write")
    add("--unseen", action="store_true",
        help="leave out faces that the model has learned from or that its epoch was selected on, and "
        "near-duplicates")
    # fmt: on
    add_device_flags(parser)
    return parser


def main(args):
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    check_writable("--out", args.out)
    folder = Path(args.data) / args.split
    scored = score_model(args.checkpoint, folder, device, dtype, args.workers, args.unseen)
    measure(scored, args.seed)
    write_results(scored, args.out)
    warn_of_seen(scored)
    print_results(scored)
    names = "metrics.json, predictions.csv, confusion_matrix.png, subgroups.csv and .png, reliability.png"
    print(f"{args.out} written: {names}, mistakes.png")


if __name__ == "__main__":
    run(main, get_parser())
