"""What a run keeps in `.last.pt`, what it may continue, and whether its flags arrive."""

import copy
import csv
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import nn

import devices
import training
from cli import UserError, atomic_path
from common import FaceDataset, load_checkpoint
from conftest import FAST, ROOT, noise_pairs
from training import (
    EpochBatches,
    begin_training,
    describe_difference,
    plot_history,
    to_device,
    train_one_epoch,
    warmup_cosine,
)

CPU = torch.device("cpu")


class TinyModel(nn.Module):
    """Batch normalisation, so that its mode matters, and a convolution, so that its precision does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 6)
        self.backbone = None  # which starts at random

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def group_losses(model, batch):
    return F.cross_entropy(model(batch["image"]).float(), batch["group"])[None]


LR, DECAY = 0.01, 0.3  # the peak rate, and the average's


def begin(folder, precision, state=None):
    """A run of a `TinyModel` on 18 faces in steps of four."""
    noise_pairs(folder / "train", [3, 10, 20, 30, 50, 70] * 3)
    dataset = FaceDataset(folder / "train", 32, seed=4)
    torch.manual_seed(0)
    model = TinyModel()
    args = Namespace(out=folder / "o.pt", data=folder, batch_size=4, seed=4, workers=0, epochs=2)
    args.image_size, args.overwrite, args.ema, args.init = 32, False, DECAY, "random"
    args.device, args.precision = "cpu", precision
    groups = [{"params": list(model.parameters()), "lr": LR, "weight_decay": 0.2}]
    return begin_training(args, "model", model, groups, dataset, state)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_equals_a_loop_written_by_hand(tmp_path, precision, dtype):
    """Every weight and statistic of the model and of its average, after two epochs of four steps."""
    run = begin(tmp_path, precision)
    model, found = run.model, []
    expected = copy.deepcopy(model)
    for run.epoch in (0, 1):
        found.append(train_one_epoch(run, group_losses))
        model.eval()  # as validation leaves it

    average, step, losses = copy.deepcopy(expected), 0, []
    optimizer = torch.optim.AdamW(expected.parameters(), weight_decay=0.2)
    for run.loader.batch_sampler.epoch in (0, 1):
        expected.train()
        for batch in run.loader:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = LR * (0.5 + 0.5 * math.cos(math.pi * max(step - 1, 0) / 7))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = group_losses(expected, to_device(batch, CPU))[0]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            share = min(DECAY, (step + 1) / (step + 11)) if step else 0  # the average begins as a copy
            step += 1
            for mean, now in zip(average.state_dict().values(), expected.state_dict().values()):
                if mean.is_floating_point():
                    mean.copy_(share * mean + (1 - share) * now)
    assert torch.cat(found).flatten().tolist() == pytest.approx(losses, abs=1e-6)
    for ours, theirs in ((model, expected), (run.ema.module, average)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        for name in theirs.keys() - {"norm.num_batches_tracked"}:
            assert torch.allclose(ours[name], theirs[name], atol=1e-6), name


@pytest.mark.parametrize("overflows", [1, 4])
def test_a_gradient_scaler_skips_the_steps_that_overflow(tmp_path, overflows):
    """Of four; without one that is left the training stops."""
    run, done = begin(tmp_path, "fp32"), []
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def losses(model, batch):
        done.append(copy.deepcopy(model.state_dict()))
        return group_losses(model, batch) * (torch.inf if len(done) <= overflows else 1)

    if overflows == 4:
        with pytest.raises(UserError, match="lower --lr"):
            train_one_epoch(run, losses)
        return
    train_one_epoch(run, losses)
    weights = [before["conv.weight"] for before in done]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert run.scaler.get_scale() == 2.0**9


def test_a_run_goes_on_in_another_precision_of_auto(tmp_path, monkeypatch):
    run = begin(tmp_path, "auto")
    training.finish_epoch(run, {"loss": 1.0})
    monkeypatch.setattr(training, "choose_precision", lambda *_: torch.float16)  # another machine's
    again = begin(tmp_path, "auto", load_checkpoint(tmp_path / "o.last.pt", "model.last"))
    assert again.epoch == 1 and again.scaler.is_enabled()


def test_the_scale_of_gradients_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "choose_precision", lambda *_: torch.float16)
    run = begin(tmp_path, "auto")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training.finish_epoch(run, {"loss": 1.0})
    again = begin(tmp_path, "auto", load_checkpoint(tmp_path / "o.last.pt", "model.last"))
    assert again.scaler.get_scale() == 2.0**10


@pytest.fixture
def epochs(monkeypatch, small_model):
    """Training without its steps; a list of the epochs, and Ctrl-C at those that are put into `stop_at`."""

    def train(run, _):
        if run.epoch + 1 == done.stop_at:
            raise KeyboardInterrupt
        done.append(run)
        return torch.ones(2, 3)

    class Epochs(list):
        stop_at = None

    done = Epochs()
    monkeypatch.setattr("training.train_one_epoch", train)
    return done


class Wrapped(nn.Module):
    """As DistributedDataParallel stands around a model."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.mark.parametrize("script, more", [("pretrain", []), ("finetune", ["--ema", 0])])
