"""Measures how fast each stage is, beside what it could be: the figures of docs/speed.md.

    python tools/benchmark.py                                   # on drawn faces; a few minutes
    python tools/benchmark.py --only training loader --image-size 128
    python tools/benchmark.py --only growth --data UTKFace --faces 23708

Parts: training (finetune.py --multitask, beside bare steps on a batch that is on the device already), loader
(what feeds a model), evaluate (scoring and predict.py, beside the released model's bare forward pass), masks
(beside a bare loop of GrabCut), growth (the five stages on a quarter, half and all of the faces). What is
compared takes turns; a figure is the median of the repeats, a ratio the median of their ratios.
"""

import importlib
import io
import platform
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import redirect_stdout
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from time import perf_counter

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
import common
import devices
import finetune
import training
from utkface import parse_name

RELEASED = cli.ROOT / "weights/age_multitask.pt"


def seconds(work, device=None) -> float:
    """Wall time of `work()`, the device's included."""
    start = perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def measure(part: str, works: dict, faces: int, args, device=None):
    """Prints the faces a second of each of the named functions, and its ratio to the first.

    They take turns, and the first round does not count.
    """
    rounds = [{name: seconds(work, device) for name, work in works.items()} for _ in range(args.repeats + 1)]
    first = next(iter(works))
    for name in works:
        rate = median(faces / times[name] for times in rounds[1:])
        ratio = median(times[first] / times[name] for times in rounds[1:])
        print_row(part, name, f"{rate:,.1f} faces/s", "" if name == first else f"{ratio:.2f} of {first}")


def print_row(part: str, what: str, figure: str, beside: str = ""):
    """A row of a Markdown table."""
    print(f"| {part:8} | {what:27} | {figure:>18} | {beside:32} |", flush=True)


def call(script: str, *flags):
    """Runs a script's `main` in this process, without what it prints."""
    module = importlib.import_module(script)
    with redirect_stdout(io.StringIO()):
        module.main(cli.parse_args(module.get_parser(), [str(flag) for flag in flags]))


def measure_training(_, pairs: Path, args, device):
    """Faces a second of finetune.py --multitask by its own defaults."""
    flags = ["--multitask", "--out", pairs / "model.pt", "--epochs", args.repeats + 1]
    flags += ["--workers", args.workers, "--device", args.device, "--precision", args.precision]
    flags += ["--image-size", args.image_size, "--batch-size", args.batch_size]
    settings = cli.parse_args(finetune.get_parser(), [str(flag) for flag in flags])
    dataset = common.FaceDataset(pairs, args.image_size, common.SUPERVISED_AUGMENTATION, workers=args.workers)
    model = common.make_model(vars(settings), training=True)
    groups = common.build_param_groups(model, settings.lr)
    dtype = devices.choose_precision(args.precision, device)
    t = training.begin_training(settings, "model", model, groups, dataset, device, dtype, None, None)
    compute_losses = partial(finetune.multitask_losses, args=settings)
    batch = training.to_device(next(iter(t.loader)), device)

    def bare_steps():
        model.train()
        for _ in range(len(t.loader)):
            with devices.autocast(device, dtype):
                loss = compute_losses(model, batch)[0]
            loss.backward()
            t.optimizer.step()
            t.optimizer.zero_grad()

    works = {"bare steps": bare_steps, "finetune.py": partial(training.train_one_epoch, t, compute_losses)}
    measure("training", works, len(t.loader) * args.batch_size, args, device)
    t.loader = None  # its workers end


def measure_loader(_, pairs: Path, args, device):
    """Faces a second that one core draws, and all workers, for either stage of training."""
    stages = {
        "pretrain": (common.CONTRASTIVE_AUGMENTATION, 2),
        "finetune": (common.SUPERVISED_AUGMENTATION, 1),
    }
    for stage, (view, views) in stages.items():
        dataset = common.FaceDataset(pairs, args.image_size, view, views, with_masks=views == 1)
        loaders = [training.train_loader(dataset, args.batch_size, 0, n, device) for n in (0, args.workers)]
        names = f"{stage}, one core", f"{stage}, {args.workers} workers"
        works = {name: partial(deque, loader, maxlen=0) for name, loader in zip(names, loaders)}
        measure("loader", works, len(loaders[0]) * args.batch_size, args)


def measure_evaluation(raw: Path, pairs: Path, args, device):
    """Faces a second that are scored and predicted by the released model."""
    model, checkpoint = common.load_model(RELEASED, device)
    dtype, size = devices.choose_precision(args.precision, device), checkpoint["preprocessing"]["image_size"]
    dataset = common.FaceDataset(pairs, size, workers=args.workers)
    batch = common.to_input(dataset.images[:256], device)
    flags = ["--workers", args.workers, "--device", args.device, "--precision", args.precision]

    @torch.inference_mode()
    def forward():
        for start in range(0, len(dataset), 256):
            with devices.autocast(device, dtype):
                common.infer(model, batch[: len(dataset) - start])

    works = {
        f"bare forward pass, {size} px": forward,
        "scoring in evaluate.py": partial(common.score_dataset, model, dataset, device, dtype),
        "reading in evaluate.py": partial(common.FaceDataset, pairs, size, workers=args.workers),
        "predict.py": partial(call, "predict", raw, "--aligned", "--checkpoint", RELEASED, *flags),
    }
    measure("evaluate", works, len(dataset), args, device)


