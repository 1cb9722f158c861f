"""Measures how fast each stage is, beside what it could be: the figures of docs/speed.md.

    python tools/benchmark.py                                   # on drawn faces; a few minutes
    python tools/benchmark.py --only training loader --image-size 128
    python tools/benchmark.py --only growth --data UTKFace --faces 23708

Parts: training (finetune.py beside bare steps on one batch), loader (what feeds a model), evaluate (scoring
and predict.py beside the released model's bare forward pass), masks (beside a bare loop of GrabCut), growth
(the stages on a quarter, half and all of the faces). What is compared takes turns; figures are medians.
"""

import io
import random
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import redirect_stdout
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
import common
import devices
import finetune
import masks
import predict
import training
from utkface import parse_name

RELEASED = cli.ROOT / "weights/age_multitask.pt"
ROW = "| {:8} | {:27} | {:>18} | {:32} |"
PARTS = ["training", "loader", "evaluate", "masks", "growth"]
# Runs a command and prints the KiB that it took. A process's memory counts that of the one that started it
# until it is a program of its own: so a small one starts it.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(memory // 1024 if sys.platform == "darwin" else memory)  # macOS counts bytes
sys.exit(code)"""


def measure(part, works, faces, args):
    """Prints the faces a second of each named function, and its ratio to the first; they take turns."""
    names, functions = zip(*works.items())
    times = np.empty((args.repeats + 1, len(works)))
    for turn, column in np.ndindex(times.shape):
        start = perf_counter()
        functions[column]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():
            torch.mps.synchronize()
        times[turn, column] = perf_counter() - start
    times = times[1:]  # the first turn warms up
    rates, ratios = np.median(faces / times, axis=0), np.median(times[:, :1] / times, axis=0)
    for name, rate, ratio in zip(names, rates, ratios):
        beside = "" if name == names[0] else f"{ratio:.2f} of {names[0]}"
        print(ROW.format(part, name, f"{rate:,.1f} faces/s", beside), flush=True)


def call(script, *flags):
    """Runs a script's `main` in this process, without what it prints."""
    with redirect_stdout(io.StringIO()):
        script.main(cli.parse_args(script.get_parser(), [str(flag) for flag in flags]))


def measure_training(raw, pairs, args, device):
    flags = f"--multitask --epochs {args.repeats + 1} --image-size {args.image_size}".split()
    flags += f"--batch-size {args.batch_size} --workers {args.workers}".split()
    flags += f"--init random --device {args.device} --precision {args.precision}".split()
    settings = cli.parse_args(finetune.get_parser(), flags)
    dataset = common.FaceDataset(pairs, args.image_size, common.supervised_augmentation)
    model = common.make_model(vars(settings), training=True)
    groups = common.build_param_groups(model, settings.lr)
    with redirect_stdout(io.StringIO()):
        t = training.begin_training(settings, "model", model, groups, dataset, None)
    compute_losses = partial(finetune.multitask_losses, args=settings)
    batch = training.to_device(next(iter(t.loader)), device)

    def bare_steps():
        for _ in range(len(t.loader)):
            with devices.autocast(device, t.dtype):
                loss = compute_losses(model.train(), batch)[0]
            loss.backward()
            t.optimizer.step()
            t.optimizer.zero_grad()

    works = {"bare steps": bare_steps, "finetune.py": partial(training.train_one_epoch, t, compute_losses)}
    measure("training", works, len(t.loader) * args.batch_size, args)
    t.loader = None  # its workers end


def measure_loader(raw, pairs, args, device):
    dataset = partial(common.FaceDataset, pairs, args.image_size)
    pretraining = dataset(common.contrastive_augmentation, views=2, with_masks=False)
    finetuning = dataset(common.supervised_augmentation)
    for stage, faces in {"pretrain": pretraining, "finetune": finetuning}.items():
        works = {}
        for name, workers in {"one core": 0, f"{args.workers} workers": args.workers}.items():
            loader = training.train_loader(faces, args.batch_size, args.seed, workers, device)
            works[f"{stage}, {name}"] = partial(deque, loader, maxlen=0)
        measure("loader", works, len(loader) * args.batch_size, args)


def measure_evaluate(raw, pairs, args, device):
    model, checkpoint = common.load_model(RELEASED, device)
    dtype, size = devices.choose_precision(args.precision, device), checkpoint["preprocessing"]["image_size"]
    dataset = common.FaceDataset(pairs, size)
    batch = common.to_input(dataset.images[:256], device)

    @torch.inference_mode()
    def forward():
        for start in range(0, len(dataset), 256):
            with devices.autocast(device, dtype):
                common.infer(model, batch[: len(dataset) - start])

    flags = f"--aligned --workers {args.workers} --device {args.device} --precision {args.precision}".split()
    works = {
        f"bare forward pass, {size} px": forward,
        "scoring in evaluate.py": partial(common.score_dataset, model, dataset, device, dtype),
        "reading in evaluate.py": partial(common.FaceDataset, pairs, size, workers=args.workers),
        "predict.py": partial(call, predict, raw, "--checkpoint", RELEASED, *flags),
    }
    measure("evaluate", works, len(dataset), args)


