import csv
import re
import shutil
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import finetune
import training
from common import FaceDataset, load_checkpoint, load_model, make_model, score_dataset
from conftest import FAST, noise_pairs, write_pair

CPU = torch.device("cpu")


def history(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_writes_model_history_and_curves(drawn, tmp_path, cli, monkeypatch):
    """By the recipe that is the default; the average of weights is what is validated and kept."""
    begun, validated = [], []
    begin, validate = training.begin_training, finetune.validate
    monkeypatch.setattr(training, "begin_training", lambda *args: begun.append(begin(*args)) or begun[-1])
    monkeypatch.setattr(finetune, "validate", lambda *args: validated.append(args[0]) or validate(*args))
    data, out = drawn / "dataset/processed_split", tmp_path / "m.pt"
    flags = ["--data", data, "--out", out, "--epochs", 1, *FAST, "--init", "random", "--multitask"]
    code, printed, _ = cli("finetune", *flags, "--lr", 0.01)
    assert code == 0 and str(out) in printed.splitlines()[-1]
    model, checkpoint = load_model(out, CPU)
    assert checkpoint["split"] == {
        "seed": 0, "fractions": [0.7, 0.1, 0.2], "near_duplicate": 0.975, "random": False
    }  # fmt: skip
    assert checkpoint["missing_groups"] == []
    [row] = history(tmp_path / "m.csv")
    assert float(row["train_mask_loss"]) > 0 and row["val_mask_iou"] != ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "m.last.pt", "m.png", "m.pt"]
    # Years, averages of mirror images and of weights; matrices in half precision, vectors as they are.
    assert model.head.weight.shape == (101, 512) and model.flip_averaging and out.stat().st_size < 25e6
    [run], average = begun, begun[0].ema.module
    assert validated == [average] and run.args.ema == 0.998
    kept = checkpoint["weights"]
    for name, values in average.state_dict().items():
        if name.startswith("attributes."):  # the heads for gender and race end with the training
            assert name not in kept
        else:
            assert torch.equal(kept[name], values.half() if values.ndim > 1 else values), name
    assert not torch.equal(average.head.weight, run.model.head.weight)
    val = FaceDataset(data / "val", 32)
    right = score_dataset(model, val, CPU)[0].argmax(dim=1) == val.labels["group"]
    assert right.double().mean() == pytest.approx(checkpoint["val"]["val_accuracy"], abs=0.001)
    assert torch.equal(checkpoint["val_hashes"], val.hashes.unique())


def test_the_history_holds_what_its_columns_name(drawn, tmp_path, cli, monkeypatch, small_model):
    losses = torch.tensor([[9.0, 2.0, 1.0], [9.0, 4.0, 0.0]])
    monkeypatch.setattr(training, "train_one_epoch", lambda *_: losses)

    def score(_, data, device):
        return torch.zeros(len(data), 6), None, torch.tensor([[0.25, 0.4]] * len(data))

    monkeypatch.setattr(common, "score_dataset", score)
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 1]
    flags += ["--out", tmp_path / "m.pt", "--multitask", "--lr", 0.01, "--lr-strategy", "differentiated"]
    asked = []
    monkeypatch.setattr(training, "plot_history", lambda _, rows, columns: asked.append((rows, columns)))
    assert cli("finetune", *flags)[0] == 0
    [(rows, columns)] = asked
    assert set(columns) <= rows[-1].keys() and "val_accuracy" in columns
    [row] = history(tmp_path / "m.csv")
    found = [float(row[name]) for name in ("train_loss", "train_mask_loss", "val_mask_iou", "lr")]
    assert found == pytest.approx([3, 0.5, 0.25, 0.01])


def test_a_range_of_ages_is_learned_as_a_range():
    logits, spread = torch.randn(2, 101), torch.tensor([4.5, 0.0])
    batch = {"image": None, "age": torch.tensor([24.5, 70.0]), "spread": spread}
    expected = F.cross_entropy(logits, common.soft_age_labels(batch["age"], 2.0, spread))
    args = Namespace(mask_weight=0.5, attribute_weight=0, age_sigma=2.0)
    found = finetune.multitask_losses(lambda _, heads: (logits, None, None), batch, args)
    assert found[1] == pytest.approx(expected.item(), rel=1e-6)


def add_one(model):
    """In place of an epoch: weights that can be told apart, and losses (steps, 3)."""
    with torch.no_grad():
        model.head.weight += 1
    return torch.ones(2, 3)


