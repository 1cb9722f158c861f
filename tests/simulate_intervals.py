"""How often the intervals of evaluate.py and tools/table.py hold, beside what they replaced.

    python tests/simulate_intervals.py

Every figure is of simulated faces with fixed seeds, where the truth is known. "before" is the percentile
bootstrap (over near-duplicate groups and, for differences, over seeds as well), and for the last three lines
a reference that counts near-duplicates as separate faces. Takes three minutes at most on two cores.
"""

import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "tools")]

import metrics
from metrics import (
    balanced_accuracy,
    calibration_error,
    effective_faces,
    gap_p_value,
    interval,
    logit_interval,
    perfect_calibration,
    rank_areas,
    resample,
    wilson,
)
from table import compare

FACES = 1895
RACES = (787, 356, 287, 338, 127)  # faces of each, of which no gap is real
NORMAL = NormalDist()


def report(what, wanted, before, after, trials):
    """A line: the share of `trials` data sets, as it should be and as it is."""
    noise = 1.96 * (wanted * (1 - wanted) / trials) ** 0.5
    before = "" if before is None else f"{before:.1%}"
    after = "" if after is None else f"{after:.1%}"
    print(f"{what:72}{before:>8}{after:>8}{f'{wanted:.1%} ± {noise:.1%}':>16}", flush=True)