def measure_masks(raw, pairs, args, device):
    images = [cv2.resize(cv2.imread(str(path)), (64, 64)) for path in raw.iterdir()]
    flags = ["--input", raw, "--output", pairs, "--overwrite", "--workers"]

    def bare_grabcut(image):
        labels, models = np.zeros((64, 64), np.uint8), np.zeros((2, 1, 65))
        cv2.grabCut(image, labels, (8, 2, 48, 60), models[0], models[1], 1, cv2.GC_INIT_WITH_RECT)

    for cores in sorted({1, max(args.workers, 1)}):
        with ThreadPool(cores) as pool:
            works = {f"bare GrabCut, {cores} at once": partial(pool.map, bare_grabcut, images)}
            works[f"masks.py --workers {cores}"] = partial(call, masks, *flags, cores)
            measure("masks", works, len(images), args)


def measure_growth(raw, pairs, args, device):
    epoch = f"--epochs 1 --image-size {args.image_size} --batch-size {args.batch_size} --device {args.device}"
    epoch += f" --precision {args.precision}"
    finetuning = f"finetune {epoch} --multitask --init contrastive.pt"
    for part in (4, 2, 1):
        folder, faces = raw.parent / f"growth-{part}", args.faces // part
        link_faces(raw, folder / "dataset/raw", faces)
        for stage in ("masks", "split", f"pretrain {epoch}", finetuning, f"evaluate --device {args.device}"):
            script, *flags = f"{stage} --workers {args.workers}".split()
            taken, memory = run_stage(script, *flags, cwd=folder)
            figures = f"{taken:,.1f} s", f"{memory:,.0f} MiB"
            print(ROW.format("growth", f"{script}.py, {faces:,} faces", *figures), flush=True)


def run_stage(script, *flags, cwd):
    """Runs a script as a user does: seconds, and MiB of memory at most, its workers' own left out."""
    start, command = perf_counter(), [sys.executable, cli.ROOT / f"{script}.py", *flags]
    starter = [sys.executable, "-c", MEASURED, *command]
    done = subprocess.run(starter, cwd=cwd, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise cli.UserError(f"{script}.py failed: what it said is above")
    return perf_counter() - start, int(done.stdout) / 1024


def link_faces(source, folder, count):
    """Links `count` of the faces below `source`, or all, into a new folder."""
    paths = {path.name: path for path in sorted(source.rglob("*")) if parse_name(path.name)}
    if not paths:
        raise cli.UserError(f"--data {source} is no folder of UTKFace's faces: unpack its archive first")
    folder.mkdir(parents=True)
    for name in random.Random(0).sample(list(paths), min(count, len(paths))):
        (folder / name).symlink_to(paths[name].resolve())


def get_parser():
    parser = cli.script_parser("benchmark", __doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS[:-1], help="parts to measure")
    add("--data", metavar="DIR", help="folder of UTKFace's faces; drawn ones if none is named")
    add("--faces", metavar="N", type=cli.number(int, low=16), default=1024, help="to draw, or to take of it")
    add("--batch-size", metavar="N", type=cli.number(int, low=2), default=64, help="faces a step")
    add("--image-size", metavar="PX", type=cli.image_side, default=64, help="of training, a multiple of 32")
    add("--repeats", metavar="N", type=cli.number(int, low=1), default=3, help="rounds that count")
    cli.add_device_flags(parser, precision="auto")
    return parser


def main(args):
    device = devices.choose_device(args.device)
    name = f"{cli.usable_cores()} cores" if device.type == "cpu" else "Apple's GPU"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for `synchronize`
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {args.image_size} px, batches of {args.batch_size}\n")
    with tempfile.TemporaryDirectory() as scratch:
        raw, pairs = Path(scratch, "raw"), Path(scratch, "pairs")
        if args.data:
            link_faces(Path(args.data), raw, args.faces)
        else:
            run_stage("tools/synthesize", "--output", raw, "--count", str(args.faces), cwd=scratch)
        call(masks, "--input", raw, "--output", pairs, "--workers", args.workers)
        args.faces = len(list(raw.iterdir()))
        print(ROW.format("part", "what", "figure", "beside"), ROW.format(*["---"] * 4), sep="\n")
        for part in dict.fromkeys(args.only):
            globals()[f"measure_{part}"](raw, pairs, args, device)


if __name__ == "__main__":
    cli.run(main, get_parser())