def test_keeps_the_best_epoch_by_accuracy_then_loss(drawn, tmp_path, cli, monkeypatch):
    scores = iter([(0.4, 2.0), (0.6, 1.5), (0.6, 1.2), (0.6, 1.2), (0.5, 0.1)])
    weights = []

    def scripted(model, *_):
        weights.append(model.head.weight.detach().clone())
        accuracy, loss = next(scores)
        return {"val_loss": loss, "val_accuracy": accuracy, "val_mask_iou": None}

    monkeypatch.setattr(finetune, "validate", scripted)
    monkeypatch.setattr(training, "train_one_epoch", lambda run, _: add_one(run.model))
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "m.pt", "--epochs", 5]
    code, printed, _ = cli("finetune", *flags, *FAST, "--init", "random", "--ema", 0)
    assert code == 0 and "epoch 3 of 5" in printed and printed.endswith("accuracy on val 60.00%\n")
    checkpoint = load_checkpoint(tmp_path / "m.pt", "model")
    assert checkpoint["epoch"] == 3 and checkpoint["val"]["val_loss"] == 1.2
    assert torch.equal(checkpoint["weights"]["head.weight"], weights[2].half())


def test_val_must_hold_a_face_of_one_group(tmp_path, cli, refuse, monkeypatch):
    monkeypatch.setattr(training, "train_one_epoch", lambda run, _: add_one(run.model))
    noise_pairs(tmp_path / "train", [2, 10, 20, 30, 50, 70] * 3)
    noise_pairs(tmp_path / "val", ["20-29", "40-49"])
    flags = ["--data", tmp_path, "--out", tmp_path / "m.pt", "--epochs", 1, *FAST, "--init", "random"]
    refuse("finetune", *flags, words=[str(tmp_path / "val"), "ranges that cross groups", "--final"])
    noise_pairs(tmp_path / "val", [30])
    code, printed, _ = cli("finetune", *flags)
    assert code == 0 and re.search(r"accuracy on val (0|100)\.00%", printed)  # of the one


def test_final_learns_from_val_too_and_keeps_the_last_epoch(drawn, tmp_path, cli, monkeypatch):
    data, out = drawn / "dataset/processed_split", tmp_path / "m.pt"
    monkeypatch.setattr(training, "train_one_epoch", lambda run, _: add_one(run.model))
    flags = ["--data", data, *FAST, "--init", "random", "--ema", 0]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "validate", None)  # nothing is scored
        code, printed, _ = cli("finetune", *flags, "--out", out, "--epochs", 2, "--final")
    assert code == 0 and "val " not in printed
    checkpoint = load_checkpoint(out, "model")
    both = torch.cat([FaceDataset(data / name, 32).hashes for name in ("train", "val")])
    assert torch.equal(checkpoint["train_hashes"], both.unique())
    assert checkpoint["epoch"] == 2 and not len(checkpoint["val_hashes"]) and checkpoint["val"] == {}
    last = load_checkpoint(tmp_path / "m.last.pt", "model.last")
    assert torch.equal(checkpoint["weights"]["head.weight"], last["model"]["head.weight"].half())
    code, _, err = cli("finetune", *flags[:-3], out, "--out", tmp_path / "n.pt", "--epochs", 1)
    count = len(FaceDataset(data / "val", 32))
    assert code == 0 and f"--init has learned from {count} of the {count} faces of val" in err


def test_a_group_that_val_alone_holds_is_learned_by_final(tmp_path, cli, monkeypatch, small_model):
    monkeypatch.setattr(training, "train_one_epoch", lambda run, _: add_one(run.model))
    noise_pairs(tmp_path / "train", [10, 20, 30, 50, 70] * 4)
    noise_pairs(tmp_path / "val", [2])
    flags = ["--data", tmp_path, *FAST, "--init", "random", "--epochs", 1, "--out", tmp_path / "m.pt"]
    assert cli("finetune", *flags, "--final", "--age-sigma", 0)[0] == 0
    assert load_checkpoint(tmp_path / "m.pt", "model")["missing_groups"] == []


def test_ranges_that_cross_groups_are_no_faces_of_them_where_groups_alone_are_learned(tmp_path, refuse):
    for part in ("train", "val"):
        noise_pairs(tmp_path / part, ["10-19", "20-29", 2, 30, 50, 70] * 4)
    flags = ["--data", tmp_path, *FAST, "--init", "random", "--out", tmp_path / "m.pt"]
    refuse("finetune", *flags, "--age-sigma", 0, words=["holds no face of Child, Youth"])
    assert finetune.missing_groups([]) == finetune.GROUP_NAMES