def widest_gaps(trials=200):
    """A gap is found although all subgroups have the same accuracy."""
    weights = resample(np.arange(FACES), 400).astype(float)
    for what, counts in (("race", RACES), ("race and gender", [n // 2 for n in RACES for _ in range(2)])):
        labels, rng = np.repeat(np.arange(len(counts)), counts), np.random.default_rng(1)
        members, used = np.eye(len(counts))[labels], weights[:, : len(labels)]
        faces, found = used @ members, np.zeros(2)
        large = [k for k, n in enumerate(counts) if n >= 100]
        for trial in range(trials):
            right = rng.random(len(labels)) < 0.76
            shares, draws = right @ members / counts, used @ (members * right[:, None]) / faces
            high, low = max(large, key=lambda k: shares[k]), min(large, key=lambda k: shares[k])
            inside = np.isin(labels, large)
            p = gap_p_value(right[inside], labels[inside], np.flatnonzero(inside), trial, shuffles=199)
            found += interval(draws[:, high] - draws[:, low])[0] > 0, p <= 0.05
        report(f"1. a gap by {what} is found where there is none", 0.05, *found / trials, trials)


def old_compare(first, second, rng):
    """The interval as it was: faces and seeds drawn anew with each resample."""
    means = []
    for runs in (first, second):
        draws = np.stack([drawn for _, drawn in runs])
        chosen = rng.integers(len(runs), size=draws.shape)
        means.append(np.take_along_axis(draws, chosen, axis=0).mean(axis=0))
    return interval(means[0] - means[1])


def differences(trials=200):
    """Two configurations equally good on average; their seeds differ, and each face is hard for some."""
    weights = resample(np.arange(FACES), 400).astype(float) / FACES
    for seeds in (1, 3, 5):
        for spread in (0.5, 2):
            rng, held = np.random.default_rng(seeds), np.zeros(3)
            for _ in range(trials):
                hard, sides, truths = rng.normal(size=FACES), [], []
                for _ in range(2):
                    own = hard + 0.3 * rng.normal(size=FACES)  # what is hard for a configuration
                    truth = 0.76 + spread / 100 * rng.normal(size=seeds)
                    noise = 0.4 * rng.normal(size=(seeds, FACES))  # and for one of its models
                    scale = (1 + 0.3**2 + 0.4**2) ** 0.5
                    cut = np.array([NORMAL.inv_cdf(share) for share in truth]) * scale
                    right = (own + noise < cut[:, None]).astype(float)  # S×N
                    sides.append(list(zip(right.mean(axis=1), right @ weights.T)))
                    truths.append(truth.mean())
                low, high = old_compare(*sides, rng)
                _, (new_low, new_high), _ = compare(*sides)
                trained = truths[0] - truths[1]
                held += low <= 0 <= high, new_low <= 0 <= new_high, new_low <= trained <= new_high
            before, zero, trained = held / trials
            what = f"2. a difference of zero is covered, {seeds} seeds a side, sd {spread} points"
            if seeds < 3:
                report(what, 0.95, before, None, trials)
                report("   that of these trained models is covered", 0.95, None, trained, trials)
            else:
                report(what, 0.95, before, zero, trials)


def shares(trials=2000):
    """Shares near one, of faces alone and with a tenth of them in pairs of near-duplicates that agree."""
    for count, pairs in ((118, 0), (118, 12), (FACES, 0), (FACES, 190)):
        clusters = np.r_[np.repeat(np.arange(pairs), 2), pairs + np.arange(count - 2 * pairs)]
        weights = resample(clusters, 400).astype(float)
        for share in (0.98, 0.994):
            rng, held = np.random.default_rng(2), np.zeros(2)
            right = (rng.random((trials, clusters.max() + 1)) < share)[:, clusters].astype(float)
            draws = right @ weights.T / weights.sum(axis=1)  # trials×R
            for values, drawn in zip(right, draws):
                for i, (low, high) in enumerate(
                    (np.percentile(drawn, [2.5, 97.5]), wilson(values.mean(), effective_faces(clusters)))
                ):
                    held[i] += low <= share <= high
            what = f"3. a share of {share:.1%} of {count} faces, {pairs} pairs, is covered"
            report(what, 0.95, *held / trials, trials)


def draw_answers(count, rng):
    """True groups (N,) and probabilities (N, 6) of a model that is right in 77 % of the faces, as often as it
    says, with the groups as frequent as in UTKFace."""
    frequency = np.array([0.10, 0.07, 0.14, 0.45, 0.16, 0.08])
    seen = rng.choice(6, count, p=frequency) + rng.normal(0, 0.42, count)
    logits = np.log(frequency) - (seen[:, None] - np.arange(6)) ** 2 / (2 * 0.42**2)  # N×6
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return (rng.random(count)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1).clip(max=5), probabilities


def average_precision(groups, probabilities, weights):
    """Macro average precision (R,) under weights (R, N)."""
    areas = [rank_areas(probabilities[:, g], groups == g, weights)[1] for g in range(6)]
    return np.stack(areas, axis=1).mean(axis=1, where=weights @ np.eye(6)[groups] > 0)


def macro_recall(groups, guesses, weights):
    """Balanced accuracy (R,) under weights (R, N)."""
    matrix = metrics.confusion_matrix(guesses, groups, weights)
    counts = matrix.sum(axis=2)  # R×6
    return (matrix.diagonal(0, 1, 2) / np.maximum(counts, 1)).mean(axis=1, where=counts > 0)


def macro_averages():
    """Average precision, and balanced accuracy of small subgroups, each of a model known from many faces."""
    rng = np.random.default_rng(4)
    groups, probabilities = draw_answers(300_000, rng)
    once = np.ones((1, len(groups)))
    true_precision = average_precision(groups, probabilities, once)[0]
    true_recall = macro_recall(groups, probabilities.argmax(axis=1), once)[0]
    for count, trials in ((300, 1000), (FACES, 200)):
        weights, held = resample(np.arange(count), 300).astype(float), np.zeros(2)
        for _ in range(trials):
            answers = draw_answers(count, rng)
            value = average_precision(*answers, np.ones((1, count)))[0]
            draws = average_precision(*answers, weights)
            ends = np.array([interval(draws), logit_interval(value, draws)])  # 2×2
            held += (ends[:, 0] <= true_precision) & (true_precision <= ends[:, 1])
        report(f"4. average precision of {count} faces is covered", 0.95, *held / trials, trials)
    for count, trials in ((45, 2000), (90, 2000), (143, 2000)):
        weights, held = resample(np.arange(count), 300).astype(float), np.zeros(2)
        for _ in range(trials):
            groups, probabilities = draw_answers(count, rng)
            guesses = probabilities.argmax(axis=1)
            draws = macro_recall(groups, guesses, weights)
            found = wilson(*balanced_accuracy(guesses == groups, groups, np.arange(count)))
            ends = np.array([interval(draws), found])  # 2×2
            held += (ends[:, 0] <= true_recall) & (true_recall <= ends[:, 1])
        report(
            f"5. balanced accuracy of a subgroup of {count} faces is covered", 0.95, *held / trials, trials
        )


def calibration(trials=400):
    """A perfect model lies in the range that is printed for one, however many faces have near-duplicates."""
    rng = np.random.default_rng(3)
    metrics.RESAMPLES = 200
    for share in (0, 0.1, 0.3):
        pairs, held = int(share * FACES / 2), np.zeros(2)
        clusters = np.r_[np.repeat(np.arange(pairs), 2), pairs + np.arange(FACES - 2 * pairs)]
        for trial in range(trials):
            confidence = (0.4 + 0.6 * rng.beta(3, 1.5, FACES))[clusters]
            right = rng.random(FACES)[clusters] < confidence
            for i, counted in enumerate((np.arange(FACES), clusters)):
                perfect = perfect_calibration(confidence, counted, trial)
                held[i] += calibration_error(confidence, right) > perfect["range95"][1]
        what = f"6. a perfect model looks miscalibrated, {share:.0%} of the faces in pairs"
        report(what, 0.025, *held / trials, trials)


if __name__ == "__main__":
    print(f"{'':72}{'before':>8}{'after':>8}{'should be':>16}")
    widest_gaps()
    differences()
    shares()
    macro_averages()
    calibration()
