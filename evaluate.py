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
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell names a backend that this Python may not have

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binned_statistic

import cli
import metrics
from cli import UserError
from common import YEARS, FaceDataset, load_model, score_dataset
from devices import choose_device, choose_precision
from utkface import GENDERS, GROUP_NAMES, RACES, Face, read_image

FEW = 20  # faces below which a bin of the reliability diagram is marked, and most intervals say little
SMALL = 100  # faces below which a subgroup is marked
SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "within_one_group", "range_coverage")


@dataclass
class Evaluation:
    """A checkpoint and what it says of N faces of a folder; `measure` adds all metrics."""

    path: Path
    checkpoint: dict
    folder: Path
    faces: list[Face]
    scores: tuple  # as `score_dataset` returns them
    clusters: np.ndarray  # int (N,), which near-duplicates share
    leaked: np.ndarray  # bool (N,): the model has learned from a near-duplicate, by split.csv
    summary: dict  # what metrics.json holds
    draws: dict[str, np.ndarray] = field(init=False)  # bootstrap, (RESAMPLES,) of each metric
    subgroups: list[dict] = field(init=False)  # rows of subgroups.csv

    def __post_init__(self):
        logits, years, overlaps = self.scores
        self.years = {}  # columns of predictions.csv
        self.groups = np.array([face.group for face in self.faces])  # true, int (N,)
        self.probabilities = logits.double().softmax(dim=1).numpy()  # N×6
        self.predicted, self.confidence = self.probabilities.argmax(axis=1), self.probabilities.max(axis=1)
        self.right = self.predicted == self.groups
        near = np.abs(self.predicted - self.groups) <= 1
        self.per_face = {"accuracy": self.right, "within_one_group": near}  # whose means are metrics: N each
        if years is not None:
            ages, low, high = years.double().numpy().T
            self.years = {"predicted_age": ages, "age_low": low, "age_high": high}
            true, spread = np.array([(face.age, face.spread) for face in self.faces]).T  # N each
            error = np.maximum(np.abs(ages - true) - spread, 0)  # from the nearest year of a range
            self.per_face |= {"mae_years": error, "within_five_years": error <= 5, "range_width": high - low}
            if not spread.any():  # a range tells no coverage
                year = np.minimum(np.floor(true + 0.5), YEARS - 1)  # as the model learns it
                self.per_face["range_coverage"] = (low <= year) & (year <= high)
        if overlaps is not None:
            iou, dice = overlaps.numpy().T
            self.per_face |= {"mask_iou": iou, "mask_dice": dice}


def read_split_table(data, files):
    """What `split.csv`, if there is one in the folder `data`, says of N files; UserError if it is of others.

    Returns their near-duplicate groups, int (N,), and whether each lies outside train, or outside val, while
    another face of its group lies inside, bool (N,) each; split.py allows that only with --random.
    """
    path, rows = data / "split.csv", {}
    if path.is_file():
        with suppress(OSError, ValueError, KeyError, csv.Error):
            table = cli.read_table(path)
            rows = {row["file"]: (row["duplicate_of"] or row["file"], row["split"]) for row in table}
        if not rows.keys() & set(files):
            raise UserError(f"{path} is no table of these faces: run split.py again, or remove it")
    groups, splits = np.array([rows.get(name, (name, "")) for name in files]).T  # N each
    near = []
    for part in ("train", "val"):
        inside = [group for group, split in rows.values() if split == part]
        near.append(np.isin(groups, inside) & (splits != part))
    return np.unique(groups, return_inverse=True)[1], *near


