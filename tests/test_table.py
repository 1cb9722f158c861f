import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
import table
from cli import run
from common import load_checkpoint
from conftest import noise_pairs
from evaluate import METRICS
from table import compare, group_by_configuration
from test_evaluate import PNGS, untrained

FLAGS = ["--device", "cpu", "--workers", 0]
CONFIG = """
pretrain: {epochs: 1, image-size: 32, batch-size: 16}
finetune: {epochs: 1, image-size: 32, batch-size: 16}
"""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    for name in PNGS:
        monkeypatch.setattr(evaluate, f"plot_{name}", lambda *_: None)


@pytest.fixture
def calls(monkeypatch):
    """Runs the stages in this process, where each would cost seconds of imports; collects their names."""
    made = []

    def call(script, *flags):
        module = __import__(script)
        made.append((script, module.get_parser().parse_args([str(flag) for flag in flags]).out))
        try:
            run(module.main, module.get_parser(), [str(flag) for flag in flags])
        except SystemExit:
            return f"{script}.py: error: it failed"

    monkeypatch.setattr(table, "call", call)
    return made


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


def test_trains_a_row_for_each_choice_and_reports_what_fails(drawn, tmp_path, cli, calls, no_network):
    (tmp_path / "c.yaml").write_text(CONFIG)
    flags = ["--data", drawn / "dataset/processed_split", "--config", tmp_path / "c.yaml", *FLAGS]
    flags += ["--weights", "imagenet", "rank", "age", "--tasks", "multitask"]
    flags += ["--lr-strategies", "differentiated"]
    (tmp_path / "table/contrastive-age-seed3.pt").mkdir(parents=True)  # so that pretraining by age fails
    code, out, _ = cli("table", *flags, "--seeds", 3, cwd=tmp_path)
    assert code == 1 and "1 models, 2 not trained" in out.splitlines()[-1]
    assert [script for script, _ in calls] == ["pretrain", "pretrain", "finetune", "finetune"]
    text = (tmp_path / "results/table.md").read_text()
    assert "| differentiated | multitask | contrastive (rank) |" in text
    assert "Not trained: multitask-imagenet-differentiated-seed3 (finetune.py: error: it failed)" in text
    assert "Not trained: multitask-age-differentiated-seed3 (pretrain.py: error: it failed)" in text
    path = tmp_path / "table/multitask-rank-differentiated-seed3.pt"
    pretrained = load_checkpoint(tmp_path / "table/contrastive-rank-seed3.pt", "contrastive")
    assert pretrained["config"]["positives"] == "rank"
    checkpoint = load_checkpoint(path, "model")
    assert checkpoint["pretraining"] == pretrained["config"]
    config = [checkpoint["config"][key] for key in ("seed", "epochs", "multitask", "lr_strategy")]
    assert config == [3, 1, True, "differentiated"]
    assert json.loads((tmp_path / f"results/{path.stem}/metrics.json").read_text())
    assert len(table.get_parser().parse_args([]).weights) == 5

    code, out, _ = cli("table", *flags, "--seeds", 3, cwd=tmp_path)  # done: nothing is trained
    assert code == 1 and "resumed" in out and "epoch 1/1" not in out
    after = load_checkpoint(path, "model")["weights"]
    assert all(torch.equal(checkpoint["weights"][key], after[key]) for key in after)


def test_a_failed_pretraining_takes_its_rows_with_it(tmp_path, cli, calls, refuse):
    code, _, err = cli("table", "--data", tmp_path / "none", "--seeds", 0, *FLAGS, cwd=tmp_path)
    assert code == 2 and err.splitlines()[-1].startswith("table.py: error: no row was trained")
    assert [script for script, _ in calls] == [*["pretrain"] * 3, *["finetune"] * 8]
    refuse("table", "--weights", "view", "none", words=["--weights"], cwd=tmp_path)
    refuse("table", "--seeds", -1, words=["--seeds"], cwd=tmp_path)


def test_call_returns_the_error_of_a_script(capfd):
    error = table.call("split", "--input", "nowhere", "--fractions", 1, 1, 1)
    assert error.startswith("split.py: error: --fractions sum to 3")
    printed = capfd.readouterr()
    assert "$ python split.py --input nowhere --fractions 1 1 1" in printed.out and error in printed.err


# ------------------------------------------------------------------------------------------------------------
# Differences
# ------------------------------------------------------------------------------------------------------------


def test_with_few_seeds_the_interval_is_paired_over_faces_and_for_these_models_only():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(0.7, 0.01, 4000), rng.normal(0.02, 0.001, 4000)
    worse, better = [(0.7, shared)], [(0.72, shared + own)]
    difference, (low, high), general = compare(better, worse)
    assert difference == pytest.approx(0.02) and not general
    assert (low, high) == pytest.approx((0.018, 0.022), abs=2e-4)  # alone, each varies ten times as much
    assert compare(worse, worse) == (0, [0, 0], False)
    assert not compare(better * 2, worse * 5)[2]  # seeds of one side tell nothing of the other's


