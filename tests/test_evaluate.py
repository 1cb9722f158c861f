import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logit
from sklearn import metrics as sk

import evaluate
import metrics
from common import FaceDataset, MultitaskResNet18, save_checkpoint
from conftest import ROOT, noise_pairs, write_pair
from evaluate import Evaluation, measure, read_split_table, score_model, score_subgroups
from utkface import GROUP_NAMES, Face, pixel_hash, read_image

PNGS = ("confusion_matrix", "mistakes", "reliability", "subgroups")
CPU = ["--device", "cpu", "--workers", 0]


# ------------------------------------------------------------------------------------------------------------
# Metrics and intervals
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [3]])
def test_metrics_equal_scikit_learn_on_the_faces_drawn(groups):
    """Under any weights, with ties, with classes that are absent, and with one that is never predicted."""
    rng = np.random.default_rng(0)
    truth = rng.choice(groups, size=300)
    scores = rng.normal(size=(300, 6)) + 1.2 * np.eye(6)[truth]
    probabilities = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)).round(1)
    probabilities[:, 5] *= 1e-6
    per_face = {"mask_iou": rng.random(300), "mae_years": rng.random(300)}
    weights = np.stack([np.ones(300, int), *rng.integers(3, size=(3, 300))])
    found = metrics.score(probabilities, truth, weights, per_face)
    for i, row in enumerate(weights):
        p, t = np.repeat(probabilities, row, axis=0), np.repeat(truth, row)
        predicted, one_hot, present = p.argmax(axis=1), np.eye(6)[t], np.unique(t)
        average = {"labels": np.union1d(t, predicted), "average": "macro", "zero_division": 0}
        areas = [np.nan]
        if len(present) > 1:
            areas = [sk.roc_auc_score(one_hot[:, g], p[:, g]) for g in present]
        expected = {
            "balanced_accuracy": sk.recall_score(t, predicted, labels=present, average="macro"),
            "f1_macro": sk.f1_score(t, predicted, **average),
            "precision_macro": sk.precision_score(t, predicted, **average),
            "auc_macro_ovr": np.mean(areas),
            "ap_macro": np.mean([sk.average_precision_score(one_hot[:, g], p[:, g]) for g in present]),
            **{name: np.repeat(values, row).mean() for name, values in per_face.items()},
        }
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected, nan_ok=True)


def test_wilson_equals_scipy_and_near_duplicates_count_once():
    for right, count in ((0, 20), (7, 20), (118, 118), (1883, 1895)):
        expected = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert metrics.wilson(right / count, count) == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert metrics.effective_faces(np.arange(50)) == 50
    assert metrics.effective_faces(np.repeat(np.arange(50), 3)) == pytest.approx(50)
    assert metrics.effective_faces(np.array([4, 4, 1, 2])) == pytest.approx(16 / 6)


def test_balanced_accuracy_is_worth_the_faces_of_a_share_with_its_variance():
    right, groups = np.arange(40) % 4 > 0, np.repeat([2, 5], [8, 32])
    right[:8] = True
    value, faces = metrics.balanced_accuracy(right, groups, np.arange(40))
    assert value == pytest.approx((1 + 0.75) / 2)
    shares = np.array([9 / 10, 25 / 34])
    variance = (shares * (1 - shares) / [8, 32]).sum() / 4
    assert faces == pytest.approx(shares.mean() * (1 - shares.mean()) / variance)
    assert metrics.balanced_accuracy(right[8:], groups[8:], np.arange(32)) == pytest.approx((0.75, 32))
    assert metrics.balanced_accuracy(right, groups, np.arange(40) // 2)[1] == pytest.approx(faces / 2)


def test_percentile_interval():
    assert metrics.interval(np.array([np.nan, *range(101)])) == [2.5, 97.5]
    assert np.isnan(metrics.interval(np.array([np.nan]))).all()


def test_interval_in_log_odds():
    draws = np.array([0.8, 0.9, 0.8, 0.9])  # a deviation of half the way from one to the other
    low, high = np.log(0.8 / 0.2), np.log(0.9 / 0.1)
    expected = np.log(0.84 / 0.16) + 1.959964 * (high - low) / 2 * np.array([-1, 1])
    assert metrics.logit_interval(0.84, draws) == pytest.approx((1 / (1 + np.exp(-expected))).tolist())
    assert metrics.logit_interval(1, np.ones(5)) == pytest.approx([1, 1])


def test_bootstrap_draws_near_duplicates_together():
    weights = metrics.resample(np.array([7, 3, 7, 5]), 300)
    assert weights.shape == (300, 4) and (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()  # as many clusters as there are
    assert (weights[:, 0] != weights[:, 1]).any() and (
        weights == metrics.resample(np.array([7, 3, 7, 5]), 300)
    ).all()
    assert (weights != metrics.resample(np.array([7, 3, 7, 5]), 300, seed=1)).any()


def test_p_value_of_a_gap_is_the_permutation_test_of_scipy():
    right, labels = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 1]) > 0, np.repeat(["b", "a"], 5)
    exact = stats.permutation_test(
        (right[:5], right[5:]), lambda a, b, axis: abs(a.mean(axis=axis) - b.mean(axis=axis)),
        vectorized=True, alternative="greater", n_resamples=np.inf,
    )  # fmt: skip
    assert metrics.gap_p_value(right, labels, np.arange(10)) == pytest.approx(exact.pvalue, abs=0.05)
    many = metrics.gap_p_value(np.tile(right, 9), np.tile(labels, 9), np.arange(90))
    as_one = metrics.gap_p_value(np.tile(right, 9), np.tile(labels, 9), np.tile(np.arange(10), 9))
    assert many < 0.01 and as_one == pytest.approx(exact.pvalue, abs=0.05)  # copies add no evidence


