import json
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import table
from cli import parse_args
from common import FaceDataset, load_checkpoint, save_checkpoint
from conftest import noise_pairs
from evaluate import score_model
from metrics import METRICS
from table import compare, format_difference, group_by_configuration, make_table
from test_evaluate import no_figures, untrained

__all__ = ["no_figures"]  # a fixture
FLAGS = ["--device", "cpu", "--workers", 0]


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
    both = width(seeds(first, faces), seeds(second, faces))
    assert both == pytest.approx(narrow)  # the same for both sides
    noise = rng.normal(0, 0.01, (2, 4, 1000))  # each seed's own: the values over seeds hold it already
    assert width(seeds(first, noise[0]), seeds(second, noise[1])) == pytest.approx(narrow, rel=0.03)
    alike = np.full(4, 0.7)
    least = 2 * 1.96 * (noise[0].mean(axis=0) - noise[1].mean(axis=0)).std()  # what faces alone give
    assert width(seeds(alike, noise[0]), seeds(alike, noise[1])) == pytest.approx(least, rel=0.01)
    still_wider = width(seeds(alike, faces), seeds(alike, still))
    assert still_wider == pytest.approx(2 * 1.96 * faces[0].std(), rel=0.01)


def test_ends_near_zero_get_a_second_decimal():
    assert format_difference(0.0131, [-0.0012, 0.038]) == "+1.3 [-0.1, +3.8]"
    assert format_difference(0.0031, [0.0003, 0.0062]) == "+0.31 [+0.03, +0.62]"
    assert format_difference(-0.0031, [-0.0062, -0.0004]) == "-0.31 [-0.62, -0.04]"
    assert format_difference(-0.0001, [-0.006, 0.0]) == "+0.0 [-0.6, +0.0]"
    assert format_difference(np.nan, [0, 0]) == "–"


# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------


def test_a_configuration_counts_by_its_faces_and_settings_not_by_how_paths_are_spelled():
    old = {"data": "split", "init": "c0.pt", "lr": 0.1, "seed": 0}  # older ones held the path
    pretraining = {"positives": "age", "init": "random", "data": "split", "seed": 0}
    new = {"init": "./c1.pt", "init_sha256": "f" * 64, "lr": 0.1, "final": False, "seed": 1}
    faces = {"train_hashes": torch.arange(7)}
    moved = pretraining | {"data": "./split/."}
    many = [
        SimpleNamespace(checkpoint={"config": old, "pretraining": pretraining, **faces}),
        SimpleNamespace(checkpoint={"config": new, "pretraining": moved, **faces}),
    ]
    [(columns, runs)], shared = group_by_configuration(many)
    assert len(runs) == 2 and columns["Pretrained weights"] == "contrastive (age)"
    assert shared["final"] == "off" and "init_sha256" not in shared
    [name] = re.findall(r"^7 faces \(([0-9a-f]{8})\)$", shared["data"])
    many[1].checkpoint["train_hashes"] = torch.arange(1, 8)
    (one, _), (other, _) = group_by_configuration(many)[0]
    assert one["Other settings"] == f"data 7 faces ({name})" != other["Other settings"]
    many[1].checkpoint |= faces
    many[1].checkpoint["config"]["final"] = True
    rows, _ = group_by_configuration(many)
    assert [columns["Other settings"] for columns, _ in rows] == ["final off", "final True"]


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


def scored(accuracy, checkpoint, path="m.pt"):
    """A model of which all COMPARED metrics and the error in years are known, or None."""
    metrics = dict.fromkeys(table.COMPARED, accuracy) | {"mae_years": accuracy and 10 * accuracy}
    draws = {name: (accuracy or np.nan) + np.linspace(-0.02, 0.02, 100) for name in metrics}
    summary = {
        name: {"value": value, "ci95": value and [value - 0.02, value + 0.03]}
        for name, value in metrics.items()
    }
    values = {"draws": draws, "summary": summary, "checkpoint": checkpoint}
    return SimpleNamespace(path=path, faces=[None] * 9, **values)


def model(strategy, seed, accuracy, **settings):
    config = {"lr_strategy": strategy, "seed": seed, "init": "random", **settings}
    checkpoint = {"config": config, "pretraining": {}, "train_hashes": torch.arange(3)}
    return scored(accuracy, checkpoint, f"{strategy}{seed}.pt")