def score_model(path, folder, device, dtype, workers=0, unseen=False, read=FaceDataset):
    """Runs the model of a checkpoint on the faces of a folder, such as `split/test`: an `Evaluation`.

    A face whose range of ages crosses groups is left out. unseen: so are the faces that the model has learned
    from or that its epoch was selected on, and their near-duplicates; else it warns of them. read: how faces
    are read, for a caller that keeps them. UserError if a file is not as it should be, or no face is left.
    """
    model, checkpoint = load_model(path, device)
    size, with_masks = checkpoint["preprocessing"]["image_size"], model.decoder is not None
    dataset = copy(read(folder, size, with_masks=with_masks, workers=workers))
    files = [f"{face.stem}_image.png" for face in dataset.faces]
    clusters, near_train, near_val = read_split_table(folder.parent, files)
    learned = np.isin(dataset.hashes, checkpoint["train_hashes"])
    selected_on = np.isin(dataset.hashes, checkpoint["val_hashes"]) & ~learned
    # With --final, be it of finetune.py or of what the model started from, it has learned from val, too.
    final = any(checkpoint[stage].get("final") for stage in ("config", "pretraining"))
    leaked = (near_train | near_val if final else near_train) & ~learned
    one_group = dataset.groups >= 0
    seen = np.isin(clusters, clusters[learned | selected_on]) | near_train | near_val
    kept = one_group & ~seen if unseen else one_group
    across, known = int((~one_group).sum()), int((one_group & ~kept).sum())
    if not kept.any():
        lost = f"--unseen leaves out {known}, and the ages of {across} are ranges that cross groups"
        raise UserError(f"0 of {len(kept)} faces of {folder} remain for {path}: {lost}")
    summary = {
        "n": int(kept.sum()),
        "left_out_across_groups": across,
        "left_out_by_unseen": known if unseen else None,
        "seen_in_training": int(learned[kept].sum()),
        "chose_the_epoch": int(selected_on[kept].sum()),
        "classes_never_learned": checkpoint.get("missing_groups", []),
    }
    for key, what in {"seen_in_training": "was trained", "chose_the_epoch": "had its epoch selected"}.items():
        if summary[key]:
            found = f"{path} {what} on {summary[key]} of these {summary['n']} faces"
            print(f"warning: {found}; evaluate.py --unseen leaves them out", file=sys.stderr)
    dataset.faces = [face for face, keep in zip(dataset.faces, kept) if keep]
    dataset.images = dataset.images[kept]
    dataset.masks = dataset.masks[kept] if with_masks else None
    scores = score_dataset(model, dataset, device, dtype)
    del checkpoint["weights"]  # a table keeps many
    return Evaluation(path, checkpoint, folder, dataset.faces, scores, clusters[kept], leaked[kept], summary)


def score_subgroup(scored, by, name, at):
    """A row of subgroups.csv: `SUBGROUP_METRICS` of the faces where `at`, bool (N,), with 95 % intervals."""
    faces = metrics.effective_faces(scored.clusters[at])
    estimates = {metric: (values[at].mean(), faces) for metric, values in scored.per_face.items()}
    answers = scored.right[at], scored.groups[at], scored.clusters[at]
    estimates["balanced_accuracy"] = metrics.balanced_accuracy(*answers)
    row = {"by": by, "subgroup": name, "n": int(at.sum()), "small": int(at.sum() < SMALL)}
    if "range_coverage" in estimates:
        row["range_width"] = round(float(estimates["range_width"][0]), 6)
    for metric in SUBGROUP_METRICS:
        if metric in estimates:
            value, faces = estimates[metric]
            for end, number in zip(("", "_low", "_high"), (value, *metrics.wilson(value, faces))):
                row[metric + end] = round(float(number), 6)
    return row


