import csv
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from common import GROUP_NAMES, parse_name
from conftest import noise_pairs
from evaluate import (
    bootstrap,
    calibration_error,
    compare,
    compute_metrics,
    group_by_configuration,
    interval,
    rates,
    read_split_table,
    resample,
    score_subgroups,
)
from finetune import fit_temperature

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
    for trial in range(200):
        truth = rng.integers(6, size=150)
        wrong = rng.random(150) > 0.7
        predicted = torch.from_numpy(np.where(wrong, (truth + 1) % 6, truth))
        weights = resample(np.arange(150), 200, seed=trial)
        draws = bootstrap(torch.eye(6)[predicted], torch.from_numpy(truth), weights)
        low, high = interval(draws["accuracy"])
        covered += low <= 0.7 <= high
    assert 181 <= covered <= 198  # of 95 %, less the percentile interval's usual shortfall


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [1, 3, 4], [3]])
def test_bootstrap_equals_the_metrics_of_the_faces_drawn(groups):
    """Weighted counts against torchmetrics on repeated faces, ties and absent classes too."""
    probabilities, truth = random_scores(groups)
    probabilities = torch.from_numpy(probabilities.round(1))
    truth = torch.from_numpy(truth)
    overlap = {"iou": torch.rand(300), "dice": torch.rand(300)}
    weights = resample(np.arange(300) // 2, 4)
    draws = bootstrap(probabilities, truth, weights, overlap)
    for i, row in enumerate(weights):
        index = torch.from_numpy(np.repeat(np.arange(300), row))
        part = {name: values[index] for name, values in overlap.items()}
        expected = compute_metrics(probabilities[index], truth[index], part)
        assert {name: values[i] for name, values in draws.items()} == pytest.approx(
            expected, abs=1e-6, nan_ok=True
        )


def test_bootstrap_draws_near_duplicates_together():
    truth = torch.arange(40) % 6
    predicted = torch.where(torch.arange(40) < 20, truth, (truth + 1) % 6)
    two = resample((np.arange(40) >= 20).astype(int), 200)
    assert interval(bootstrap(torch.eye(6)[predicted], truth, two)["accuracy"]) == [0, 1]
    alone = interval(bootstrap(torch.eye(6)[predicted], truth, resample(np.arange(40), 200))["accuracy"])
    assert 0.25 < alone[0] < alone[1] < 0.75


def test_a_model_does_not_differ_from_itself():
    probabilities, truth = (torch.from_numpy(values) for values in random_scores(range(6)))
    weights = resample(np.arange(300), 300)
    value, draws = compute_metrics(probabilities, truth), bootstrap(probabilities, truth, weights)
    for name in value:
        one = [(value[name], draws[name])]
        assert compare(one, one) == (0, [0, 0])
    other, _ = random_scores(range(6), seed=1)  # another seed: wrong on other faces
    other = torch.from_numpy(other).roll(7, 0)
    seeds = [(value["accuracy"], draws["accuracy"])]
    seeds += [(compute_metrics(other, truth)["accuracy"], bootstrap(other, truth, weights)["accuracy"])]
    difference, (low, high) = compare(seeds, seeds)
    assert difference == 0 and low < 0 < high and high - low > 0.05


def test_paired_comparison_sees_what_two_intervals_would_not():
    truth = torch.arange(600) % 6
    worse = torch.where(torch.arange(600) % 10 < 3, (truth + 1) % 6, truth)  # 70 %
    better = torch.where(torch.arange(600) % 60 == 0, truth, worse)  # ten of those mended
    weights = resample(np.arange(600), 500)
    runs = []
    for predicted in (better, worse):
        draws = bootstrap(torch.eye(6)[predicted], truth, weights)["accuracy"]
        runs.append([((predicted == truth).double().mean().item(), draws)])
    difference, (low, high) = compare(*runs)
    assert difference == pytest.approx(10 / 600) and 0 < low < difference < high < 0.03
    assert interval(runs[1][0][1])[1] > interval(runs[0][0][1])[0]  # alone, their intervals overlap


def test_split_table_tells_near_duplicates_and_leaks(tmp_path):
    clusters, leaked = read_split_table(tmp_path, ["a", "b"])
    assert clusters.tolist() == [0, 1] and not leaked.any()
    (tmp_path / "split.csv").write_text(
        "file,split,duplicate_of\na,test,\nb,test,\nc,test,a\nd,train,b\ne,train,\n"
    )
    clusters, leaked = read_split_table(tmp_path, ["a", "b", "c", "d"])
    assert clusters.tolist() == [0, 1, 0, 1] and leaked.tolist() == [False, True, False, False]


def test_rates_equal_scikit_learn_on_repeated_faces():
    rng = np.random.default_rng(0)
    predicted, truth, weights = (
        rng.integers(6, size=60),
        rng.integers(1, 5, 60),
        rng.integers(3, size=(4, 60)),
    )
    found = rates(predicted, truth, weights)
    for i, row in enumerate(weights):
        p, t = np.repeat(predicted, row), np.repeat(truth, row)
        assert found["accuracy"][i] == pytest.approx(sk.accuracy_score(t, p))
        recall = sk.recall_score(t, p, labels=np.unique(t), average="macro")
        assert found["balanced_accuracy"][i] == pytest.approx(recall)
        assert found["within_one_group"][i] == pytest.approx(np.mean(np.abs(p - t) <= 1))
    assert np.isnan(rates(predicted, truth, np.zeros((1, 60)))["accuracy"]).all()


def test_subgroups_by_hand():
    """200 men, 9 in 10 right, and 120 women, 3 in 4; 10 of them Black girls, all others White adults."""
    man, woman = ([parse_name(f"30_{gender}_0_1.jpg")] for gender in (0, 1))
    faces = man * 200 + woman * 110 + [parse_name("30_1_1_1.jpg")] * 10
    truth = np.repeat([3, 1], [310, 10])
    predicted = np.r_[np.repeat([3, 5], [180, 20]), np.repeat([3, 4], [90, 20]), np.full(10, 2)]
    rows, gaps = score_subgroups(predicted, truth, faces, resample(np.arange(320), 400))
    rows = {row["subgroup"]: row for row in rows}
    assert set(rows) >= {"Child", "Young Adult"} and len(rows) == 9
    assert rows["Young Adult"]["accuracy"] == pytest.approx(270 / 310) and rows["Child"]["accuracy"] == 0
    assert set(rows) >= {"male", "female", "White", "Black", "White, male", "White, female", "Black, female"}
    assert (rows["male"]["n"], rows["male"]["accuracy"], rows["male"]["within_one_group"]) == (200, 0.9, 0.9)
    assert (rows["female"]["accuracy"], rows["female"]["balanced_accuracy"]) == (0.75, 0.409091)
    assert rows["Black"] | {"accuracy": 0, "within_one_group": 1, "small": 1, "n": 10} == rows["Black"]
    assert not rows["White"]["small"] and 0.6 < rows["female"]["accuracy_low"] < 0.75
    assert [gap[:3] for gap in gaps] == [
        ("gender", "male", "female"),
        ("race and gender", "White, male", "White, female"),
    ]
    assert gaps[0][3] == pytest.approx(0.15) and 0 < gaps[0][4][0] < 0.15 < gaps[0][4][1]


def test_calibration_error_by_hand():
    """Four predictions at 0.9, half of them right, and four at 0.5, all right: (0.4 + 0.5) / 2."""
    probabilities = torch.full((8, 6), 0.02, dtype=torch.float64)
    probabilities[:4, 0], probabilities[4:, 0] = 0.9, 0.5
    assert calibration_error(probabilities, torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])) == pytest.approx(0.45)