def bare_grabcut(images: list):
    """One iteration of cv2.grabCut at 64×64 on each of the images, and nothing else."""
    for image in images:
        labels, models = np.zeros((64, 64), np.uint8), np.zeros((2, 1, 65))
        cv2.grabCut(image, labels, (8, 2, 48, 60), models[0], models[1], 1, cv2.GC_INIT_WITH_RECT)


def measure_masks(raw: Path, pairs: Path, args, device):
    """Faces a second from files to pairs, on one core and on all."""
    images = [cv2.resize(cv2.imread(str(path)), (64, 64)) for path in sorted(raw.iterdir())]
    flags = ["--input", raw, "--output", pairs, "--overwrite", "--workers"]
    for cores in sorted({1, max(args.workers, 1)}):
        shares = [images[start::cores] for start in range(cores)]
        with ThreadPool(cores) as pool:
            works = {
                f"bare GrabCut, {cores} at once": partial(pool.map, bare_grabcut, shares),
                f"masks.py --workers {cores}": partial(call, "masks", *flags, cores),
            }
            measure("masks", works, len(images), args)


def run_stage(script: str, flags: list, folder: Path):
    """Runs a script in `folder` as a user does; what it complains of goes to stderr."""
    command = [sys.executable, str(cli.ROOT / f"{script}.py"), *map(str, flags)]
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        raise cli.UserError(f"--only growth: {script}.py failed")


def measure_growth(raw: Path, pairs: Path, args, device):
    """Seconds of each stage, with one epoch of training, on more and more faces."""
    workers = ["--workers", args.workers]
    scoring = [*workers, "--device", args.device]
    learning = [*scoring, "--epochs", 1, "--image-size", args.image_size, "--batch-size", args.batch_size]
    for part in (4, 2, 1):
        folder, faces = raw.parent / f"growth-{part}", sorted(raw.iterdir())[::part]
        (folder / "dataset/raw").mkdir(parents=True)
        for path in faces:
            (folder / "dataset/raw" / path.name).symlink_to(path.resolve())
        for script, flags in (
            ("masks", workers),
            ("split", workers),
            ("pretrain", learning),
            ("finetune", [*learning, "--multitask", "--init", "contrastive.pt"]),
            ("evaluate", scoring),
        ):
            taken = seconds(partial(run_stage, script, flags, folder))
            print_row("growth", f"{script}.py, {len(faces):,} faces", f"{taken:,.1f} s")


PARTS = {
    "training": measure_training,
    "loader": measure_loader,
    "evaluate": measure_evaluation,
    "masks": measure_masks,
    "growth": measure_growth,
}


def gather_faces(raw: Path, args):
    """Fills the folder `raw` with --faces faces: drawn, or evenly spread over those of --data."""
    if not args.data:
        call("synthesize", "--output", raw, "--count", args.faces, "--workers", args.workers)
        return
    paths = sorted(path for path in Path(args.data).rglob("*") if parse_name(path.name))
    if not paths:
        raise cli.UserError(f"--data {args.data} is no folder of UTKFace's faces: unpack its archive first")
    raw.mkdir()
    for index in np.unique(np.linspace(0, len(paths) - 1, args.faces).astype(int)):
        (raw / paths[index].name).symlink_to(paths[index].resolve())


def get_parser():
    parser = cli.script_parser("benchmark", __doc__)
    # fmt: off
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS)[:-1], help="parts to measure")
    add("--data", metavar="DIR", help="folder of UTKFace's faces; drawn ones if none is named")
    add("--faces", metavar="N", type=cli.number(int, low=16), default=1024, help="to draw, or to take of it")
    add("--batch-size", metavar="N", type=cli.number(int, low=2), default=64, help="faces a step")
    add("--image-size", metavar="PX", type=cli.image_side, default=64, help="of training, a multiple of 32")
    add("--repeats", metavar="N", type=cli.number(int, low=1), default=3, help="rounds that count")
    # fmt: on
    cli.add_device_flags(parser, precision="auto")
    return parser


def main(args):
    device = devices.choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{name}, {cli.usable_cores()} cores, torch {torch.__version__}, training at {args.image_size} px in "
        f"batches of {args.batch_size}, medians of {args.repeats}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        raw, pairs = Path(scratch, "raw"), Path(scratch, "pairs")
        gather_faces(raw, args)
        if args.only != ["growth"]:
            call("masks", "--input", raw, "--output", pairs, "--workers", args.workers)
        print_row("part", "what", "figure", "beside")
        print_row("---", "---", "---", "---")
        for part in dict.fromkeys(args.only):
            PARTS[part](raw, pairs, args, device)


if __name__ == "__main__":
    cli.run(main, get_parser())
