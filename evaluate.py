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
from common import FaceDataset, load_model, score_dataset
from devices import choose_device, choose_precision
from utkface import GENDERS, GROUP_NAMES, RACES, Face, read_image

RESAMPLES = 1000  # of the bootstrap, of the permutation test, and of perfectly calibrated outcomes
BINS = 15  # of confidence, for calibration (Guo et al. 2017)
SMALL = 100  # faces below which a subgroup is marked

METRICS = {  # and how each is averaged
    "accuracy": "accuracy (micro)",
    "balanced_accuracy": "balanced accuracy (macro recall)",
    "f1_macro": "F1 (macro)",
    "precision_macro": "precision (macro)",
    "auc_macro_ovr": "AUC (macro, one-vs-rest)",
    "ap_macro": "average precision (macro)",
    "within_one_group": "within one group",
    "mae_years": "mean absolute error in years",
    "within_five_years": "within five years",
    "mask_iou": "mask IoU (mean over faces)",
    "mask_dice": "mask Dice (mean over faces)",
}
SHARES = ("accuracy", "within_one_group", "within_five_years")  # of faces, each of which counts 0 or 1
SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "within_one_group")

# ------------------------------------------------------------------------------------------------------------
# A model's answers
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """A checkpoint and what it says of N faces of a folder; `measure` fills in the last four fields."""

    path: Path
    checkpoint: dict
    folder: Path
    faces: list[Face]
    groups: np.ndarray  # true groups, int (N,)
    probabilities: np.ndarray  # (N, 6)
    ages: np.ndarray | None  # predicted, (N,) in years
    per_face: dict[str, np.ndarray]  # metrics that are means over faces, (N,) each
    clusters: np.ndarray  # int (N,), which near-duplicates share
    learned: np.ndarray  # bool (N,): the model was trained on it
    selected_on: (
        np.ndarray
    )  # bool (N,): the model's epoch was selected on it, though it was not trained on it
    leaked: np.ndarray  # bool (N,): the model has learned from a near-duplicate, by split.csv
    left_out: int  # faces, by --unseen
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)  # what metrics.json holds
    draws: dict[str, np.ndarray] = field(default_factory=dict)  # bootstrap, (RESAMPLES,) of each metric
    subgroups: list[dict] = field(default_factory=list)  # rows of subgroups.csv

    def __post_init__(self):
        self.predicted, self.confidence = self.probabilities.argmax(axis=1), self.probabilities.max(axis=1)
        self.right = self.predicted == self.groups


def image_name(face):
    return f"{face.stem}_image.png"


def read_split_table(data, files):
    """What `split.csv`, if there is one in the folder `data`, says of N files.

    Returns their near-duplicate groups, int (N,), and whether each lies outside train, or outside val, while
    another face of its group lies inside, bool (N,) each; split.py allows that only with --random. UserError
    if the table is one of other faces.
    """
    path, first, parts = Path(data) / "split.csv", {}, {"train": set(), "val": set(), "test": set()}
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")  # spreadsheets add a byte order mark, and semicolons
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            for row in csv.DictReader(text.splitlines(), delimiter=delimiter):
                first[row["file"]] = row["duplicate_of"] or row["file"]
                parts[row["split"]].add(row["file"])
        except (OSError, ValueError, KeyError, csv.Error):
            first = {}
        if not first.keys() & set(files):
            raise UserError(
                f"{path} is not split.py's table of these faces: run split.py again, or remove it"
            )
    groups = [first.get(name, name) for name in files]

    def near(part):
        inside = {first[name] for name in part}
        return np.array([group in inside and name not in part for group, name in zip(groups, files)])

    return np.unique(groups, return_inverse=True)[1], near(parts["train"]), near(parts["val"])


def subset(dataset, kept):
    """The faces of a `FaceDataset` for which `kept`, bool (N,), is true."""
    part = copy(dataset)
    part.faces = [face for face, keep in zip(dataset.faces, kept) if keep]
    part.images, part.ages, part.groups = dataset.images[kept], dataset.ages[kept], dataset.groups[kept]
    part.masks = None if dataset.masks is None else dataset.masks[kept]
    return part


