"""The model in weights/: what it holds, and that every script takes it, from any folder."""

import importlib
import json
import shutil
import subprocess

from cli import parse_args
from common import load_checkpoint, load_model
from conftest import FAST, ROOT, commands
from training import choose_device

RELEASED = "weights/age_multitask.pt"


def test_what_it_holds():
    assert (ROOT / RELEASED).stat().st_size <= 25e6
    checkpoint = load_checkpoint(ROOT / RELEASED, "model")
    assert checkpoint["split"]["seed"] == 0 and not checkpoint["split"]["random"]
    assert checkpoint["config"]["final"] and not len(checkpoint["val_hashes"])
    assert len(checkpoint["train_hashes"]) > 16_000  # of 17,069 faces, some of them the same
    model = load_model(ROOT / RELEASED, choose_device("cpu"))[0]
    assert model.by_year and model.flip_averaging and model.decoder is not None


def test_it_was_made_by_make_best():
    """With --final: so the recipe that is the default, and the config, are those of the released weights."""
    released = load_checkpoint(ROOT / RELEASED, "model")
    make = ["make", "-n", "best", "DATA=faces.tar.gz", "FLAGS=--final"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True).stdout
    given = {
        script: vars(parse_args(importlib.import_module(script).get_parser(), arguments))
        for script, arguments in commands(printed)
    }
    assert given["split"]["fractions"] == released["split"]["fractions"]
    for script, config in (("pretrain", released["pretraining"]), ("finetune", released["config"])):
        for key in config.keys() - {"init_sha256"}:
            assert given[script][key] == config[key], key


def test_it_takes_an_exam_from_any_folder(drawn, tmp_path, cli):
    """Drawn faces are not what it has learned; it tells more of them than always saying Young Adult would."""
    exam = tmp_path / "exam"
    shutil.copytree(drawn / "dataset/raw", exam)
    for command in (
        ["masks", "--input", exam, "--output", "X"],
        ["split", "--input", "X", "--output", "Y", "--fractions", 0, 0, 1],
        ["evaluate", RELEASED, "--data", "Y", "--device", "cpu"],
    ):
        code, _, err = cli(*command, cwd=tmp_path)
        assert code == 0, err
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["n"] == 150 and metrics["seen_in_training"] == 0
    assert metrics["mask_iou"]["value"] > 0.5
    assert metrics["auc_macro_ovr"]["ci95"][0] > 0.5  # a constant answer gives 0.5, whatever it is


def test_finetune_starts_from_it(drawn, tmp_path, cli):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--epochs", 1]
    code, out, err = cli("finetune", "--init", RELEASED, *flags, cwd=tmp_path)
    assert code == 0, err
    assert "120 of 120 tensors loaded" in out
    config = load_checkpoint(tmp_path / "model.pt", "model")["config"]
    assert len(config["init_sha256"]) == 64  # of the file, wherever it lies
