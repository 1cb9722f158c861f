import csv
import math

import pytest
import torch

from common import load_checkpoint
from conftest import noise_pairs
from pretrain import ContrastiveResNet18, warn_of_odd_start

FAST = ["--image-size", 32, "--batch-size", 16, "--workers", 0, "--device", "cpu"]


@pytest.mark.parametrize("positives, epochs", [("view", 4), ("age", 1)])
def test_writes_backbone_history_and_curves(drawn, tmp_path, cli, positives, epochs):
    out = tmp_path / "c.pt"
    flags = [
        "--data",
        drawn / "dataset/processed_split",
        "--out",
        out,
        "--epochs",
        epochs,
        "--positives",
        positives,
    ]
    code, printed, _ = cli("pretrain", *flags, *FAST)
    assert code == 0 and str(out) in printed.splitlines()[-1]
    checkpoint = load_checkpoint(out, "contrastive")
    assert all(key.startswith("backbone.") for key in checkpoint["weights"])  # the projection head is gone
    assert checkpoint["config"]["positives"] == positives
    assert checkpoint["preprocessing"]["image_size"] == 32
    faces = len(list((drawn / "dataset/processed_split/train").glob("*_image.png")))
    assert len(checkpoint["train_hashes"]) == faces
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    losses = [float(row["loss"]) for row in rows]
    assert all(0 < loss < math.inf for loss in losses)
    if positives == "view":
        assert losses[-1] < losses[0] < 1.25 * math.log(31)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.last.pt", "c.png", "c.pt"]


def test_odd_start_is_reported(capsys):
    warn_of_odd_start(1.1 * math.log(31), 16)
    assert capsys.readouterr().err == ""
    warn_of_odd_start(0.7 * math.log(31), 16)
    assert "warning" in capsys.readouterr().err


def test_projection_shape():
    assert ContrastiveResNet18()(torch.randn(3, 3, 32, 64)).shape == (3, 128)


def test_bad_input(drawn, tmp_path, refuse):
    data = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "c.pt"]
    refuse("pretrain", *data, *FAST, "--batch-size", 5000, words=["--batch-size", "train"])
    refuse("pretrain", *data, "--image-size", 50, words=["--image-size", "32"])
    refuse("pretrain", *data, "--epochs", -1, words=["--epochs"])
    refuse("pretrain", *data, "--temperature", 0, words=["--temperature"])
    refuse("pretrain", *data, "--device", "cuda:99", words=["--device"])
    refuse("pretrain", *data, *FAST, "--init", "nowhere.pt", words=["nowhere.pt"])
    refuse("pretrain", *data, "--resume", "--overwrite", words=["--resume", "--overwrite"])
    refuse("pretrain", "--data", tmp_path / "nowhere", "--out", tmp_path / "c.pt", words=["nowhere"])
    noise_pairs(tmp_path / "x" / "train", [3, 30])
    (tmp_path / "x/train" / "notes_image.png").write_text("no name")
    refuse("pretrain", "--data", tmp_path / "x", "--out", tmp_path / "c.pt", words=["notes_image.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
