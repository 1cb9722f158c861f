"""Figures count the faces that they should, by a clock that moves only for what is charged to it."""

import importlib
import re

import cv2
import pytest
import torch

import benchmark
import common
import finetune
from cli import UserError, parse_args

FAST = ["--image-size", 32, "--batch-size", 8, "--faces", 20, "--repeats", 1, "--device", "cpu"]


@pytest.fixture
def charge(monkeypatch):
    """`charge(owner, name, ms, instead=None)` moves the clock by `ms(*args)` at each call of a function."""
    costs = []
    monkeypatch.setattr(benchmark, "perf_counter", lambda: sum(costs) / 1000)

    def charge(owner, name, ms, instead=None):
        function = instead or getattr(owner, name)

        def charged(*args, **options):
            costs.append(ms(*args))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, charged)

    return charge


def figures(printed):
    """{(part, what): (faces a second, ratio to the first of its part or None)} of a printed table."""
    row = r"^\| (\w+) +\| (.+?) +\| +([\d,.]+) faces/s \| (?:([\d.]+) of .+?)? +\|$"
    return {
        (part, what): (float(rate.replace(",", "")), float(ratio) if ratio else None)
        for part, what, rate, ratio in re.findall(row, printed, re.MULTILINE)
    }


def test_training_costs_what_loader_and_model_cost(drawn, cli, charge):
    """A face costs 2 ms to draw and 3 to learn from; of 20 faces in batches of 8, an epoch has 16."""
    charge(common.FaceDataset, "__getitems__", lambda _, keys: 2 * len(keys))
    charge(finetune, "multitask_losses", lambda _, batch: 3 * len(batch["age"]))
    flags = [*FAST, "--data", drawn / "dataset/raw", "--workers", 0]
    code, printed, err = cli("benchmark", *flags, "--only", "training", "loader")
    assert code == 0, err
    assert figures(printed) == {
        ("training", "bare steps"): (333.3, None),
        ("training", "finetune.py"): (200, 0.6),
        ("loader", "pretrain, one core"): (500, None),
        ("loader", "pretrain, 0 workers"): (500, 1),
        ("loader", "finetune, one core"): (500, None),
        ("loader", "finetune, 0 workers"): (500, 1),
    }


def test_masks_and_scores_cost_what_they_are_made_of(drawn, cli, charge):
    """A face costs 2 ms to cut out, 1 a picture to decode (the preview has two), 4 to score."""

    def forward(_, images, heads=False):
        masks = torch.zeros(len(images), 1, *images.shape[2:])
        age_logits = torch.zeros(len(images), common.YEARS)
        return common.Heads(age_logits, masks, None) if heads else (age_logits[:, :6], masks)

    charge(cv2, "grabCut", lambda *_: 2)
    charge(cv2, "imdecode", lambda *_: 1)
    charge(common.MultitaskResNet18, "forward", lambda _, images, **__: 2 * len(images), instead=forward)
    flags = [*FAST, "--data", drawn / "dataset/raw", "--workers", 1]
    code, printed, err = cli("benchmark", *flags, "--only", "masks", "evaluate")
    assert code == 0, err
    size = common.load_checkpoint(benchmark.RELEASED, "model")["preprocessing"]["image_size"]
    assert figures(printed) == {
        ("masks", "bare GrabCut, 1 at once"): (500, None),
        ("masks", "masks.py --workers 1"): (200, 0.4),
        ("evaluate", f"bare forward pass, {size} px"): (250, None),
        ("evaluate", "scoring in evaluate.py"): (250, 1),
        ("evaluate", "reading in evaluate.py"): (500, 2),
        ("evaluate", "predict.py"): (200, 0.8),
    }


def test_medians_of_turns_without_the_first(monkeypatch, capsys):
    """Of 60 faces: a takes 1, 2 and 6 s, b 2, 1 and 6 s, which is once the same pace."""
    order, now = [], [0]
    took = {"a": iter([50, 1, 2, 6]), "b": iter([99, 2, 1, 6])}
    monkeypatch.setattr(benchmark, "perf_counter", lambda: now[0])

    def work(name):
        order.append(name)
        now[0] += next(took[name])

    args = parse_args(benchmark.get_parser(), ["--repeats", "3"])
    benchmark.measure("part", {name: lambda name=name: work(name) for name in "ab"}, 60, args)
    assert "".join(order) == "abababab"
    assert figures(capsys.readouterr().out) == {("part", "a"): (30, None), ("part", "b"): (30, 1)}


def test_growth_runs_the_stages_on_a_quarter_half_and_all(drawn, cli, refuse, monkeypatch, tmp_path):
    calls = []

    def run_stage(script, flags, folder):
        parse_args(importlib.import_module(script).get_parser(), [str(flag) for flag in flags])
        calls.append((script, len(list((folder / "dataset/raw").iterdir()))))

    monkeypatch.setattr(benchmark, "run_stage", run_stage)
    code, printed, err = cli("benchmark", *FAST, "--only", "growth", "--data", drawn / "dataset/raw")
    stages = ["masks", "split", "pretrain", "finetune", "evaluate"]
    assert code == 0 and calls == [(stage, count) for count in (5, 10, 20) for stage in stages], err
    shown = re.findall(r"^\| growth +\| (\w+)\.py, (\d+) faces +\| +[\d.]+ s \|", printed, re.MULTILINE)
    assert shown == [(stage, str(count)) for stage, count in calls]
    refuse("benchmark", "--data", tmp_path, words=["--data", str(tmp_path)])


def test_a_stage_that_fails_is_no_figure(tmp_path, capfd):
    benchmark.run_stage("split", ["--help"], tmp_path)
    with pytest.raises(UserError, match=r"split\.py"):
        benchmark.run_stage("split", ["--input", "nowhere"], tmp_path)
    assert "nowhere" in capfd.readouterr().err