def test_years_are_learned_where_groups_are_missing(tmp_path, cli):
    """Adults only, some of unknown gender, some known by a range; what is unknown is no class of its own."""
    for part in ("train", "val"):
        for i, face in enumerate(["20-29_x_x", "31.5_1_x", "30_0_2", "66_x_3", "20_1_1", "35-70_0_x"] * 3):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            write_pair(tmp_path / part, f"{face}_{part}{i}", cv2.resize(pixels, (40, 40)))
    flags = ["--data", tmp_path, *FAST, "--init", "random", "--epochs", 1, "--out", tmp_path / "m.pt"]
    code, _, err = cli("finetune", *flags)
    assert code == 0 and "holds no face of Infant, Child" in err
    checkpoint = load_checkpoint(tmp_path / "m.pt", "model")
    assert checkpoint["missing_groups"] == ["Infant", "Child"]
    val = FaceDataset(tmp_path / "val", 32)
    logits = score_dataset(load_model(tmp_path / "m.pt", CPU)[0], val, CPU)[0]
    known = val.groups >= 0
    right = (logits.argmax(dim=1).numpy() == val.groups)[known].mean()
    assert known.sum() == 12 and checkpoint["val"]["val_accuracy"] == pytest.approx(right, abs=0.001)


def test_init_from_contrastive_says_what_was_loaded(drawn, tmp_path, cli, refuse):
    data, contrastive = ["--data", drawn / "dataset/processed_split"], tmp_path / "c.pt"
    stems = noise_pairs(tmp_path / "other/train", [3, 10, 20, 30, 50, 70] * 3)
    assert cli("pretrain", "--data", tmp_path / "other", *FAST, "--out", contrastive, "--epochs", 1)[0] == 0
    before = load_checkpoint(contrastive, "contrastive")
    torch.save(before | {"val_hashes": torch.tensor([7])}, contrastive)
    out, start = tmp_path / "m.pt", ["--init", contrastive]
    code, printed, _ = cli(
        "finetune", *data, *FAST, *start, "--out", out, "--epochs", 1, "--lr", 1e-9, "--multitask"
    )
    assert code == 0 and "heads start fresh" in printed
    assert f"120 of 120 tensors loaded from {contrastive}" in printed
    before, after = load_checkpoint(contrastive, "contrastive"), load_checkpoint(out, "model")
    key = "backbone.layer4.1.conv2.weight"
    assert torch.allclose(before["weights"][key], after["weights"][key].float(), atol=1e-4)
    faces = len(list((drawn / "dataset/processed_split/train").glob("*_image.png")))
    assert len(after["train_hashes"]) == faces + len(stems)  # those that pretraining saw are seen, too
    val = FaceDataset(drawn / "dataset/processed_split/val", 32).hashes
    assert after["val_hashes"].tolist() == sorted({7, *val.tolist()})  # and what an epoch was selected on
    assert after["pretraining"]["positives"] == "rank"
    before["weights"] = {"nothing.weight": torch.zeros(3)}
    torch.save(before, contrastive)
    new = ["--out", tmp_path / "n.pt"]
    refuse("finetune", *data, *FAST, *start, *new, words=["--init", "no weight"])
    last = tmp_path / "m.last.pt"
    refuse("finetune", *data, *FAST, "--init", last, *new, words=["m.last.pt", "model.last checkpoint"])


