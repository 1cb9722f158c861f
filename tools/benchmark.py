"""Measures how fast each stage is, beside what it could be: every speed figure in the README.

    python benchmark.py                                  # on drawn faces
    python benchmark.py --data dataset/processed --image-size 128 --json benchmark.json
    python benchmark.py --only growth --data UTKFace.tar.gz

Every row is measured in this one run, by turns with the others of its part, and is the median of the repeats;
a ratio is the median of the repeats' ratios. `model` is a training step on tensors that lie on the device
already, the ceiling of what training can reach.
"""

import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import synthesize
import torch
import torch.nn.functional as F

import finetune
import masks
import predict
import pretrain
import split
from common import (
    CONTRASTIVE_VIEW,
    SUPERVISED_VIEW,
    FaceDataset,
    MultitaskResNet18,
    UserError,
    add_device_flags,
    atomic_path,
    autocast,
    build_param_groups,
    check_writable,
    choose_device,
    choose_precision,
    image_side,
    list_pairs,
    nt_xent_loss,
    number,
    predict_dataset,
    read_image,
    run,
    script_parser,
    start_training,
    terminate,
    to_device,
    to_input,
    train_loader,
    train_one_epoch,
)

PARTS = ("training", "loss", "masks", "split", "evaluate", "loader", "growth")
GROWTH = (2000, 8000)  # faces, and then all there are


def seconds(work, device=None) -> float:
    """Wall time of `work()`, the device's included."""
    began = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def by_turns(works: dict, repeats: int, device=None) -> dict:
    """Seconds of each of the named functions in every repeat, after a first round that does not count."""
    rounds = [{name: seconds(work, device) for name, work in works.items()} for _ in range(repeats + 1)][1:]
    return {name: [one[name] for one in rounds] for name in works}


def report(rows: list, part: str, name: str, rates: list, unit: str, against: list | None = None, of=""):
    """Adds the median rate, and its ratio to the rates `against`, and prints both."""
    row = {"part": part, "name": name, "rate": statistics.median(rates), "unit": unit}
    if against is not None:
        row |= {"ratio": statistics.median(a / b for a, b in zip(rates, against)), "of": of}
    ratio = f"{row['ratio']:6.2f} of {of}" if against is not None else ""
    print(f"| {part:9} | {name:34} | {row['rate']:9.1f} {unit:9} | {ratio:32} |", flush=True)
    rows.append(row)


def draw_pairs(folder: Path, count: int, workers: int):
    """Fills `folder` with `count` pairs: a few hundred drawn faces and their true masks, over and over."""
    folder.mkdir()
    plan = synthesize.plan_faces(min(count, 256), seed=0)

    def draw(index):
        rng = np.random.default_rng(index)
        image, mask = synthesize.draw_face(synthesize.sample_looks(rng, *plan[index][1:]), rng)
        encoded = [cv2.imencode(".png", pixels, masks.PNG_FLAGS)[1] for pixels in (image[..., ::-1], mask)]
        for copy in range(index, count, len(plan)):
            stem = "{}_{}_{}".format(*plan[index][1:]) + f"_{20170000000000000 + copy}"
            for part, pixels in zip(("image", "mask"), encoded):
                (folder / f"{stem}_{part}.png").write_bytes(pixels)

    with ThreadPool(workers) as pool:
        pool.map(draw, range(len(plan)))


# ------------------------------------------------------------------------------------------------------------
# Training: loader alone, model alone, both together
# ------------------------------------------------------------------------------------------------------------