def test_table_and_differences_of_known_models(capsys, tmp_path):
    many = [model("uniform", seed, 0.7 + seed / 100) for seed in (2, 0, 1)]
    many += [model("differentiated", seed, 0.75 + seed / 100) for seed in (0, 1, 2)]
    many += [model("uniform", 0, None, lr=0.1)]
    (tmp_path / "t.md").write_text(make_table(many, "d/test"))
    first, second, third = read_table(tmp_path / "t.md", "LR strategy")
    assert (first["LR strategy"], first["Seeds"], first["Other settings"]) == ("uniform", "0, 1, 2", "lr off")
    assert first["accuracy (micro)"] == "71.0 ± 1.0" and first[METRICS["mae_years"]] == "7.1 ± 0.1"
    assert second["accuracy (micro)"] == "76.0 ± 1.0" and third["accuracy (micro)"] == "–"
    # Uniform with lr 0.1 differs from differentiated twice.
    one, other = read_table(tmp_path / "t.md", "Difference")
    assert (one["Difference"], one["Holds for"]) == ("differentiated − uniform", "other seeds")
    half = 100 * stats.t.ppf(0.975, 4) * (2 * 0.01**2 / 3) ** 0.5
    assert one["accuracy (micro)"] == f"+5.0 [{5 - half:+.1f}, {5 + half:+.1f}]"
    assert (other["Difference"], other["Where"]) == ("lr 0.1 − lr off", "uniform, classification, random")
    assert other["accuracy (micro)"] == "–" and other["Holds for"] == "these trained models only"
    settings = {"lr": 1, "epochs": 1}, {"lr": 2, "epochs": 1}, {"lr": 2, "epochs": 2}
    (tmp_path / "t.md").write_text(make_table([model("uniform", 0, 0.7, **s) for s in settings], "d"))
    rows = read_table(tmp_path / "t.md", "Difference")
    what = ["lr 2 − lr 1", "epochs 2, lr 2 − epochs 1, lr 1", "epochs 2 − epochs 1"]
    assert [row["Difference"] for row in rows] == what
    assert rows[0]["Where"] == "uniform, classification, random, epochs 1"
    alone = make_table([model("uniform", 0, 0.7), model("uniform", 0, 0.8)], "d")
    assert "two of them alike: uniform0.pt, uniform0.pt" in capsys.readouterr().err
    assert "Differences" not in alone
    assert "| 70.0 [68.0, 73.0] |" in make_table(many[1:2], "d")


def test_fine_tunings_of_one_pretraining_say_nothing_of_other_seeds():
    many = [model("uniform", seed, 0.7) for seed in range(3)]
    for differ in (False, True):
        tuned = [model("differentiated", seed, 0.75, init_sha256=str(seed * differ)) for seed in range(3)]
        for scored_model in tuned:
            scored_model.checkpoint["pretraining"] = {"positives": "rank", "epochs": 5}
        text = make_table(many + tuned, "d")
        assert ("other seeds |" in text, "these trained models only |" in text) == (differ, not differ)


def test_ways_to_pretrain_are_compared_with_each_other_and_with_none():
    many = [model("uniform", 0, 0.7) for _ in range(3)]
    for scored_model, positives in zip(many, ("view", "rank")):
        scored_model.checkpoint["pretraining"] = {"positives": positives, "epochs": 5}
    text = make_table(many, "d")
    assert text.count("these trained models only |") == 3 and "Other settings" not in text


def test_a_seed_twice_is_one_seed():
    many = [model("uniform", seed, 0.7) for seed in (0, 0, 1)]
    many += [model("differentiated", seed, 0.75) for seed in range(3)]
    assert "these trained models only |" in make_table(many, "d")


def test_fine_tunings_of_models_are_one_configuration():
    many = [model("uniform", seed, 0.7, init=f"m{seed}.pt") for seed in range(2)]
    for scored_model in many:
        seed = scored_model.checkpoint["config"]["seed"]
        of_it = {"multitask": True, "init": f"contrastive{seed}.pt", "init_sha256": str(seed)}
        scored_model.checkpoint["pretraining"] = of_it
    assert "| fine-tuned |" in make_table(many, "d") and "Differences" not in make_table(many, "d")
    many[0].checkpoint["pretraining"] |= {"init": "other0.pt"}
    assert "pretraining init contrastive#.pt − pretraining init other#.pt" in make_table(many, "d")
    many[0].checkpoint["pretraining"] |= {"init": "imagenet", "init_sha256": None}
    assert "pretraining init imagenet" in make_table(many, "d")