def test_what_torchrun_wraps_is_scored_and_saved_bare(
    drawn, tmp_path, cli, epochs, monkeypatch, script, more
):
    monkeypatch.setattr(training, "distribute", lambda model, _: Wrapped(model))
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 1, *more]
    code, _, err = cli(script, *flags, "--out", tmp_path / "o.pt")
    assert code == 0 and (tmp_path / "o.pt").exists(), err


def test_the_network_that_torchrun_wraps_is_trained_and_its_losses_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "distribute", lambda model, _: Wrapped(model))
    monkeypatch.setattr(training, "mean_over_ranks", lambda values: values * 0 + 7)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda values: values + 1)  # NCCL takes no tensor from there
    run, seen = begin(tmp_path, "fp32"), []
    losses = train_one_epoch(run, lambda model, batch: seen.append(model) or group_losses(model, batch))
    assert seen and all(model is run.network for model in seen) and (losses == 8).all()


def test_processes_compare_their_faces_and_settings(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "check_ranks_agree", lambda what: asked.append(str(what)))
    noise_pairs(tmp_path / "b/train", [31], seed=9)  # another face
    for folder, precision in (("a", "fp32"), ("b", "fp32"), ("a", "bf16")):
        begin(tmp_path / folder, precision)
    run = begin(tmp_path / "a", "fp32")
    training.finish_epoch(run, {"loss": 1.0})
    begin(tmp_path / "a", "fp32", load_checkpoint(tmp_path / "a/o.last.pt", "model.last"))
    assert len(set(asked)) == 4 and asked[0] == asked[3]


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_precision_and_final_reach_the_training(drawn, tmp_path, cli, epochs, script):
    flags = [script, "--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 2]
    first = None
    for own, dtype, folders in (
        (["--precision", "bf16", "--final"], torch.bfloat16, ["train", "val"]),
        (["--precision", "fp32", "--overwrite"], torch.float32, ["train"]),
    ):
        epochs.stop_at = 2
        assert cli(*flags, "--out", tmp_path / "o.pt", *own)[0] == 130
        run = epochs.pop()
        first, dataset = first or run.model.state_dict(), run.loader.dataset
        assert all(torch.equal(values, first[key]) for key, values in run.model.state_dict().items())
        assert run.dtype == dtype
        assert len(dataset) == sum(
            len(list((drawn / "dataset/processed_split" / name).glob("*_image.png"))) for name in folders
        )
    names = [type(step).__name__ for step in dataset.augment.transforms]
    contrastive = script == "pretrain"
    assert ("GaussianBlur" in names, "CoarseDropout" in names) == (contrastive, not contrastive)
    assert dataset.views == 1 + contrastive and (dataset.masks is None)


def test_precision_auto_is_bf16_where_the_processor_has_it(monkeypatch):
    for found, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert devices.choose_precision("auto", CPU) == dtype
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert devices.choose_precision("auto", CPU) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of an older torch
    assert devices.choose_precision("auto", CPU) == torch.float32
    for device in ("cpu", "mps"):
        with pytest.raises(UserError, match=f"--precision fp16 needs CUDA.*--device {device}"):
            devices.choose_precision("fp16", torch.device(device))


def test_precision_auto_on_cuda(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):

        def supported(including_emulation=True, has=has):
            return has or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert devices.choose_precision("auto", torch.device("cuda")) == dtype


def test_all_of_a_batch_lies_on_the_device():
    batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "mask": np.zeros((2, 32, 32), np.uint8)}
    batch |= {"age": np.zeros(2), "group": np.zeros(2, np.int64)}
    assert all(values.is_meta for values in to_device(batch, torch.device("meta")).values())