def measure_training(rows, folder, args, device, dtype, loader_only=False):
    """Faces a second of both training stages, end to end and of each half alone (or of the loader only)."""
    objective = Namespace(
        positives="view", temperature=0.07, sigma=0.5, mask_weight=0.5, age_sigma=0, mixup=0
    )  # fmt: skip
    for stage, view, views, model, losses in (
        (
            "pretrain", CONTRASTIVE_VIEW, 2, pretrain.ContrastiveResNet18(),
            partial(pretrain.contrastive_loss, args=objective),
        ),
        (
            "finetune", SUPERVISED_VIEW, 1, MultitaskResNet18(),
            partial(finetune.multitask_losses, args=objective),
        ),
    ):  # fmt: skip
        dataset = FaceDataset(
            folder, args.image_size, view, views, stage == "finetune", workers=args.workers,
            on_device=device.type == "cuda",
        )  # fmt: skip
        alone = train_loader(dataset, args.batch_size, 0, 0, device)
        settings = Namespace(**vars(args), lr=1e-4, epochs=1000, save_every_steps=0)
        groups = build_param_groups(model, settings.lr)
        training = start_training(settings, stage, model, groups, dataset, device, None, (torch.empty(0), {}))
        signal.signal(signal.SIGTERM, terminate)  # at once: there is nothing to save
        loader, scaler, optimizer = training.loader, training.scaler, training.optimizer
        batch = to_device(next(iter(alone)), dataset, device, (0,))

        def model_only(
            model=model, losses=losses, scaler=scaler, optimizer=optimizer, loader=loader, batch=batch
        ):
            model.train()
            for _ in range(len(loader)):
                with autocast(device, dtype):
                    loss = losses(model, batch)[0]
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

        def end_to_end(training=training, losses=losses):
            training.step, training.losses = 0, []
            train_one_epoch(training, losses)

        def iterate(loader):
            for _ in loader:
                pass

        works = {
            "loader, one core": partial(iterate, alone),
            f"loader, {args.workers} workers": partial(iterate, loader),
            "model": model_only,
            "end to end": end_to_end,
        }
        if loader_only:
            works = {name: work for name, work in works.items() if "loader" in name}
        taken = by_turns(works, args.repeats, device)
        faces = len(loader) * args.batch_size
        rates = {name: [faces / time for time in times] for name, times in taken.items()}
        for name, values in rates.items():
            report(
                rows, stage, name, values, "faces/s", None if name == "model" else rates.get("model"), "model"
            )


# ------------------------------------------------------------------------------------------------------------
# Loss, masks, split, evaluation
# ------------------------------------------------------------------------------------------------------------


