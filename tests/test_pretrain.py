import csv
import math

import pytest
import torch

import common
import pretrain
from common import load_checkpoint
from conftest import FAST, noise_pairs
from pretrain import ContrastiveResNet18, contrastive_loss


def test_decimal_ages_attract_in_whole_years(monkeypatch):
    seen = []
    monkeypatch.setattr(common, "age_contrastive_loss", lambda *args: seen.append(args) or torch.ones(()))
    args = pretrain.get_parser().parse_args(["--positives", "age"])
    batch = {"image": torch.randn(4, 8), "age": torch.tensor([31.5, 32.4, 60, 60])}
    contrastive_loss(lambda images: images, batch, args)
    assert seen[0][1].tolist() == [32, 32, 60, 60]


@pytest.mark.parametrize("positives, epochs", [("rank", 1), ("view", 2)])
def test_writes_backbone_history_and_curves(drawn, tmp_path, cli, positives, epochs):
    out = tmp_path / "c.pt"
    flags = ["--data", drawn / "dataset/processed_split", "--out", out, "--positives", positives]
    code, printed, _ = cli("pretrain", *flags, *FAST, "--init", "random", "--epochs", epochs)
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
    assert all(0 < float(row["loss"]) < math.inf for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.last.pt", "c.png", "c.pt"]


@pytest.mark.parametrize("positives, default", [("view", 0.07), ("age", 0.07), ("rank", 2.0)])
def test_flags_reach_the_losses(monkeypatch, positives, default):
    batch = {"image": torch.randn(4, 3, 32, 32), "age": torch.tensor([3, 3, 60, 60])}
    names = {"view": "nt_xent_loss", "age": "age_contrastive_loss", "rank": "rank_contrastive_loss"}
    seen = []
    monkeypatch.setattr(common, names[positives], lambda *args: seen.append(args) or torch.ones(()))
    for flags, temperature in (([], default), (["--temperature", "0.3", "--sigma", "0.9"], 0.3)):
        args = pretrain.get_parser().parse_args(["--positives", positives, *flags])
        contrastive_loss(ContrastiveResNet18(positives != "rank"), batch, args)
        z, *rest = seen.pop()
        width = 512 if positives == "rank" else 128  # Rank-N-Contrast orders the backbone's own features
        assert z.shape == (2 if positives == "view" else 4, width) and rest[1] == temperature
        if positives == "age":
            assert rest[2] == (0.9 if flags else 0.5)


def test_views_of_a_face_lie_in_a_row():
    """Rows 2k and 2k + 1 attract, whatever the rest: swapping faces changes nothing, swapping views does."""
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    args = pretrain.get_parser().parse_args(["--positives", "view", "--temperature", "0.5"])

    def loss(rows):
        return contrastive_loss(lambda images: images, {"image": z[rows], "age": None}, args).item()

    in_order = loss([0, 1, 2, 3, 4, 5, 6, 7])
    assert loss([4, 5, 0, 1, 7, 6, 2, 3]) == pytest.approx(in_order, rel=1e-5)
    assert abs(loss([0, 2, 1, 3, 4, 5, 6, 7]) - in_order) > 1e-3


@pytest.mark.parametrize("positives, width", [("rank", 512), ("age", 128), ("view", 128)])
def test_flags_reach_the_training(drawn, tmp_path, cli, monkeypatch, positives, width):
    """The projection head, and rates and decay of the optimizer's groups."""
    begun = []
    monkeypatch.setattr("training.begin_training", lambda *args: begun.append(args) or 1 / 0)
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--out", tmp_path / "o.pt"]
    with pytest.raises(ZeroDivisionError):
        cli("pretrain", *flags, "--positives", positives, "--lr", 0.02, "--weight-decay", 0.4)
    [(_, kind, model, groups, *_)] = begun
    assert kind == "contrastive" and model(torch.randn(2, 3, 32, 32)).shape == (2, width)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.02, 0.4), (0.02, 0.0)}


def test_starts_from_what_init_names(drawn, tmp_path, cli):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--epochs", 1, "--lr", 1e-12]
    assert cli("pretrain", *flags, "--out", tmp_path / "a.pt", "--seed", 1)[0] == 0
    assert cli("pretrain", *flags, "--out", tmp_path / "b.pt", "--init", tmp_path / "a.pt")[0] == 0
    a, b = (load_checkpoint(tmp_path / f"{name}.pt", "contrastive") for name in "ab")
    key = "backbone.layer4.1.conv2.weight"
    assert torch.allclose(a["weights"][key], b["weights"][key], atol=1e-6)
    assert b["pretraining"]["seed"] == 1 and len(b["config"]["init_sha256"]) == 64


def test_the_history_holds_the_mean_over_steps(drawn, tmp_path, cli, monkeypatch, small_model):
    def train_one_epoch(run, _):
        run.seconds = 1
        return torch.tensor([[2.0], [4.0]])

    monkeypatch.setattr("training.train_one_epoch", train_one_epoch)
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--epochs", 1, "--out", tmp_path / "c.pt"]
    code, printed, _ = cli("pretrain", *flags)
    faces = len(list((drawn / "dataset/processed_split/train").glob("*_image.png")))
    assert code == 0 and f", {faces // 16 * 16} faces/s" in printed
    with open(tmp_path / "c.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [3]


def test_the_projection_head_is_not_linear():
    head = ContrastiveResNet18().eval().projection
    a, b = 10 * torch.randn(2, 4, 512)
    assert not torch.allclose(head(a) + head(b), head(a + b) + head(torch.zeros(4, 512)), atol=1e-3)


def test_bad_input(drawn, tmp_path, refuse):
    data = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "c.pt"]
    refuse("pretrain", *data, *FAST, "--batch-size", 5000, words=["--batch-size", "train"])
    refuse("pretrain", *data, "--image-size", 50, words=["--image-size", "32"])
    refuse("pretrain", *data, *FAST, "--init", "nowhere.pt", words=["nowhere.pt"])
    refuse("pretrain", *data, "--resume", "--overwrite", words=["--resume", "--overwrite"])
    refuse("pretrain", "--data", tmp_path / "nowhere", "--out", tmp_path / "c.pt", words=["nowhere"])
    noise_pairs(tmp_path / "x" / "train", [3, 30])
    (tmp_path / "x/train" / "notes_image.png").write_text("no name")
    refuse("pretrain", "--data", tmp_path / "x", "--out", tmp_path / "c.pt", words=["notes_image.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
