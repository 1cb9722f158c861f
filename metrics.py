"""Metrics of N faces and their 95 % intervals. No torch.

Faces of one cluster are near-duplicates, and count once.
"""

import numpy as np
from scipy.special import expit, logit

from utkface import GROUP_NAMES

RESAMPLES = 1000  # of the bootstrap, of the permutation test, and of perfectly calibrated outcomes
BINS = 15  # of confidence, for calibration (Guo et al. 2017)
Z = 1.959964  # standard deviations that a 95 % interval reaches to each side

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
    "range_coverage": "80 % range of years covers",
    "range_width": "its width in years",
    "mask_iou": "mask IoU (mean over faces)",
    "mask_dice": "mask Dice (mean over faces)",
}
IN_YEARS = ("mae_years", "range_width")
SHARES = ("accuracy", "within_one_group", "within_five_years", "range_coverage")  # a face counts 0 or 1


def score(probabilities, groups, weights, per_face):
    """Every metric under each of R weightings, in the order of `METRICS`: {metric: (R,)}.

    probabilities: (N, 6); groups: int (N,); weights: (R, N), how often each face counts: ones for the value,
    draws of the bootstrap for its interval; per_face: {metric: (N,)}, averaged. Recall, AUC and AP average
    over the classes present in `groups`, F1 and precision over those present or predicted.
    """
    weights = weights.astype(float)
    matrix = confusion_matrix(probabilities.argmax(axis=1), groups, weights)  # R×true×predicted
    right, true, guessed = matrix.diagonal(0, 1, 2), matrix.sum(axis=2), matrix.sum(axis=1)  # R×6
    present, either = true > 0, true + guessed > 0
    areas = [rank_areas(probabilities[:, g], groups == g, weights) for g in range(len(GROUP_NAMES))]
    auc, ap = np.stack(areas, axis=2).mean(axis=2, where=present)  # R each
    values = {
        "balanced_accuracy": (right / np.maximum(true, 1)).mean(axis=1, where=present),
        "f1_macro": (2 * right / np.maximum(true + guessed, 1)).mean(axis=1, where=either),
        "precision_macro": (right / np.maximum(guessed, 1)).mean(axis=1, where=either),
        "auc_macro_ovr": np.where(present.sum(axis=1) > 1, auc, np.nan),
        "ap_macro": ap,
        **{name: weights @ column / weights.sum(axis=1) for name, column in per_face.items()},
    }
    return {name: values[name] for name in METRICS if name in values}


def confusion_matrix(predicted, groups, weights):
    """Counts (R, 6, 6), true groups in rows: predicted, groups int (N,); weights (R, N)."""
    count = len(GROUP_NAMES)
    return (weights @ np.eye(count**2)[groups * count + predicted]).reshape(-1, count, count)


def rank_areas(scores, positive, weights):
    """Area under the ROC curve and average precision, (R,) each; zero where a side is missing.

    scores: (N,), the higher the likelier positive; positive: bool (N,); weights: (R, N).
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


def effective_faces(clusters):
    """How many unrelated faces N faces are worth: N² / Σ m² over the m faces of each cluster (Kish 1965)."""
    return len(clusters) ** 2 / (np.bincount(clusters) ** 2).sum()


def wilson(share, count):
    """The 95 % interval [low, high] of a share of `count` faces (Wilson 1927)."""
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return [float(max(middle - half, 0) / scale), float(min((middle + half) / scale, 1))]


def resample(clusters, resamples=RESAMPLES, seed=0):
    """How often each of N faces is drawn in each bootstrap resample: int16 (resamples, N).

    Clusters, int (N,), are drawn whole. One seed draws alike, so that models are compared face by face.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(clusters, return_inverse=True)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=len(names)).astype(np.int16)[index] for draw in draws])


def interval(draws):
    """The 95 % percentile interval [low, high] of draws (R,), those that are NaN left out."""
    draws = draws[~np.isnan(draws)]
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else [np.nan, np.nan]


def logit_interval(value, draws):
    """The 95 % interval of a value from 0 to 1, normal in log-odds, by the deviation of draws (R,).

    For average precision, of which draws lie too high: copies of a face share a rank (Boyd et al. 2013).
    """
    odds = logit(np.clip([value, *draws], 1e-9, 1 - 1e-9))
    half = Z * odds[1:].std()
    return expit([odds[0] - half, odds[0] + half]).tolist()


def balanced_accuracy(right, groups, clusters):
    """Balanced accuracy, and of how many unrelated faces a share has the same variance, for `wilson`.

    right: bool (N,); groups, clusters: int (N,). A right and a wrong face more in each group keep the
    variance above zero (Agresti and Caffo 2000).
    """
    parts = [groups == group for group in np.unique(groups)]
    shares = np.array([(right[part].sum() + 1) / (part.sum() + 2) for part in parts])
    faces = np.array([effective_faces(clusters[part]) for part in parts])
    variance = (shares * (1 - shares) / faces).sum() / len(parts) ** 2
    value = np.mean([right[part].mean() for part in parts])
    return value, shares.mean() * (1 - shares.mean()) / variance


def gap_p_value(right, labels, clusters, seed=0, shuffles=RESAMPLES):
    """The share of permutations of the labels that give as wide a gap in accuracy: above 0, at most 1.

    right: bool (N,); labels, clusters: (N,). Clusters of one size swap their labels, so that they stay whole.
    """
    rng = np.random.default_rng(seed)
    labels = np.unique(labels, return_inverse=True)[1]
    counts, order = np.bincount(labels), np.argsort(clusters, kind="stable")
    sizes = np.bincount(clusters)[clusters[order]]  # of each face's cluster
    blocks = [order[sizes == size].reshape(-1, size) for size in np.unique(sizes)]  # clusters×size each
    gaps, shuffled = [np.ptp(np.bincount(labels, right) / counts)], labels.copy()
    for _ in range(shuffles):
        for block in blocks:
            shuffled[block] = labels[rng.permutation(block)]
        gaps.append(np.ptp(np.bincount(shuffled, right) / counts))
    return float(np.mean(np.array(gaps) >= gaps[0] - 1e-9))


def calibration_error(confidence, right):
    """Expected calibration error, 0 to 1, of the predicted groups: confidence (N,), right bool (N,)."""
    sums, _ = np.histogram(confidence, BINS, (0, 1), weights=right - confidence)
    return float(np.abs(sums).sum() / len(right))


def perfect_calibration(confidence, clusters, seed=0):
    """Mean and 95 % range of the calibration error if outcomes had the probability `confidence` (N,).

    It is above zero, since few faces fall into a bin. Faces of a cluster, int (N,), are drawn together.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(clusters, return_inverse=True)
    drawn = (rng.random(len(names))[index] < confidence for _ in range(RESAMPLES))
    errors = np.array([calibration_error(confidence, right) for right in drawn])
    return {"mean": float(errors.mean()), "range95": interval(errors)}