def test_copies_wait_unless_pinned_to_cuda(monkeypatch):
    """Apple's GPU reads pageable memory after it was freed."""
    asked = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking=False: asked.append(non_blocking)
    )
    values = torch.zeros(3)
    for pinned in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _, pinned=pinned: pinned)
        for device in ("mps", "cuda", "cpu"):
            devices.copy_to(torch.device(device), values)
    assert asked == [False, False, False, False, True, False]


def test_flags_reach_the_training(drawn, tmp_path, cli, epochs):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 2]
    flags += ["--out", tmp_path / "m.pt", "--lr", 0.01, "--lr-strategy", "differentiated", "--ema", 0.9]
    flags += ["--backbone-lr-scale", 0.2, "--weight-decay", 0.3, "--multitask", "--seed", 5]
    epochs.stop_at = 2
    assert cli("finetune", *flags)[0] == 130
    [run] = epochs
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    rates = {name: (group["initial_lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "backbone": (pytest.approx(0.002), 0.3), "backbone, no decay": (pytest.approx(0.002), 0.0),
        "heads": (0.01, 0.3), "heads, no decay": (0.01, 0.0),
    }  # fmt: skip
    for _ in range(2 * len(run.loader)):  # the rates end with the last epoch
        assert groups["heads"]["lr"] > 0
        run.optimizer.step()
        run.scheduler.step()
    assert groups["heads"]["lr"] == pytest.approx(0, abs=1e-9)
    assert run.loader.batch_sampler.seed == run.loader.dataset.seed == 5
    assert load_checkpoint(tmp_path / "m.last.pt", "model.last")["epoch"] == 1


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_seeds_change_order_and_pictures(drawn, tmp_path, cli, monkeypatch, small_model, script):
    firsts, begun = [], []

    def look(run, _):
        firsts.append(next(iter(run.loader))["image"])
        begun.append((run.loader.dataset.seed, run.model.backbone.conv1.weight.detach().clone()))
        raise KeyboardInterrupt

    monkeypatch.setattr("training.train_one_epoch", look)
    flags = ["--data", drawn / "dataset/processed_split", "--out", tmp_path / "o.pt", "--init", "random"]
    for seed in (0, 0, 1):
        assert cli(script, *flags, *FAST, "--seed", seed)[0] == 130
    assert np.array_equal(firsts[0], firsts[1]) and not np.array_equal(firsts[0], firsts[2])
    assert [seed for seed, _ in begun] == [0, 0, 1] and not torch.equal(begun[0][1], begun[2][1])


def test_settings_that_differ():
    old = {"lr": 0.1, "seed": 0, "init": "a/../c.pt", "init_sha256": "f00", "ema": 0, "data": "x"}
    same = {key: value for key, value in old.items() if key != "data"} | {"init": "c.pt"}
    for new, words in (
        (same, None),
        (same | {"init": "kept.pt"}, None),  # the same bytes under another name
        (same | {"init_sha256": "ba5"}, "another --init than a/../c.pt"),
        (same | {"init_sha256": None}, None),  # the file is gone, and not needed any more
        (same | {"init": "typo.pt", "init_sha256": None}, "another --init than a/../c.pt"),
        (same | {"seed": 1}, "--seed 0, not 1"),
        (same | {"lr": 0.2}, "--lr 0.1, not 0.2"),
        (same | {"new_flag": False}, None),  # what there was not yet was off
        (same | {"new_flag": 0.3}, "--new-flag off, not 0.3"),
    ):
        assert describe_difference(old, new) == words
    random = old | {"init": "random", "init_sha256": None}
    assert describe_difference(random, random) is None
    assert describe_difference(random, same) == "another --init than random"


def test_what_may_be_continued(drawn, tmp_path, cli, refuse, epochs):
    """A run with the same settings, however its paths are spelled, as long as they lead to the same bytes."""
    data = tmp_path / "split"
    shutil.copytree(drawn / "dataset/processed_split", data)
    assert cli("pretrain", "--data", data, *FAST, "--epochs", 1, "--out", "c.pt", cwd=tmp_path)[0] == 0
    flags, epochs.stop_at = ["--epochs", 2, *FAST], 2
    assert cli("finetune", "--data", data, *flags, "--init", "c.pt")[0] == 130
    run = ["finetune", "--data", data, *flags, "--init", "c.pt"]
    refuse(*run, words=["--resume", "--overwrite"])
    refuse(*run, "--resume", "--epochs", 3, words=["--epochs 2, not 3", "--overwrite"])
    refuse(*run, "--resume", "--seed", 1, words=["--seed 0, not 1", "--overwrite"])
    shutil.move("c.pt", "kept.pt")
    again = ["finetune", "--data", "split/", *flags, "--init", "./kept.pt", "--resume"]
    code, printed, _ = cli(*again)
    assert code == 130 and "resumed model.last.pt at epoch 1" in printed
    shutil.copy("model.last.pt", "kept.last.pt")
    epochs.stop_at = None
    assert cli(*again)[0] == 0
    with open("model.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    shutil.copy("kept.last.pt", "model.last.pt")
    face, other = sorted((data / "train").glob("*_image.png"))[:2]
    for change in (
        lambda: face.rename(face.with_name(face.name.replace("_", ".5_", 1))),  # another age
        lambda: next((data / "val").glob("*_image.png")).unlink(),  # epochs were chosen on it
        other.unlink,
    ):
        shutil.copytree(data, tmp_path / "before")
        change()
        refuse(*again, words=["other faces, labels or masks"])
        shutil.rmtree(data)
        shutil.move(tmp_path / "before", data)
    assert cli(*again)[0] == 0


def test_other_masks_and_labels_are_noticed(drawn):
    dataset = FaceDataset(drawn / "dataset/processed_split/val", 32)
    before = training.checksum([dataset])
    dataset.masks[0, 0, 0] ^= 255
    assert training.checksum([dataset]) != before != training.checksum([dataset, dataset])
    for values in (*dataset.labels.values(), dataset.hashes):  # the last: another picture of the same name
        before = training.checksum([dataset])
        values[0] += 1
        assert training.checksum([dataset]) != before


def test_a_finished_pretraining_keeps_its_bytes(drawn, tmp_path, cli, epochs):
    """However its paths are spelled: else fine-tuning from it could not be resumed."""
    (tmp_path / "d").symlink_to(drawn / "dataset/processed_split")
    start = tmp_path / "start.pt"
    flags = ["pretrain", *FAST, "--epochs", 1, "--resume"]
    assert cli(*flags, "--data", "d", "--out", start, "--init", "random", cwd=tmp_path)[0] == 0
    kept = []
    for data, init in (("d", "start.pt"), ("./d/", "./start.pt")):
        assert cli(*flags, "--data", data, "--init", init, "--out", "c.pt", cwd=tmp_path)[0] == 0
        kept.append((tmp_path / "c.pt").read_bytes())
    assert kept[0] == kept[1] and len(epochs) == 2


def test_a_finished_run_changes_nothing(drawn, tmp_path, cli, refuse, epochs):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 1]
    out = tmp_path / "lr0.01.pt"
    for name in ("lr0.01.last.pt", "lr0.01.csv", "lr0.1.pt"):
        with suppress(KeyError), atomic_path(tmp_path / name) as temporary:
            raise KeyError
        temporary.touch()  # as a kill leaves it
    assert cli("finetune", *flags, "--out", out)[0] == 0
    names = [temporary.name]  # the last is another run's, which may be alive
    names += ["lr0.01.csv", "lr0.01.last.pt", "lr0.01.png", "lr0.01.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before = out.read_bytes()
    assert cli("finetune", *flags, "--out", out)[0] == 0 and out.read_bytes() == before
    assert len(epochs) == 1
    with open(tmp_path / "lr0.01.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1
    (tmp_path / "lr0.01.last.pt").unlink()
    for more in ([], ["--resume"]):
        refuse("finetune", *flags, *more, "--out", out, words=["lr0.01.pt is there", "--overwrite"])
    assert out.read_bytes() == before


def test_tables_and_pictures_of_others_beside_out_are_kept(drawn, tmp_path, refuse, epochs):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 1]
    for name in ("faces.csv", "adults.png"):
        (tmp_path / name).write_text("file,age\n")
        refuse("finetune", *flags, "--out", (tmp_path / name).with_suffix(".pt"), words=[name, "--overwrite"])
        assert (tmp_path / name).read_text() == "file,age\n"


def test_out_does_not_replace_init(drawn, tmp_path, cli, refuse, epochs):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--epochs", 1, "--out", tmp_path / "m.pt"]
    assert cli("finetune", *flags, "--init", "random")[0] == 0
    before = (tmp_path / "m.pt").read_bytes()
    refuse("finetune", *flags, "--init", tmp_path / "m.pt", "--overwrite", words=["--out", "--init"])
    assert (tmp_path / "m.pt").read_bytes() == before


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_final_needs_no_val(tmp_path, cli, epochs, script):
    noise_pairs(tmp_path / "d/train", [2, 10, 20, 30, 50, 70] * 4)
    (tmp_path / "d/val").mkdir()  # as split.py --fractions 0.8 0 0.2 leaves it
    flags = ["--data", tmp_path / "d", *FAST, "--init", "random", "--epochs", 1, "--out", tmp_path / "o.pt"]
    code, _, err = cli(script, *flags, "--final")
    assert code == 0, err


def test_a_run_killed_after_its_last_epoch_writes_what_is_missing(drawn, tmp_path, cli, epochs):
    flags = ["--data", drawn / "dataset/processed_split", *FAST, "--init", "random", "--epochs", 1]
    flags += ["--out", tmp_path / "m.pt"]
    assert cli("finetune", *flags)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("m.pt", "m.csv", "m.png")}
    for name in before:
        (tmp_path / name).unlink()
    assert cli("finetune", *flags, "--resume")[0] == 0 and len(epochs) == 1
    for name in ("m.pt", "m.csv"):
        assert (tmp_path / name).read_bytes() == before[name], name
    assert (tmp_path / "m.png").is_file()


def test_each_epoch_has_its_own_order_and_drops_only_the_rest():
    batches = EpochBatches(37, 8, seed=3)
    orders = []
    for batches.epoch in (0, 1, 0):
        keys = [key for batch in batches for key in batch]
        assert len(keys) == len(set(keys)) == 32 and {epoch for epoch, _ in keys} == {batches.epoch}
        orders.append([index for _, index in keys])
    assert orders[0] == orders[2] != orders[1]
    assert [index for batch in EpochBatches(37, 8, seed=4) for _, index in batch] != orders[0]


def test_a_sandbox_without_idle_priority_has_workers_too(monkeypatch):
    monkeypatch.setattr(training.signal, "signal", Mock())
    refused = Mock(side_effect=OSError(22, "Invalid argument"))
    monkeypatch.setattr(os, "sched_setscheduler", refused, raising=False)
    monkeypatch.setattr(os, "SCHED_IDLE", 5, raising=False)
    monkeypatch.setattr(os, "sched_param", Mock(), raising=False)
    training.start_worker(0, give_way=True)
    assert refused.call_count == 1


def test_workers_that_are_not_forked_share_the_pictures(drawn, tmp_path, monkeypatch):
    """Where they are spawned, tensors travel as handles; the batches are the same."""
    dataset = FaceDataset(drawn / "dataset/processed_split/val", 32)
    forked = list(training.train_loader(dataset, 4, 0, 1, torch.device("cpu")))
    monkeypatch.setattr(sys, "platform", "elsewhere")
    loader = training.train_loader(dataset, 4, 0, 1, torch.device("cpu"))
    assert loader.multiprocessing_context is None
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(forked, loader, strict=True))


def test_warmup_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, rates = warmup_cosine(optimizer, 100), []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert np.allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0]) and max(rates) == 2.0
    assert (np.diff(rates[5:]) < 0).all() and rates[-1] < 0.01
    assert rates[52] == pytest.approx(1, abs=0.03)


