"""The whole chain as a user runs it: a process a stage, in an empty folder, defaults handing files on."""

import importlib
import json

import pytest

from common import SCRIPTS, parse_args
from conftest import ROOT, shell


def test_from_drawn_faces_to_a_confusion_matrix(tmp_path):
    small = ["--image-size", 64, "--batch-size", 32, "--device", "cpu"]
    chain = [
        ("synthesize", ["--count", 400]),
        ("masks", []),
        ("split", []),
        ("pretrain", ["--epochs", 1, *small]),
        (
            "finetune",
            [
                "--multitask",
                "--lr-strategy",
                "differentiated",
                "--init",
                "contrastive.pt",
                "--epochs",
                4,
                *small,
            ],
        ),
        ("evaluate", []),
        ("predict", ["dataset/raw", "--csv", "faces.csv"]),
    ]
    for script, arguments in chain:
        done = shell(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and len(done.stdout.splitlines()) >= 1, done.stderr
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["n"] >= 70
    assert metrics["balanced_accuracy"]["ci95"][0] > 1 / 6  # chance
    assert metrics["mask_iou"]["value"] > 0.6
    assert metrics["seen_in_training"] == 0
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 401
    assert (tmp_path / "results/confusion_matrix.png").stat().st_size > 10_000
    assert (tmp_path / "dataset/processed/preview.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(cli, script):
    code, printed, _ = cli(script, "-h")
    assert code == 0 and f"python {script}.py" in printed
    for action in importlib.import_module(script).get_parser()._actions:
        assert action.help and all(option in printed for option in action.option_strings)
    assert "default:" in printed


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = shell("split", "--input", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_the_configs_that_ship_are_valid():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for script in SCRIPTS:
            parser = importlib.import_module(script).get_parser()
            assert parse_args(parser, ["--config", str(path)]).config == str(path)