def answered(faces, chances, years=None, low=None, high=None):
    """An evaluation of a model that answers faces, of pixels nobody sees, with chances (N, 6) and years."""
    ages = None if years is None else torch.tensor([years, low, high], dtype=torch.float32).T
    scores = torch.tensor(chances).clamp(min=1e-9).log(), ages, None
    clusters, leaked, checkpoint = np.arange(len(faces)), np.zeros(len(faces), bool), {}
    return Evaluation(Path("m.pt"), checkpoint, Path("test"), faces, scores, clusters, leaked, {})


def test_a_gap_is_among_large_subgroups_alone():
    """The forty who are always wrong are too few to be compared, so the two that are left are alike."""
    faces = [Face(str(i), 30, 0, race) for i, race in enumerate([0] * 120 + [1] * 120 + [2] * 40)]
    guesses = np.where([True, False] * 120 + [False] * 40, 3, 2)
    rows, gaps = score_subgroups(answered(faces, np.eye(6)[guesses]))
    [gap] = [gap for gap in gaps if gap["by"] == "race"]
    assert (gap["difference"], gap["p"]) == (0, 1)
    assert [row["small"] for row in rows if row["by"] == "race"] == [0, 0, 1]


def test_a_subgroup_is_small_below_a_hundred_faces():
    faces = [Face(str(i), 30, 0, race) for i, race in enumerate([0] * 100 + [1] * 99)]
    rows, gaps = score_subgroups(answered(faces, np.eye(6)[np.full(199, 3)]))
    assert [row["small"] for row in rows if row["by"] == "race"] == [0, 1]
    assert not [gap for gap in gaps if gap["by"] == "race"]


def test_balanced_accuracy_of_a_subgroup_is_as_sure_as_its_rarest_group():
    faces = [Face(str(i), age, 0, 0) for i, age in enumerate([2] * 8 + [30] * 92)]
    e = answered(faces, np.eye(6)[[0] * 4 + [3] * 96])
    [row] = [row for row in score_subgroups(e)[0] if row["subgroup"] == "male"]
    value, worth = metrics.balanced_accuracy(e.right, e.groups, np.arange(100))
    ends = row["balanced_accuracy_low"], row["balanced_accuracy_high"]
    assert row["balanced_accuracy"] == value == 0.75
    assert ends == pytest.approx(metrics.wilson(value, worth), abs=1e-5)