def test_with_three_seeds_the_interval_is_students_t_and_for_other_seeds():
    rng = np.random.default_rng(0)
    first, second = np.array([0.71, 0.73, 0.72, 0.75]), np.array([0.70, 0.69, 0.72])

    def seeds(values, over_faces):
        return [(value, value + draws) for value, draws in zip(values, over_faces)]

    still = np.zeros((4, 1000))
    difference, ends, general = compare(seeds(first, still), seeds(second, still))
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert general and difference == pytest.approx(first.mean() - second.mean())
    assert ends == pytest.approx([welch.low, welch.high])

    def width(*sides):
        low, high = compare(*sides)[1]
        return high - low

    narrow = welch.high - welch.low
    faces = rng.normal(0, 0.02, (1, 1000)).repeat(4, axis=0)  # the same for all seeds of one side
    assert width(seeds(first, faces), seeds(second, still)) > 1.3 * narrow
    assert width(seeds(first, faces), seeds(second, faces)) == pytest.approx(
        narrow
    )  # the same for both sides
    noise = rng.normal(0, 0.005, (2, 4, 1000))  # each seed's own: the values over seeds hold it already
    assert width(seeds(first, noise[0]), seeds(second, noise[1])) == pytest.approx(narrow, rel=0.05)
    alike = np.full(4, 0.7)
    assert width(seeds(alike, faces), seeds(alike, still)) == pytest.approx(
        2 * 1.96 * faces[0].std(), rel=0.01
    )


# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------


def test_a_configuration_counts_by_what_it_says_not_by_how_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split").mkdir()
    (tmp_path / "link").symlink_to("split")
    old = {"data": "split", "init": "c0.pt", "lr": 0.1, "seed": 0}
    pretraining = {"positives": "age", "init": "random", "data": "split", "seed": 0}
    new = {"data": str(tmp_path / "link") + "/", "init": "./c1.pt", "init_sha256": "f" * 64, "lr": 0.1}
    new |= {"final": False, "seed": 1}
    many = [
        SimpleNamespace(checkpoint={"config": old, "pretraining": pretraining}),
        SimpleNamespace(checkpoint={"config": new, "pretraining": pretraining | {"data": "./split/."}}),
    ]
    [(columns, runs)], shared = group_by_configuration(many)
    assert len(runs) == 2 and columns["Pretrained weights"] == "contrastive (age)"
    assert (shared["data"], shared["final"]) == ("split", "off") and "init_sha256" not in shared
    many[1].checkpoint["config"] |= {"final": True, "data": "other"}
    rows, _ = group_by_configuration(many)
    assert [columns["Other settings"] for columns, _ in rows] == [
        "data split, final off",
        "data other, final True",
    ]


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


def test_scores_models_and_groups_them(tmp_path, cli, refuse):
    noise_pairs(tmp_path / "d/val", [2, 10, 20, 30, 50, 70] * 5)
    runs = tmp_path / "runs"
    paths = [untrained(runs / f"a{seed}.pt", seed) for seed in range(3)]
    paths += [untrained(runs / f"run.v{i}.pt", 5 + i, lr_strategy="differentiated") for i in range(3)]
    paths += [untrained(runs / "one.pt", multitask=False, age_sigma=0)]
    shutil.copy(paths[0], runs / "a0.last.pt")
    (runs / "bad.pt").write_text("no checkpoint")
    torch.save(torch.load(paths[0], weights_only=True) | {"kind": "contrastive"}, runs / "c.pt")
    flags = ["--data", tmp_path / "d", "--split", "val", "--results", tmp_path / "r", *FLAGS]
    code, out, err = cli("table", *sorted(runs.glob("*.pt")), *flags)
    assert code == 1 and err.count("\n") == 1 and err.startswith("table.py: error: ") and "bad.pt" in err
    assert "skipped, being no finished models: a0.last.pt, c.pt\n" in out and "1 not scored" in out
    names = ["a0", "a1", "a2", "run.v0", "run.v1", "run.v2", "one"]
    assert {path.name for path in (tmp_path / "r").iterdir()} == {*names, "table.md"}
    scores = [json.loads((tmp_path / f"r/{name}/metrics.json").read_text()) for name in names]
    three, one, others = read_table(tmp_path / "r/table.md", "LR strategy")
    assert (one["Task"], one["Seeds"], one["Other settings"]) == ("classification", "0", "age-sigma off")
    assert (three["Task"], three["Seeds"], three["Pretrained weights"]) == ("multitask", "0, 1, 2", "random")
    assert (others["LR strategy"], others["Seeds"]) == ("differentiated", "5, 6, 7")
    for name, scale in (("accuracy", 100), ("mae_years", 1)):
        values = [scale * score[name]["value"] for score in scores if name in score]
        for row, part in ((three, values[:3]), (others, values[3:6])):
            assert row[METRICS[name]] == f"{np.mean(part):.1f} ± {np.std(part, ddof=1):.1f}"
    low, high = (100 * end for end in scores[-1]["accuracy"]["ci95"])
    assert one["accuracy (micro)"] == f"{100 * scores[-1]['accuracy']['value']:.1f} [{low:.1f}, {high:.1f}]"
    assert (one[METRICS["mae_years"]], one[METRICS["mask_iou"]]) == ("–", "–")
    [difference] = read_table(tmp_path / "r/table.md", "Difference")
    assert (difference["Difference"], difference["Holds for"]) == ("differentiated − uniform", "other seeds")
    means = np.array([score["accuracy"]["value"] for score in scores])
    assert difference["accuracy (micro)"].split()[0] == f"{100 * (means[3:6].mean() - means[:3].mean()):+.1f}"

    twin = shutil.copy(paths[0], tmp_path / "twin.pt")
    code, _, err = cli("table", paths[0], twin, paths[-1], *flags)
    assert code == 0 and err.startswith("warning: seeds of one configuration, two of them alike")
    [difference] = read_table(tmp_path / "r/table.md", "Difference")
    assert difference["Holds for"] == "these trained models only"
    refuse("table", runs / "c.pt", *flags, words=["none of the 1 files is a model"])
    refuse("table", paths[0], "--data", tmp_path, words=["test"])