def score_model(path, folder, device, dtype, workers=0, unseen=False, read=FaceDataset):
    """Runs the model of a checkpoint on the faces of a folder, such as `split/test`; returns a `Scored`.

    unseen: leaves out the faces that the model has learned from or that its epoch was selected on, and their
    near-duplicates. read: how faces are read, so that the caller of several models can keep them. Raises
    UserError if the checkpoint, the folder or its table is not as it should be, or if no face is left.
    """
    model, checkpoint = load_model(path, device)
    size, with_masks = checkpoint["preprocessing"]["image_size"], model.decoder is not None
    dataset = read(folder, size, with_masks=with_masks, workers=workers)
    files = [image_name(face) for face in dataset.faces]
    clusters, near_train, near_val = read_split_table(folder.parent, files)
    hashes = (np.asarray(checkpoint.get(name, [])) for name in ("train_hashes", "val_hashes"))
    learned, selected_on = (np.isin(dataset.hashes.numpy(), values) for values in hashes)
    selected_on &= ~learned
    leaked = (near_train | near_val if checkpoint["config"].get("final") else near_train) & ~learned
    kept = np.ones(len(dataset), bool)
    if unseen:
        kept = ~np.isin(clusters, clusters[learned | selected_on]) & ~near_train & ~near_val
        if not kept.any():
            raise UserError(
                f"--unseen: 0 of {len(dataset)} faces of {folder} remain for {path}: name faces that it has "
                "not learned from"
            )
        dataset = subset(dataset, kept)
    scores = score_dataset(model, dataset, device, dtype)
    del checkpoint["weights"]  # a table keeps many
    ages, per_face = None, {}
    if scores.ages is not None:
        ages = scores.ages.double().numpy()
        error = np.abs(ages - dataset.ages)
        per_face |= {"mae_years": error, "within_five_years": (error <= 5).astype(float)}
    if scores.mask_iou is not None:
        per_face |= {"mask_iou": scores.mask_iou.numpy(), "mask_dice": scores.mask_dice.numpy()}
    return Scored(
        path, checkpoint, folder, dataset.faces, dataset.groups,
        scores.logits.double().softmax(dim=1).numpy(), ages, per_face,
        clusters[kept], learned[kept], selected_on[kept], leaked[kept], int((~kept).sum()),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


def score(probabilities, groups, weights, per_face):
    """Every metric of N faces under each of R weightings, in the order of `METRICS`: {metric: (R,)}.

    probabilities: (N, 6); groups: int (N,); weights: (R, N), how often each face counts; per_face: {metric:
    (N,)}, which are averaged. Balanced accuracy, AUC and AP average over the classes present in `groups`, F1
    and precision over those present in `groups` or among the predictions, a class that is never predicted
    having precision 0. AUC is NaN where only one class is present.
    """
    parts = []
    for part in progress(np.array_split(weights, -(-len(weights) // 50)), "bootstrap"):  # memory for 50
        part = part.astype(float)  # r×N
        values = rates(probabilities.argmax(axis=1), groups, part)
        areas = [rank_areas(probabilities[:, g], groups == g, part) for g in range(len(GROUP_NAMES))]
        auc, ap = (np.stack(columns, axis=1) for columns in zip(*areas))  # r×6
        present = part @ np.eye(len(GROUP_NAMES))[groups] > 0  # r×6
        values["auc_macro_ovr"] = np.where(present.sum(axis=1) > 1, mean_over(auc, present), np.nan)
        values["ap_macro"] = mean_over(ap, present)
        for name, column in per_face.items():
            values[name] = part @ column / part.sum(axis=1)
        parts.append(values)
    return {name: np.concatenate([values[name] for values in parts]) for name in METRICS if name in parts[0]}


def rates(predicted, groups, weights):
    """Those metrics that follow from the confusion matrix, under each of R weightings: see `score`."""
    matrix = confusion_matrix(predicted, groups, weights)  # R×true×predicted
    right, true, guessed = matrix.diagonal(0, 1, 2), matrix.sum(axis=2), matrix.sum(axis=1)  # R×6
    faces = np.where(true.any(axis=1), true.sum(axis=1), np.nan)  # R
    return {
        "accuracy": right.sum(axis=1) / faces,
        "balanced_accuracy": mean_over(right / np.maximum(true, 1), true > 0),
        "f1_macro": mean_over(2 * right / np.maximum(true + guessed, 1), true + guessed > 0),
        "precision_macro": mean_over(right / np.maximum(guessed, 1), true + guessed > 0),
        "within_one_group": sum(matrix.diagonal(k, 1, 2).sum(axis=1) for k in (-1, 0, 1)) / faces,
    }


def confusion_matrix(predicted, groups, weights):
    """Counts (R, 6, 6) of true groups in rows and predicted in columns: int (N,) each, weights (R, N)."""
    count = len(GROUP_NAMES)
    return (weights @ np.eye(count**2)[groups * count + predicted]).reshape(-1, count, count)


def mean_over(values, present):
    """Mean over the classes that are present in each weighting: (R, 6), bool (R, 6) → (R,), NaN of none."""
    count = np.where(present.any(axis=1), present.sum(axis=1), np.nan)
    return np.where(present, values, 0).sum(axis=1) / count


def rank_areas(scores, positive, weights):
    """Area under the ROC curve and average precision, each (R,), of faces that count `weights` (R, N) times.

    scores: (N,), the higher the likelier positive; positive: bool (N,). Zero where a side is missing.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # faces of one score tie
    weights, positive = weights[:, order], positive[order]
    tp = np.cumsum(weights * positive, axis=1)[:, ends]  # R×E, above each threshold
    fp = np.cumsum(weights * ~positive, axis=1)[:, ends]
    new_tp, new_fp = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
    positives, negatives = np.maximum(tp[:, -1], 1), np.maximum(fp[:, -1], 1)
    auc = (new_fp * (tp - new_tp / 2)).sum(axis=1) / (positives * negatives)
    return auc, (new_tp * tp / np.maximum(tp + fp, 1)).sum(axis=1) / positives


# ------------------------------------------------------------------------------------------------------------
# Intervals
# ------------------------------------------------------------------------------------------------------------


def effective_faces(clusters):
    """How many unrelated faces N faces are worth: N² / Σ m², over the m faces of each cluster, int (N,).

    Near-duplicates are taken to be right or wrong together, so that they count once: the variance of a share
    is then greater by Σ m² / N (Kish 1965, the design effect of clusters with correlation 1).
    """
    return len(clusters) ** 2 / (np.unique(clusters, return_counts=True)[1] ** 2).sum()


def wilson(share, count):
    """The 95 % interval [low, high] of a share of `count` faces, which holds near 0 and 1 too (Wilson)."""
    z = 1.959964
    middle, scale = share + z**2 / (2 * count), 1 + z**2 / count
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [float(max(middle - half, 0) / scale), float(min((middle + half) / scale, 1))]


def resample(clusters, resamples=RESAMPLES, seed=0):
    """How often each of N faces is drawn in each bootstrap resample: int16 (resamples, N).

    clusters: int (N,); faces of one cluster (near-duplicates) are drawn together, since they tell the same
    thing. The same clusters and seed give the same draws, so that models can be compared face by face.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(clusters, return_inverse=True)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=len(names)).astype(np.int16)[index] for draw in draws])


def interval(draws):
    """The 95 % percentile interval [low, high] of draws (R,), those that are NaN left out."""
    draws = draws[~np.isnan(draws)]
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else [np.nan, np.nan]


def gap_p_value(right, labels, clusters, seed=0, shuffles=RESAMPLES):
    """How often chance alone gives as wide a gap in accuracy, were all subgroups alike: above 0, at most 1.

    right: bool (N,); labels, clusters: (N,). A permutation test, so it holds although the widest gap is
    picked after looking. Near-duplicate groups of one size swap their labels: near-duplicates stay together,
    and every subgroup keeps its number of faces.
    """
    rng = np.random.default_rng(seed)
    labels = np.unique(labels, return_inverse=True)[1]
    counts, sizes = np.bincount(labels), np.unique(clusters, return_counts=True)[1]
    order, size_of = np.argsort(clusters, kind="stable"), np.repeat(sizes, sizes)
    blocks = [order[size_of == size].reshape(-1, size) for size in np.unique(sizes)]  # clusters×size each
    gaps, shuffled = [np.ptp(np.bincount(labels, right) / counts)], labels.copy()
    for _ in range(shuffles):
        for block in blocks:
            shuffled[block] = labels[rng.permutation(block)]
        gaps.append(np.ptp(np.bincount(shuffled, right) / counts))
    return float(np.mean(np.array(gaps) >= gaps[0] - 1e-9))


# ------------------------------------------------------------------------------------------------------------
# Subgroups and calibration
# ------------------------------------------------------------------------------------------------------------


def label_subgroups(faces, groups):
    """The subgroups of N faces: {kind: (the name of each face's, str (N,); all names in order)}."""
    genders = np.array(GENDERS)[[face.gender for face in faces]]
    races = np.array(RACES)[[face.race for face in faces]]
    both = np.array([f"{race}, {gender}" for race, gender in zip(races, genders)])
    return {
        "age group": (np.array(GROUP_NAMES)[groups], GROUP_NAMES),  # where accuracy is recall
        "gender": (genders, GENDERS),
        "race": (races, RACES),
        "race and gender": (both, [f"{race}, {gender}" for race in RACES for gender in GENDERS]),
    }


def score_subgroup(scored, at, weights):
    """A row of subgroups.csv: `SUBGROUP_METRICS` of the faces at indices `at`, with 95 % intervals."""
    predicted, groups = scored.predicted[at], scored.groups[at]
    values, draws = rates(predicted, groups, np.ones((1, len(at)))), rates(predicted, groups, weights[:, at])
    row = {"n": len(at), "small": int(len(at) < SMALL)}
    for metric in SUBGROUP_METRICS:
        value = float(values[metric][0])
        # Balanced accuracy over a single age group is a share, too.
        if metric in SHARES or len(np.unique(groups)) == 1:
            low, high = wilson(value, effective_faces(scored.clusters[at]))
        else:
            low, high = interval(draws[metric])
        row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = (round(x, 6) for x in (value, low, high))
    return row


def score_subgroups(scored, weights, seed=0):
    """Accuracies by age group, gender, race and the last two: a row a subgroup, and the widest gap of each.

    weights: (R, N) from `resample`. A gap lies between the highest and the lowest accuracy among subgroups of
    at least `SMALL` faces, and stands there with its `gap_p_value`.
    """
    rows, gaps = [], []
    for by, (labels, names) in label_subgroups(scored.faces, scored.groups).items():
        own = []
        for name in names:
            at = np.flatnonzero(labels == name)
            if len(at):
                own.append({"by": by, "subgroup": name} | score_subgroup(scored, at, weights))
        large = sorted((row for row in own if not row["small"]), key=lambda row: row["accuracy"])
        p = ""
        if len(large) > 1:
            lowest, highest = large[0], large[-1]
            inside = np.isin(labels, [row["subgroup"] for row in large])
            p = gap_p_value(scored.right[inside], labels[inside], scored.clusters[inside], seed)
            difference = round(highest["accuracy"] - lowest["accuracy"], 6)
            gap = {"by": by, "highest": highest["subgroup"], "lowest": lowest["subgroup"]}
            gaps.append(gap | {"difference": difference, "p": p})
        rows += [row | {"p_no_gap": p} for row in own]
    return rows, gaps


def calibration_bins(confidence):
    """Which of `BINS` bins of equal width each confidence (N,) falls into: int (N,)."""
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def calibration_error(confidence, right):
    """Expected calibration error of the predicted group, 0 to 1: confidence (N,), right bool (N,)."""
    return float(np.abs(np.bincount(calibration_bins(confidence), right - confidence)).sum() / len(right))


def measure_calibration(confidence, right, seed=0):
    """The calibration error, and what a perfectly calibrated model would show on as many faces.

    The second is above zero, since few faces fall into a bin: its mean and 95 % range, over outcomes that are
    drawn from the confidences themselves.
    """
    rng = np.random.default_rng(seed)
    drawn = (rng.random(len(right)) < confidence for _ in range(RESAMPLES))
    perfect = np.array([calibration_error(confidence, outcome) for outcome in drawn])
    return {
        "expected_calibration_error": calibration_error(confidence, right),
        "calibration_error_if_perfect": {"mean": float(perfect.mean()), "range95": interval(perfect)},
    }


def accuracies_by_leak(right, leaked):
    """How many faces are leaked, the accuracy on them and on the rest (None of none)."""
    on_leaked, on_rest = (float(right[part].mean()) if part.any() else None for part in (leaked, ~leaked))
    return {"n": int(leaked.sum()), "accuracy": on_leaked, "accuracy_of_the_rest": on_rest}


def measure(scored, seed):
    """Fills in the metrics of a `Scored`, their summary and draws, and its subgroups."""
    s, weights = scored, resample(scored.clusters, seed=seed)
    effective = effective_faces(s.clusters)
    values = score(s.probabilities, s.groups, np.ones((1, len(s.faces))), s.per_face)
    s.draws = score(s.probabilities, s.groups, weights, s.per_face)
    s.subgroups, gaps = score_subgroups(s, weights, seed)
    for name, [value] in values.items():
        s.metrics[name] = float(value)
        low, high = wilson(value, effective) if name in SHARES else interval(s.draws[name])
        value, low, high = (None if np.isnan(x) else round(float(x), 6) for x in (value, low, high))
        s.summary[name] = {"value": value, "ci95": [low, high]}
    s.summary |= {
        "n": len(s.faces),
        "effective_n": round(effective, 1),
        "absent_classes": [name for group, name in enumerate(GROUP_NAMES) if group not in s.groups],
        **measure_calibration(s.confidence, s.right, seed),
        "widest_gaps": gaps,
        "seen_in_training": int(s.learned.sum()),
        "chose_the_epoch": int(s.selected_on.sum()),
        "left_out_by_unseen": s.left_out,
        "near_duplicates_in_train": accuracies_by_leak(s.right, s.leaked),
        "checkpoint": str(s.path),
        "split": s.folder.name,
        "bootstrap_resamples": RESAMPLES,
    }


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def plot_confusion_matrix(path, scored):
    """Draws how many faces of each true group (rows) were taken for which (columns), and their share."""
    [counts] = confusion_matrix(scored.predicted, scored.groups, np.ones((1, len(scored.faces)))).astype(int)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(7.6, 6.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text, color = f"{counts[row, column]}\n{share:.1%}", "white" if share > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(len(GROUP_NAMES)), GROUP_NAMES, rotation=30, ha="right")
    axis.set_yticks(range(len(GROUP_NAMES)), GROUP_NAMES)
    title = f"{len(scored.faces)} faces, accuracy {scored.right.mean():.1%}"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, label="share of the true group", fraction=0.046)
    save_figure(figure, path)