def test_calibration_error_and_what_a_perfect_model_would_show():
    confidence = np.repeat([0.9, 0.5], 4)  # half right at 0.9, and all right at 0.5: (0.4 + 0.5) / 2
    assert metrics.calibration_error(confidence, np.array([1, 1, 0, 0, 1, 1, 1, 1])) == pytest.approx(0.45)
    one_bin = metrics.calibration_error(np.array([0.61, 0.63]), np.array([1, 0]))  # of 15 from 0 to 1
    assert one_bin == pytest.approx((0.63 - 0.39) / 2)
    perfect = metrics.perfect_calibration(np.array([0.5]), np.arange(1))
    assert perfect == {"mean": pytest.approx(0.5), "range95": pytest.approx([0.5, 0.5])}
    rng, widths = np.random.default_rng(0), []
    confidence = rng.uniform(0.4, 1, 1000).repeat(2)  # each face and a copy of it
    for clusters, factor, inside in (
        (np.arange(2000), 1, True),
        (np.arange(2000), 0.9, False),
        (np.arange(2000) // 2, 1, True),
    ):
        right = rng.random(clusters.max() + 1)[clusters] < factor * confidence
        error, perfect = (
            metrics.calibration_error(confidence, right),
            metrics.perfect_calibration(confidence, clusters),
        )
        low, high = perfect["range95"]
        assert (low <= error <= high) == inside and 0.005 < low < perfect["mean"] < high < 0.06
        widths.append(perfect["mean"])
    assert widths[2] == pytest.approx(2**0.5 * widths[0], rel=0.1)  # copies count once


def test_split_table_as_written_and_as_a_spreadsheet_saves_it(tmp_path, cli, refuse):
    clusters, near_train, near_val = read_split_table(tmp_path, ["a", "b"])
    assert clusters.tolist() == [0, 1] and not near_train.any() and not near_val.any()
    text = "file,split,duplicate_of\na,test,\nb,test,\nc,test,a\nd,train,b\ne,val,a\n"
    path = tmp_path / "split.csv"
    for spelled in (text, "\ufeff" + text.replace(",", ";").replace("\n", "\r\n")):
        path.write_text(spelled, newline="")
        found = read_split_table(tmp_path, ["a", "b", "c", "d"])
        assert [values.tolist() for values in found] == [[0, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]]
    path.write_text("file,split,duplicate_of\nv,val,\nw,val,\nt,train,v\n")  # by --random
    _, near_train, near_val = read_split_table(tmp_path, ["v", "w"])
    assert near_train.tolist() == [True, False] and not near_val.any()
    stems, model = noise_pairs(tmp_path / "test", [30] * 3), untrained(tmp_path / "model.pt")
    for foreign in ("", text, text.replace("file,", "name,"), f"file,split\n{stems[0]}_image.png,test\n"):
        path.write_text(foreign)
        flags = ["--data", tmp_path, "--out", tmp_path / "r", *CPU]
        refuse("evaluate", model, *flags, words=["split.csv", "run split.py again"])
    path.write_bytes(text.encode("utf-16"))
    refuse("evaluate", model, *flags, words=["split.csv", "run split.py again"])


# ------------------------------------------------------------------------------------------------------------
# Drawn answers of which everything is known
# ------------------------------------------------------------------------------------------------------------


def untrained(path, seed=0, **content):
    """A checkpoint of a model with random weights, 32 px; content: what else it holds, or config's keys."""
    torch.manual_seed(seed)
    config = {"image_size": 32, "seed": seed, "multitask": True, "age_sigma": 2.0, "init": "random"}
    config |= {"lr_strategy": "uniform", "data": "d", "lr": 1e-3}
    held = {"train_hashes": torch.empty(0, dtype=torch.int64), "pretraining": {}}
    own = [key for key in content if key.endswith(("_hashes", "_groups", "pretraining"))]
    held |= {key: content.pop(key) for key in own}
    args = SimpleNamespace(**config | content)
    weights = MultitaskResNet18(multitask=args.multitask, by_year=args.age_sigma > 0).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, "model", args, weights=weights, **held)
    return path


RIGHT = {"White": (20, 20), "Black": (0, 20), "Asian": (100, 110), "Indian": (66, 110), "Others": (10, 20)}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """280 faces of 30 years, of UTKFace's races 0 to 4, and which of them a model gets right: see `RIGHT`."""
    data, stems, right = tmp_path_factory.mktemp("known"), [], []
    rng = np.random.default_rng(0)
    (data / "test").mkdir()
    for race, (hits, count) in enumerate(RIGHT.values()):
        for i in range(count):
            stems.append(f"30_{i % 2}_{race}_{1000 * race + i}")
            right.append(i < hits)
            for kind, shape in (("image", (16, 16, 3)), ("mask", (16, 16))):
                picture = rng.integers(0, 256, shape, np.uint8)
                cv2.imwrite(str(data / f"test/{stems[-1]}_{kind}.png"), picture)
    return SimpleNamespace(data=data, right=dict(zip(stems, right)))


@pytest.fixture
def scores(known, monkeypatch):
    """Has evaluate.py's models answer what is known; returns the confidence of each stem."""
    confidence = {stem: 0.51 + 0.001 * i for i, stem in enumerate(known.right)}

    def answer(model, dataset, device, dtype):
        known.dtype = dtype
        stems = [face.stem for face in dataset.faces]
        assert len(dataset.images) == len(dataset.masks) == len(stems)
        right = torch.tensor([known.right[stem] for stem in stems])
        # Of Black faces, race 1, the wrong are two groups off.
        wrong = torch.tensor([5 if stem.split("_")[2] == "1" else 4 for stem in stems])
        chances = torch.full((len(stems), 6), 1e-9)
        guessed = torch.where(right, 3, wrong)
        sure = torch.tensor([confidence[stem] for stem in stems])
        chances[torch.arange(len(stems)), guessed] = sure
        chances[torch.arange(len(stems)), (guessed + 1) % 3] = 1 - sure
        years = torch.where(right, 33.0, 38.5)
        overlaps = torch.tensor([[0.5, 0.75]]).double().expand(len(stems), 2)
        return chances.log(), torch.stack([years, years - 3, years + 6], dim=1), overlaps

    monkeypatch.setattr(evaluate, "score_dataset", answer)
    return confidence


@pytest.fixture
def no_figures(monkeypatch):
    """Leaves out what takes most of the time."""
    figure = SimpleNamespace(savefig=lambda *_, **__: None)
    for name in PNGS:
        monkeypatch.setattr(evaluate, f"plot_{name}", lambda _: figure)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "p, words", [(0.049, "Asian above Indian by"), (0.051, "no more than chance may give")]
)
def test_a_gap_counts_below_five_percent(known, scores, tmp_path, cli, no_figures, monkeypatch, p, words):
    monkeypatch.setattr(metrics, "gap_p_value", lambda *_, **__: p)
    code, out, _ = cli(
        "evaluate", untrained(tmp_path / "m.pt"), "--data", known.data, "--out", tmp_path, *CPU
    )
    [line] = [line for line in out.splitlines() if line.startswith("  by race: ")]
    assert code == 0 and words in line


