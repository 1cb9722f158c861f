"""Scores models on faces they have not learned from: metrics with intervals, fairness, calibration, mistakes.

    python evaluate.py
    python evaluate.py model.pt --data dataset/processed_split --split test --out results
    python evaluate.py runs/*.pt                # a table, a row a configuration, averaged over seeds

For one model writes to --out: metrics.json, predictions.csv, confusion_matrix.png, subgroups.csv and .png (by
age group, gender and race), reliability.png (calibration) and mistakes.png (the most confident ones; it shows
faces of the data set, so keep it to yourself). For several writes table.md there, and those files in a folder
a model.
"""

import csv
import json
import os
import sys
import warnings
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from torchmetrics.functional import classification as tm

from common import (
    CONTENT,
    GROUP_NAMES,
    FaceDataset,
    UserError,
    add_device_flags,
    atomic_path,
    check_writable,
    choose_device,
    choose_precision,
    load_checkpoint,
    load_model,
    predict_dataset,
    progress,
    read_image,
    run,
    script_parser,
    write_csv,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESAMPLES = 1000
BINS = 15  # of confidence, for calibration (Guo et al. 2017)
SMALL = 100  # faces below which a subgroup is marked
GENDERS = ("male", "female")  # as UTKFace labels them
RACES = ("White", "Black", "Asian", "Indian", "Others")

LABELS = {  # how each metric is averaged, for the terminal
    "accuracy": "accuracy (micro)",
    "balanced_accuracy": "balanced accuracy (macro recall)",
    "f1_macro": "F1 (macro)",
    "precision_macro": "precision (macro)",
    "auc_macro_ovr": "AUC (macro, one-vs-rest)",
    "ap_macro": "average precision (macro)",
    "within_one_group": "within one group",
    "mask_iou": "mask IoU (mean over faces)",
    "mask_dice": "mask Dice (mean over faces)",
}
COLUMNS = {  # of the table
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc_macro_ovr": "AUC",
    "f1_macro": "F1 (macro)",
    "precision_macro": "Precision (macro)",
    "ap_macro": "AP",
    "within_one_group": "Within one group",
    "mask_iou": "Mask IoU",
}
COMPARED = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro")

# ------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------


def read_split_table(data, files):
    """What `split.csv`, if there is one, says of N files.

    Returns their near-duplicate groups, int (N,), and whether each lies outside train and another face of its
    group inside, which split.py allows only with --random, bool (N,).
    """
    rows = []
    if (Path(data) / "split.csv").is_file():
        with open(Path(data) / "split.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    first = {row["file"]: row["duplicate_of"] or row["file"] for row in rows}
    train = {row["file"] for row in rows if row["split"] == "train"}
    learned = {first[name] for name in train}
    own = [first.get(name, name) for name in files]
    leaked = [one in learned and name not in train for one, name in zip(own, files)]
    return np.unique(own, return_inverse=True)[1], np.array(leaked)


def predict(path, args, device, datasets):
    """Everything that is known of one checkpoint and the faces that it scored.

    datasets: a dict that keeps the faces for the next checkpoint.
    """
    model, checkpoint = load_model(path, device)
    config, temperature = checkpoint["config"], checkpoint["val"].get("val_temperature")
    temperature = temperature if isinstance(temperature, float) and temperature > 0 else None
    if args.temperature_scaling and temperature is None:
        raise UserError(f"{path} holds no temperature: train again, or leave out --temperature-scaling")
    key = (checkpoint["preprocessing"]["image_size"], bool(config.get("multitask")))
    if key not in datasets:
        folder = Path(args.data) / args.split
        datasets[key] = FaceDataset(folder, key[0], with_masks=key[1], workers=args.workers)
    dataset = datasets[key]
    logits, overlap = predict_dataset(model, dataset, device, choose_precision(args.precision, device))
    logits = logits.double()
    probabilities = (logits / temperature if args.temperature_scaling else logits).softmax(dim=1)
    files = [f"{face.stem}_image.png" for face in dataset.faces]
    clusters, leaked = read_split_table(args.data, files)
    seen = np.isin(dataset.hashes, checkpoint["train_hashes"].numpy())
    if seen.any():
        print(f"warning: {path} was trained on {seen.sum()} of these {len(seen)} faces", file=sys.stderr)
    return SimpleNamespace(
        path=path, checkpoint=checkpoint, temperature=temperature, faces=dataset.faces, files=files,
        seen=seen, logits=logits, probabilities=probabilities, predicted=probabilities.argmax(dim=1),
        groups=torch.from_numpy(dataset.groups), overlap=overlap, clusters=clusters, leaked=leaked & ~seen,
    )  # fmt: skip


def compute_metrics(probabilities, groups, overlap=None):
    """Every metric of a set of faces as a dict of floats.

    probabilities: float (N, 6); groups: int64 (N,); overlap: {"iou": (N,), "dice": (N,)} or None. Balanced
    accuracy, AUC and AP average over the classes present in `groups`, F1 and precision over those present in
    `groups` or among the predictions, a class that is never predicted having precision 0. AUC is NaN where
    only one class is present.
    """
    count = probabilities.shape[1]
    predicted = probabilities.argmax(dim=1)
    in_truth = torch.bincount(groups, minlength=count) > 0
    in_either = in_truth | (torch.bincount(predicted, minlength=count) > 0)
    options = {"num_classes": count, "average": "none", "validate_args": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of absent classes, which are left out below
        auc = tm.multiclass_auroc(probabilities, groups, **options)[in_truth].mean()
        ap = tm.multiclass_average_precision(probabilities, groups, **options)[in_truth].mean()
    metrics = {
        "accuracy": (predicted == groups).double().mean(),
        "balanced_accuracy": tm.multiclass_recall(predicted, groups, **options)[in_truth].mean(),
        "f1_macro": tm.multiclass_f1_score(predicted, groups, **options)[in_either].mean(),
        "precision_macro": tm.multiclass_precision(predicted, groups, **options)[in_either].mean(),
        "auc_macro_ovr": auc if in_truth.sum() > 1 else torch.nan,
        "ap_macro": ap,
        "within_one_group": ((predicted - groups).abs() <= 1).double().mean(),
    }
    if overlap is not None:
        metrics |= {"mask_iou": overlap["iou"].mean(), "mask_dice": overlap["dice"].mean()}
    return {name: float(value) for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------
# Intervals
# ------------------------------------------------------------------------------------------------------------


def resample(clusters, resamples=RESAMPLES, seed=0):
    """How often each of N faces is drawn in each bootstrap resample: int16 (resamples, N).

    clusters: int (N,); faces of one cluster (near-duplicates) are drawn together, since they tell the same
    thing. The same clusters and seed give the same draws, so that models can be compared face by face.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(clusters, return_inverse=True)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=len(names)).astype(np.int16)[index] for draw in draws])


def bootstrap(probabilities, groups, weights, overlap=None):
    """What `compute_metrics` gives for each resample of `weights` (R, N), from `resample`: {metric: (R,)}.

    Computed for all resamples at once from weighted counts, which takes a fortieth of the time.
    """
    scores, truth = probabilities.numpy(), groups.numpy()
    count = scores.shape[1]
    pairs = np.eye(count * count)[truth * count + probabilities.argmax(dim=1).numpy()]  # N×36
    draws = []
    for part in progress(np.array_split(weights, -(-len(weights) // 50)), "bootstrap"):
        part = part.astype(float)  # r×N
        faces = part.sum(axis=1)  # r
        matrix = (part @ pairs).reshape(-1, count, count)  # r×true×predicted
        right, true, guessed = (
            matrix.diagonal(axis1=1, axis2=2),
            matrix.sum(axis=2),
            matrix.sum(axis=1),
        )  # r×6
        areas = [rank_areas(scores[:, group], truth == group, part) for group in range(count)]
        auc, ap = (np.stack(values, axis=1) for values in zip(*areas))  # r×6
        values = {
            "accuracy": right.sum(axis=1) / faces,
            "balanced_accuracy": mean_over(right / np.maximum(true, 1), true > 0),
            "f1_macro": mean_over(2 * right / np.maximum(true + guessed, 1), true + guessed > 0),
            "precision_macro": mean_over(right / np.maximum(guessed, 1), true + guessed > 0),
            "auc_macro_ovr": np.where((true > 0).sum(axis=1) > 1, mean_over(auc, true > 0), np.nan),
            "ap_macro": mean_over(ap, true > 0),
            "within_one_group": sum(matrix.diagonal(k, 1, 2).sum(axis=1) for k in (-1, 0, 1)) / faces,
        }
        for name, per_face in (overlap or {}).items():
            values[f"mask_{name}"] = part @ per_face.double().numpy() / faces
        draws.append(values)
    return {name: np.concatenate([values[name] for values in draws]) for name in draws[0]}


def mean_over(values, present):
    """Mean over the classes that are present in each resample: (r, 6), bool (r, 6) → (r,)."""
    return np.where(present, values, 0).sum(axis=1) / present.sum(axis=1)


def rank_areas(scores, positive, weights):
    """Area under the ROC curve and average precision, each (r,), of faces that count `weights` (r, N) times.

    scores: (N,), the higher the likelier positive; positive: bool (N,). Zero where a resample lacks a side.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # faces of one score tie
    weights, positive = weights[:, order], positive[order]
    hits = np.cumsum(weights * positive, axis=1)[:, ends]  # r×E
    misses = np.cumsum(weights * ~positive, axis=1)[:, ends]
    new_hits, new_misses = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    roc = (new_misses * (hits - new_hits / 2)).sum(axis=1)
    precision = hits / np.maximum(hits + misses, 1)
    total = np.maximum(hits[:, -1], 1)
    return roc / (total * np.maximum(misses[:, -1], 1)), (new_hits * precision).sum(axis=1) / total


def interval(draws):
    """The 95 % percentile interval [low, high] of bootstrap draws (R,), those that are NaN left out."""
    draws = draws[~np.isnan(draws)]
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else [np.nan, np.nan]


def compare(first, second, seed=0):
    """How much higher a metric is under `first` than under `second`: the difference, and its 95 % interval.

    Each is a list over seeds of (value, bootstrap draws (R,)) on the same faces and resamples. Seeds are
    drawn anew with each resample, so the interval holds for other faces and, as far as so few can tell, for
    other seeds.
    """
    rng = np.random.default_rng(seed)
    means = []
    for runs in (first, second):
        draws = np.stack([draws for _, draws in runs])  # S×R
        chosen = rng.integers(len(runs), size=draws.shape)
        means.append(np.take_along_axis(draws, chosen, axis=0).mean(axis=0))
    difference = np.mean([value for value, _ in first]) - np.mean([value for value, _ in second])
    return float(difference), interval(means[0] - means[1])


# ------------------------------------------------------------------------------------------------------------
# Whom it fails
# ------------------------------------------------------------------------------------------------------------


def rates(predicted, groups, weights):
    """Accuracy, balanced accuracy and within-one-group accuracy under each of R weightings: dict of (R,).

    predicted, groups: int (N,); weights: (R, N). NaN where a resample has drawn no face.
    """
    weights, right, near = weights.astype(float), predicted == groups, np.abs(predicted - groups) <= 1
    with np.errstate(invalid="ignore"):
        members = [groups == group for group in np.unique(groups)]
        recalls = [weights[:, one] @ right[one] / weights[:, one].sum(axis=1) for one in members]
        return {
            "accuracy": weights @ right / weights.sum(axis=1),
            "balanced_accuracy": np.nansum(recalls, axis=0) / np.isfinite(recalls).sum(axis=0),
            "within_one_group": weights @ near / weights.sum(axis=1),
        }


def score_subgroups(predicted, groups, faces, weights):
    """Rates by age group, gender, race and the last two: a row a subgroup, and the widest gap of each kind.

    predicted, groups: int (N,); faces: N `Face`s; weights: (R, N) from `resample`. A gap lies between the
    highest and the lowest accuracy among subgroups of at least `SMALL` faces: (by, highest, lowest,
    difference, [low, high]).
    """
    gender = np.array([GENDERS[face.gender] for face in faces])
    race = np.array([RACES[face.race] for face in faces])
    both = np.array([f"{r}, {g}" for r, g in zip(race, gender)])
    orders = {
        "age group": (np.array(GROUP_NAMES)[groups], GROUP_NAMES),  # where accuracy is recall
        "gender": (gender, GENDERS),
        "race": (race, RACES),
        "race and gender": (both, [f"{r}, {g}" for r in RACES for g in GENDERS]),
    }
    rows, gaps = [], []
    for by, (label, names) in orders.items():
        large = []
        for name in names:
            members = np.flatnonzero(label == name)
            if not len(members):
                continue
            part = (predicted[members], groups[members])
            values, draws = rates(*part, np.ones((1, len(members)))), rates(*part, weights[:, members])
            row = {"by": by, "subgroup": name, "n": len(members), "small": int(len(members) < SMALL)}
            for metric, value in values.items():
                ends = zip(("", "_low", "_high"), (value[0], *interval(draws[metric])))
                row |= {metric + end: round(float(number), 6) for end, number in ends}
            rows.append(row)
            if not row["small"]:
                large.append((row["accuracy"], name, draws["accuracy"]))
        if len(large) > 1:
            high, low = max(large, key=lambda cell: cell[0]), min(large, key=lambda cell: cell[0])
            gaps.append((by, high[1], low[1], high[0] - low[0], interval(high[2] - low[2])))
    return rows, gaps


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
    """Draws the rates of `score_subgroups` with their intervals, small subgroups hollow, as PNG.

    overall: the rates of all faces, {metric: float}, drawn as a line.
    """
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 1.6 + 0.3 * len(rows)), sharey=True, layout="constrained", squeeze=False
    )
    kinds = list(dict.fromkeys(row["by"] for row in rows))
    for axis, metric in zip(axes[0], ("accuracy", "balanced_accuracy", "within_one_group")):
        axis.axvline(overall[metric], color="0.6", linestyle="--")
        for y, row in enumerate(rows):
            color = f"C{kinds.index(row['by'])}"
            axis.plot([row[metric + "_low"], row[metric + "_high"]], [y, y], color=color)
            axis.plot(row[metric], y, "o", color=color, fillstyle="none" if row["small"] else "full")
        axis.set(title=metric.replace("_", " "), ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axis.grid(alpha=0.3)
    labels = [f"{row['subgroup']} ({row['n']}{', small' if row['small'] else ''})" for row in rows]
    axes[0, 0].set_yticks(range(len(rows)), labels)
    figure.supxlabel(
        f"95 % bootstrap intervals; dashed: all faces; hollow: fewer than {SMALL} faces", fontsize=9
    )
    save_figure(figure, path)


def calibration_error(probabilities, groups):
    """Expected calibration error of the predicted group, `BINS` bins of equal width, 0 to 1."""
    return tm.multiclass_calibration_error(probabilities, groups, len(GROUP_NAMES), BINS).item()


def plot_reliability(path, variants, groups):
    """Draws accuracy against confidence, and how many faces have which confidence, as PNG.

    variants: {name: probabilities (N, 6)}; groups: int64 (N,).
    """
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.6, 6.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect")
    edges = np.linspace(0, 1, BINS + 1)
    for name, probabilities in variants.items():
        confidence, predicted = (values.numpy() for values in probabilities.max(dim=1))
        which = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, BINS - 1)
        counts = np.bincount(which, minlength=BINS)
        sums = [np.bincount(which, v, BINS) for v in (confidence, predicted == groups.numpy())]
        mean, accuracy = (total / np.maximum(counts, 1) for total in sums)
        error = calibration_error(probabilities, groups)
        label = f"{name}: expected calibration error {error:.1%}"
        (line,) = top.plot(mean[counts >= 20], accuracy[counts >= 20], "o-", label=label)
        few = (counts > 0) & (counts < 20)
        top.plot(mean[few], accuracy[few], "o", color=line.get_color(), fillstyle="none")
        bottom.stairs(counts, edges, linewidth=1.5)
    top.set(ylabel="accuracy", title=f"{len(groups)} faces", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left", fontsize=9)
    bottom.set(xlabel="confidence in the predicted group; hollow above: fewer than 20 faces", ylabel="faces")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_mistakes(path, scored, folder, count=40):
    """Draws the `count` wrong predictions of highest confidence with their labels, as PNG."""
    confidence = scored.probabilities.max(dim=1).values
    wrong = torch.nonzero(scored.predicted != scored.groups)[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True)][:count].tolist()
    columns, rows = 8, max(1, -(-len(chosen) // 8))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.75 * columns, 2.25 * rows + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen):
        axis.imshow(read_image(folder / scored.files[i])[:, :, ::-1])
        true, predicted = GROUP_NAMES[scored.groups[i]], GROUP_NAMES[scored.predicted[i]]
        text = f"{true} ({scored.faces[i].age})\ntaken for {predicted}\n{confidence[i]:.0%} sure"
        axis.set_title(text, fontsize=8)
    figure.suptitle(f"{len(chosen)} of {len(wrong)} mistakes, the most confident first; labels may be wrong")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------
# One model
# ------------------------------------------------------------------------------------------------------------


def evaluate(scored, out, args):
    """Adds metrics and their bootstrap draws to what `predict` returned; writes the files of one model."""
    weights = resample(scored.clusters, seed=args.seed)
    probabilities, groups = scored.probabilities, scored.groups
    scored.metrics = compute_metrics(probabilities, groups, scored.overlap)
    scored.draws = bootstrap(probabilities, groups, weights, scored.overlap)
    scored.intervals = {name: interval(draws) for name, draws in scored.draws.items()}
    scored.absent = [name for group, name in enumerate(GROUP_NAMES) if group not in groups]
    scored.ece = calibration_error(probabilities, groups)
    scored.subgroups, scored.gaps = score_subgroups(
        scored.predicted.numpy(), groups.numpy(), scored.faces, weights
    )
    right = (scored.predicted == groups).numpy()
    leaks = {
        "n": int(scored.leaked.sum()),
        "accuracy": float(right[scored.leaked].mean()) if scored.leaked.any() else None,
        "accuracy_of_the_rest": float(right[~scored.leaked].mean()) if not scored.leaked.all() else None,
    }
    scored.leaks = leaks

    def rounded(value):
        return None if np.isnan(value) else round(value, 6)

    summary = {
        **{
            name: {"value": rounded(value), "ci95": [rounded(end) for end in scored.intervals[name]]}
            for name, value in scored.metrics.items()
        },
        "n": len(groups),
        "absent_classes": scored.absent,
        "expected_calibration_error": rounded(scored.ece),
        "temperature": scored.temperature if args.temperature_scaling else 1.0,
        "seen_in_training": int(scored.seen.sum()),
        "near_duplicates_in_train": leaks,
        "checkpoint": str(scored.path),
        "split": args.split,
        "bootstrap_resamples": RESAMPLES,
    }
    with atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_csv(
        out / "predictions.csv",
        [
            {
                "file": scored.files[i],
                "age": scored.faces[i].age,
                "true": int(groups[i]),
                "predicted": int(scored.predicted[i]),
                **{f"p{group}": f"{p:.6f}" for group, p in enumerate(probabilities[i].tolist())},
            }
            for i in range(len(groups))
        ],
    )
    matrix = tm.multiclass_confusion_matrix(scored.predicted, groups, len(GROUP_NAMES)).numpy()
    plot_confusion_matrix(out / "confusion_matrix.png", matrix)
    write_csv(out / "subgroups.csv", scored.subgroups)
    plot_subgroups(out / "subgroups.png", scored.subgroups, scored.metrics)
    variants = {"as trained": scored.logits.softmax(dim=1)}
    if scored.temperature is not None:
        name = f"temperature {scored.temperature:.2f}"
        variants[name] = (scored.logits / scored.temperature).softmax(dim=1)
    plot_reliability(out / "reliability.png", variants, groups)
    plot_mistakes(out / "mistakes.png", scored, Path(args.data) / args.split)


def print_one(scored, args):
    """Prints what `evaluate` has found of one model: metrics, calibration, leaks, subgroups and gaps."""
    print(
        f"{scored.path} on {len(scored.files)} faces of {args.data}/{args.split}, 95 % bootstrap intervals:"
    )
    for name, value in scored.metrics.items():
        low, high = scored.intervals[name]
        print(f"  {LABELS[name]:34}{value:7.2%}  [{low:.2%}, {high:.2%}]")
    if scored.absent:
        print(f"  absent from the truth and left out of macro averages: {', '.join(scored.absent)}")
    scaled = f"at temperature {scored.temperature:.2f}" if args.temperature_scaling else "without scaling"
    print(f"  expected calibration error        {scored.ece:7.2%}  {scaled}")
    if scored.leaks["n"]:
        rest = scored.leaks["accuracy_of_the_rest"]
        print(
            f"  {scored.leaks['n']} faces have a near-duplicate in train: accuracy "
            f"{scored.leaks['accuracy']:.2%} on them" + (f", {rest:.2%} on the rest" if rest else "")
        )
    print(f"\n  {'':16}{'faces':>6}{'accuracy':>26}{'balanced':>26}{'within one group':>26}")
    for row in scored.subgroups:
        cells = (
            f"{row[m]:10.1%} [{row[m + '_low']:.1%}, {row[m + '_high']:.1%}]"
            for m in ("accuracy", "balanced_accuracy", "within_one_group")
        )
        name = f"{row['subgroup']:16}{row['n']:5}{'*' if row['small'] else ' '}"
        print(f"  {name}" + "".join(f"{cell:>26}" for cell in cells))
    if any(row["small"] for row in scored.subgroups):
        print(f"  * fewer than {SMALL} faces: little can be said")
    for by, high, low, gap, (start, end) in scored.gaps:
        print(f"  widest gap by {by}: {high} above {low} by {gap:.1%} [{start:.1%}, {end:.1%}] of accuracy")


# ------------------------------------------------------------------------------------------------------------
# Many models
# ------------------------------------------------------------------------------------------------------------


def describe(checkpoint):
    """What a model was made with, its seed apart: the table's first three columns, and all other settings."""
    config, pretraining = dict(checkpoint["config"]), dict(checkpoint["pretraining"])
    start = config.pop("init", "")
    if "positives" in pretraining:
        start = f"contrastive ({pretraining['positives']})"
        if pretraining.get("init") == "imagenet":
            start = f"ImageNet, then {start}"
        if pretraining.get("init") in ("random", "imagenet"):
            del pretraining["init"]
    elif pretraining:
        start = "fine-tuned"
    config.pop("seed", None)
    row = {
        "LR strategy": config.pop("lr_strategy", ""),
        "Task": "multitask" if config.pop("multitask", False) else "classification",
        "Pretrained weights": "ImageNet" if start == "imagenet" else start,
    }
    config |= {
        f"pretraining {key}": value for key, value in pretraining.items() if key not in ("seed", "positives")
    }
    return row, config


ORDER = ["uniform", "differentiated", "classification", "multitask"]
ORDER += ["random", "ImageNet", "contrastive (view)", "contrastive (age)"]


def group_by_configuration(many):
    """Sorts scored models into configurations: a list of (columns, runs), and the settings all share.

    columns: the table's first ones, among them "Other settings" where the rest does not agree.
    """
    described = [(*describe(scored.checkpoint), scored) for scored in many]
    keys = {key for _, settings, _ in described for key in settings}
    for _, settings, _ in described:  # an older checkpoint may lack one; only pretraining's may be missing
        settings |= {key: "unset" for key in keys - settings.keys() if not key.startswith("pretraining ")}
    shared, differing = {}, []
    for key in sorted(keys):
        values = {json.dumps(settings[key]) for _, settings, _ in described if key in settings}
        if len(values) == 1:
            shared[key] = next(iter(values)).strip('"')
        else:
            differing.append(key)
    found = {}
    for columns, settings, scored in described:
        if differing:
            columns["Other settings"] = ", ".join(
                f"{key.replace('_', '-')} {settings[key]}" for key in differing if key in settings
            )
        found.setdefault(tuple(columns.items()), []).append(scored)
    rows = [(dict(columns), sorted(runs, key=seed_of)) for columns, runs in found.items()]

    def position(row):
        return [(ORDER.index(v) if v in ORDER else len(ORDER), v) for v in row[0].values()]

    return sorted(rows, key=position), shared


def seed_of(scored):
    return scored.checkpoint["config"].get("seed", 0)


def format_metric(runs, name):
    """A cell of the table, in percent: mean ± standard deviation over seeds, or value [95 % interval]."""
    values = [100 * scored.metrics.get(name, np.nan) for scored in runs]
    if np.isnan(values).any():
        return "–"
    if len(runs) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    low, high = runs[0].intervals[name]
    return f"{values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def write_table(many, args):
    """The table over configurations and, between those that differ in one respect, the differences."""
    configurations, shared = group_by_configuration(many)
    for _, runs in configurations:
        if len({seed_of(scored) for scored in runs}) < len(runs):
            names = ", ".join(str(scored.path) for scored in runs)
            print(
                f"warning: taken for seeds of one configuration, two of them alike: {names}", file=sys.stderr
            )
    faces = f"{len(many[0].files)} faces of {args.data}/{args.split}"
    header = [*configurations[0][0], *COLUMNS.values(), "Seeds"]
    rows = [
        [
            *columns.values(),
            *(format_metric(runs, name) for name in COLUMNS),
            ", ".join(str(seed_of(scored)) for scored in runs),
        ]
        for columns, runs in configurations
    ]
    text = f"In percent, on {faces}: mean ± standard deviation over seeds, or for one seed "
    text += "[95 % bootstrap interval].\n"
    text += f"All: {', '.join(f'{key} {value}' for key, value in shared.items())}.\n\n"
    text += markdown(header, rows)
    pairs = []
    for (first, runs), (second, others) in combinations(configurations, 2):
        differ = [key for key in first if first[key] != second[key]]
        if len(differ) == 1 or len(configurations) == 2:
            cells = []
            for name in COMPARED:
                a, b = ([(s.metrics[name], s.draws[name]) for s in side] for side in (others, runs))
                difference, (low, high) = compare(a, b, args.seed)
                cells.append(f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
            what = (", ".join(side[key] for key in differ) for side in (second, first))
            where = ", ".join(value for key, value in first.items() if key not in differ)
            pairs.append([" − ".join(what), where, *cells])
    if pairs:
        text += (
            "\nDifferences in points, with 95 % intervals of a paired bootstrap over faces and seeds. One "
        )
        text += "interval in twenty misses zero by chance alone.\n\n"
        text += markdown(["Difference", "Where", *(COLUMNS[name] for name in COMPARED)], pairs)
    with atomic_path(Path(args.out) / "table.md", sync=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print("\n" + text)


def choose_models(paths):
    """The checkpoints to score: of several, resumable states and contrastive ones are skipped with a line."""
    paths = list(dict.fromkeys(Path(path) for path in paths))
    if len(paths) == 1:
        return paths
    kinds = {
        path: "last" if path.name.endswith(".last.pt") else load_checkpoint(path, tuple(CONTENT))["kind"]
        for path in paths
    }
    models = [path for path in paths if kinds[path] == "model"]
    skipped = [path.name for path in paths if kinds[path] != "model"]
    if skipped:
        print(f"skipped, being no finished models: {', '.join(skipped)}")
    if not models:
        raise UserError(f"none of the {len(paths)} files is a model: run finetune.py first")
    return models


def get_parser():
    parser = script_parser("evaluate", __doc__)
    parser.add_argument("checkpoint", nargs="*", default=["model.pt"], help="models written by finetune.py")
    parser.add_argument("--data", default="dataset/processed_split", help="folder written by split.py")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test", help="part to score")
    parser.add_argument("--out", default="results", help="folder to write")
    parser.add_argument(
        "--temperature-scaling",
        action="store_true",
        help="divide logits by the temperature that finetune.py fitted on val",
    )
    add_device_flags(parser)
    return parser


def main(args):
    device = choose_device(args.device)
    check_writable("--out", args.out)
    paths, out, datasets = choose_models(args.checkpoint), Path(args.out), {}
    if len(paths) == 1:
        scored = predict(paths[0], args, device, datasets)
        evaluate(scored, out, args)
        print_one(scored, args)
        print(
            f"{out} written: metrics.json, predictions.csv, subgroups.csv, confusion_matrix.png, "
            "subgroups.png, reliability.png, mistakes.png"
        )
        return
    many, top = [], os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    for path in progress(paths, "models", unit="model"):
        scored = predict(path, args, device, datasets)
        evaluate(scored, out / Path(os.path.relpath(path, top)).with_suffix(""), args)
        low, high = scored.intervals["accuracy"]
        print(f"{path}: accuracy {scored.metrics['accuracy']:.2%} [{low:.2%}, {high:.2%}]")
        many.append(scored)
    write_table(many, args)
    print(f"{out} written: table.md, and a folder for each of {len(many)} models")


if __name__ == "__main__":
    run(main, get_parser())
