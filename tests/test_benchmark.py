"""Figures count the faces that they should, by a clock that moves only for what is charged to it."""

import importlib
import shutil
from functools import partial

import cv2
import pytest
import torch

import benchmark
import common
import finetune
from cli import UserError, parse_args

FAST = ["--image-size", 32, "--batch-size", 8, "--faces", 20, "--repeats", 1, "--device", "cpu", "--only"]


def table(printed):
    """The first word of each cell of a printed table, without its head and the part's name."""
    rows = [line.split("|")[2:-1] for line in printed.splitlines() if line.startswith("| ")]
    return [[(cell.split() or [""])[0] for cell in row] for row in rows[2:]]


def test_figures_cost_what_they_are_made_of(drawn, cli, monkeypatch):
    """A face costs 2 ms to cut out, 1 to decode or to draw, 3 to learn from, 4 to score."""
    clock = [0.0]
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock[0])

    def charge(owner, name, ms, instead=None):
        function = instead or getattr(owner, name)

        def charged(*args, **options):
            clock[0] += ms(*args) / 1000
            return function(*args, **options)

        monkeypatch.setattr(owner, name, charged)

    charge(common.FaceDataset, "__getitems__", lambda data, keys: data.views * len(keys))
    charge(finetune, "multitask_losses", lambda _, batch: 3 * len(batch["age"]))
    charge(cv2, "grabCut", lambda *_: 2)
    charge(cv2, "imdecode", lambda *_: 1)
    flags = [*FAST, "training", "loader", "masks", "--data", drawn / "dataset/raw", "--workers", 0]
    code, printed, err = cli("benchmark", *flags)
    assert code == 0 and table(printed) == [
        ["bare", "333.3", ""], ["finetune.py", "250.0", "0.75"], ["pretrain,", "500.0", ""],
        ["pretrain,", "500.0", "1.00"], ["finetune,", "1,000.0", ""], ["finetune,", "1,000.0", "1.00"],
        ["bare", "500.0", ""], ["masks.py", "200.0", "0.40"],
    ], err  # fmt: skip

    def forward(_, images, heads):
        masks = torch.zeros(len(images), 1, *images.shape[2:])
        return torch.zeros(len(images), common.YEARS), masks, None

    # Each face and its mirror image.
    charge(common.MultitaskResNet18, "forward", lambda _, images: 2 * len(images), instead=forward)
    code, printed, err = cli("benchmark", *FAST, "evaluate", "--data", drawn / "dataset/raw", "--workers", 1)
    assert code == 0 and table(printed) == [
        ["bare", "250.0", ""], ["scoring", "250.0", "1.00"], ["reading", "500.0", "2.00"],
        ["predict.py", "200.0", "0.80"],
    ], err  # fmt: skip