def test_temperature_is_that_by_which_logits_are_too_sure():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20000, 6)
    groups = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.5, 1, 3):
        assert fit_temperature(factor * logits, groups) == pytest.approx(factor, rel=0.05)
    assert fit_temperature(torch.eye(6), torch.arange(1, 7) % 6) == 20  # always wrong: as flat as allowed


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
        "mistakes.png",
        "predictions.csv",
        "reliability.png",
        "subgroups.csv",
        "subgroups.png",
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
    for name in ("confusion_matrix", "subgroups", "reliability", "mistakes"):
        assert cv2.imread(str(tmp_path / f"r/{name}.png")).shape[0] > 400
    assert "* fewer than 100 faces" in out  # and so no gaps between subgroups
    assert 0 <= summary["expected_calibration_error"] <= 1 and summary["temperature"] == 1
    with open(tmp_path / "r/subgroups.csv", newline="") as file:
        subgroups = list(csv.DictReader(file))
    for by in ("age group", "gender", "race", "race and gender"):
        assert sum(int(row["n"]) for row in subgroups if row["by"] == by) == len(rows)


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


def variant(model, path, factor=1.0, **config):
    """A copy of a model with other settings in its name plate, its head scaled by `factor`."""
    checkpoint = torch.load(model, weights_only=True)
    checkpoint["config"] |= config
    checkpoint["weights"]["head.weight"] *= factor
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, path)
    return path