@pytest.mark.parametrize("sigma", [0, 2])
def test_every_head_learns(sigma):
    torch.manual_seed(0)
    batch = {"image": torch.randn(4, 3, 32, 32), "mask": (torch.rand(4, 1, 32, 32) > 0.5).to(torch.uint8)}
    batch |= {"age": torch.tensor([1, 20, 40, 110]), "group": torch.tensor([0, 2, 3, 5])}
    batch |= {"spread": torch.zeros(4)}
    batch |= {"gender": torch.tensor([0, 1, 1, 0]), "race": torch.tensor([4, 0, 2, 1])}
    model = make_model(
        {"multitask": True, "age_sigma": sigma, "attribute_weight": 0.7}, training=True
    ).train()
    args = Namespace(mask_weight=0.3, attribute_weight=0.7, age_sigma=sigma)
    losses = finetune.multitask_losses(model, batch, args)
    _, _, heads = model(batch["image"], heads=True)
    logs = {name: logits.log_softmax(dim=1) for name, logits in heads.items()}
    attributes = -sum(logs[name][range(4), batch[name]].mean() for name in ("gender", "race"))
    assert losses.shape == (3,)
    assert torch.isclose(losses[0], losses[1] + 0.3 * losses[2] + 0.7 * attributes)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_age_loss_by_hand():
    """Years: cross-entropy with a bell of --age-sigma; groups: plain cross-entropy."""
    logits = torch.randn(2, 101)
    batch = {"image": None, "age": torch.tensor([3, 70]), "group": torch.tensor([0, 5])}
    batch["spread"] = torch.zeros(2)
    for sigma in (1.0, 5.0):
        bell = torch.stack([(-((torch.arange(101) - age) ** 2) / (2 * sigma**2)).exp() for age in (3, 70)])
        bell /= bell.sum(dim=1, keepdim=True)
        expected = -(bell * logits.log_softmax(dim=1)).sum(dim=1).mean()
        args = Namespace(mask_weight=0.5, attribute_weight=0, age_sigma=sigma)
        found = finetune.multitask_losses(lambda _, heads: (logits, None, None), batch, args)
        assert found[1] == pytest.approx(expected.item(), rel=1e-5)
    args = Namespace(mask_weight=0.5, attribute_weight=0, age_sigma=0)
    found = finetune.multitask_losses(lambda _, heads: (logits[:, :6], None, None), batch, args)
    assert found[1] == pytest.approx(-logits[:, :6].log_softmax(dim=1)[[0, 1], [0, 5]].mean().item())
    batch["group"] = torch.tensor([0, -1])  # a range that crosses groups
    found = finetune.multitask_losses(lambda _, heads: (logits[:, :6], None, None), batch, args)
    assert found[1] == pytest.approx(-logits[0, :6].log_softmax(dim=0)[0].item(), rel=1e-5)


def test_faces_of_unknown_gender_and_race_are_learned_by_age():
    unknown = {"gender": torch.full((2,), -1), "race": torch.full((2,), -1)}
    batch = {"image": None, "age": torch.tensor([3, 70]), "spread": torch.zeros(2), **unknown}
    heads = torch.randn(2, 101), None, {"gender": torch.randn(2, 2), "race": torch.randn(2, 5)}
    args = Namespace(mask_weight=0.5, attribute_weight=0.3, age_sigma=2.0)
    total, age_loss, _ = finetune.multitask_losses(lambda _, **__: heads, batch, args)
    assert total == age_loss and total.isfinite()


def test_losses_stay_on_the_device_of_the_batch(small_model):
    with FakeTensorMode():  # devices are checked, nothing is computed
        with torch.device("cuda"):
            settings = {"multitask": True, "age_sigma": 2, "attribute_weight": 0.3}
            model = make_model(settings, training=True)
            batch = {name: torch.zeros(4, dtype=torch.int64) for name in ("group", "gender", "race")}
            batch |= {"image": torch.zeros(4, 3, 32, 32), "mask": torch.zeros(4, 1, 32, 32)}
            batch |= {"age": torch.zeros(4), "spread": torch.zeros(4)}
        args = Namespace(mask_weight=0.5, attribute_weight=0.3, age_sigma=2.0)
        assert finetune.multitask_losses(model, batch, args).device.type == "cuda"


def test_val_loss_is_the_cross_entropy_of_the_groups_known(monkeypatch):
    logits, groups = 3 * torch.randn(4, 6), torch.tensor([2, -1, 0, 5])
    monkeypatch.setattr(common, "score_dataset", lambda *_: (logits, None, None))
    found = finetune.validate(None, Namespace(labels={"group": groups}), CPU)
    known = groups >= 0
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits[known], groups[known]).item())


def test_bad_input(drawn, tmp_path, refuse):
    start = [*FAST, "--init", "random"]
    data = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "m.pt"]
    refuse("finetune", *data, *start, "--lr-strategy", "layerwise", words=["--lr-strategy"])
    refuse("finetune", *data, *start, "--ema", 1, words=["--ema"])
    refuse("finetune", *data, *start, "--precision", "fp16", words=["--precision"])
    refuse("finetune", *data[:2], *start, "--out", tmp_path / "model.csv", words=["--out", ".pt"])
    copy = tmp_path / "split"
    shutil.copytree(drawn / "dataset/processed_split", copy)
    data[1] = copy
    mask = next((copy / "val").glob("*_mask.png"))
    mask.unlink()
    refuse("finetune", *data, *start, "--multitask", words=[mask.name])
    shutil.rmtree(copy / "train")
    noise_pairs(copy / "train", [2, 8, 30, 50, 80] * 4)
    refuse("finetune", *data, *start, "--age-sigma", 0, words=["train", "Youth", "--age-sigma"])
    (copy / "split.yaml").write_text("seed: [")
    refuse("finetune", *data, *start, words=["split.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["split"]