def test_medians_of_turns_without_the_first(monkeypatch, capsys):
    """Of 60 faces: a takes 1, 2 and 6 s, b 2, 1 and 6 s, which is once the same pace."""
    order, clock = [], [0]
    took = {"a": iter([50, 1, 2, 6]), "b": iter([99, 2, 1, 6])}
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock[0])

    def work(name):
        order.append(name)
        clock[0] += next(took[name])

    args = parse_args(benchmark.get_parser(), ["--repeats", "3"])
    benchmark.measure("part", {name: partial(work, name) for name in "ab"}, 60, args)
    printed = table("| head |\n| --- |\n" + capsys.readouterr().out)
    assert "".join(order) == "abababab" and printed == [["a", "30.0", ""], ["b", "30.0", "1.00"]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_measured_in_the_precision_asked_for(drawn, cli, monkeypatch, precision):
    def begin_training(args, *_):
        raise UserError(f"in {args.precision}")

    monkeypatch.setattr(benchmark.training, "begin_training", begin_training)
    flags = [*FAST, "training", "--data", drawn / "dataset/raw", "--workers", 0, "--precision", precision]
    code, _, err = cli("benchmark", *flags)
    assert code == 2 and f"in {precision}" in err


def test_bare_steps_have_the_precision_asked_for(drawn, cli, monkeypatch, small_model):
    found, losses = [], finetune.multitask_losses

    def spy(*args, **options):
        found.append(torch.is_autocast_enabled("cpu"))
        return losses(*args, **options)

    monkeypatch.setattr(finetune, "multitask_losses", spy)
    flags = [*FAST, "training", "--data", drawn / "dataset/raw", "--workers", 0, "--precision", "bf16"]
    assert cli("benchmark", *flags)[0] == 0 and found and all(found)


def test_loaders_of_one_core_and_of_all_draw_what_the_stages_draw(drawn, cli, monkeypatch):
    found = []

    def train_loader(dataset, _, seed, workers, device):
        found.append((dataset.views, dataset.masks is not None, workers))
        return [None]

    monkeypatch.setattr(benchmark.training, "train_loader", train_loader)
    code, _, err = cli("benchmark", *FAST, "loader", "--data", drawn / "dataset/raw", "--workers", 2)
    assert code == 0 and found == [(2, False, 0), (2, False, 2), (1, True, 0), (1, True, 2)], err


def test_a_gpu_is_waited_for(monkeypatch, capsys):
    clock = [0]
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.append(clock.pop() + 2))
    args = parse_args(benchmark.get_parser(), ["--repeats", "1"])
    benchmark.measure("part", {"a": lambda: None}, 60, args)
    assert "30.0 faces/s" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: clock.append(clock.pop() + 3))
    benchmark.measure("part", {"a": lambda: None}, 60, args)
    assert "20.0 faces/s" in capsys.readouterr().out


def test_faces_are_drawn_where_none_are_given(cli):
    code, printed, err = cli("benchmark", *FAST, "masks", "--workers", 1)
    assert code == 0 and [row[0] for row in table(printed)] == ["bare", "masks.py"], err


def test_growth_runs_the_stages_on_a_quarter_half_and_all(drawn, cli, refuse, monkeypatch, tmp_path):
    done, precisions, run = [], [], benchmark.run_stage

    def run_stage(script, *flags, cwd):
        args = parse_args(importlib.import_module(script).get_parser(), list(flags))
        if "train" in script or "tune" in script:
            precisions.append(args.precision)
            assert (args.epochs, args.image_size, args.batch_size) == (1, 32, 8)
            assert script == "pretrain" or (args.init, args.multitask) == ("contrastive.pt", True)
        done.append((script, len(list((cwd / "dataset/raw").iterdir()))))
        return 2.0, 300.0

    monkeypatch.setattr(benchmark, "run_stage", run_stage)
    growth = ["benchmark", *FAST, "growth", "--precision", "bf16", "--data"]
    code, printed, err = cli(*growth, drawn / "dataset/raw")
    stages = ["masks", "split", "pretrain", "finetune", "evaluate"]
    assert code == 0 and done == [(stage, count) for count in (5, 10, 20) for stage in stages], err
    assert table(printed) == [[f"{stage}.py,", "2.0", "300"] for stage, _ in done]
    assert precisions == ["bf16", "bf16"] * 3  # of the trainings
    for folder in ("a", "b"):  # two places of the same faces, and fewer than are asked for
        shutil.copytree(drawn / "dataset/processed_split/val", tmp_path / "two" / folder)
        for path in (tmp_path / "two" / folder).glob("*_image.png"):
            path.rename(path.with_name(path.name.replace("_image", "")))
    code, printed, err = cli(*growth, tmp_path / "two", "--faces", 999)
    assert code == 0 and "evaluate.py, 15 faces" in printed, err
    (tmp_path / "empty").mkdir()
    refuse("benchmark", "--data", tmp_path / "empty", words=["--data", str(tmp_path)])
    with pytest.raises(UserError, match=r"split\.py"):
        run("split", "--input", "nowhere", cwd=tmp_path)
    took, memory = run("split", "-h", cwd=tmp_path)
    assert 0 < took < 600 and 20 < memory < 300  # less than this process has: the stage's own