def score_subgroups(scored, seed=0):
    """Scores by age group, gender, race and the last two: rows of subgroups.csv, and the widest gap of each.

    A gap lies between the highest and the lowest accuracy among subgroups of at least `SMALL` faces.
    """
    genders = np.array([*GENDERS, "unknown"])[[face.gender for face in scored.faces]]  # -1 is the last
    races = np.array([*RACES, "unknown"])[[face.race for face in scored.faces]]
    both = np.array([f"{race}, {gender}" for race, gender in zip(races, genders)])
    kinds = {  # the label of each face, and the names of the subgroups, among which unknown is none
        "age group": (np.array(GROUP_NAMES)[scored.groups], GROUP_NAMES),
        "gender": (genders, GENDERS),
        "race": (races, RACES),
        "race and gender": (both, [f"{race}, {gender}" for race in RACES for gender in GENDERS]),
    }
    rows, gaps = [], []
    for by, (labels, names) in kinds.items():
        own = [score_subgroup(scored, by, name, labels == name) for name in names if name in labels]
        large = [(row["accuracy"], row["subgroup"]) for row in own if not row["small"]]
        if len(large) > 1:
            (least, lowest), (most, highest) = min(large), max(large)
            at = np.isin(labels, [name for _, name in large])
            p = metrics.gap_p_value(scored.right[at], labels[at], scored.clusters[at], seed)
            difference = round(most - least, 6)
            gaps.append({"by": by, "highest": highest, "lowest": lowest, "difference": difference, "p": p})
        rows += own
    return rows, gaps


def measure(scored, seed):
    """Fills in the summary of an `Evaluation`, the draws of its metrics, and its subgroups."""
    effective = metrics.effective_faces(scored.clusters)
    parts = np.split(metrics.resample(scored.clusters, seed=seed), 20)  # each of which fits the memory
    bar = cli.progress(parts, "bootstrap")
    draws = [metrics.score(scored.probabilities, scored.groups, part, scored.per_face) for part in bar]
    scored.draws = {name: np.concatenate([part[name] for part in draws]) for name in draws[0]}
    once = np.ones((1, len(scored.faces)))
    values = metrics.score(scored.probabilities, scored.groups, once, scored.per_face)
    for name, [value] in values.items():
        if name in metrics.SHARES:
            ends = metrics.wilson(value, effective)
        elif name == "ap_macro":
            ends = metrics.logit_interval(value, scored.draws[name])
        else:
            ends = metrics.interval(scored.draws[name])
        value, *ends = (None if np.isnan(x) else round(float(x), 6) for x in (value, *ends))
        scored.summary[name] = {"value": value, "ci95": ends}
    scored.subgroups, gaps = score_subgroups(scored, seed)
    right, leaked, classes = scored.right, scored.leaked, np.union1d(scored.groups, scored.predicted)
    scored.summary |= {
        "effective_n": round(effective, 1),
        "absent_classes": [name for group, name in enumerate(GROUP_NAMES) if group not in scored.groups],
        "classes_of_f1_and_precision": [GROUP_NAMES[group] for group in classes],
        "unknown_gender": sum(face.gender < 0 for face in scored.faces),
        "unknown_race": sum(face.race < 0 for face in scored.faces),
        "ages_in_ranges": sum(face.spread > 0 for face in scored.faces),
        "range_by_group": {
            row["subgroup"]: {"coverage": row["range_coverage"], "width": row["range_width"]}
            for row in scored.subgroups
            if row["by"] == "age group" and "range_coverage" in row
        },
        "expected_calibration_error": metrics.calibration_error(scored.confidence, right),
        "calibration_error_if_perfect": metrics.perfect_calibration(scored.confidence, scored.clusters, seed),
        "widest_gaps": gaps,
        "near_duplicates_in_train": {
            "n": int(leaked.sum()),
            "accuracy": float(right[leaked].mean()) if leaked.any() else None,
            "accuracy_of_the_rest": None if leaked.all() else float(right[~leaked].mean()),
        },
        "checkpoint": str(scored.path),
        "split": scored.folder.name,
        "bootstrap_resamples": metrics.RESAMPLES,
    }


