"""Scores a model on faces it has not learned from: metrics with intervals, fairness, calibration, mistakes.

    python evaluate.py
    python evaluate.py model.pt --data dataset/processed_split --split test --out results
    python evaluate.py weights/age_multitask.pt --unseen

Writes to --out: metrics.json, predictions.csv, confusion_matrix.png, subgroups.csv and .png (by age group,
gender and race), reliability.png (calibration) and mistakes.png (the most confident ones; it shows faces of
the data set, so keep it to yourself). Of several models each gets a folder; tools/table.py compares them.
"""

import csv
import json
import os
import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np

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
from utkface import GENDERS, GROUP_NAMES, RACES, Face, list_pairs, read_image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    """A checkpoint and what it says of N faces; `measure` fills in the last six fields."""

    path: Path
    checkpoint: dict
    faces: list[Face]
    groups: np.ndarray  # true groups, int (N,)
    probabilities: np.ndarray  # (N, 6)
    ages: np.ndarray | None  # predicted, (N,) in years
    per_face: dict[str, np.ndarray]  # metrics that are means over faces, (N,) each
    clusters: np.ndarray  # int (N,), which near-duplicates share
    learned: np.ndarray  # bool (N,): the model was trained on it
    chose: np.ndarray  # bool (N,): it chose the model's epoch
    leaked: np.ndarray  # bool (N,): the model has learned from a near-duplicate, by split.csv
    left_out: int  # faces, by --unseen
    metrics: dict[str, float] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)  # bootstrap, (RESAMPLES,) each
    intervals: dict[str, list[float]] = field(default_factory=dict)  # [low, high]
    subgroups: list[dict] = field(default_factory=list)
    gaps: list[dict] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)

    def __post_init__(self):
        self.predicted, self.confidence = self.probabilities.argmax(axis=1), self.probabilities.max(axis=1)
        self.right = self.predicted == self.groups
        self.files = [f"{face.stem}_image.png" for face in self.faces]


def read_split_table(data, files):
    """What `split.csv`, if there is one in the folder `data`, says of N files.

    Returns their near-duplicate groups, int (N,), and whether each lies outside train, and outside val, and
    another face of its group inside, which split.py allows only with --random, bool (2, N). UserError if it
    is another table.
    """
    path, first, inside = Path(data) / "split.csv", {}, {"train": set(), "val": set(), "test": set()}
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")  # spreadsheets add a byte order mark, and semicolons
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            for row in csv.DictReader(text.splitlines(), delimiter=delimiter):
                first[row["file"]] = row["duplicate_of"] or row["file"]
                inside[row["split"]].add(row["file"])
        except (OSError, ValueError, KeyError, csv.Error):
            first = {}
        if not first.keys() & set(files):
            raise UserError(
                f"{path} is not split.py's table of these faces: run split.py again, or remove it"
            )
    own, near = [first.get(name, name) for name in files], []
    for part in (inside["train"], inside["val"]):
        groups = {first[name] for name in part}
        near.append([group in groups and name not in part for group, name in zip(own, files)])
    return np.unique(own, return_inverse=True)[1], np.array(near)