def test_faces_that_one_model_leaves_out_are_there_for_the_next(tmp_path):
    noise_pairs(tmp_path / "d/test", ["20-29", 30, 50])
    path, read = untrained(tmp_path / "m.pt"), cache(FaceDataset)
    options = torch.device("cpu"), torch.float32
    found = [score_model(path, tmp_path / "d/test", *options, read=read) for _ in range(2)]
    assert [len(scored.faces) for scored in found] == [2, 2]
    assert [scored.summary["left_out_across_groups"] for scored in found] == [1, 1]


def test_scores_models_and_groups_them(tmp_path, cli, refuse, no_figures, monkeypatch):
    noise_pairs(tmp_path / "d/val", [2, 10, 20, 30, 50, 70] * 3)
    runs, read = tmp_path / "runs", []
    paths = [untrained(runs / f"a{seed}.pt", seed) for seed in range(2)]
    paths += [untrained(runs / "run.v1.pt", 5, lr_strategy="differentiated")]
    paths += [untrained(runs / "run.v2.pt", multitask=False, age_sigma=0)]
    shutil.copy(paths[0], runs / "a0.last.pt")
    (runs / "bad.pt").write_text("no checkpoint")
    torch.save(torch.load(paths[0], weights_only=True) | {"kind": "contrastive"}, runs / "c.pt")

    def read_faces(*key, **options):
        read.append(key)
        return FaceDataset(*key, **options)

    monkeypatch.setattr(table, "FaceDataset", read_faces)
    flags = ["--data", tmp_path / "d", "--split", "val", "--results", tmp_path / "r", *FLAGS]
    code, out, err = cli("table", *sorted(runs.glob("*.pt")), *flags, "--seed", 1)
    assert code == 1 and err.count("\n") == 1 and err.startswith("table.py: error: ") and "bad.pt" in err
    assert "skipped, being no finished models: a0.last.pt, c.pt\n" in out and "models; 1 failed" in out
    assert len(read) == 2  # once with masks, once without
    names = ["a0", "a1", "run.v1", "run.v2"]
    assert {path.name for path in (tmp_path / "r").iterdir()} == {*names, "table.md"}
    assert "Not scored: bad.pt (" in (tmp_path / "r/table.md").read_text()
    scores = [json.loads((tmp_path / f"r/{name}/metrics.json").read_text()) for name in names]
    two, one, other = read_table(tmp_path / "r/table.md", "LR strategy")
    assert (two["Task"], two["Seeds"], two["Pretrained weights"]) == ("multitask", "0, 1", "random")
    values = [100 * score["auc_macro_ovr"]["value"] for score in scores]
    assert two[METRICS["auc_macro_ovr"]] == f"{np.mean(values[:2]):.1f} ± {np.std(values[:2], ddof=1):.1f}"
    low, high = (100 * end for end in scores[2]["auc_macro_ovr"]["ci95"])
    assert one["LR strategy"] == "differentiated"
    assert one[METRICS["auc_macro_ovr"]] == f"{values[2]:.1f} [{low:.1f}, {high:.1f}]"
    assert (other["Task"], other["Seeds"]) == ("classification", "0")
    assert other["Other settings"] == "age-sigma off"
    assert (other[METRICS["mae_years"]], other[METRICS["mask_iou"]]) == ("–", "–")
    assert one["F1 (macro)"].startswith(f"{100 * scores[2]['f1_macro']['value']:.1f} [")
    [difference] = read_table(tmp_path / "r/table.md", "Difference")
    assert (difference["Difference"], difference["Holds for"]) == (
        "differentiated − uniform", "these trained models only"
    )  # fmt: skip
    assert cli("evaluate", paths[0], *flags[:4], "--out", tmp_path / "e", "--seed", 1, *FLAGS)[0] == 0
    alone = json.loads((tmp_path / "e/metrics.json").read_text())
    assert alone == scores[0]  # the same draws as evaluate.py's
    assert cli("evaluate", paths[2], *flags[:4], "--out", tmp_path / "e", "--seed", 1, *FLAGS)[0] == 0
    assert json.loads((tmp_path / "e/metrics.json").read_text()) == scores[2]  # and for all models
    refuse("table", runs / "c.pt", *flags, words=["none of the 1 files is a model"])
    refuse("table", paths[0], "--data", tmp_path, words=["test"])
    refuse("table", paths[0], *flags[:4], "--results", paths[0] / "r", words=["--results", "written"])


