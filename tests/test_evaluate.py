import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from common import GROUP_NAMES
from conftest import noise_pairs
from evaluate import bootstrap, compute_metrics, read_clusters

FAST = [
    "--image-size",
    32,
    "--batch-size",
    16,
    "--workers",
    0,
    "--device",
    "cpu",
    "--init",
    "random",
    "--epochs",
    1,
]


def random_scores(groups, seed=0):
    """Probabilities (N, 6) that favour the true group, for random true groups among `groups`."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(groups, size=300)
    scores = rng.normal(size=(300, 6)) + 1.2 * np.eye(6)[truth]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), truth


@pytest.mark.parametrize(
    "groups, never", [([0, 1, 2, 3, 4, 5], None), ([0, 1, 2, 3, 5], None), ([0, 2, 3, 4, 5], 3)]
)
def test_metrics_equal_scikit_learn(groups, never):
    probabilities, truth = random_scores(groups)
    if never is not None:  # a class that is never predicted
        probabilities[:, never] *= 1e-6
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    in_truth, in_either = np.unique(truth), np.unique([*truth, *predicted])
    found = compute_metrics(torch.from_numpy(probabilities), torch.from_numpy(truth))
    one_hot = np.eye(6)[truth]
    average = {"labels": in_either, "average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.recall_score(truth, predicted, labels=in_truth, average="macro"),
        "f1_macro": sk.f1_score(truth, predicted, **average),
        "precision_macro": sk.precision_score(truth, predicted, **average),
        "auc_macro_ovr": np.mean([sk.roc_auc_score(one_hot[:, g], probabilities[:, g]) for g in in_truth]),
        "ap_macro": np.mean(
            [sk.average_precision_score(one_hot[:, g], probabilities[:, g]) for g in in_truth]
        ),
        "within_one_group": np.mean(np.abs(predicted - truth) <= 1),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_metrics_by_hand():
    predicted, truth = [0, 0, 3, 3, 4], [0, 1, 3, 4, 4]
    overlap = {"iou": torch.tensor([0.5, 1, 1, 1, 1]), "dice": torch.tensor([0.6, 1, 1, 1, 1])}
    found = compute_metrics(torch.eye(6)[predicted], torch.tensor(truth), overlap)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0 + 1 + 1 / 2) / 4)
    assert found["precision_macro"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1) / 4)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 0 + 2 / 3 + 2 / 3) / 4)
    assert found["within_one_group"] == 1
    assert (found["mask_iou"], found["mask_dice"]) == (pytest.approx(0.9), pytest.approx(0.92))


def test_one_class_alone_has_no_auc():
    found = compute_metrics(torch.eye(6)[[3, 3, 4]], torch.tensor([3, 3, 3]))
    assert np.isnan(found["auc_macro_ovr"]) and found["balanced_accuracy"] == pytest.approx(2 / 3)


def test_bootstrap_interval_covers_the_accuracy_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        truth = rng.integers(6, size=150)
        wrong = rng.random(150) > 0.7
        predicted = np.where(wrong, (truth + 1) % 6, truth)
        low, high = bootstrap(
            torch.eye(6)[torch.from_numpy(predicted)],
            torch.from_numpy(truth),
            np.arange(150),
            resamples=60,
            seed=trial,
        )["accuracy"]
        covered += low <= 0.7 <= high
    assert 33 <= covered <= 40


def test_bootstrap_draws_near_duplicates_together():
    truth = torch.arange(40) % 6
    predicted = torch.where(torch.arange(40) < 20, truth, (truth + 1) % 6)
    two = bootstrap(torch.eye(6)[predicted], truth, (np.arange(40) >= 20).astype(int), resamples=200)[
        "accuracy"
    ]
    assert two == [0, 1]  # both draws may be the right half, or the wrong one
    alone = bootstrap(torch.eye(6)[predicted], truth, np.arange(40), resamples=200)["accuracy"]
    assert 0.25 < alone[0] < alone[1] < 0.75


def test_clusters_come_from_the_split(tmp_path):
    assert read_clusters(tmp_path, ["a", "b"]).tolist() == [0, 1]
    (tmp_path / "split.csv").write_text("file,duplicate_of\na,\nb,\nc,a\n")
    assert read_clusters(tmp_path, ["a", "b", "c"]).tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def model(drawn, tmp_path_factory):
    import finetune
    from common import run

    out = tmp_path_factory.mktemp("model") / "model.pt"
    flags = ["--data", drawn / "dataset/processed_split", "--out", out, "--multitask", *FAST]
    run(finetune.main, finetune.get_parser(), list(map(str, flags)))
    return out


def test_writes_metrics_predictions_and_matrix(drawn, model, tmp_path, cli):
    data = drawn / "dataset/processed_split"
    code, out, err = cli("evaluate", model, "--data", data, "--out", tmp_path / "r", "--device", "cpu")
    assert code == 0 and err == "" and "macro" in out and "mask IoU" in out
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "confusion_matrix.png",
        "metrics.json",
        "predictions.csv",
    ]
    summary = json.loads((tmp_path / "r/metrics.json").read_text())
    with open(tmp_path / "r/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "age", "true", "predicted", "p0", "p1", "p2", "p3", "p4", "p5"]
    assert sorted(row["file"] for row in rows) == sorted(p.name for p in (data / "test").glob("*_image.png"))
    assert summary["n"] == len(rows)
    for row in rows:
        probabilities = [float(row[f"p{group}"]) for group in range(6)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert int(row["predicted"]) == int(np.argmax(probabilities))
    accuracy = np.mean([row["true"] == row["predicted"] for row in rows])
    assert summary["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6)
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "auc_macro_ovr", "mask_iou", "mask_dice"):
        low, high = summary[name]["ci95"]
        assert 0 <= low <= summary[name]["value"] <= high <= 1
    assert cv2.imread(str(tmp_path / "r/confusion_matrix.png")).shape[0] > 400


def test_warns_with_a_count_when_it_scores_what_was_trained_on(drawn, model, tmp_path, cli):
    data = drawn / "dataset/processed_split"
    _, _, err = cli("evaluate", model, "--data", data, "--split", "train", "--out", tmp_path / "r")
    count = len(list((data / "train").glob("*_image.png")))
    assert f"trained on {count} of these {count} faces" in err


def test_absent_classes_are_named(drawn, model, tmp_path, cli):
    noise_pairs(tmp_path / "d/test", [30] * 3 + [50] * 3)
    code, out, _ = cli("evaluate", model, "--data", tmp_path / "d", "--out", tmp_path / "r")
    absent = [name for name in GROUP_NAMES if name not in ("Young Adult", "Middle-aged")]
    assert code == 0 and ", ".join(absent) in out
    assert json.loads((tmp_path / "r/metrics.json").read_text())["absent_classes"] == absent


def test_one_class_split_has_null_auc(drawn, model, tmp_path, cli):
    noise_pairs(tmp_path / "d/test", [30] * 3)
    assert cli("evaluate", model, "--data", tmp_path / "d", "--out", tmp_path / "r")[0] == 0
    assert json.loads((tmp_path / "r/metrics.json").read_text())["auc_macro_ovr"]["value"] is None


def test_bad_input(drawn, model, tmp_path, cli, refuse):
    data = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "r"]
    refuse("evaluate", tmp_path / "nowhere.pt", *data, words=["nowhere.pt"])
    refuse("evaluate", model.with_suffix(".last.pt"), *data, words=["model.last checkpoint", "model one"])
    (tmp_path / "text.pt").write_text("no checkpoint")
    refuse("evaluate", tmp_path / "text.pt", *data, words=["text.pt"])
    refuse("evaluate", model, "--data", tmp_path, "--out", tmp_path / "r", words=["test"])
    refuse("evaluate", model, *data, "--split", "exam", words=["--split"])
    copy = tmp_path / "copy"
    shutil.copytree(drawn / "dataset/processed_split/test", copy / "test")
    next((copy / "test").glob("*_image.png")).write_text("no image")
    refuse("evaluate", model, "--data", copy, "--out", tmp_path / "r", words=["_image.png", "readable"])
    assert not (tmp_path / "r").exists()