def plot_subgroups(path, scored):
    """Draws the accuracies of subgroups with their intervals, small subgroups hollow."""
    rows = scored.subgroups
    figure = Figure(figsize=(13, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(SUBGROUP_METRICS), sharey=True)
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    for axis, metric in zip(axes, SUBGROUP_METRICS):
        axis.axvline(scored.summary[metric]["value"], color="0.6", linestyle="--")
        for y, row in enumerate(rows):
            color = f"C{kinds.index(row['by'])}"
            axis.plot([row[metric + "_low"], row[metric + "_high"]], [y, y], color=color)
            axis.plot(row[metric], y, "o", color=color, fillstyle="none" if row["small"] else "full")
        axis.set(title=metric.replace("_", " "), ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.grid(alpha=0.3)
    labels = [f"{row['subgroup']} ({row['n']}{', small' if row['small'] else ''})" for row in rows]
    axes[0].set_yticks(range(len(rows)), labels)
    figure.supxlabel(f"95 % intervals; dashed: all faces; hollow: fewer than {SMALL} faces", fontsize=9)
    save_figure(figure, path)


def plot_reliability(path, scored):
    """Draws accuracy against confidence, bins of fewer than 20 faces hollow, and the number of faces."""
    which = calibration_bins(scored.confidence)
    counts = np.bincount(which, minlength=BINS)
    sums = (np.bincount(which, values, BINS) for values in (scored.confidence, scored.right))
    confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    error = scored.summary["expected_calibration_error"]
    low, high = scored.summary["calibration_error_if_perfect"]["range95"]
    label = f"the model: calibration error {error:.1%}\n(a perfect one's: {low:.1%} to {high:.1%})"
    many, few = counts >= 20, (counts > 0) & (counts < 20)
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
    top.plot(confidence[many], accuracy[many], "o-", color="C0", label=label)
    top.plot(confidence[few], accuracy[few], "o", color="C0", fillstyle="none")
    top.set(ylabel="accuracy", title=f"{len(scored.faces)} faces", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left", fontsize=9)
    top.grid(alpha=0.3)
    bottom.stairs(counts, np.linspace(0, 1, BINS + 1), linewidth=1.5)
    bottom.set(xlabel="confidence in the predicted group; hollow above: fewer than 20 faces", ylabel="faces")
    bottom.grid(alpha=0.3)
    save_figure(figure, path)


def plot_mistakes(path, scored, count=40):
    """Draws the `count` wrong predictions of highest confidence with their labels."""
    s, wrong = scored, np.flatnonzero(~scored.right)
    chosen = wrong[np.argsort(-s.confidence[wrong], kind="stable")][:count]
    columns, rows = 8, max(1, -(-len(chosen) // 8))
    figure = Figure(figsize=(1.75 * columns, 2.25 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, chosen):
        axis.imshow(read_image(s.folder / image_name(s.faces[i]))[:, :, ::-1])
        true, taken = f"{GROUP_NAMES[s.groups[i]]} ({s.faces[i].age})", GROUP_NAMES[s.predicted[i]]
        axis.set_title(f"{true}\ntaken for {taken}\n{s.confidence[i]:.0%} sure", fontsize=8)
    figure.suptitle(f"{len(chosen)} of {len(wrong)} mistakes, the most confident first; labels may be wrong")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------------------------


def write_results(scored, out):
    """Writes the files of one model that `measure` has been through."""
    s, out, rows = scored, Path(out), []
    with atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(s.summary, indent=2) + "\n", encoding="utf-8")
    for i, face in enumerate(s.faces):
        row = {"file": image_name(face), "age": face.age, "true": s.groups[i], "predicted": s.predicted[i]}
        if s.ages is not None:
            row["predicted_age"] = f"{s.ages[i]:.1f}"
        rows.append(row | {f"p{group}": f"{p:.6f}" for group, p in enumerate(s.probabilities[i])})
    write_csv(out / "predictions.csv", rows)
    write_csv(out / "subgroups.csv", s.subgroups)
    plot_confusion_matrix(out / "confusion_matrix.png", s)
    plot_subgroups(out / "subgroups.png", s)
    plot_reliability(out / "reliability.png", s)
    plot_mistakes(out / "mistakes.png", s)


def warn_of_seen(scored):
    """Warns of faces that the model was trained on, or that its epoch was selected on."""
    kinds = {"was trained on": scored.learned, "had its epoch selected on": scored.selected_on}
    for what, faces in kinds.items():
        if faces.any():
            counts = f"{faces.sum()} of these {len(faces)} faces"
            print(f"warning: {scored.path} {what} {counts}; --unseen leaves them out", file=sys.stderr)


def print_results(scored):
    """Prints what `measure` has found of one model: metrics, calibration, leaks, subgroups and gaps."""
    summary, leaks = scored.summary, scored.summary["near_duplicates_in_train"]
    if scored.left_out:
        total = f"{len(scored.faces) + scored.left_out} faces"
        print(f"{scored.left_out} of {total} left out: the model has seen them, or near-duplicates of them")
    print(f"{scored.path} on {len(scored.faces)} faces of {scored.folder}, 95 % intervals:")
    for name, label in METRICS.items():
        if name in summary:
            form = ".2f" if name == "mae_years" else ".2%"
            numbers = (summary[name]["value"], *summary[name]["ci95"])
            value, low, high = ("–" if x is None else format(x, form) for x in numbers)
            print(f"  {label:34}{value:>7}  [{low}, {high}]")
    perfect = summary["calibration_error_if_perfect"]
    low, high = perfect["range95"]
    print(f"  {'expected calibration error':34}{summary['expected_calibration_error']:7.2%}", end="  ")
    print(f"(perfectly calibrated: {perfect['mean']:.2%} [{low:.2%}, {high:.2%}])")
    if summary["absent_classes"]:
        names = ", ".join(summary["absent_classes"])
        print(f"  absent from the truth and left out of macro averages: {names}")
    if leaks["n"]:
        where = "train or val" if scored.checkpoint["config"].get("final") else "train"
        print(
            f"  {leaks['n']} faces have a near-duplicate in {where}: accuracy {leaks['accuracy']:.2%}", end=""
        )
        rest = leaks["accuracy_of_the_rest"]
        print(" on them" + ("" if rest is None else f", {rest:.2%} on the rest"))
    print(f"\n  {'':16}{'faces':>6}{'accuracy':>26}{'balanced':>26}{'within one group':>26}")
    for row in scored.subgroups:
        cells = (f"{row[m]:10.1%} [{row[m + '_low']:.1%}, {row[m + '_high']:.1%}]" for m in SUBGROUP_METRICS)
        name = f"{row['subgroup']:16}{row['n']:5}{'*' if row['small'] else ' '}"
        print(f"  {name}" + "".join(f"{cell:>26}" for cell in cells))
    if any(row["small"] for row in scored.subgroups):
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