def plot_confusion_matrix(scored):
    """How many faces of each true group (rows) were taken for which (columns), and their share."""
    once = np.ones((1, len(scored.faces)))
    [counts] = metrics.confusion_matrix(scored.predicted, scored.groups, once).astype(int)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(6.6, 6.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.6)  # so that black can be read on all of it
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]}\n{share:.1%}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(GROUP_NAMES)), GROUP_NAMES, rotation=30, ha="right")
    axis.set_yticks(range(len(GROUP_NAMES)), GROUP_NAMES)
    title = f"{len(scored.faces)} faces, accuracy {scored.right.mean():.1%}; shares are of the true group"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def plot_subgroups(scored):
    """Accuracies and coverage of subgroups with their intervals, small subgroups hollow."""
    rows = scored.subgroups
    shown = [metric for metric in SUBGROUP_METRICS if metric in rows[0]]
    inside = ["white" if row["small"] else "C0" for row in rows]
    figure = Figure(figsize=(4.3 * len(shown), 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, metric in zip(axes, shown):
        value, low, high = ([row[metric + end] for row in rows] for end in ("", "_low", "_high"))
        axis.axvline(scored.summary[metric]["value"], color="0.6", linestyle="--")
        axis.hlines(range(len(rows)), low, high)
        axis.scatter(value, range(len(rows)), edgecolors="C0", facecolors=inside, zorder=2)
        axis.set(title=metric.replace("_", " "), ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{row['subgroup']} ({row['n']})" for row in rows])
    figure.supxlabel(f"95 % intervals; dashed: all faces; hollow: fewer than {SMALL} faces", fontsize=9)
    return figure


def plot_reliability(scored):
    """Accuracy against confidence, in bins, and the number of faces in each."""
    error = scored.summary["expected_calibration_error"]
    low, high = scored.summary["calibration_error_if_perfect"]["range95"]
    bins = {"bins": metrics.BINS, "range": (0, 1)}
    columns = [scored.confidence, scored.right]
    means = binned_statistic(scored.confidence, columns, **bins).statistic  # 2×BINS, NaN if empty
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    counts, *_ = bottom.hist(scored.confidence, **bins)
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--")
    top.plot(*means[:, counts >= FEW], "o-", color="C0")
    top.plot(*means[:, counts < FEW], "o", color="C0", fillstyle="none")
    title = f"calibration error {error:.1%}, of a perfect model {low:.1%} to {high:.1%}"
    top.set(ylabel="accuracy", title=f"{len(scored.faces)} faces\n{title}", xlim=(0, 1), ylim=(0, 1))
    bottom.set(xlabel="confidence in the predicted group", ylabel="faces")
    figure.supxlabel(f"dashed: perfect calibration; hollow: fewer than {FEW} faces", fontsize=9)
    return figure


def plot_mistakes(scored, count=40):
    """The `count` (at most 40) wrong predictions of highest confidence with their labels."""
    wrong = np.flatnonzero(~scored.right)
    chosen = wrong[np.argsort(-scored.confidence[wrong], kind="stable")][:count]
    figure = Figure(figsize=(14, 11.75), layout="constrained")
    for place, i in enumerate(chosen, start=1):
        face, sure = scored.faces[i], f"{scored.confidence[i]:.0%} sure"
        true, taken = GROUP_NAMES[face.group], GROUP_NAMES[scored.predicted[i]]
        axis = figure.add_subplot(5, 8, place)
        axis.axis("off")
        axis.imshow(read_image(scored.folder / f"{face.stem}_image.png")[:, :, ::-1])
        axis.set_title(f"{true} ({face.age})\ntaken for {taken}\n{sure}", fontsize=8)
    figure.suptitle(f"{len(chosen)} of {len(wrong)} mistakes, the most confident first; labels may be wrong")
    return figure


def write_results(scored, out):
    """Writes the files of one model that `measure` has been through into the folder `out`."""
    with cli.atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(scored.summary, indent=2) + "\n", encoding="utf-8")
    rows = []
    for i, face in enumerate(scored.faces):
        row = {"file": f"{face.stem}_image.png", "age": face.age}
        row |= {"true": scored.groups[i], "predicted": scored.predicted[i]}
        row |= {name: f"{years[i]:.1f}" for name, years in scored.years.items()}
        rows.append(row | {f"p{group}": f"{p:.6f}" for group, p in enumerate(scored.probabilities[i])})
    cli.write_csv(out / "predictions.csv", rows)
    cli.write_csv(out / "subgroups.csv", scored.subgroups)
    for plot in (plot_confusion_matrix, plot_subgroups, plot_reliability, plot_mistakes):
        with cli.atomic_path(out / f"{plot.__name__.removeprefix('plot_')}.png") as temporary:
            plot(scored).savefig(temporary, dpi=130)


def print_results(scored):
    """Prints metrics, calibration, what is to be known of the faces, and gaps between subgroups."""
    summary = scored.summary
    print(f"{scored.path} on {summary['n']} faces of {scored.folder}, 95 % intervals:")
    for name, label in metrics.METRICS.items():
        if name in summary:
            form = ".2f" if name in metrics.IN_YEARS else ".2%"
            numbers = (summary[name]["value"], *summary[name]["ci95"])
            value, low, high = ("–" if x is None else format(x, form) for x in numbers)
            print(f"  {label:34}{value:>7}  [{low}, {high}]")
    error, perfect = summary["expected_calibration_error"], summary["calibration_error_if_perfect"]
    low, high = perfect["range95"]
    reference = f"perfectly calibrated: {perfect['mean']:.2%} [{low:.2%}, {high:.2%}]"
    print(f"  {'expected calibration error':34}{error:7.2%}  ({reference})")
    absent, leaks = ", ".join(summary["absent_classes"]), summary["near_duplicates_in_train"]
    few = summary["effective_n"] if summary["effective_n"] < FEW else None
    unseen = "" if summary["left_out_by_unseen"] is None else str(summary["left_out_by_unseen"])  # 0 is news
    notes = {
        "absent from the truth and left out of the other macro averages": absent,
        "F1 and precision average over": absent and ", ".join(summary["classes_of_f1_and_precision"]),
        "unrelated faces, so few that only the intervals of shares hold": few,
        "the model was trained without": ", ".join(summary["classes_never_learned"]),
        "left out, since the range of ages crosses groups": summary["left_out_across_groups"],
        "left out by --unseen, with the near-duplicates that split.csv names": unseen,
        "left out of subgroups by gender, since it is unknown": summary["unknown_gender"],
        "left out of subgroups by race, since it is unknown": summary["unknown_race"],
        "ages that are ranges, where errors count from the nearest year": summary["ages_in_ranges"],
        "near-duplicates of faces in train, or for a model of --final in val": leaks["n"],
        "accuracy on these": leaks["n"] and f"{leaks['accuracy']:.2%}",
    }
    for gap in summary["widest_gaps"]:
        points = f"{100 * gap['difference']:.1f} points of accuracy"
        found = f"{gap['highest']} above {gap['lowest']} by {points}"
        if gap["p"] > 0.05:
            found = f"at most {points} apart, no more than chance may give"
        notes[f"by {gap['by']}"] = f"{found} (p = {gap['p']:.3f})"
    for what, value in notes.items():
        if value:
            print(f"  {what}: {value}")


def get_parser():
    parser = cli.script_parser("evaluate", __doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", default="model.pt", help="model written by finetune.py")
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--split", choices=["train", "val", "test"], default="test", help="part to score")
    add("--out", default="results", help="folder to write")
    add("--unseen", action="store_true", help="leave out faces the model knows, and their near-duplicates")
    cli.add_device_flags(parser)
    return parser


def main(args):
    device, folder = choose_device(args.device), Path(args.data) / args.split
    dtype = choose_precision(args.precision, device)
    cli.check_writable("--out", args.out)
    scored = score_model(args.checkpoint, folder, device, dtype, args.workers, args.unseen)
    measure(scored, args.seed)
    write_results(scored, Path(args.out))
    print_results(scored)
    print(f"{args.out} written: metrics.json, predictions.csv, subgroups.csv and four figures")


if __name__ == "__main__":
    cli.run(main, get_parser())