def read_table(path, header):
    """The rows of the Markdown table in a file whose first cell is `header`, as dicts."""
    lines = [line.strip("| \n").split(" | ") for line in path.read_text().splitlines() if line[:1] == "|"]
    start = next(i for i, line in enumerate(lines) if line[0] == header)
    rows = []
    for line in lines[start + 2 :]:
        if len(line) != len(lines[start]) or line[0] == "Difference":
            break
        rows.append(dict(zip(lines[start], line)))
    return rows


def test_many_models_are_grouped_by_configuration(drawn, model, tmp_path, cli):
    runs = tmp_path / "runs"
    paths = [variant(model, runs / f"a{seed}.pt", factor, seed=seed) for seed, factor in ((0, 1), (1, -1))]
    paths += [variant(model, runs / "b.pt", 0.1, lr_strategy="differentiated")]
    paths += [shutil.copy(model.with_suffix(".last.pt"), runs / "a0.last.pt")]
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "r", "--device", "cpu"]
    code, out, err = cli("evaluate", *paths, *flags)
    assert code == 0 and err == "" and "skipped, being no finished models: a0.last.pt\n" in out
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["a0", "a1", "b", "table.md"]
    assert len(list((tmp_path / "r/b").iterdir())) == 7
    scores = [json.loads((tmp_path / f"r/{n}/metrics.json").read_text()) for n in ("a0", "a1", "b")]
    table = read_table(tmp_path / "r/table.md", "LR strategy")
    assert [(row["LR strategy"], row["Seeds"]) for row in table] == [
        ("uniform", "0, 1"),
        ("differentiated", "0"),
    ]
    assert list(table[0])[:4] == ["LR strategy", "Task", "Pretrained weights", "Accuracy"]
    assert table[0]["Task"] == "multitask" and table[0]["Pretrained weights"] == "random"
    for column, name in (("Accuracy", "accuracy"), ("Mask IoU", "mask_iou"), ("AP", "ap_macro")):
        values = [100 * score[name]["value"] for score in scores]
        low, high = (100 * end for end in scores[2][name]["ci95"])
        assert table[0][column] == f"{np.mean(values[:2]):.1f} ± {np.std(values[:2], ddof=1):.1f}"
        assert table[1][column] == f"{values[2]:.1f} [{low:.1f}, {high:.1f}]"
    (difference,) = read_table(tmp_path / "r/table.md", "Difference")
    assert difference["Difference"] == "differentiated − uniform"
    means = np.array([score["accuracy"]["value"] for score in scores])
    assert difference["Accuracy"].split()[0] == f"{100 * (means[2] - means[:2].mean()):+.1f}"


