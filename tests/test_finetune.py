import csv
import multiprocessing
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import finetune
from common import load_checkpoint, make_model
from conftest import noise_pairs

FAST = ["--image-size", 32, "--batch-size", 16, "--workers", 0, "--device", "cpu", "--init", "random"]


def history(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("multitask", [True, False])
def test_writes_model_history_and_curves(drawn, tmp_path, cli, multitask):
    out = tmp_path / "m.pt"
    flags = ["--data", drawn / "dataset/processed_split", "--out", out, "--epochs", 1]
    code, printed, _ = cli("finetune", *flags, *FAST, *["--multitask"] * multitask)
    assert code == 0 and str(out) in printed.splitlines()[-1]
    checkpoint = load_checkpoint(out, "model")
    assert any(key.startswith("decoder.") for key in checkpoint["weights"]) == multitask
    rows = history(tmp_path / "m.csv")
    assert len(rows) == 1
    assert all((float(row["train_mask_loss"]) > 0) == multitask for row in rows)
    assert all((row["val_mask_iou"] != "") == multitask for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "m.last.pt", "m.png", "m.pt"]


def test_keeps_the_best_epoch_by_accuracy_then_loss(drawn, tmp_path, cli, monkeypatch):
    scores = iter([(0.4, 2.0), (0.6, 1.5), (0.6, 1.2), (0.6, 1.3), (0.5, 0.1)])
    weights = []

    def scripted(model, *_):
        weights.append(model.head.weight.detach().clone())
        accuracy, loss = next(scores)
        return {"val_loss": loss, "val_accuracy": accuracy, "val_mask_iou": None}

    def train_one_epoch(training, *_):
        with torch.no_grad():
            training.model.head.weight += 1
        return torch.ones(2, 3)

    monkeypatch.setattr(finetune, "validate", scripted)
    monkeypatch.setattr(finetune, "train_one_epoch", train_one_epoch)
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "m.pt", "--epochs", 5]
    assert cli("finetune", *flags, *FAST)[0] == 0
    checkpoint = load_checkpoint(tmp_path / "m.pt", "model")
    assert checkpoint["epoch"] == 3 and checkpoint["val"]["val_loss"] == 1.2
    assert torch.equal(checkpoint["weights"]["head.weight"], weights[2])


def test_init_from_contrastive_says_what_was_loaded(drawn, tmp_path, cli, refuse):
    data = ["--data", drawn / "dataset/processed_split"]
    contrastive = tmp_path / "c.pt"
    pretraining = [flag for flag in FAST if flag not in ("--init", "random")]
    assert cli("pretrain", *data, *pretraining, "--out", contrastive, "--epochs", 1)[0] == 0
    out = tmp_path / "m.pt"
    code, printed, _ = cli(
        "finetune",
        *data,
        *FAST,
        "--init",
        contrastive,
        "--out",
        out,
        "--epochs",
        1,
        "--lr",
        1e-9,
        "--multitask",
    )
    assert (
        code == 0
        and f"120 of 120 tensors loaded from {contrastive}" in printed
        and "heads start fresh" in printed
    )
    before, after = (
        load_checkpoint(contrastive, "contrastive")["weights"],
        load_checkpoint(out, "model")["weights"],
    )
    assert torch.allclose(
        before["backbone.layer4.1.conv2.weight"], after["backbone.layer4.1.conv2.weight"], atol=1e-6
    )
    state = torch.load(contrastive, weights_only=True)
    state["weights"] = {"nothing.weight": torch.zeros(3)}
    torch.save(state, contrastive)
    refuse(
        "finetune",
        *data,
        *FAST,
        "--init",
        contrastive,
        "--out",
        tmp_path / "n.pt",
        words=["--init", "no weight"],
    )
    refuse(
        "finetune", *data, *FAST, "--init", tmp_path / "m.last.pt", "--out", tmp_path / "n.pt",
        words=["m.last.pt", "model.last checkpoint"],
    )  # fmt: skip