def test_models_of_one_name_have_their_own_results(tmp_path, cli, monkeypatch):
    noise_pairs(tmp_path / "d/test", [30])
    places = []

    def answer(path, *_, **__):
        return scored(0.7, load_checkpoint(path, "model"))

    monkeypatch.setattr(table, "score_model", answer)
    monkeypatch.setattr(table, "measure", lambda *_: None)
    monkeypatch.setattr(table, "write_results", lambda _, place: places.append(str(place)))
    for name in "ab":
        untrained(tmp_path / name / "m.pt")
    models = "a/m.pt", "b/m.pt", "./a/m.pt"
    assert cli("table", *models, "--data", "d", *FLAGS, cwd=tmp_path)[0] == 0
    assert places == ["results/a/m", "results/b/m"]
    assert cli("table", "a/m.pt", "--data", "d", *FLAGS, cwd=tmp_path)[0] == 0
    assert places[-1] == "results/m"


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Has the stages write checkpoints without training; collects their names and arguments.

    Pretraining by age and the uniform row from random weights fail.
    """
    made = []
    none = torch.empty(0, dtype=torch.int64)

    def call(script, *flags):
        args = parse_args(__import__(script).get_parser(), [str(flag) for flag in flags])
        made.append((script, args))
        if "random-uniform" in args.out or "age" in Path(args.out).stem:
            return f"{script}.py: error: it failed"
        held = {"train_hashes": none, "pretraining": {}}
        if script == "pretrain":
            save_checkpoint(args.out, "contrastive", args, weights={}, **held)
            return None
        if str(args.init).endswith(".pt"):
            held["pretraining"] = load_checkpoint(args.init, "contrastive")["config"]
        save_checkpoint(args.out, "model", args, weights={}, **held)
        return None

    monkeypatch.setattr(table, "call", call)
    monkeypatch.setattr(table, "list_pairs", lambda *_, **__: None)  # no face is scored
    return made


def test_faces_to_score_are_looked_for_before_any_training(tmp_path, refuse, monkeypatch):
    trained = []
    monkeypatch.setattr(table, "call", lambda *flags: trained.append(flags))
    refuse("table", "--data", "d", "--seeds", 0, *FLAGS, words=["is not a folder"], cwd=tmp_path)
    assert not trained


def test_a_script_that_is_killed_is_not_blamed_on_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    code = "import os, sys\nprint('warning: x', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)"
    (tmp_path / "k.py").write_text(code)
    assert "signal 9" in table.call("k")


def test_a_link_is_no_second_model_and_faces_seen_are_told(tmp_path, cli, no_figures):
    noise_pairs(tmp_path / "d/test", [30, 50])
    hashes = FaceDataset(tmp_path / "d/test", 32, with_masks=False).hashes
    (tmp_path / "runs").mkdir()
    untrained(tmp_path / "runs/a.pt", train_hashes=hashes[:1])
    (tmp_path / "best.pt").symlink_to("runs/a.pt")
    code, out, err = cli("table", "best.pt", "runs/a.pt", "--data", "d", *FLAGS, cwd=tmp_path)
    assert code == 0 and out.count("| uniform |") == 1 and "two of them alike" not in err
    assert "evaluate.py --unseen leaves them out" in err and "Flattered: a.pt knows 1 of these faces\n" in out


def test_trains_a_row_for_each_choice_and_reports_what_fails(tmp_path, cli, calls, monkeypatch):
    places, dtypes = [], []

    def answer(path, folder, device, dtype, *_, **__):
        dtypes.append(dtype)
        return scored(0.7, load_checkpoint(path, "model"))

    monkeypatch.setattr(table, "score_model", answer)
    monkeypatch.setattr(table, "measure", lambda *_: None)
    monkeypatch.setattr(table, "write_results", lambda _, place: places.append(str(place)))
    (tmp_path / "c.yaml").write_text(
        "pretrain: {image-size: 32, epochs: 7}\nfinetune: {image-size: 32, lr: 0.5}\n"
    )
    flags = ["--data", "d", "--config", "c.yaml", "--device", "cpu", "--workers", 0, "--precision", "bf16"]
    flags += ["--weights", "random", "rank", "age", "--tasks", "multitask", "--seeds", 3, 4, 3]
    code, out, _ = cli("table", *flags, cwd=tmp_path)
    assert code == 1 and "6 models; 6 failed" in out.splitlines()[-1]
    text = (tmp_path / "results/table.md").read_text()
    for seed in (3, 4):
        for name, script in (
            ("random-uniform", "finetune"), ("age-uniform", "pretrain"), ("age-differentiated", "pretrain")
        ):  # fmt: skip
            assert f"Not trained: multitask-{name}-seed{seed} ({script}.py: error: it failed)\n" in text
    rows = read_table(tmp_path / "results/table.md", "LR strategy")
    assert [(row["LR strategy"], row["Pretrained weights"], row["Seeds"]) for row in rows] == [
        ("differentiated", "random", "3, 4"),
        ("uniform", "contrastive (rank)", "3, 4"),
        ("differentiated", "contrastive (rank)", "3, 4"),
    ]
    assert set(dtypes) == {torch.float32}  # whatever they are trained in
    assert "epochs 7" in text and "lr 0.5" in text and "on 9 faces of" in text
    assert [script for script, _ in calls] == 2 * [
        *["finetune"] * 2,
        *["pretrain", "finetune", "finetune"],
        "pretrain",
    ]
    for script, args in calls:
        assert (args.data, args.device, args.workers, args.precision) == ("d", "cpu", 0, "bf16")
        assert args.resume and not args.overwrite and args.image_size == 32
        assert args.seed == int(Path(args.out).stem[-1]) and script in ("pretrain", "finetune")
    trained = {Path(args.out).stem: args for _, args in calls}
    args = trained["multitask-rank-differentiated-seed4"]
    assert (args.init, args.multitask) == ("table/contrastive-rank-seed4.pt", True)
    assert args.lr_strategy == "differentiated" and trained["contrastive-rank-seed3"].positives == "rank"
    assert "results/multitask-rank-uniform-seed3" in places and len(places) == 6


def test_what_is_not_given_is_the_configs(tmp_path, cli, calls):
    (tmp_path / "c.yaml").write_text("finetune: {precision: fp32, data: other, workers: 3}\n")
    flags = ["--config", "c.yaml", "--weights", "random", "--lr-strategies", "uniform", "--device", "cpu"]
    assert cli("table", *flags, cwd=tmp_path)[0] == 2  # since this row fails
    assert calls and all(
        (args.precision, args.data, args.workers, args.device) == ("fp32", "other", 3, "cpu")
        for _, args in calls
    )
    assert sorted(args.seed for script, args in calls if script == "finetune") == [0, 0, 1, 1, 2, 2]


def test_a_precision_that_is_no_trainings_default_is_handed_on(tmp_path, cli, calls):
    flags = ["--precision", "fp32", "--weights", "random", "--lr-strategies", "uniform", *FLAGS]
    cli("table", *flags, cwd=tmp_path)
    assert calls and all(args.precision == "fp32" for _, args in calls)


def test_every_row_by_default_and_none_that_can_be_trained(tmp_path, cli, calls, refuse, monkeypatch):
    monkeypatch.setattr(table, "call", lambda script, *flags: calls.append((script, flags)) or "no face")
    code, _, err = cli("table", "--seeds", 0, "--overwrite", *FLAGS, cwd=tmp_path)
    assert code == 2 and err.startswith("table.py: error: no row was trained. ") and "(no face)\n" in err
    assert [script for script, _ in calls] == [*["finetune"] * 8, *["pretrain"] * 3]
    assert all("--overwrite" in flags and "--resume" not in flags for _, flags in calls)
    for _, flags in calls[:8]:
        task, weights, strategy, _ = flags[-1].stem.split("-")
        assert ("--multitask" in flags) == (task == "multitask") != ("--no-multitask" in flags)
        assert flags[flags.index("--lr-strategy") + 1] == strategy
        assert flags[flags.index("--init") + 1] == weights
    refuse("table", "--weights", "view", "none", words=["--weights"], cwd=tmp_path)
    refuse("table", "--seeds", -1, words=["--seeds"], cwd=tmp_path)


def test_call_returns_the_error_of_a_script_and_stops_with_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    for name, line in (
        ("good", ""), ("bad", "print('no', 'face', file=sys.stderr); sys.exit(2)"),
        ("mute", "sys.exit(3)"), ("stopped", "sys.exit(130)"),
    ):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(f"import sys\n{line}\n")
    assert table.call("good") is None and table.call("mute") == "mute.py ended with exit code 3"
    assert table.call("bad", "--epochs", 2, "--out", "a b") == "no face"
    printed = capfd.readouterr()
    assert "$ python bad.py --epochs 2 --out 'a b'\n" in printed.out and printed.err == "no face\n"
    with pytest.raises(KeyboardInterrupt):
        table.call("stopped")


def test_a_table_that_is_stopped_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "long.py").write_text(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(5)\nopen('end', 'w')"
    )

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        table.call("long")
    assert not (tmp_path / "end").exists()