def test_models_of_one_name_and_other_settings(drawn, model, tmp_path, cli, refuse):
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "r"]
    paths = [variant(model, tmp_path / name / "model.pt", epochs=n) for n, name in ((1, "x"), (2, "y"))]
    assert cli("evaluate", *paths, *flags)[0] == 0
    table = read_table(tmp_path / "r/table.md", "LR strategy")
    assert [row["Other settings"] for row in table] == ["epochs 1", "epochs 2"]
    (difference,) = read_table(tmp_path / "r/table.md", "Difference")
    assert difference["Accuracy"] == "+0.0 [+0.0, +0.0]"  # the same weights
    assert (tmp_path / "r/x/model/metrics.json").is_file() and (tmp_path / "r/y/model").is_dir()
    older = torch.load(paths[1], weights_only=True)
    del older["config"]["mixup"]
    newer = torch.load(paths[1], weights_only=True)
    for pair, settings in (
        ([newer, older], ["mixup 0", "mixup unset"]),
        ([older | {"pretraining": {"init": init}} for init in "ab"], [f"pretraining init {i}" for i in "ab"]),
    ):
        rows = group_by_configuration([SimpleNamespace(checkpoint=checkpoint) for checkpoint in pair])[0]
        assert [columns["Other settings"] for columns, _ in rows] == settings
    code, _, err = cli("evaluate", *[shutil.copy(model, path) for path in paths], *flags)
    assert code == 0 and err.startswith("warning: taken for seeds of one configuration, two of them alike")
    refuse("evaluate", *[model.with_suffix(".last.pt")] * 2, *flags, words=["model.last checkpoint"])
    other = shutil.copy(model.with_suffix(".last.pt"), tmp_path / "other.last.pt")
    refuse("evaluate", model.with_suffix(".last.pt"), other, *flags, words=["none of the 2 files is a model"])


def test_temperature_scaling_is_off_unless_asked_for(drawn, model, tmp_path, cli, refuse):
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "r"]
    found = []
    for more in ([], ["--temperature-scaling"]):
        assert cli("evaluate", model, *flags, *more)[0] == 0
        with open(tmp_path / "r/predictions.csv", newline="") as file:
            rows = [[float(row[f"p{group}"]) for group in range(6)] for row in csv.DictReader(file)]
        summary = json.loads((tmp_path / "r/metrics.json").read_text())
        found.append((torch.tensor(rows).double(), summary["temperature"]))
    temperature = torch.load(model, weights_only=True)["val"]["val_temperature"]
    assert found[0][1] == 1 and found[1][1] == temperature != 1
    scaled = (found[0][0].log() / temperature).softmax(dim=1)
    assert torch.allclose(scaled, found[1][0], atol=1e-3)
    checkpoint = torch.load(model, weights_only=True)
    del checkpoint["val"]["val_temperature"]
    torch.save(checkpoint, tmp_path / "old.pt")
    refuse("evaluate", tmp_path / "old.pt", *flags, "--temperature-scaling", words=["old.pt", "temperature"])


def test_says_what_a_random_split_leaks(drawn, model, tmp_path, cli):
    data = tmp_path / "d"
    stems = noise_pairs(data / "test", [30] * 6)
    lines = ["file,split,duplicate_of", *(f"{stem}_image.png,test," for stem in stems)]
    lines += [f"other{i}_image.png,train,{stems[i]}_image.png" for i in range(2)]
    (data / "split.csv").write_text("\n".join(lines) + "\n")
    code, out, _ = cli("evaluate", model, "--data", data, "--out", tmp_path / "r")
    leaks = json.loads((tmp_path / "r/metrics.json").read_text())["near_duplicates_in_train"]
    assert code == 0 and leaks["n"] == 2 and "2 faces have a near-duplicate in train" in out