def masked_nt_xent(z1, z2, temperature):
    """NT-Xent as one writes it first: exponentials, a mask, a quotient."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # 2N×D
    similarities = torch.exp(z @ z.T / temperature)  # 2N×2N
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = torch.cat([similarities.diag(len(z1)), similarities.diag(-len(z1))])  # 2N
    return -torch.log(positives / (similarities * others).sum(dim=1)).mean()


def measure_loss(rows, args, device):
    """Calls a second, forward and backward, of NT-Xent on the embeddings of a batch."""
    z1, z2 = torch.randn(2, args.batch_size, 128, device=device)
    losses = {"nt_xent_loss": nt_xent_loss, "masked exponentials": masked_nt_xent}
    try:
        from lightly.loss import NTXentLoss

        theirs = NTXentLoss(temperature=0.07)
        losses["lightly's NTXentLoss"] = lambda z1, z2, _: theirs(z1, z2)
    except ImportError:
        print("(lightly is not installed: its loss is left out)")

    def call(loss):
        for _ in range(50):
            a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
            loss(a, b, 0.07).backward()

    taken = by_turns({name: partial(call, loss) for name, loss in losses.items()}, args.repeats, device)
    rates = {name: [50 / time for time in times] for name, times in taken.items()}
    for name, values in rates.items():
        ours = name == "nt_xent_loss"
        report(
            rows, "loss", name, values, "calls/s", *([] if ours else [rates["nt_xent_loss"], "nt_xent_loss"])
        )


def bare_grabcut(images):
    """One iteration of cv2.grabCut at 64×64 on each of the images, and nothing else."""
    for image in images:
        mask, models = np.zeros((64, 64), np.uint8), np.zeros((2, 1, 65))
        cv2.grabCut(image, mask, (8, 2, 48, 60), models[0], models[1], 1, cv2.GC_INIT_WITH_RECT)


def measure_masks(rows, folder, args, scratch):
    """Faces a second of masks.py from encoded faces to pairs, on one core and on all, beside bare GrabCut."""
    source = scratch / "raw"
    source.mkdir()
    names = [face.stem for face in list_pairs(folder)][:1000]
    for stem in names:
        image = cv2.imread(str(folder / f"{stem}_image.png"))
        cv2.imwrite(str(source / f"{stem}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    small = [cv2.resize(cv2.imread(str(folder / f"{stem}_image.png")), (64, 64)) for stem in names]
    parse = masks.choose_parser("grabcut", 0)

    def write(workers):
        made = Namespace(input=source, output=scratch / "pairs", workers=workers, overwrite=True)
        masks.write_pairs(made, parse)

    def bare(workers):
        with ThreadPool(workers) as pool:
            pool.map(bare_grabcut, [small[start::workers] for start in range(workers)])

    works = {"1 core": partial(write, 1), "bare grabCut, 1 core": partial(bare, 1)}
    if args.workers > 1:
        works |= {f"{args.workers} cores": partial(write, args.workers)}
        works |= {f"bare grabCut, {args.workers} cores": partial(bare, args.workers)}
    taken = by_turns(works, args.repeats)
    rates = {name: [len(names) / time for time in times] for name, times in taken.items()}
    for name, values in rates.items():
        bare_name = f"bare grabCut, {name}"
        report(rows, "masks", name, values, "faces/s", rates.get(bare_name), "bare grabCut")
    if args.workers > 1:
        many = f"{args.workers} cores"
        report(rows, "masks", f"{many} against 1", rates[many], "faces/s", rates["1 core"], "1 core")


def measure_split(rows, args):
    """Millions of pairs a second that the search for near-duplicates compares: N faces have N²/2."""
    thumbnails = np.random.default_rng(0).normal(size=(8192, 1024)).astype(np.float32)
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    work = {"near-duplicate search": lambda: split.find_near_duplicates(thumbnails, 0.98)}
    for name, times in by_turns(work, args.repeats).items():
        report(rows, "split", name, [len(thumbnails) ** 2 / 2e6 / time for time in times], "M pairs/s")


def measure_evaluation(rows, folder, args, scratch, device, dtype):
    """Faces a second that evaluate.py and predict.py read and score, beside the bare forward pass."""
    model = MultitaskResNet18().to(device, memory_format=torch.channels_last).eval()
    dataset = FaceDataset(folder, args.image_size, workers=args.workers)
    batch = to_input(dataset.images[:256], device)
    crops = [scratch / f"{face.stem}.jpg" for face in dataset.faces]
    for face, path in zip(dataset.faces, crops):
        image = read_image(folder / f"{face.stem}_image.png")
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 75])  # that of UTKFace's own files
    loaded = Namespace(model=model, image_size=args.image_size, device=device, dtype=dtype, detect=None)

    @torch.inference_mode()
    def forward():
        for start in range(0, len(dataset), 256):
            with autocast(device, dtype):
                model(batch[: len(dataset) - start])

    taken = by_turns(
        {
            "read and decode": lambda: FaceDataset(folder, args.image_size, workers=args.workers),
            "bare forward pass": forward,
            "predict_dataset": lambda: predict_dataset(model, dataset, device, dtype),
            "predict.py on JPEGs": lambda: list(predict.score_pictures(crops, loaded, args.workers)),
        },
        args.repeats,
        device,
    )
    rates = {name: [len(dataset) / time for time in times] for name, times in taken.items()}
    for name, values in rates.items():
        against = [] if name == "bare forward pass" else [rates["bare forward pass"], "bare forward pass"]
        report(rows, "evaluate", name, values, "faces/s", *against)


# ------------------------------------------------------------------------------------------------------------
# Growth: time and memory of every stage on more and more faces
# ------------------------------------------------------------------------------------------------------------


def run_stage(script, *flags, cwd):
    """Runs a script; returns its wall time in seconds and its largest memory, children's apart, in GiB."""
    command = [sys.executable, str(Path(__file__).parent / f"{script}.py"), *map(str, flags)]
    began = time.perf_counter()
    process = os.posix_spawn(
        "/bin/sh", ["sh", "-c", 'cd "$0" && exec "$@" > /dev/null', str(cwd), *command], os.environ
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise UserError(f"{script}.py failed: run `{' '.join(command)}` in a folder of your own to see why")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def measure_growth(rows, args, scratch):
    """Time and memory of each stage, with one epoch of training, on part of --data and on all of it."""
    if not args.data or not Path(args.data).is_file() or not tarfile.is_tarfile(args.data):
        raise UserError("--only growth needs faces: name UTKFace.tar.gz with --data")
    with tarfile.open(args.data) as archive:
        members = [member for member in archive if member.isfile()]
        counts = [count for count in GROWTH if count < len(members)] + [len(members)]
        for count in counts:
            folder = scratch / str(count)
            (folder / "dataset/raw").mkdir(parents=True)
            for member in members[:: len(members) // count][:count]:
                (folder / "dataset/raw" / Path(member.name).name).write_bytes(
                    archive.extractfile(member).read()
                )
            training = ["--epochs", 1, "--image-size", args.image_size, "--batch-size", args.batch_size]
            training += ["--device", args.device, "--workers", args.workers]
            for script, flags in (
                ("masks", ["--workers", args.workers]),
                ("split", ["--workers", args.workers]),
                ("pretrain", training),
                ("finetune", [*training, "--multitask", "--init", "contrastive.pt"]),
                ("evaluate", ["--device", args.device]),
            ):
                taken, memory = run_stage(script, *flags, cwd=folder)
                print(f"| {script:9} | {count:7,} faces | {taken:7.1f} s | {memory:5.2f} GiB |", flush=True)
                rows.append({"part": "growth", "name": script, "faces": count, "s": taken, "GiB": memory})
            shutil.rmtree(folder)


def get_parser():
    parser = script_parser("benchmark", __doc__)
    parser.add_argument(
        "--data",
        help="folder of pairs written by masks.py, or for growth UTKFace's archive; drawn faces by default",
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="parts to measure; the first five if none is named"
    )
    parser.add_argument("--faces", type=number(int, low=16), default=1024, help="faces to draw, an epoch")
    parser.add_argument("--batch-size", type=number(int, low=2), default=64, help="faces a step")
    parser.add_argument("--image-size", type=image_side, default=64, help="side in pixels, a multiple of 32")
    parser.add_argument("--repeats", type=number(int, low=1), default=3, help="rounds that count")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    add_device_flags(parser)
    return parser


def main(args):
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    args.workers = max(args.workers, 1)
    parts = args.only or PARTS[:5]
    if args.json:
        check_writable("--json", Path(args.json).parent)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {args.image_size} px, batches of "
        f"{args.batch_size}, {str(dtype).removeprefix('torch.')}, medians of {args.repeats}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = Path(args.data) if args.data else scratch / "drawn"
        if not args.data and {*parts} - {"loss", "split", "growth"}:
            draw_pairs(folder, args.faces, args.workers)
        for part in {*parts} & {"training", "loader"}:
            measure_training(rows, folder, args, device, dtype, loader_only=part == "loader")
        if "loss" in parts:
            measure_loss(rows, args, device)
        if "masks" in parts:
            measure_masks(rows, folder, args, scratch)
        if "split" in parts:
            measure_split(rows, args)
        if "evaluate" in parts:
            measure_evaluation(rows, folder, args, scratch, device, dtype)
        if "growth" in parts:
            measure_growth(rows, args, scratch)
    if args.json:
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(f"{args.json} written: {len(rows)} rows")


if __name__ == "__main__":
    run(main, get_parser())
