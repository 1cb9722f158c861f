"""Two processes must compute what one computes on the whole batch."""

import os
import socket
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn

import training
from cli import UserError
from common import FaceDataset, MultitaskResNet18, load_checkpoint, score_dataset
from conftest import ROOT
from devices import mean_over_ranks, rank, world_size
from finetune import multitask_losses
from pretrain import ContrastiveResNet18, contrastive_loss
from utkface import age_to_group

CPU = torch.device("cpu")
AGES = [3, 3, 20, 20, 20, 41, 77, 90]


def model_and_losses(name):
    """A model in float64, its batch normalisation fixed, and the function of its losses."""
    torch.manual_seed(0)
    model = MultitaskResNet18() if name == "multitask" else ContrastiveResNet18(name != "rank")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2)
    args = Namespace(
        positives=name, temperature=0.2, sigma=0.5, mask_weight=0.5, attribute_weight=0, age_sigma=0
    )
    return model.double().eval(), partial(
        multitask_losses if name == "multitask" else contrastive_loss, args=args
    )


def share(name):
    """This process's part of a batch of eight faces, (rank::world); the contrastive ones have two views."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 1 if name == "multitask" else 2, 3, 32, 32, generator=generator).double()
    masks = (torch.rand(8, 1, 32, 32, generator=generator) > 0.7).double()
    own = slice(rank(), None, world_size())
    ages = torch.tensor(AGES)[own].repeat_interleave(images.shape[1])
    groups = torch.from_numpy(age_to_group(AGES))[own]
    return {"image": images[own].flatten(0, 1), "mask": masks[own], "age": ages, "group": groups}


def compute(split):
    """Losses and gradients of each objective, and the logits of a split."""
    found = {}
    for name in ("view", "age", "rank", "multitask"):
        model, losses = model_and_losses(name)
        network = training.distribute(model, CPU)
        values = losses(network, share(name))
        values[0].backward()
        found[name] = mean_over_ranks(values.detach())
        found |= {f"{name} {key}": p.grad for key, p in model.named_parameters()}
    model = model_and_losses("multitask")[0].float()
    for buffer in model.buffers():  # as training leaves them: each process has its own statistics
        buffer += rank() * torch.ones_like(buffer)
    found["logits"], _, found["overlaps"] = score_dataset(model, FaceDataset(split, 32), CPU, batch_size=4)
    return found


def one_of_two(rank, port, split, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    training.join_processes(Namespace(device="cpu", precision="fp32"))
    torch.save(compute(split), f"{out}.{rank}")
    training.check_ranks_agree({"faces": "same"})
    # Folders that are not shared: the first process alone has found a run to continue. It says so, once.
    with pytest.raises(SystemExit if rank else UserError) as stop:
        training.check_ranks_agree({"faces": "same", "epochs done": 0 if rank else 3})
    assert stop.value.code == 2 if rank else "'epochs done': 3}, {" in str(stop.value)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(drawn, tmp_path):
    split = drawn / "dataset/processed_split/val"
    whole = compute(split)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, split, tmp_path / "found"), nprocs=2)
    for process in (0, 1):
        found = torch.load(tmp_path / f"found.{process}", weights_only=True)
        assert found.keys() == whole.keys()
        for key, expected in whole.items():
            tolerance = 1e-5 * expected.abs().max()
            assert expected.abs().max() > 0 and (found[key] - expected).abs().max() <= tolerance, key


def test_torchrun_writes_and_prints_once(drawn, tmp_path):
    flags = ["--data", drawn / "dataset/processed_split", "--out", "o.pt", "--image-size", 32, "--workers", 1]
    flags += ["--batch-size", 16, "--epochs", 1, "--device", "cpu", "--init", "random", "--multitask"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "finetune.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    for line in ("epoch 1/1", "o.pt written", "SyncBatchNorm needs CUDA"):
        assert sum(line in printed for printed in lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv", "o.last.pt", "o.png", "o.pt"]
    assert load_checkpoint(tmp_path / "o.pt", "model")["config"]["batch_size"] == 16


def test_shares_of_a_batch_do_not_overlap(monkeypatch):
    whole = list(training.EpochBatches(37, 8, seed=0))
    monkeypatch.setattr(training, "world_size", lambda: 4)
    shares = []
    for process in range(4):
        monkeypatch.setattr(training, "rank", lambda process=process: process)
        shares.append(list(training.EpochBatches(37, 8, seed=0)))
    for batch, parts in zip(whole, zip(*shares), strict=True):
        assert sorted(key for part in parts for key in part) == sorted(batch)
        assert {len(part) for part in parts} == {2}


def test_gpus_share_their_batch_statistics(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 2)
    asked = []
    monkeypatch.setattr(
        training, "DistributedDataParallel", lambda model, device_ids: asked.append(device_ids) or model
    )
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # no GPU is needed
    modules = list(training.distribute(MultitaskResNet18(), torch.device("cuda", 1)).modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in modules)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules) and asked == [[1]]


def test_a_process_alone_has_its_model_on_the_device():
    model = training.distribute(MultitaskResNet18(), torch.device("meta"))
    assert all(values.is_meta for values in model.state_dict().values())