def test_says_of_each_subgroup_and_face_what_is_known(known, scores, tmp_path, cli, no_figures):
    model = untrained(tmp_path / "m.pt")
    code, out, err = cli("evaluate", model, "--data", known.data, "--out", tmp_path / "r", *CPU)
    assert (code, err) == (0, "")
    assert known.dtype == torch.float32
    rows = {row["subgroup"]: row for row in read_csv(tmp_path / "r/subgroups.csv")}
    for race, (hits, count) in RIGHT.items():
        row = {key: float(rows[race][key]) for key in list(rows[race])[2:]}
        assert (row["n"], row["small"], row["accuracy"]) == (count, count < 100, pytest.approx(hits / count))
        assert row["balanced_accuracy"] == row["accuracy"]  # they are of one age group
        expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
        for metric in ("accuracy", "balanced_accuracy"):
            ends = row[f"{metric}_low"], row[f"{metric}_high"]
            assert ends == pytest.approx((expected.low, expected.high), abs=1e-5)
        assert row["within_one_group"] == (race != "Black")
        assert (row["range_coverage"], row["range_width"]) == (row["accuracy"], 9)
    right = [known.right[stem] for stem in known.right]
    for gender in (0, 1):
        own = [hit for stem, hit in known.right.items() if stem.split("_")[1] == str(gender)]
        assert float(rows[("male", "female")[gender]]["accuracy"]) == pytest.approx(np.mean(own), abs=1e-6)
    assert (int(rows["Asian, female"]["n"]), float(rows["Indian, male"]["accuracy"])) == (55, 0.6)
    assert "by race: Asian above Indian by 30.9 points of accuracy (p = 0.00" in out
    assert "by gender: at most 0.0 points of accuracy apart, no more than chance may give (p = 1.000)" in out

    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    assert summary["accuracy"]["value"] == pytest.approx(np.mean(right), abs=1e-6)
    expected = stats.binomtest(sum(right), 280).proportion_ci(method="wilson")
    assert summary["accuracy"]["ci95"] == pytest.approx([expected.low, expected.high], abs=1e-5)
    assert (summary["mask_iou"]["value"], summary["mask_dice"]["value"]) == (0.5, 0.75)
    off = np.where(right, 3, 8.5)
    assert summary["mae_years"]["value"] == pytest.approx(off.mean(), abs=1e-6)
    assert summary["mae_years"]["ci95"][0] < off.mean() < summary["mae_years"]["ci95"][1] < off.mean() + 0.5
    # Those that are right are 3 years off, and in the first year of their range, others before theirs.
    assert summary["within_five_years"] == summary["range_coverage"] == summary["accuracy"]
    assert summary["range_width"] == {"value": 9, "ci95": [9, 9]}
    near = summary["within_one_group"]  # all but the Black faces
    assert near["value"] == pytest.approx(260 / 280, abs=1e-6)
    assert near["ci95"] == pytest.approx(metrics.wilson(260 / 280, 280), abs=1e-5)
    coverage = summary["range_coverage"]["value"]
    assert summary["range_by_group"] == {"Young Adult": {"coverage": coverage, "width": 9}}
    assert f"{'mean absolute error in years':34}{off.mean():7.2f}  [" in out
    assert summary["widest_gaps"][1]["difference"] == pytest.approx(100 / 110 - 0.6, abs=1e-6)
    assert summary["effective_n"] == summary["n"] == 280
    for name, label in (
        ("accuracy", "accuracy (micro)"), ("f1_macro", "F1 (macro)"),
        ("precision_macro", "precision (macro)"), ("mask_iou", "mask IoU (mean over faces)"),
    ):  # fmt: skip
        value, (low, high) = summary[name].values()
        assert f"  {label:34}{value:>7.2%}  [{low:.2%}, {high:.2%}]\n" in out
    error, floor = summary["expected_calibration_error"], summary["calibration_error_if_perfect"]
    assert f"{'expected calibration error':34}{error:7.2%}  (" in out
    assert f"perfectly calibrated: {floor['mean']:.2%}" in out
    assert floor["range95"][1] < summary["expected_calibration_error"] > 0.1  # it grows surer, and not better

    rows = {row["file"]: row for row in read_csv(tmp_path / "r/predictions.csv")}
    columns = ["file", "age", "true", "predicted", "predicted_age", "age_low", "age_high"]
    assert list(next(iter(rows.values()))) == columns + [f"p{group}" for group in range(6)]
    for stem, hit in known.right.items():
        row = rows[f"{stem}_image.png"]
        assert (row["predicted"] == row["true"]) == hit
        years = ("33.0", "30.0", "39.0") if hit else ("38.5", "35.5", "44.5")
        assert (row["predicted_age"], row["age_low"], row["age_high"]) == years
        assert float(row[f"p{row['predicted']}"]) == pytest.approx(scores[stem], abs=1e-5)


