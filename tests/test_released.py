"""The model in weights/: what it holds, and that every script takes it, from any folder."""

import json
import shutil

import torch
import yaml

from common import load_checkpoint
from conftest import ROOT, section

RELEASED = "weights/age_multitask.pt"


def test_it_was_made_by_the_recipe_and_says_how():
    assert (ROOT / RELEASED).stat().st_size <= 25e6
    checkpoint = load_checkpoint(ROOT / RELEASED, "model")
    recipe = yaml.safe_load((ROOT / "configs/best.yaml").read_text())
    config = checkpoint["config"] | checkpoint["split"]
    assert config | {key.replace("-", "_"): value for key, value in recipe["finetune"].items()} == config
    assert checkpoint["split"]["fractions"] == recipe["split"]["fractions"]
    assert checkpoint["split"]["seed"] == 0 and not checkpoint["split"]["random"]
    assert {v.dtype for v in checkpoint["weights"].values() if v.is_floating_point()} == {torch.float16}
    assert len(checkpoint["train_hashes"]) > 14_000  # of 15,166 faces, some of them the same
    assert f"| {100 * checkpoint['val']['val_accuracy']:.1f} [" in section("The released model")


def test_it_takes_an_exam_from_any_folder(drawn, tmp_path, cli):
    """Drawn faces tell little of its accuracy, which is for UTKFace's."""
    exam = tmp_path / "exam"
    shutil.copytree(drawn / "dataset/raw", exam)
    for command in (
        ["masks", "--input", exam, "--output", "X"],
        ["split", "--input", "X", "--output", "Y", "--fractions", 0, 0, 1],
        ["evaluate", RELEASED, "--data", "Y", "--split", "test", "--device", "cpu"],
    ):
        code, _, err = cli(*command, cwd=tmp_path)
        assert code == 0, err
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["n"] == 150 and metrics["seen_in_training"] == 0
    assert metrics["mask_iou"]["value"] > 0.5
    assert metrics["within_one_group"]["value"] > 0.5


def test_predict_takes_it_by_default_and_finetune_starts_from_it(drawn, tmp_path, cli):
    code, out, _ = cli("predict", drawn / "dataset/raw", "--device", "cpu", cwd=tmp_path)
    assert code == 0 and f"model: {ROOT / RELEASED}" in out and "150 faces" in out
    flags = [
        "--data",
        drawn / "dataset/processed_split",
        "--image-size",
        32,
        "--batch-size",
        16,
        "--device",
        "cpu",
    ]
    code, out, err = cli("finetune", "--init", RELEASED, "--epochs", 1, "--workers", 0, *flags, cwd=tmp_path)
    assert code == 0, err
    assert "120 of 120 tensors loaded" in out and (tmp_path / "model.pt").is_file()
