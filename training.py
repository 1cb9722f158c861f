"""How pretrain.py and finetune.py train: processes, batches, one epoch, `.last.pt` and resume, curves.

A run is a `Training`: `open_run` looks for one to continue, `begin_training` sets it up, `train_one_epoch` is
the loop, `finish_epoch` writes `.last.pt`. The course of a training is in the `main` of each script.
"""

import argparse
import hashlib
import math
import os
import signal
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

import cli
from cli import UserError
from common import FaceDataset, all_finite, init_backbone, load_checkpoint, save_checkpoint, to_input
from devices import autocast, choose_device, choose_precision, copy_to, mean_over_ranks, rank, world_size


def training_parser(script: str, description: str, **defaults) -> cli.Parser:
    """A parser with the flags that pretrain.py and finetune.py share; defaults for five of them."""
    parser = cli.script_parser(script, description)
    # fmt: off
    add = parser.add_argument
    whole, rate = cli.number(int, low=1), cli.number(float, above=0)
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--out", type=cli.checkpoint_path, help="checkpoint to write; history and curves go beside it")
    add("--init", help="where the backbone starts: random, imagenet, or a checkpoint file")
    add("--epochs", metavar="N", type=whole, help="passes over the faces")
    add("--batch-size", metavar="N", type=cli.number(int, low=2), help="faces a step, of all processes")
    add("--lr", type=rate, default=2e-3, help="peak learning rate of AdamW")
    add("--weight-decay", metavar="W", type=cli.number(float, low=0), default=0.05, help="of AdamW")
    add("--image-size", metavar="PX", type=cli.image_side, default=128, help="side, a multiple of 32")
    add("--final", action="store_true", help="learn from train and val, and keep the last epoch")
    add("--resume", action="store_true", help="continue from the .last.pt file beside --out")
    # fmt: on
    cli.add_device_flags(parser, precision="auto")
    parser.set_defaults(**defaults)
    return parser


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


def join_processes(args: argparse.Namespace):
    """Under torchrun, joins the other processes (NCCL on CUDA, else gloo); the first alone prints."""
    device = choose_device(args.device)
    choose_precision(args.precision, device)  # which refuses what the device cannot do
    processes, own = cli.environment_number("WORLD_SIZE") or 1, cli.environment_number("RANK")
    if processes == 1:
        return
    master = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    no_gpu = device.type == "cuda" and device.index is None
    if own is None or own >= processes or not master or no_gpu:  # torch would wait for minutes
        needed = f"RANK below {processes}, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        raise UserError(f"WORLD_SIZE is {processes}, which needs {needed}, too: start by torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def check_ranks_agree(what: dict):
    """UserError unless all processes hold the same `what`, a dict of short strings or numbers by name."""
    everywhere = [what] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everywhere, what)
    if all(other == what for other in everywhere):
        return
    if rank():
        sys.exit(2)  # the first says it
    remedy = "give all machines the same --data, --init and folder of --out"
    raise UserError(f"processes differ: {', '.join(map(str, everywhere))}; {remedy}")


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, moved to `device`; under torchrun wrapped so that gradients are averaged over processes."""
    model.to(device, memory_format=torch.channels_last)
    if world_size() == 1:
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces the modules inside, keeps the parameters
        return DistributedDataParallel(model, device_ids=[device.index])
    print(f"{world_size()} CPU processes: each has batch statistics of its own (SyncBatchNorm needs CUDA)")
    return DistributedDataParallel(model)


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


class EpochBatches(Sampler):
    """Batches of (epoch, index) keys, in a new order each epoch, the last incomplete one dropped.

    The key brings the epoch to the workers, so that they can stay alive between epochs. Under torchrun
    `batch_size` counts the faces of all processes, and each takes its share of every batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            share = order[start + rank() : start + self.batch_size : world_size()]
            yield [(self.epoch, index) for index in share]


def learned_folders(args: argparse.Namespace) -> list[Path]:
    """train and, with --final, val, if it holds faces."""
    train, val = Path(args.data) / "train", Path(args.data) / "val"
    return [train, val] if args.final and any(val.glob("*_image.png")) else [train]


def check_batch_size(batch_size: int, faces: int):
    """UserError unless `faces` fill a batch, and its shares are equal and fit for batch normalisation."""
    if batch_size > faces or batch_size % world_size() or batch_size < 2 * world_size():
        share = f"the train split's {faces} faces in equal shares of 2 or more for {world_size()} processes"
        raise UserError(f"--batch-size {batch_size} does not take {share}: change it")


