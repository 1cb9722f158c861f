"""Scores a checkpoint on faces it has not learned from: metrics with intervals, confusion matrix.

    python evaluate.py
    python evaluate.py model.pt --data dataset/processed_split --split test --out results

Writes metrics.json, predictions.csv and confusion_matrix.png to --out.
"""

import csv
import json
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torchmetrics.functional import classification as tm

from common import (
    GROUP_NAMES,
    FaceDataset,
    MultitaskResNet18,
    UserError,
    add_device_flags,
    atomic_path,
    check_writable,
    choose_device,
    choose_precision,
    load_checkpoint,
    predict_dataset,
    progress,
    run,
    script_parser,
    write_csv,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESAMPLES = 1000

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


def load_model(path, device):
    """The model of a checkpoint written by finetune.py, in eval mode, and the checkpoint itself."""
    checkpoint = load_checkpoint(path, "model")
    model = MultitaskResNet18(len(GROUP_NAMES), checkpoint["config"].get("multitask"))
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError:
        raise UserError(f"{path} is damaged: its weights do not fit the model; train again") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


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


def bootstrap(probabilities, groups, clusters, overlap=None, resamples=RESAMPLES, seed=0):
    """95 % percentile intervals {metric: [low, high]} over `resamples` draws of faces with replacement.

    clusters: int (N,); faces of one cluster (near-duplicates) are drawn together, since they tell the same
    thing.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    draws = []
    for _ in progress(range(resamples), "bootstrap"):
        chosen = rng.integers(len(members), size=len(members))
        index = torch.from_numpy(np.concatenate([members[i] for i in chosen]))
        part = None if overlap is None else {name: values[index] for name, values in overlap.items()}
        draws.append(compute_metrics(probabilities[index], groups[index], part))
    intervals = {}
    for name in draws[0]:
        values = [draw[name] for draw in draws if not np.isnan(draw[name])] or [np.nan]
        intervals[name] = np.percentile(values, [2.5, 97.5]).tolist()
    return intervals


def read_clusters(data, files):
    """Near-duplicate group of each file, int (N,), from the split's table if there is one."""
    first = {}
    if (Path(data) / "split.csv").is_file():
        with open(Path(data) / "split.csv", newline="", encoding="utf-8") as file:
            first = {row["file"]: row["duplicate_of"] for row in csv.DictReader(file)}
    return np.unique([first.get(name) or name for name in files], return_inverse=True)[1]


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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def get_parser():
    parser = script_parser("evaluate", __doc__)
    parser.add_argument("checkpoint", nargs="?", default="model.pt", help="model written by finetune.py")
    parser.add_argument("--data", default="dataset/processed_split", help="folder written by split.py")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test", help="part to score")
    parser.add_argument("--out", default="results", help="folder to write")
    add_device_flags(parser)
    return parser


def main(args):
    device = choose_device(args.device)
    check_writable("--out", args.out)
    model, checkpoint = load_model(args.checkpoint, device)
    dataset = FaceDataset(
        Path(args.data) / args.split,
        checkpoint["preprocessing"]["image_size"],
        with_masks=checkpoint["config"]["multitask"],
        workers=args.workers,
    )
    seen = int(np.isin(dataset.hashes, checkpoint["train_hashes"].numpy()).sum())
    if seen:
        print(
            f"warning: {args.checkpoint} was trained on {seen} of these {len(dataset)} faces", file=sys.stderr
        )
    logits, overlap = predict_dataset(model, dataset, device, choose_precision(args.precision, device))
    probabilities, groups = logits.double().softmax(dim=1), torch.from_numpy(dataset.groups)
    predicted = probabilities.argmax(dim=1)
    files = [f"{face.stem}_image.png" for face in dataset.faces]

    values = compute_metrics(probabilities, groups, overlap)
    intervals = bootstrap(probabilities, groups, read_clusters(args.data, files), overlap, seed=args.seed)
    absent = [name for group, name in enumerate(GROUP_NAMES) if group not in dataset.groups]
    rounded = {
        name: {
            "value": None if np.isnan(value) else round(value, 6),
            "ci95": [None if np.isnan(end) else round(end, 6) for end in intervals[name]],
        }
        for name, value in values.items()
    }
    summary = {
        **rounded,
        "n": len(dataset),
        "absent_classes": absent,
        "seen_in_training": seen,
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "bootstrap_resamples": RESAMPLES,
    }
    out = Path(args.out)
    with atomic_path(out / "metrics.json", sync=True) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_csv(
        out / "predictions.csv",
        [
            {
                "file": files[i],
                "age": int(dataset.ages[i]),
                "true": int(groups[i]),
                "predicted": int(predicted[i]),
                **{f"p{group}": f"{p:.6f}" for group, p in enumerate(probabilities[i].tolist())},
            }
            for i in range(len(dataset))
        ],
    )
    matrix = tm.multiclass_confusion_matrix(predicted, groups, len(GROUP_NAMES)).numpy()
    plot_confusion_matrix(out / "confusion_matrix.png", matrix)

    print(f"{args.checkpoint} on {len(dataset)} faces of {args.data}/{args.split}, 95 % bootstrap intervals:")
    for name, value in values.items():
        low, high = intervals[name]
        print(f"  {LABELS[name]:34}{value:7.2%}  [{low:.2%}, {high:.2%}]")
    if absent:
        print(f"  absent from the truth and left out of macro averages: {', '.join(absent)}")
    print(f"{out} written: metrics.json, predictions.csv, confusion_matrix.png")


if __name__ == "__main__":
    run(main, get_parser())