def test_curves_show_the_columns_that_are_named(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda _, *xy, **__: drawn.append(xy))
    rows = [
        {"epoch": 1, "loss": 3.0, "iou": None, "lr": 2.0},
        {"epoch": 2, "loss": 1.0, "iou": None, "lr": 4.0},
    ]
    plot_history(tmp_path / "c.png", rows, ["loss", "iou", "val_loss"])
    assert drawn == [([1, 2], [3.0, 1.0])]


def test_curves_are_drawn_whatever_the_backend(tmp_path):
    """In a process of its own, which takes MPLBACKEND when it imports matplotlib."""
    code = "from training import *; plot_history('c.png', [{'epoch': 1, 'loss': 2.0}], ['loss'])"
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "c.png").stat().st_size > 1000, done.stderr


def test_batches_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 3)
    for size in (16, 3):
        with pytest.raises(training.UserError, match="--batch-size"):
            training.check_batch_size(size, 100)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(devices.torch, "empty", Mock())  # no GPU is needed
    assert str(devices.choose_device("cuda")) == "cuda:3" and str(devices.choose_device("cuda:1")) == "cuda:1"
    assert str(devices.choose_device("cpu")) == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        assert str(devices.choose_device("cuda")) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(devices.choose_device("auto")) == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto").type == "mps"


def test_processes_on_cuda_join_by_nccl_each_on_its_gpu(monkeypatch):
    settings = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    taken, joined = Mock(), Mock()
    monkeypatch.setattr(torch, "empty", Mock())
    monkeypatch.setattr(torch.cuda, "set_device", taken)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    training.join_processes(Namespace(device="cuda", precision="fp32"))
    taken.assert_called_once_with(torch.device("cuda", 1))
    joined.assert_called_once_with("nccl")


def test_a_process_on_cuda_needs_its_local_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch, "empty", Mock())
    with pytest.raises(UserError, match="LOCAL_RANK"):
        training.join_processes(Namespace(device="cuda", precision="fp32"))


def test_usable_device_names(tmp_path, drawn, refuse):
    for device in ("meta", "toaster", "cuda:77", "xpu"):
        flags = ["--data", drawn / "dataset/processed_split", *FAST[:-2], "--device", device]
        refuse("pretrain", *flags, "--out", tmp_path / "o.pt", words=["--device", device])
    assert not os.listdir(tmp_path)