def as_arrays(batch: dict) -> dict:
    """A batch of tensors as arrays: those leave a worker by a pipe.

    Tensors would pass through /dev/shm, 64 MB in Docker, and an open file each; training hangs without.
    """
    return {name: values.numpy() for name, values in batch.items()}


def start_worker(worker: int, give_way: bool):
    """Leaves signals to the main process; with `give_way` works only while the arithmetic leaves a core."""
    cli.own_process()  # which a worker that is spawned has not inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Torch would report a worker that dies of a signal before the main process can say why it stops.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if give_way and hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # some sandboxes have one priority alone
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif give_way and hasattr(os, "nice"):
        os.nice(19)


def train_loader(
    dataset: FaceDataset, batch_size: int, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Shuffled batches for training; set `loader.batch_sampler.epoch` before each epoch."""
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed),
        collate_fn=as_arrays,
        num_workers=workers,
        worker_init_fn=partial(start_worker, give_way=device.type == "cpu"),
        generator=torch.Generator(),  # its own, lest the workers' number change what others draw
        pin_memory=device.type == "cuda",  # for its thread, which receives the batches ahead
        persistent_workers=workers > 0,
        # Forked workers start at once, with the pictures as they lie in memory.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def to_device(batch: dict, device: torch.device) -> dict:
    """A loader's batch on `device`, `image` normalised float32 (B, 3, H, W), `mask` uint8 (B, 1, H, W)."""
    batch = {name: torch.as_tensor(values) for name, values in batch.items()}
    if device.type == "cuda":  # pinned, no copy is waited for
        batch = {name: values.pin_memory() for name, values in batch.items()}
    batch = {name: copy_to(device, values) for name, values in batch.items()}
    batch["image"] = to_input(batch["image"], device)
    if "mask" in batch:
        batch["mask"] = batch["mask"].unsqueeze(1)
    return batch


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A run of training: what it works with, and where it stands."""

    args: argparse.Namespace
    kind: str  # of its checkpoint: contrastive or model
    model: nn.Module
    network: nn.Module  # the model, under torchrun wrapped
    loader: DataLoader | None
    device: torch.device
    dtype: torch.dtype  # of the forward pass
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None  # the moving average of the weights, with --ema
    hashes: Tensor  # int64 (N,), of the faces that it learns from
    data_checksum: int  # of those faces and of the ones that it is validated on, with labels and masks
    provenance: dict  # of the weights that it started from: see `init_backbone`
    epoch: int = 0  # epochs done
    seconds: float = math.nan  # that the last of them took
    history: list[dict] = field(default_factory=list)  # a row an epoch
    best: dict | None = None  # finetune.py's best epoch


CARRIED = ("provenance", "epoch", "history", "best")  # from one call to the next, by `.last.pt`


def open_run(args: argparse.Namespace, kind: str) -> dict | None:
    """The state in `.last.pt` to continue from, or None; UserError if another run would be clobbered.

    A finished run with the same settings counts as one to continue: nothing is left to train.
    """
    out, last, init = Path(args.out), cli.beside(args.out, ".last.pt"), cli.shipped(args.init)
    cli.check_output("--out", out)
    if init.is_file() and os.path.realpath(init) == os.path.realpath(out):
        raise UserError(f"--out {out} would replace --init: name another file")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one")
    # A file behind --init counts by what is in it, so its hash is a setting.
    args.init_sha256 = hashlib.sha256(init.read_bytes()).hexdigest() if init.is_file() else None
    if not rank():
        for suffix in (".pt", ".last.pt", ".csv", ".png"):  # of a run that was killed
            path = Path(os.path.realpath(cli.beside(out, suffix)))  # beside which `atomic_path` writes
            cli.remove_leftovers(path.parent, f".tmp-????????-{escape(path.name)}", age=0)
    if args.overwrite:
        return None
    if not last.exists():
        there = [path for path in (out, cli.beside(out, ".csv"), cli.beside(out, ".png")) if path.exists()]
        if there:  # perhaps a table or a picture of somebody else's
            raise UserError(f"{there[0]} is there already, without {last.name}: --overwrite replaces it")
        if args.resume:
            print(f"no {last}: starting from the beginning")
        return None
    state = load_checkpoint(last, f"{kind}.last")
    difference = describe_difference(state["config"], cli.settings_of(args))
    if difference:
        raise UserError(f"{last} was made with {difference}: --overwrite starts again")
    # As they were given first, lest the checkpoint of a finished run change with their spelling.
    args.init, args.init_sha256 = (state["config"].get(name) for name in ("init", "init_sha256"))
    if not args.resume and state.get("epoch") != args.epochs:
        raise UserError(f"{last} holds an unfinished run: --resume continues it, --overwrite starts again")
    print(f"resumed {last} at epoch {state.get('epoch')}")
    return state


def describe_difference(old: dict, new: dict) -> str | None:
    """In what the settings of two runs differ, or None. Faces are compared later, by their pixels."""
    for name in sorted((old.keys() | new.keys()) - {"data", "init", "init_sha256"}):  # older ones hold `data`
        if (old.get(name) or 0) != (new.get(name) or 0):  # a flag that there was not yet was off
            return f"--{name.replace('_', '-')} {old.get(name, 'off')}, not {new.get(name, 'off')}"
    if new["init_sha256"]:
        same_start = new["init_sha256"] == old.get("init_sha256")
    else:  # random, ImageNet's, or a file that is gone: a run that has begun needs it no more
        same_start = os.path.realpath(old["init"]) == os.path.realpath(new["init"])
    return None if same_start else f"another --init than {old['init']}"


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Learning rates that rise linearly over the first 5 % of `steps`, then fall as a cosine to zero."""
    warmup = max(1, steps // 20)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def average_weights(model: nn.Module, decay: float, scheduler: LambdaLR) -> AveragedModel:
    """The moving average of a model's weights and statistics.

    Early on it would be of weights that have hardly begun to learn, so it starts short: after n steps the
    decay is n/(10 + n), until that exceeds `decay`.
    """

    def update(averaged, current, _):
        steps = scheduler.last_epoch
        get_ema_multi_avg_fn(min(decay, steps / (10 + steps)))(averaged, current, None)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def checksum(datasets: list[FaceDataset]) -> int:
    """Of all that may be learned from data sets: pixels, labels and masks."""
    total = 0
    for dataset in datasets:
        for values in (dataset.hashes, *dataset.labels.values(), dataset.masks):
            total = total if values is None else zlib.crc32(values.numpy(), total)
    return total


def begin_training(
    args: argparse.Namespace, kind: str, model: nn.Module, groups: list[dict], dataset: FaceDataset,
    state: dict | None, val: FaceDataset | None = None,
) -> Training:  # fmt: skip
    """A run at its beginning, its backbone loaded from --init, or where `open_run`'s `state` has it.

    Raises UserError if the state does not fit, or if the processes of torchrun are not all at one point.
    """
    settings = {key: value for key, value in cli.settings_of(args).items() if key != "init"}
    data_checksum = checksum([dataset, val] if val else [dataset])
    checksums = {"faces": data_checksum, "settings": zlib.crc32(repr(settings).encode())}
    check_ranks_agree({"epochs done": state.get("epoch") if state else 0, **checksums})
    provenance = {} if state else init_backbone(model.backbone, args.init)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where a product stays in float32
        torch.backends.cudnn.benchmark = True  # pays for pictures of one size
    network = distribute(model, device)
    loader = train_loader(dataset, args.batch_size, args.seed, args.workers, device)
    optimizer = torch.optim.AdamW(groups, fused=True)
    scheduler = warmup_cosine(optimizer, args.epochs * len(loader))
    decay = vars(args).get("ema")  # pretrain.py has none
    run = Training(
        args, kind, model, network, loader, device, dtype, optimizer, scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=average_weights(model, decay, scheduler) if decay else None,
        hashes=dataset.hashes, data_checksum=data_checksum, provenance=provenance,
    )  # fmt: skip
    last = cli.beside(args.out, ".last.pt")
    if state is None:
        if args.overwrite and not rank():
            for suffix in (".last.pt", ".csv", ".png"):  # lest --resume bring back what was overwritten
                Path(os.path.realpath(cli.beside(args.out, suffix))).unlink(missing_ok=True)
        return run
    try:
        for name, part in stateful_parts(run).items():
            if state[name]:  # empty of a scaler that was off: `auto` is not fp16 on all devices
                part.load_state_dict(state[name])
        same_data = state["data_checksum"] == data_checksum
        for name in CARRIED:
            setattr(run, name, state[name])
    except Exception:  # what a damaged file raises depends on where it is damaged
        raise UserError(
            f"{last} does not fit the model, or is of an older version: --overwrite starts again"
        ) from None
    if not same_data:
        what = f"other faces, labels or masks than {args.data} holds"
        raise UserError(f"{last} was made with {what}: --overwrite starts again")
    return run


def stateful_parts(run: Training) -> dict:
    """What changes while it trains and has a `state_dict`, by its name in `.last.pt`."""
    names = ("model", "optimizer", "scheduler", "scaler", "ema")
    return {name: getattr(run, name) for name in names if getattr(run, name) is not None}


def train_one_epoch(run: Training, compute_losses) -> Tensor:
    """Trains for one epoch; returns the losses of all its steps, float32 (steps, K) on the CPU.

    compute_losses(model, batch) → (K,), of which the first is minimised; see `to_device` for the batch. Under
    torchrun the losses are means over processes. Raises UserError if the first, or a weight, becomes infinite
    or NaN.
    """
    losses, start = [], time.perf_counter()
    run.network.train()
    run.loader.batch_sampler.epoch = run.epoch
    for batch in cli.progress(run.loader, f"epoch {run.epoch + 1}/{run.args.epochs}", unit="step"):
        with autocast(run.device, run.dtype):
            values = compute_losses(run.network, to_device(batch, run.device))  # K
        run.scaler.scale(values[0]).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        run.scheduler.step()
        if run.ema is not None:
            run.ema.update_parameters(run.model)
        losses.append(values.detach())
    losses = mean_over_ranks(torch.stack(losses).float()).cpu()  # steps×K
    run.seconds = time.perf_counter() - start
    broken = ~losses[:, 0].isfinite()
    # A gradient scaler skips the step of an overflow, and trains on with a smaller scale.
    if broken.all() if run.scaler.is_enabled() else broken.any():
        step = int(broken.int().argmax())
        what = f"the loss became {losses[step, 0]:g} in epoch {run.epoch + 1}, step {step + 1}"
        raise UserError(f"{what}: lower --lr; checkpoints from before are kept")
    if not all_finite(run.model):
        what = f"weights became infinite or NaN in epoch {run.epoch + 1}"
        raise UserError(f"{what}: lower --lr; checkpoints from before are kept")
    return losses


def finish_epoch(run: Training, figures: dict):
    """Ends an epoch: prints its figures, adds them to the history, and writes that and `.last.pt`."""
    run.epoch += 1
    lr = run.scheduler.get_last_lr()[-1]
    run.history.append({"epoch": run.epoch, **figures, "lr": lr, "seconds": round(run.seconds, 1)})
    if not rank():
        content = {name: part.state_dict() for name, part in stateful_parts(run).items()}
        content |= {name: getattr(run, name) for name in ("data_checksum", *CARRIED)}
        save_checkpoint(cli.beside(run.args.out, ".last.pt"), f"{run.kind}.last", run.args, **content)
        cli.write_csv(cli.beside(run.args.out, ".csv"), run.history)
    shown = "".join(f"{name.replace('_', ' ')} {value:.4f}, " for name, value in figures.items() if value)
    speed = len(run.loader) * run.args.batch_size / run.seconds
    print(f"epoch {run.epoch}/{run.args.epochs}: {shown}{run.seconds:.0f} s, {speed:.0f} faces/s")
    if run.epoch == run.args.epochs:
        run.loader = None  # its workers end now, lest torch report that they were killed at exit


def provenance(run: Training) -> dict:
    """All faces that the weights have learned from, and how they began, for a checkpoint to carry."""
    seen = torch.cat([run.provenance["train_hashes"], run.hashes]).unique()
    return run.provenance | {"train_hashes": seen}


def finish_run(run: Training, columns: list[str]):
    """Writes the history as CSV and curves of its `columns` as PNG, and leaves the other processes."""
    if not rank():
        cli.write_csv(cli.beside(run.args.out, ".csv"), run.history)
        plot_history(cli.beside(run.args.out, ".png"), run.history, columns)
    if dist.is_initialized():  # those of a run that failed are left to torchrun
        dist.destroy_process_group()


def plot_history(path: Path, history: list[dict], columns: list[str]):
    """Draws those of `columns` that hold numbers over the epochs, a panel each, as PNG."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's shell inherits one that may not be installed here
    from matplotlib.figure import Figure  # here, since the import takes a second

    columns = [column for column in columns if history[-1].get(column) is not None]
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(4.5 * len(columns), 3.6), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        axis.plot(epochs, [row[column] for row in history], marker="o" if len(epochs) < 20 else None)
        axis.set(title=column.replace("_", " "), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    with cli.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