def score_model(path, folder, device, dtype, datasets, workers=0, unseen=False):
    """Runs the model of a checkpoint on the faces of a folder, such as `split/test`; returns a `Scored`.

    unseen: leaves out what the model has learned from, what chose its epoch, and their near-duplicates.
    datasets: a dict that keeps the faces for the next checkpoint. Raises UserError if the checkpoint, the
    folder or its table is not as it should be, or if no face is left.
    """
    model, checkpoint = load_model(path, device)
    key = (checkpoint["preprocessing"]["image_size"], model.decoder is not None)
    if key not in datasets:
        datasets[key] = FaceDataset(folder, key[0], with_masks=key[1], workers=workers)
    dataset = datasets[key]
    clusters, near = read_split_table(folder.parent, [f"{face.stem}_image.png" for face in dataset.faces])
    leaked = near[: 2 if checkpoint["config"].get("final") else 1].any(axis=0)
    hashes = (np.asarray(checkpoint.get(name, [])) for name in ("train_hashes", "val_hashes"))
    learned, chose = (np.isin(dataset.hashes.numpy(), values) for values in hashes)
    chose &= ~learned
    kept = np.ones(len(dataset), bool)
    if unseen:
        kept = ~(np.isin(clusters, clusters[learned | chose]) | near.any(axis=0))
        count = f"{kept.sum()} of {len(dataset)} faces of {folder} remain"
        if not kept.any():
            raise UserError(f"--unseen: {count} for {path}: name faces that it has not learned from")
        table = folder.parent / "split.csv"
        also = f", as are their near-duplicates by {table}" if table.is_file() else ""
        print(f"{path}: {count}, unseen by the model{also}")
        dataset = copy(dataset)
        dataset.faces = [face for face, keep in zip(dataset.faces, kept) if keep]
        dataset.images, dataset.ages, dataset.groups = (
            values[kept] for values in (dataset.images, dataset.ages, dataset.groups)
        )
        dataset.masks = None if dataset.masks is None else dataset.masks[kept]
    for what, faces in (("was trained on", learned), ("had its epoch chosen by", chose)):
        if faces[kept].any():
            counts = f"{faces.sum()} of these {len(faces)} faces"
            print(f"warning: {path} {what} {counts}; --unseen leaves them out", file=sys.stderr)
    scores = score_dataset(model, dataset, device, dtype)
    del checkpoint["weights"]  # a table keeps many
    ages = None if scores.ages is None else scores.ages.double().numpy()
    per_face = {}
    if ages is not None:
        off = np.abs(ages - dataset.ages)
        per_face |= {"mae_years": off, "within_five_years": (off <= 5).astype(float)}
    if scores.mask_iou is not None:
        per_face |= {"mask_iou": scores.mask_iou.numpy(), "mask_dice": scores.mask_dice.numpy()}
    return Scored(
        path, checkpoint, dataset.faces, dataset.groups, scores.logits.double().softmax(dim=1).numpy(), ages,
        per_face, clusters[kept], learned[kept], chose[kept], (leaked & ~learned)[kept], int((~kept).sum()),
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
    for part in progress(np.array_split(weights, -(-len(weights) // 50)), "bootstrap"):
        part = part.astype(float)  # r×N
        values = rates(probabilities.argmax(axis=1), groups, part)
        areas = [rank_areas(probabilities[:, g], groups == g, part) for g in range(len(GROUP_NAMES))]
        auc, ap = (np.stack(columns, axis=1) for columns in zip(*areas))  # r×6
        present = part @ np.eye(len(GROUP_NAMES))[groups] > 0  # r×6
        values["auc_macro_ovr"] = np.where(present.sum(axis=1) > 1, mean_over(auc, present), np.nan)
        values["ap_macro"] = mean_over(ap, present)
        parts.append(values | {name: part @ column / part.sum(axis=1) for name, column in per_face.items()})
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
    hits = np.cumsum(weights * positive, axis=1)[:, ends]  # R×E
    misses = np.cumsum(weights * ~positive, axis=1)[:, ends]
    new_hits, new_misses = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    roc = (new_misses * (hits - new_hits / 2)).sum(axis=1)
    precision = hits / np.maximum(hits + misses, 1)
    total = np.maximum(hits[:, -1], 1)
    return roc / (total * np.maximum(misses[:, -1], 1)), (new_hits * precision).sum(axis=1) / total


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


def score_subgroups(scored, weights, seed=0):
    """Accuracies by age group, gender, race and the last two: a row a subgroup, and the widest gap of each.

    weights: (R, N) from `resample`. A gap lies between the highest and the lowest accuracy among subgroups of
    at least `SMALL` faces, and stands there with its `gap_p_value`.
    """
    predicted, groups, clusters = scored.predicted, scored.groups, scored.clusters
    gender = np.array([GENDERS[face.gender] for face in scored.faces])
    race = np.array([RACES[face.race] for face in scored.faces])
    both = np.array([f"{r}, {g}" for r, g in zip(race, gender)])
    kinds = {
        "age group": (np.array(GROUP_NAMES)[groups], GROUP_NAMES),  # where accuracy is recall
        "gender": (gender, GENDERS),
        "race": (race, RACES),
        "race and gender": (both, [f"{r}, {g}" for r in RACES for g in GENDERS]),
    }
    rows, gaps = [], []
    for by, (labels, names) in kinds.items():
        own, p = [], ""
        for name in (name for name in names if name in labels):
            at = np.flatnonzero(labels == name)
            values, draws = (
                rates(predicted[at], groups[at], w[:, at]) for w in (np.ones_like(weights[:1]), weights)
            )
            row = {"by": by, "subgroup": name, "n": len(at), "small": int(len(at) < SMALL)}
            for metric in SUBGROUP_METRICS:
                share = metric in SHARES or len(np.unique(groups[at])) == 1  # balanced over one group, too
                value = values[metric][0]
                ends = wilson(value, effective_faces(clusters[at])) if share else interval(draws[metric])
                row |= {
                    metric + end: round(float(x), 6) for end, x in zip(("", "_low", "_high"), (value, *ends))
                }
            own.append(row)
        large = [(row["accuracy"], row["subgroup"]) for row in own if not row["small"]]
        if len(large) > 1:
            (high, highest), (low, lowest) = max(large), min(large)
            inside = np.isin(labels, [name for _, name in large])
            p = gap_p_value(scored.right[inside], labels[inside], clusters[inside], seed)
            gap = {"by": by, "highest": highest, "lowest": lowest, "difference": round(high - low, 6), "p": p}
            gaps.append(gap)
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


def measure(scored, seed):
    """Fills in the metrics of a `Scored`, their intervals, subgroups, gaps and calibration."""
    s, weights = scored, resample(scored.clusters, seed=seed)
    values, s.draws = (
        score(s.probabilities, s.groups, w, s.per_face) for w in (np.ones((1, len(s.faces))), weights)
    )
    s.metrics = {name: float(value[0]) for name, value in values.items()}
    count = effective_faces(s.clusters)
    s.intervals = {
        name: wilson(value, count) if name in SHARES else interval(s.draws[name])
        for name, value in s.metrics.items()
    }
    s.subgroups, s.gaps = score_subgroups(s, weights, seed)
    s.calibration = measure_calibration(s.confidence, s.right, seed)


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG and closes it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def plot_confusion_matrix(path, matrix):
    """Draws counts (6, 6), true groups in rows, with the share of the row, as PNG."""
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    figure, axis = plt.subplots(figsize=(7.6, 6.4), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        axis.text(column, row, f"{count}\n{share:.1%}", ha="center", va="center", color=color, fontsize=9)
    ticks = range(len(GROUP_NAMES))
    axis.set_xticks(ticks, GROUP_NAMES, rotation=30, ha="right")
    axis.set_yticks(ticks, GROUP_NAMES)
    correct = matrix.trace() / matrix.sum()
    axis.set(xlabel="predicted", ylabel="true", title=f"{matrix.sum()} faces, accuracy {correct:.1%}")
    figure.colorbar(image, label="share of the true group", fraction=0.046)
    save_figure(figure, path)


def plot_subgroups(path, rows, overall):
    """Draws the rows of `score_subgroups` with their intervals, small subgroups hollow, as PNG.

    overall: the same metrics of all faces, drawn as a line.
    """
    size = (13, 1.6 + 0.3 * len(rows))
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    for axis, metric in zip(axes, SUBGROUP_METRICS):
        axis.axvline(overall[metric], color="0.6", linestyle="--")
        for y, row in enumerate(rows):
            color = f"C{kinds.index(row['by'])}"
            axis.plot([row[metric + "_low"], row[metric + "_high"]], [y, y], color=color)
            axis.plot(row[metric], y, "o", color=color, fillstyle="none" if row["small"] else "full")
        axis.set(title=metric.replace("_", " "), ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axis.grid(alpha=0.3)
    labels = [f"{row['subgroup']} ({row['n']}{', small' if row['small'] else ''})" for row in rows]
    axes[0].set_yticks(range(len(rows)), labels)
    figure.supxlabel(f"95 % intervals; dashed: all faces; hollow: fewer than {SMALL} faces", fontsize=9)
    save_figure(figure, path)


def plot_reliability(path, confidence, right, calibration):
    """Draws accuracy against confidence, (N,), and how many faces have which confidence, as PNG."""
    shape = {"figsize": (5.6, 6.6), "height_ratios": (3, 1)}
    figure, (top, bottom) = plt.subplots(2, 1, **shape, sharex=True, layout="constrained")
    which = calibration_bins(confidence)
    counts = np.bincount(which, minlength=BINS)
    sums = (np.bincount(which, values, BINS) for values in (confidence, right))
    mean, accuracy = (total / np.maximum(counts, 1) for total in sums)
    error = calibration["expected_calibration_error"]
    low, high = calibration["calibration_error_if_perfect"]["range95"]
    label = f"the model: calibration error {error:.1%}\n(a perfect one's: {low:.1%} to {high:.1%})"
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
    top.plot(mean[counts >= 20], accuracy[counts >= 20], "o-", color="C0", label=label)
    few = (counts > 0) & (counts < 20)
    top.plot(mean[few], accuracy[few], "o", color="C0", fillstyle="none")
    bottom.stairs(counts, np.linspace(0, 1, BINS + 1), linewidth=1.5)
    top.set(ylabel="accuracy", title=f"{len(right)} faces", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left", fontsize=9)
    bottom.set(xlabel="confidence in the predicted group; hollow above: fewer than 20 faces", ylabel="faces")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_mistakes(path, scored, folder, count=40):
    """Draws the `count` wrong predictions of highest confidence with their labels, as PNG."""
    s, wrong = scored, np.flatnonzero(~scored.right)
    chosen = wrong[np.argsort(-s.confidence[wrong], kind="stable")][:count]
    columns, rows = 8, max(1, -(-len(chosen) // 8))
    size = (1.75 * columns, 2.25 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen):
        axis.imshow(read_image(folder / s.files[i])[:, :, ::-1])
        true, taken = f"{GROUP_NAMES[s.groups[i]]} ({s.faces[i].age})", GROUP_NAMES[s.predicted[i]]
        axis.set_title(f"{true}\ntaken for {taken}\n{s.confidence[i]:.0%} sure", fontsize=8)
    figure.suptitle(f"{len(chosen)} of {len(wrong)} mistakes, the most confident first; labels may be wrong")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------------------------


def accuracies_by_leak(scored):
    """How many faces are leaked, the accuracy on them and on the rest (None of none)."""
    right, leaked = scored.right, scored.leaked
    shares = (float(right[part].mean()) if part.any() else None for part in (leaked, ~leaked))
    return dict(zip(("n", "accuracy", "accuracy_of_the_rest"), (int(leaked.sum()), *shares)))


def absent_classes(groups):
    return [name for group, name in enumerate(GROUP_NAMES) if group not in groups]


def write_results(scored, out, folder):
    """Writes the files of one model that `measure` has been through."""
    s = scored

    def rounded(value):
        return None if np.isnan(value) else round(value, 6)

    summary = {
        **{
            name: {"value": rounded(value), "ci95": [rounded(end) for end in s.intervals[name]]}
            for name, value in s.metrics.items()
        },
        "n": len(s.faces),
        "effective_n": round(effective_faces(s.clusters), 1),
        "absent_classes": absent_classes(s.groups),
        **s.calibration,
        "widest_gaps": s.gaps,
        "seen_in_training": int(s.learned.sum()),
        "chose_the_epoch": int(s.chose.sum()),
        "left_out_by_unseen": s.left_out,
        "near_duplicates_in_train": accuracies_by_leak(s),
        "checkpoint": str(s.path),
        "split": folder.name,
        "bootstrap_resamples": RESAMPLES,
    }
    with atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    rows = []
    for i, name in enumerate(s.files):
        row = {"file": name, "age": s.faces[i].age, "true": s.groups[i], "predicted": s.predicted[i]}
        row |= {} if s.ages is None else {"predicted_age": f"{s.ages[i]:.1f}"}
        rows.append(row | {f"p{group}": f"{p:.6f}" for group, p in enumerate(s.probabilities[i])})
    write_csv(out / "predictions.csv", rows)
    write_csv(out / "subgroups.csv", s.subgroups)
    [matrix] = confusion_matrix(s.predicted, s.groups, np.ones((1, len(s.faces)))).astype(int)
    plot_confusion_matrix(out / "confusion_matrix.png", matrix)
    plot_subgroups(out / "subgroups.png", s.subgroups, s.metrics)
    plot_reliability(out / "reliability.png", s.confidence, s.right, s.calibration)
    plot_mistakes(out / "mistakes.png", s, folder)


def print_results(scored, folder):
    """Prints what `measure` has found of one model: metrics, calibration, leaks, subgroups and gaps."""
    s = scored
    print(f"{s.path} on {len(s.faces)} faces of {folder}, 95 % intervals:")
    for name, value in s.metrics.items():
        form = ".2f" if name == "mae_years" else ".2%"
        low, high = s.intervals[name]
        print(f"  {METRICS[name]:34}{value:7{form}}  [{low:{form}}, {high:{form}}]")
    error, perfect = s.calibration.values()
    low, high = perfect["range95"]
    print(f"  {'expected calibration error':34}{error:7.2%}", end="  ")
    print(f"(perfectly calibrated: {perfect['mean']:.2%} [{low:.2%}, {high:.2%}])")
    if absent_classes(s.groups):
        print(
            f"  absent from the truth and left out of macro averages: {', '.join(absent_classes(s.groups))}"
        )
    leaked, accuracy, rest = accuracies_by_leak(s).values()
    if leaked:
        rest = "" if rest is None else f", {rest:.2%} on the rest"
        where = "train or val" if s.checkpoint["config"].get("final") else "train"
        print(f"  {leaked} faces have a near-duplicate in {where}: accuracy {accuracy:.2%} on them{rest}")
    print(f"\n  {'':16}{'faces':>6}{'accuracy':>26}{'balanced':>26}{'within one group':>26}")
    for row in s.subgroups:
        cells = (f"{row[m]:10.1%} [{row[m + '_low']:.1%}, {row[m + '_high']:.1%}]" for m in SUBGROUP_METRICS)
        name = f"{row['subgroup']:16}{row['n']:5}{'*' if row['small'] else ' '}"
        print(f"  {name}" + "".join(f"{cell:>26}" for cell in cells))
    if any(row["small"] for row in s.subgroups):
        print(f"  * fewer than {SMALL} faces: little can be said")
    for by, highest, lowest, difference, p in (gap.values() for gap in s.gaps):
        points = f"{100 * difference:.1f} points of accuracy"
        found = f"{highest} above {lowest} by {points}"
        found = f"at most {points} apart, no more than chance may give" if p > 0.05 else found
        print(f"  by {by}: {found} (p = {p:.3f})")


def result_folders(paths, out):
    """{checkpoint: folder in `out`}, named after the checkpoints' paths below the folder that they share.

    Only the ending .pt goes, so that run.v1 and run.v2 stay apart.
    """
    paths = list({os.path.abspath(path): Path(path) for path in paths}.values())
    top = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    return {path: Path(out) / os.path.relpath(path, top).removesuffix(".pt") for path in paths}


def get_parser():
    parser = script_parser("evaluate", __doc__)
    # fmt: off
    add = parser.add_argument
    add("checkpoint", nargs="*", default=["model.pt"], help="models written by finetune.py")
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--split", choices=["train", "val", "test"], default="test", help="part to score")
    add("--out", default="results", help="folder to write")
    add("--unseen", action="store_true",
        help="leave out faces that the model has learned from or that chose its epoch, and near-duplicates")
    # fmt: on
    add_device_flags(parser)
    return parser


def main(args):
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    check_writable("--out", args.out)
    folder, out, datasets = Path(args.data) / args.split, Path(args.out), {}
    list_pairs(folder, need_masks=False)  # what ails the faces is said once, not for each model
    folders = result_folders(args.checkpoint, out)
    several, failed = len(folders) > 1, 0
    for path, results in progress(folders.items(), "models", len(folders), unit="model"):
        try:
            scored = score_model(path, folder, device, dtype, datasets, args.workers, args.unseen)
        except UserError as error:
            if not several:
                raise
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            failed += 1
            continue
        measure(scored, args.seed)
        write_results(scored, results if several else out, folder)
        if several:
            low, high = scored.intervals["accuracy"]
            print(f"{path}: accuracy {scored.metrics['accuracy']:.2%} [{low:.2%}, {high:.2%}]")
        else:
            print_results(scored, folder)
    if several:
        done = f"a folder for each of {len(folders) - failed} models" + f", {failed} failed" * bool(failed)
        print(f"{out} written: {done}; `python tools/table.py` with the same names compares them")
    else:
        names = "metrics.json, predictions.csv, confusion_matrix.png, subgroups.csv and .png, reliability.png"
        print(f"{out} written: {names}, mistakes.png")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, get_parser())