def test_unseen_leaves_out_near_duplicates_of_train(known, scores, tmp_path):
    data, stem = shutil.copytree(known.data, tmp_path / "d"), min(known.right)
    lines = ["file,split,duplicate_of", f"{stem}_image.png,test,", f"x_image.png,train,{stem}_image.png"]
    (data / "split.csv").write_text("\n".join(lines) + "\n")
    path, cpu = untrained(tmp_path / "m.pt"), torch.device("cpu")
    found = score_model(path, data / "test", cpu, torch.float32, unseen=True)
    assert found.summary["left_out_by_unseen"] == 1 and stem not in {face.stem for face in found.faces}


def test_copies_stay_together_among_single_faces():
    right, labels = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 1]) > 0, np.repeat(["b", "a"], 5)
    clusters = np.column_stack([np.tile(np.arange(10), 9), np.arange(10, 100)]).ravel()
    right = np.column_stack([np.tile(right, 9), np.ones(90, bool)]).ravel()  # a copy, a single, a copy, …
    assert metrics.gap_p_value(right, np.tile(labels, 9).repeat(2), clusters) > 0.1


def test_near_duplicates_widen_intervals_and_leaks_are_told_apart(
    known, scores, tmp_path, cli, no_figures, monkeypatch
):
    monkeypatch.setattr(evaluate, "FEW", 29)
    data = shutil.copytree(known.data, tmp_path / "d")
    stems = list(known.right)
    lines = [f"{stem}_image.png,test,{stems[i // 10 * 10]}_image.png" for i, stem in enumerate(stems)]
    # 20 faces lie in the groups of these two.
    lines += [f"other{i}_image.png,train,{stems[i]}_image.png" for i in (0, 30)]
    (data / "split.csv").write_text("\n".join(["file,split,duplicate_of", *lines]) + "\n")
    flags = ["--data", data, "--out", tmp_path / "r", *CPU]
    code, out, _ = cli("evaluate", untrained(tmp_path / "m.pt"), *flags)
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    assert code == 0 and summary["effective_n"] == 28
    low, high = summary["accuracy"]["ci95"]
    assert (low, high) == pytest.approx(metrics.wilson(summary["accuracy"]["value"], 28), abs=1e-5)
    low, high = summary["mae_years"]["ci95"]
    assert high - low > 1.5  # 0.6 of single faces
    [row] = [row for row in read_csv(tmp_path / "r/subgroups.csv") if row["subgroup"] == "Asian"]
    for metric in ("accuracy", "balanced_accuracy"):
        ends = [float(row[f"{metric}_low"]), float(row[f"{metric}_high"])]
        assert ends == pytest.approx(metrics.wilson(100 / 110, 11), abs=1e-5)
    assert "so few that only the intervals of shares hold: 28.0\n" in out
    [gap] = [gap for gap in summary["widest_gaps"] if gap["by"] == "race"]
    assert gap["p"] > 0.05  # 0.001 of single faces
    alone = metrics.perfect_calibration(np.array(list(scores.values())), np.arange(280))
    assert summary["calibration_error_if_perfect"]["mean"] > 2 * alone["mean"]
    right = np.array([known.right[stem] for stem in stems])
    leaked = np.isin(np.arange(280) // 10, [0, 3])
    leaks = summary["near_duplicates_in_train"]
    assert leaks == {
        "n": 20,
        "accuracy": pytest.approx(right[leaked].mean()),
        "accuracy_of_the_rest": pytest.approx(right[~leaked].mean()),
    }
    leaks = "near-duplicates of faces in train, or for a model of --final in val: 20\n"
    assert f"{leaks}  accuracy on these: 50.00%\n" in out


def test_faces_seen_are_counted_apart_and_left_out_if_asked(known, scores, tmp_path, cli, refuse, no_figures):
    data = shutil.copytree(known.data, tmp_path / "d")
    stems = sorted(known.right)
    hashes = torch.tensor([pixel_hash(read_image(data / f"test/{s}_image.png")) for s in stems])
    model = untrained(tmp_path / "m.pt", train_hashes=hashes[:5], val_hashes=hashes[3:12])
    lines = [f"{stem}_image.png,test," for stem in stems]
    lines[20] += (
        f"{stems[4]}_image.png"  # near-duplicates of one learned from, and of one that chose the epoch
    )
    lines[21] += f"{stems[11]}_image.png"
    lines.append(f"other_image.png,val,{stems[22]}_image.png")
    lines.append(f"another_image.png,train,{stems[0]}_image.png")  # near one that is learned from itself
    (data / "split.csv").write_text("\n".join(["file,split,duplicate_of", *lines]) + "\n")
    flags = [model, "--data", data, "--out", tmp_path / "r", *CPU]
    code, _, err = cli("evaluate", *flags)
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    assert code == 0 and "was trained on 5 of these 280 faces" in err
    assert "had its epoch selected on 7 of these 280 faces" in err
    assert (summary["seen_in_training"], summary["chose_the_epoch"], summary["n"]) == (5, 7, 280)
    assert summary["near_duplicates_in_train"]["n"] == 0

    code, out, err = cli("evaluate", *flags, "--unseen", "--precision", "bf16")
    assert (code, err) == (0, "") and "near-duplicates that split.csv names: 15\n" in out
    assert known.dtype == torch.bfloat16
    kept = {row["file"] for row in read_csv(tmp_path / "r/predictions.csv")}
    assert kept == {f"{stem}_image.png" for i, stem in enumerate(stems) if 12 <= i not in (20, 21, 22)}
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    assert (summary["left_out_by_unseen"], summary["seen_in_training"], summary["n"]) == (15, 0, 265)
    assert summary["near_duplicates_in_train"]["n"] == 0
    for content in ({"final": True}, {"pretraining": {"final": True}}):  # has learned from val, too
        untrained(model, **content)
        assert cli("evaluate", *flags)[0] == 0
        summary = json.loads((tmp_path / "r/metrics.json").read_text())
        assert summary["near_duplicates_in_train"]["n"] == 2
    untrained(model, train_hashes=hashes)
    refuse("evaluate", *flags, "--unseen", words=["--unseen", "0 of 280 faces"])


def test_unseen_faces_keep_their_own_images_ages_and_masks(tmp_path):
    rng, data = np.random.default_rng(0), tmp_path / "d/test"
    for i, age in enumerate([3, 70, 30, 50, 10, 20, 66, 40]):
        image, mask = rng.integers(0, 256, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        mask[: 3 * i + 4] = 255
        write_pair(data, f"{age}_0_0_{i}", cv2.blur(image, (5, 5)), mask)
    learned = FaceDataset(data, 32).hashes[[1, 2, 6]]
    path, cpu = untrained(tmp_path / "m.pt", train_hashes=learned), torch.device("cpu")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["weights"]["decoder.predict.bias"] += 9  # so that all is face
    torch.save(checkpoint, path)
    everyone, unseen = (score_model(path, data, cpu, torch.float32, unseen=flag) for flag in (False, True))
    kept = ~np.isin(np.arange(8), [1, 2, 6])
    assert everyone.summary["seen_in_training"] == unseen.summary["left_out_by_unseen"] == 3
    assert unseen.faces == [face for face, keep in zip(everyone.faces, kept) if keep]
    assert np.abs(unseen.probabilities - everyone.probabilities[kept]).max() < 1e-5
    for name, values in everyone.per_face.items():
        assert unseen.per_face[name] == pytest.approx(values[kept], abs=1e-4), name
    for name in ("mask_iou", "mae_years"):
        assert len(np.unique(everyone.per_face[name])) == 8


def test_figures_show_what_was_measured(monkeypatch):
    faces = [Face(str(i), age, 0, 0) for i, age in enumerate([30] * 6 + [2] * 6)]
    guesses, sure = np.array([3, 3, 3, 3, 0, 5] + [0] * 6), np.array([0.9] * 4 + [0.9, 0.92] + [0.62] * 6)
    chances = np.eye(6)[guesses] * sure[:, None] + 1e-9
    chances[:, 4] = 1 - sure
    e = answered(faces, chances)
    measure(e, 0)
    matrix = evaluate.plot_confusion_matrix(e).axes[0]
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted", "true")
    shades = matrix.images[0].get_array()  # true×predicted
    assert (shades[3, 0], shades[3, 3], shades[0, 3]) == pytest.approx((1 / 6, 4 / 6, 0))
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels()):
        assert [label.get_text() for label in labels] == GROUP_NAMES
    counts = {text.get_position(): text.get_text() for text in matrix.texts}
    assert (counts[0, 3], counts[3, 0], counts[3, 3]) == ("1\n16.7%", "0\n0.0%", "4\n66.7%")  # column, row

    monkeypatch.setattr(evaluate, "FEW", 7)
    _, solid, hollow = evaluate.plot_reliability(e).axes[0].lines
    assert len(solid.get_xydata()) == 0 and np.isfinite(hollow.get_xydata()).all(axis=1).sum() == 2
    assert (hollow.get_fillstyle(), hollow.get_linestyle()) == ("none", "None")
    monkeypatch.setattr(evaluate, "FEW", 6)
    top, bottom = evaluate.plot_reliability(e).axes
    assert (bottom.get_xlabel()[:10], top.get_ylabel()) == ("confidence", "accuracy")
    assert top.lines[1].get_xydata() == pytest.approx(np.array([[0.62, 1], [5.42 / 6, 4 / 6]]), abs=1e-6)
    assert [bar.get_height() for bar in bottom.patches] == [0] * 9 + [6] + [0] * 3 + [6, 0]

    axis, *others = evaluate.plot_subgroups(e).axes
    assert len(others) == 2 and [label.get_text() for label in axis.get_yticklabels()][:3] == [
        "Infant (6)", "Young Adult (6)", "male (12)"
    ]  # fmt: skip
    assert axis.collections[1].get_offsets().data[:3] == pytest.approx(
        np.array([[1, 0], [4 / 6, 1], [10 / 12, 2]])
    )
    assert axis.collections[1].get_facecolors()[0].tolist() == [1, 1, 1, 1]  # hollow
    e.summary["balanced_accuracy"]["value"] = 0.5
    dashed = [axis.lines[0].get_xdata()[0] for axis in evaluate.plot_subgroups(e).axes]
    assert dashed == pytest.approx([10 / 12, 0.5, 10 / 12])  # all faces
    assert axis.collections[0].get_segments()[1][:, 0] == pytest.approx(metrics.wilson(4 / 6, 6), abs=1e-6)

    shown, blue = [], np.full((9, 9, 3), (255, 128, 0), np.uint8)  # as OpenCV orders colours
    monkeypatch.setattr(evaluate, "read_image", lambda path: shown.append(path.name) or blue)
    axes = evaluate.plot_mistakes(e, count=1).axes
    assert shown == ["5_image.png"] and axes[0].images[0].get_array()[0, 0].tolist() == [0, 128, 255]
    assert axes[0].get_title() == "Young Adult (30)\ntaken for Older Adult\n92% sure"
    assert [axis.get_title()[-8:] for axis in evaluate.plot_mistakes(e).axes] == ["92% sure", "90% sure"]


def test_own_faces_with_unknown_labels_and_ranges_of_years(tmp_path, cli, no_figures):
    """Known and unknown gender and race; ages with decimals, in a range within a group, and across two."""
    stems = ["31.6_0_1_a", "50-59_x_2_b", "3-9_1_2_c", "8_1_x_d", "9_0_x_e"]
    for i, stem in enumerate(stems):
        write_pair(tmp_path / "d/test", stem, np.full((20, 20, 3), 50 * i, np.uint8))
    flags = ["--data", tmp_path / "d", "--out", tmp_path / "r", *CPU]
    code, out, _ = cli("evaluate", untrained(tmp_path / "m.pt"), *flags)
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    assert code == 0 and (summary["n"], summary["left_out_across_groups"]) == (4, 1)
    assert summary["left_out_by_unseen"] is None and "--unseen" not in out
    assert "so few that only the intervals of shares hold: 4.0\n" in out
    _, out, _ = cli("evaluate", tmp_path / "m.pt", *flags, "--unseen")
    assert "left out by --unseen, with the near-duplicates that split.csv names: 0\n" in out
    assert (summary["unknown_gender"], summary["unknown_race"], summary["ages_in_ranges"]) == (1, 2, 1)
    assert "the range of ages crosses groups: 1\n" in out and "gender, since it is unknown: 1\n" in out
    assert "by race, since it is unknown: 2\n" in out
    assert "ages that are ranges, where errors count from the nearest year: 1\n" in out
    rows = read_csv(tmp_path / "r/predictions.csv")
    true = [(row["age"], row["true"]) for row in rows]
    assert true == [("31.6", "3"), ("54.5", "4"), ("8", "1"), ("9", "1")]
    counts = [(row["subgroup"], row["n"]) for row in read_csv(tmp_path / "r/subgroups.csv")]
    known = [("male", "2"), ("female", "1"), ("Black", "1"), ("Asian", "1"), ("Black, male", "1")]
    assert counts[3:] == known
    for stem in stems[:2] + stems[3:]:
        (tmp_path / f"d/test/{stem}_image.png").unlink()
    code, _, err = cli("evaluate", tmp_path / "m.pt", *flags)
    assert code == 2 and "0 of 1 faces" in err and "of 1 are ranges that cross groups" in err


def test_errors_in_years_of_ranges_and_of_decimals():
    faces = [Face("a", 54.5, spread=4.5), Face("b", 31.4), Face("c", 31.6), Face("d", 116), Face("e", 30)]
    chances, high = np.eye(6)[[4, 3, 3, 5, 3]], [70, 31, 31, 100, 40]
    e = answered(faces, chances, [62, 31, 35, 95, 35], [55, 29, 29, 90, 30], high)
    assert e.per_face["mae_years"] == pytest.approx([3, 0.4, 3.4, 21, 5])
    assert e.per_face["within_five_years"].tolist() == [1, 1, 1, 0, 1] and "range_coverage" not in e.per_face
    e = answered(faces[1:], chances[1:], [31, 35, 95, 35], [29, 29, 90, 30], high[1:])
    assert e.per_face["range_coverage"].tolist() == [1, 0, 1, 1]  # 31.6 counts as 32, 116 as 100 or more
    pair = [Face("a", 30, 0, 0), Face("b", 30, 1, 0)]
    rows, _ = score_subgroups(answered(pair, np.eye(6)[[3, 3]], [30, 30], [29, 25], [31, 35]))
    widths = {row["subgroup"]: row["range_width"] for row in rows if row["by"] == "gender"}
    assert widths == {"male": 2, "female": 10}


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


def test_writes_every_file_before_it_prints(tmp_path, cli, monkeypatch):
    noise_pairs(tmp_path / "d/test", [2, 10, 20, 30, 50, 70] * 3)
    model, flags = untrained(tmp_path / "m.pt"), ["--data", tmp_path / "d", *CPU]

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        cli("evaluate", model, *flags, "--out", tmp_path / "r")
    monkeypatch.undo()
    files = {f"{name}.png" for name in PNGS} | {"metrics.json", "predictions.csv", "subgroups.csv"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == files
    for name in PNGS:
        assert cv2.imread(str(tmp_path / f"r/{name}.png")).shape[0] > 400
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    rows = read_csv(tmp_path / "r/predictions.csv")
    for row in rows:
        probabilities = [float(row[f"p{group}"]) for group in range(6)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert int(row["predicted"]) == int(np.argmax(probabilities))
        assert 0 <= float(row["age_low"]) <= float(row["predicted_age"]) <= float(row["age_high"]) <= 100
    accuracy = np.mean([row["true"] == row["predicted"] for row in rows])
    assert summary["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6) and summary["n"] == len(rows)
    value, ends = summary["ap_macro"].values()
    assert logit(ends).mean() == pytest.approx(logit(value), abs=1e-3)
    for name in metrics.METRICS:
        value, (low, high) = summary[name].values()
        assert 0 <= low <= value <= high and (name in metrics.IN_YEARS or high <= 1)

    monkeypatch.setattr(evaluate.Figure, "savefig", lambda *_, **__: None)
    assert cli("evaluate", model, *flags, "--out", tmp_path / "s", "--seed", 1)[0] == 0
    other = json.loads((tmp_path / "s/metrics.json").read_text())
    for name in ("auc_macro_ovr", "mae_years"):  # other draws, of the same answers
        assert other[name]["value"] == summary[name]["value"] and other[name]["ci95"] != summary[name]["ci95"]
    assert other["calibration_error_if_perfect"] != summary["calibration_error_if_perfect"]


def test_groups_absent_from_the_truth_or_the_training_are_named(tmp_path, cli, no_figures):
    model = untrained(tmp_path / "m.pt", multitask=False, age_sigma=0, missing_groups=["Infant", "Child"])
    for ages, auc in (([30] * 3 + [50] * 3, True), ([30] * 3, False)):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        noise_pairs(tmp_path / "d/test", ages)
        code, out, _ = cli("evaluate", model, "--data", tmp_path / "d", "--out", tmp_path / "r", *CPU)
        summary = json.loads((tmp_path / "r/metrics.json").read_text())
        rows = read_csv(tmp_path / "r/predictions.csv")
        present = ["Young Adult", "Middle-aged"][: 1 + auc]
        absent = [name for name in GROUP_NAMES if name not in present]
        assert code == 0 and summary["absent_classes"] == absent and ", ".join(absent) in out
        assert (summary["auc_macro_ovr"]["value"] is not None) == auc
        guessed = {GROUP_NAMES[int(row["predicted"])] for row in rows}
        both = [name for name in GROUP_NAMES if name in {*present, *guessed}]
        assert f"F1 and precision average over: {', '.join(both)}\n" in out and guessed - {*present}
        assert summary["classes_never_learned"] == ["Infant", "Child"]
        assert "the model was trained without: Infant, Child\n" in out
    assert "mae_years" not in summary and "mask_iou" not in summary and "range_coverage" not in summary
    assert "predicted_age" not in rows[0]


def test_draws_although_a_notebook_named_a_backend_that_is_not_here():
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-c", "import evaluate; evaluate.Figure().savefig('/dev/null', format='png')"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_bad_input(tmp_path, cli, refuse):
    noise_pairs(tmp_path / "d/test", [30] * 4)
    model, data = untrained(tmp_path / "m.pt"), ["--data", tmp_path / "d", "--out", tmp_path / "r"]
    refuse("evaluate", tmp_path / "nowhere.pt", *data, words=["nowhere.pt"])
    (tmp_path / "text.pt").write_text("no checkpoint")
    refuse("evaluate", tmp_path / "text.pt", *data, words=["text.pt"])
    refuse("evaluate", model, "--data", tmp_path, "--out", tmp_path / "r", words=["test"])
    refuse("evaluate", model, model, *data, words=["unrecognized", "m.pt"])
    refuse("evaluate", model, *data, "--split", "exam", words=["--split"])
    refuse("evaluate", model, "--data", tmp_path / "d", "--out", model / "r", words=["--out", "written"])
    refuse("evaluate", model, *data, "--temperature-scaling", words=["--temperature-scaling"])
    next((tmp_path / "d/test").glob("*_image.png")).write_text("no image")
    refuse("evaluate", model, *data, words=["_image.png", "readable"])
    assert not (tmp_path / "r").exists()