def test_resume_ends_with_the_same_weights(drawn, tmp_path, cli, monkeypatch):
    """A run stopped in its second epoch and resumed, with other workers, equals one never stopped."""
    flags = ["--data", drawn / "dataset/processed_split", "--epochs", 2, *FAST]
    flags += ["--multitask", "--lr-strategy", "differentiated"]
    assert cli("finetune", *flags, "--out", tmp_path / "whole.pt")[0] == 0

    train, calls = finetune.train_one_epoch, []

    def stop_in_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(finetune, "train_one_epoch", stop_in_second)
    out = tmp_path / "cut.pt"
    assert cli("finetune", *flags, "--out", out)[0] == 130
    monkeypatch.setattr(finetune, "train_one_epoch", train)
    code, _, err = cli("finetune", *flags, "--out", out)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, printed, _ = cli("finetune", *flags, "--out", out, "--resume", "--workers", 2)
    assert code == 0 and "resumed" in printed and "epoch 1" in printed
    whole, cut = (load_checkpoint(tmp_path / f"{name}.pt", "model")["weights"] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    rows = [history(tmp_path / f"{name}.csv") for name in ("whole", "cut")]
    assert [{**row, "seconds": ""} for row in rows[0]] == [{**row, "seconds": ""} for row in rows[1]]

    before = out.read_bytes()
    code, printed, _ = cli("finetune", *flags, "--out", out, "--resume")  # finished: nothing changes
    assert code == 0 and out.read_bytes() == before
    code, _, err = cli("finetune", *flags, "--out", out, "--epochs", 3)
    assert code == 2 and "--epochs" in err and "--overwrite" in err


def test_recipe_resumes_to_the_same_average(drawn, tmp_path, cli, monkeypatch):
    """A run of the recipe's flags equals one that was stopped within an epoch."""
    flags = ["--data", drawn / "dataset/processed_split", "--epochs", 2, *FAST, "--multitask"]
    flags += [
        "--age-sigma",
        2,
        "--mixup",
        0.4,
        "--ema",
        0.9,
        "--flip-averaging",
        "--crop-averaging",
        "--half-weights",
    ]
    losses, calls, stop = finetune.multitask_losses, 0, 0

    def spy(model, batch, args):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return losses(model, batch, args)

    monkeypatch.setattr(finetune, "multitask_losses", spy)
    assert cli("finetune", *flags, "--out", tmp_path / "whole.pt")[0] == 0
    stop = calls + calls * 11 // 12

    out = tmp_path / "cut.pt"
    assert cli("finetune", *flags, "--out", out, "--save-every-steps", 4, "--workers", 1)[0] == 130
    state = load_checkpoint(tmp_path / "cut.last.pt", "model.last")
    assert (state["epoch"], state["step"]) == (1, 4)
    stop, before = 0, multiprocessing.active_children()
    assert cli("finetune", *flags, "--out", out, "--resume", "--workers", 1)[0] == 0
    assert {*multiprocessing.active_children()} <= {*before}  # torch would report their end at exit
    whole, cut = (load_checkpoint(tmp_path / f"{name}.pt", "model") for name in ("whole", "cut"))
    assert whole["split"] == {
        "seed": 0, "fractions": [0.7, 0.1, 0.2], "near_duplicate": 0.98, "random": False
    }  # fmt: skip
    assert all(torch.equal(whole["weights"][key], cut["weights"][key]) for key in whole["weights"])
    assert whole["weights"]["head.weight"].shape == (101, 512) and whole["val"] == cut["val"]
    last = torch.load(tmp_path / "whole.last.pt", weights_only=True)
    kept, trained = last["best"]["weights"]["head.weight"], last["model"]["head.weight"]
    assert not torch.equal(kept, trained) and whole["config"]["flip_averaging"]
    assert torch.equal(whole["weights"]["head.weight"], kept.half())
    assert out.stat().st_size < 25e6


def test_every_head_learns_under_every_recipe():
    """No parameter without a gradient, with groups or years, blended or not."""
    torch.manual_seed(0)
    batch = {"image": torch.randn(4, 3, 32, 32), "mask": (torch.rand(4, 1, 32, 32) > 0.5).to(torch.uint8)}
    batch |= {"age": torch.tensor([1, 20, 40, 110]), "group": torch.tensor([0, 2, 3, 5])}
    for sigma in (0, 2):
        for mixup in (0, 0.4):
            args = Namespace(mask_weight=0.5, age_sigma=sigma, mixup=mixup)
            model = make_model({"multitask": True, "age_sigma": sigma}).train()
            losses = finetune.multitask_losses(model, batch, args)
            assert losses.shape == (3,) and losses[0] == losses[1] + 0.5 * losses[2]
            losses[0].backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_mixup_blends_pictures_and_targets_alike(monkeypatch):
    """A blend that is all of one face gives that face's loss; half of each the mean of both targets'."""
    batch = {"image": torch.randn(2, 3, 32, 32), "age": torch.tensor([3, 70]), "group": torch.tensor([0, 5])}
    logits = torch.randn(2, 6)
    seen = []

    def model(images, years):
        seen.append(images)
        return logits, None

    found = []
    for share in (1.0, 0.5):
        beta = SimpleNamespace(sample=lambda share=share: torch.tensor(share))
        monkeypatch.setattr(torch.distributions, "Beta", lambda *_, beta=beta: beta)
        args = Namespace(mask_weight=0.5, age_sigma=0, mixup=0.4)
        found.append(finetune.multitask_losses(model, batch, args)[1])
    assert found[0] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["group"]).item())
    by_hand = -logits.log_softmax(dim=1)[:, [0, 5]].mean()
    assert found[1] == pytest.approx(by_hand.item())
    assert torch.equal(seen[0], batch["image"]) and torch.allclose(seen[1][0], batch["image"].mean(dim=0))


def test_bad_input(drawn, tmp_path, refuse):
    data = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "m.pt"]
    refuse("finetune", *data, *FAST, "--lr-strategy", "layerwise", words=["--lr-strategy"])
    refuse("finetune", *data, *FAST, "--ema", 1, words=["--ema"])
    refuse("finetune", *data, *FAST, "--precision", "fp16", words=["--precision"])
    copy = tmp_path / "split"
    shutil.copytree(drawn / "dataset/processed_split", copy)
    mask = next((copy / "val").glob("*_mask.png"))
    mask.unlink()
    refuse("finetune", "--data", copy, "--out", tmp_path / "m.pt", *FAST, "--multitask", words=[mask.name])
    shutil.rmtree(copy / "train")
    noise_pairs(copy / "train", [2, 8, 30, 50, 80] * 4)
    refuse("finetune", "--data", copy, "--out", tmp_path / "m.pt", *FAST, words=["train", "Youth"])
    (copy / "split.yaml").write_text("seed: [")
    refuse("finetune", "--data", copy, "--out", tmp_path / "m.pt", *FAST, words=["split.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["split"]
