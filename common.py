"""What the stages share: names, flags, files, data, augmentation, model, losses, optimisation, checkpoints.

Every script imports from here and nothing imports a script, so a stage can be read with this file alone
beside it. The rooms, in order, are marked by banner comments.
"""

import argparse
import csv
import hashlib
import io
import math
import os
import random
import re
import signal
import sys
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import looks for updates, on the network

import albumentations as A
import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.models import ResNet18_Weights, resnet18
from tqdm import tqdm

cv2.setNumThreads(1)  # the images are small: work is spread over faces, never within one

# ------------------------------------------------------------------------------------------------------------
# Age groups and file names
# ------------------------------------------------------------------------------------------------------------

AGE_GROUPS = {  # WHO-based; first and last year of each
    "Infant": (0, 4),
    "Child": (5, 14),
    "Youth": (15, 24),
    "Young Adult": (25, 44),
    "Middle-aged": (45, 64),
    "Older Adult": (65, 999),
}
GROUP_NAMES = list(AGE_GROUPS)

STEM = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d+)", re.ASCII)
FACE_NAME = re.compile(
    rf"({STEM.pattern})\.(?:jpg\.chip\.)?(?:jpg|jpeg|png|webp|bmp)", re.ASCII | re.IGNORECASE
)


class Face(NamedTuple):
    """What a UTKFace file name says: stem `<age>_<gender>_<race>_<timestamp>`, age in years, labels."""

    stem: str
    age: int
    gender: int
    race: int


def parse_name(name: str) -> Face | None:
    """What a name such as `26_1_0_20170116184751593.jpg.chip.jpg` says, or None if it is malformed."""
    match = FACE_NAME.fullmatch(name)
    return Face(match[1], int(match[2]), int(match[3]), int(match[4])) if match else None


def age_to_group(ages):
    """Group index 0–5 of an age or an array of ages in years."""
    return np.searchsorted([last for _, last in AGE_GROUPS.values()], ages)


# ------------------------------------------------------------------------------------------------------------
# Errors, flags and configuration
# ------------------------------------------------------------------------------------------------------------

SCRIPTS = (
    "synthesize",
    "masks",
    "split",
    "pretrain",
    "finetune",
    "evaluate",
    "predict",
    "table",
    "benchmark",
)


class UserError(Exception):
    """A mistake that a user can mend: one line that names the file or flag and the remedy."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s, so that they too end in one line."""

    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and the description as it is written."""


def number(kind: type, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float with low <= value <= high and value > above."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value > above and abs(value) < math.inf):
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
            bounds += [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def image_side(text: str) -> int:
    """An argparse type: pixels, a positive multiple of 32 (the backbone's stride)."""
    side = int(text)
    if side < 32 or side % 32:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 32, not {text}")
    return side


def script_parser(script: str, description: str) -> Parser:
    """A parser for `<script>.py` that already holds the flags that all scripts share."""
    parser = Parser(
        f"{script}.py", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with defaults for these flags")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of everything random")
    parser.add_argument(
        "--workers", type=number(int, low=0), default=os.cpu_count(), help="parallel workers (cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pairs, split or run")
    return parser


def add_device_flags(parser: Parser):
    """Adds the flags that say where and in what arithmetic a model runs."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="arithmetic of the forward pass; auto is bf16 or fp16 on CUDA, else fp32",
    )  # fmt: skip


def add_training_flags(
    parser: Parser, out: str, init: str, epochs: int, batch_size: int, lr: float, image_size: int
):
    """Adds the flags that pretrain.py and finetune.py share, with the defaults given."""
    parser.add_argument("--data", default="dataset/processed_split", help="folder written by split.py")
    parser.add_argument("--out", default=out, help="checkpoint to write; history and curves go beside it")
    parser.add_argument(
        "--init", default=init, help="backbone weights: random, imagenet, or a checkpoint file"
    )
    parser.add_argument(
        "--epochs", type=number(int, low=1), default=epochs, help="passes over the train split"
    )
    parser.add_argument(
        "--batch-size", type=number(int, low=2), default=batch_size, help="faces a step, of all processes"
    )
    parser.add_argument("--lr", type=number(float, above=0), default=lr, help="peak learning rate of AdamW")
    parser.add_argument(
        "--weight-decay", type=number(float, low=0), default=0.05, help="AdamW's decay of weights"
    )
    parser.add_argument(
        "--image-size", type=image_side, default=image_size, help="side in pixels, a multiple of 32"
    )
    add_device_flags(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the .last.pt file beside --out")
    parser.add_argument(
        "--save-every-steps", type=number(int, low=0), default=0,
        help="also write .last.pt every so many steps; 0 is once an epoch",
    )  # fmt: skip


def read_config(path: str, parser: Parser) -> list[str]:
    """Command-line arguments equivalent to a YAML file, so that argparse checks both alike.

    Top-level keys are this script's flags, or sections named after scripts, of which only this script's own
    is read.
    """
    try:
        loaded = yaml.safe_load(shipped(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines")
    flags = {option: action for action in parser._actions for option in action.option_strings}
    script = parser.prog.removesuffix(".py")
    section = loaded.pop(script, None) or {}
    if not isinstance(section, dict):
        raise UserError(f"--config {path}: section {script!r} must hold `flag: value` lines")
    settings = {  # --split and --masks are flags, too
        key: value
        for key, value in loaded.items()
        if key not in SCRIPTS or not isinstance(value, dict | None)
    }
    arguments = []
    for key, value in {**settings, **section}.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in flags or flag in ("--config", "--help"):
            raise UserError(f"--config {path}: unknown key {key!r}; see {parser.prog} -h for the flags")
        if value is None:
            raise UserError(f"--config {path}: {key} has no value: give one, or leave the line out")
        if flags[flag].nargs == 0:  # a switch, perhaps with a --no- twin
            if not isinstance(value, bool):
                raise UserError(f"--config {path}: {key} must be true or false, not {value!r}")
            off = flag.replace("--", "--no-", 1)
            arguments += [flag] if value else [off] if off in flags else []
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line over those of `--config` over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(argv)[0].config
    namespace = None
    if path and not {"-h", "--help"} & set(argv):
        arguments = read_config(path, parser)
        try:
            namespace = parser.parse_args(arguments)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return parser.parse_args(argv, namespace)


class Terminated(BaseException):
    """SIGTERM, as cluster schedulers send it."""


def terminate(*_):
    """A signal handler that ends the script as Ctrl-C does, what was being written undone."""
    raise Terminated("stopped by SIGTERM")


def run(main, parser: Parser, argv: list[str] | None = None):
    """Calls `main(args)`; exits with 2 and one line for a UserError, 130 for Ctrl-C, 143 for SIGTERM."""
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main(parse_args(parser, argv))
    except UserError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)
    except Terminated as stop:
        print(f"{parser.prog}: {stop}", file=sys.stderr)
        sys.exit(143)
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


def progress(*args, **options) -> tqdm:
    """A progress bar, silent where output is no terminal (a log), and for what is over within a second."""
    return tqdm(*args, leave=False, delay=1, disable=True if rank() else None, **options)


# Flags that change where and how a run happens, not what comes out.
NOT_SETTINGS = ("config", "workers", "overwrite", "resume", "save_every_steps", "out", "device")


def settings_of(args: argparse.Namespace) -> dict:
    """The arguments that define a run's result: what `--resume` compares and checkpoints carry."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


# ------------------------------------------------------------------------------------------------------------
# Files, whole or absent
# ------------------------------------------------------------------------------------------------------------


def shipped(path: str | Path) -> Path:
    """`path`, or the file of that name beside the scripts where the working directory has none."""
    beside = Path(__file__).resolve().parent / path
    return beside if beside.is_file() and not Path(path).exists() else Path(path)


UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)


@contextmanager
def atomic_path(path: str | Path, sync: bool = False):
    """Yields a temporary path that takes `path`'s place on success and vanishes on failure.

    It has the same folder and suffix. `sync` has it on the disk before the old file goes, for what took long.
    Raises UserError if the disk is full or the folder cannot be written.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".tmp-{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp's files are private
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): make room, or name another place"
            ) from None
        raise


def check_writable(flag: str, folder: str | Path):
    """UserError unless `folder`, or the nearest folder above it that exists, takes new files."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {nearest} is no folder that can be written: name another place")


def write_csv(path: str | Path, rows: list[dict], columns: list[str] | None = None):
    """Writes rows (dicts with the same keys) as CSV; `columns` names the header when there may be no rows."""
    with (
        atomic_path(path, sync=True) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


Image.MAX_IMAGE_PIXELS = None  # Pillow reads headers here, and warns where decode_image refuses
MAX_PIXELS = 50_000_000
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # without which OpenCV fills what is missing with grey


def decode_image(data: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decodes an image to uint8 BGR (H, W, 3), or grey (H, W), upright as its EXIF says.

    Raises ValueError with the reason if it is no whole image, or above `MAX_PIXELS`, seen before decoding.
    """
    try:
        with Image.open(io.BytesIO(data)) as header:
            form, (width, height) = header.format, header.size
    except Exception:  # what Pillow raises depends on where a file breaks
        raise ValueError("unreadable image") from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, above {MAX_PIXELS // 10**6} million")
    if ENDS.get(form, b"") not in data[-1024:]:  # truncated, or something was appended: slow to tell
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
        except Exception:
            raise ValueError("truncated image") from None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("unreadable image")
    return image


def read_image(path: str | Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decodes an image file to uint8 BGR (H, W, 3), or grey (H, W); UserError if it cannot be."""
    try:
        return decode_image(Path(path).read_bytes(), flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} is not a readable image ({reason}): delete it and run the stage that wrote it again"
        ) from None


def list_pairs(folder: str | Path, need_masks: bool = True) -> list[Face]:
    """Faces in a folder of pairs, sorted by stem; UserError if it is missing, empty or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: run the stage that writes it, or name another")
    names = {entry.name for entry in os.scandir(folder)}
    images = sorted(name for name in names if name.endswith("_image.png"))
    if not images:
        raise UserError(f"{folder} holds no *_image.png: run masks.py (and split.py) first")
    faces = []
    for name in images:
        stem = name.removesuffix("_image.png")
        match = STEM.fullmatch(stem)
        if not match:
            raise UserError(
                f"{folder / name}: the name does not start <age>_<gender>_<race>_<timestamp>; remove it"
            )
        if need_masks and f"{stem}_mask.png" not in names:
            raise UserError(f"{folder / name} has no {stem}_mask.png beside it: run masks.py again")
        faces.append(Face(stem, *map(int, match.groups()[:3])))
    return faces


def split_settings(folder: str | Path) -> dict:
    """What split.py made `folder` with (seed, fractions, near_duplicate, random), {} if others made it."""
    try:
        return dict(yaml.safe_load((Path(folder) / "split.yaml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{folder}/split.yaml cannot be read: run split.py again with --overwrite") from None


# ------------------------------------------------------------------------------------------------------------
# Device, precision, seeds and processes
# ------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device named, or for `auto` the best there is: cuda, mps, cpu. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not available on this machine: try auto or cpu") from None
    if device.type == "cuda":
        # TF32 where a product stays in float32; convolutions tuned to the one image size.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The forward pass's dtype: what is named, or for `auto` bf16 (else fp16) on CUDA and fp32 elsewhere."""
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: use fp32 or bf16 with --device cpu")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which the forward pass runs in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def set_seed(seed: int):
    """Seeds torch (initial weights), numpy and random; augmentation and order carry their own seeds."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rank() -> int:
    """This process's number among those of torchrun; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun, joins the other processes (NCCL on CUDA, else gloo); returns this one's device.

    Only the first goes on printing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


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


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over processes, without gradient."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """(N, …) of each process → (N·world, …), rank by rank, with gradient; all must have the same N."""
    return torch.cat(all_gather(rows)) if world_size() > 1 else rows


def merge_turns(rows: Tensor) -> Tensor:
    """Rows that the processes took by turns (rank, rank + world, …), in their order again, on the CPU."""
    if world_size() == 1:
        return rows.cpu()
    turns = [None] * world_size()
    dist.all_gather_object(turns, rows.cpu())
    merged = torch.empty(sum(map(len, turns)), *rows.shape[1:], dtype=rows.dtype)
    for start, turn in enumerate(turns):
        merged[start :: world_size()] = turn
    return merged


# ------------------------------------------------------------------------------------------------------------
# Augmentation: image and mask move together
# ------------------------------------------------------------------------------------------------------------

# Chances, degrees, shares of the area, ratios, factors of brightness, contrast and saturation, turns of the
# hue circle, pixels of blur. SimCLR's view (Chen et al. 2020, appendix A), its crops mild enough to keep most
# of a face; and a milder one that leaves the signs of age alone.
CONTRASTIVE_VIEW = {
    "turn": 0, "degrees": 0, "scale": (0.5, 1), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": 0.8,
    "light": (0.6, 1.4), "hue": (-0.1, 0.1), "grey": 0.2, "blur": 0.3, "sigma": (0.1, 1.5),
}  # fmt: skip
SUPERVISED_VIEW = {
    "turn": 0.5, "degrees": 12, "scale": (0.7, 1), "ratio": (0.9, 1.1), "flip": 0.5, "jitter": 0.8,
    "light": (0.7, 1.3), "hue": (-0.03, 0.03), "grey": 0.1, "blur": 0, "sigma": (0.1, 1.5),
}  # fmt: skip


def augmentation(view: dict, image_size: int) -> A.Compose:
    """The albumentations pipeline of a view (see above), to squares of `image_size` pixels."""
    steps = (
        A.Rotate(
            view["degrees"],
            mask_interpolation=cv2.INTER_LINEAR,
            border_mode=cv2.BORDER_REFLECT,
            p=view["turn"],
        ),
        A.RandomResizedCrop(
            (image_size, image_size), view["scale"], view["ratio"], mask_interpolation=cv2.INTER_LINEAR
        ),
        A.HorizontalFlip(p=view["flip"]),
        A.ColorJitter(view["light"], view["light"], view["light"], view["hue"], p=view["jitter"]),
        A.ToGray(p=view["grey"]),
        A.GaussianBlur(blur_limit=0, sigma_limit=view["sigma"], p=view["blur"]),
    )
    return A.Compose([step for step in steps if step.p])


def seed_augmentation(augment: A.Compose, *key: int):
    """Makes the next draws of a pipeline depend on `key` alone.

    One generator is shared by all transforms: `Compose.set_random_seed` would give each its own copy of the
    same stream, so that a picture would be turned grey only when it is also flipped.
    """
    generator = np.random.default_rng(key)
    augment.set_random_state(generator, random.Random(int(generator.integers(2**63))))


def augment_batch(
    images: Tensor, masks: Tensor | None, view: dict, image_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """What `augmentation` does to one face, for a batch on its device, each face with draws of its own.

    images: uint8 (B, S, S, 3); masks: uint8 (B, S, S) with values 0–255, or None; generator: on the CPU, so
    that nothing waits for the device. Returns float32 (B, 3, H, W) with values 0–255, and uint8 (B, H, W) in
    {0, 1} or None. The order of the colour changes is drawn once a batch.
    """
    count, device = len(images), images.device

    def draw(low, high, *shape):
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    def chosen(chance):
        return draw(0, 1) < chance

    def rows(choice):
        return choice.nonzero()[:, 0].to(device, non_blocking=True)

    def factors(low, high, choice):
        return draw(low, high)[choice].to(device, non_blocking=True).view(-1, 1, 1, 1)

    # The first crop of ten that fits, or all: sizes and offsets of its centre as shares of half a side.
    area, ratio = draw(*view["scale"], 10), draw(*map(math.log, view["ratio"]), 10).exp()
    sizes = torch.stack([area * ratio, area / ratio], dim=2).sqrt()  # B×10×2
    fits = (sizes <= 1).all(dim=2)  # B×10
    size = sizes[torch.arange(count), fits.int().argmax(dim=1)].where(fits.any(dim=1, keepdim=True), 1)  # B×2
    centre = (1 - size) * draw(-1, 1, 2)  # B×2
    angle = draw(-1, 1) * math.radians(view["degrees"]) * chosen(view["turn"])  # B
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    size[:, 0] *= 1 - 2 * chosen(view["flip"]).float()
    warp = torch.cat([turn * size[:, None], turn @ centre[..., None]], dim=2)  # B×2×3
    grid = F.affine_grid(
        warp.to(device, non_blocking=True), (count, 1, image_size, image_size), align_corners=False
    )
    planes = images.permute(0, 3, 1, 2)  # B×3×S×S
    planes = planes if masks is None else torch.cat([planes, masks[:, None]], dim=1)  # B×4×S×S
    planes = F.grid_sample(planes.float(), grid, padding_mode="reflection", align_corners=False)
    x, masks = planes[:, :3], None if masks is None else (planes[:, 3] > 127).to(torch.uint8)

    choice = chosen(view["jitter"])
    jittered = x[rows(choice)]
    for change in torch.randperm(4, generator=generator).tolist():
        factor = factors(*view["hue" if change == 3 else "light"], choice)
        if change == 3:
            jittered = shift_hue(jittered, factor[:, 0])
            continue
        base = 0 if change == 0 else grey(jittered)
        base = base.mean(dim=(2, 3), keepdim=True) if change == 1 else base  # contrast keeps the mean
        jittered = (base + (jittered - base) * factor).clamp(0, 255)
    x = x.index_copy(0, rows(choice), jittered)
    index = rows(chosen(view["grey"]))
    x = x.index_copy(0, index, grey(x[index]).expand(-1, 3, -1, -1))
    choice = chosen(view["blur"])
    index = rows(choice)
    return x.index_copy(
        0, index, gaussian_blur(x[index], factors(*view["sigma"], choice), view["sigma"][1])
    ), masks


def grey(x: Tensor) -> Tensor:
    """RGB (B, 3, H, W) → luma (B, 1, H, W), as JPEG weighs the channels."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """(B, 3, H, W) with hues moved by `turns` (B, 1, 1) of the circle; value and saturation stay."""
    value, chroma = x.amax(dim=1), x.amax(dim=1) - x.amin(dim=1)  # B×H×W
    red, green, blue = x.unbind(dim=1)
    sixths = torch.where(
        red == value, green - blue, torch.where(green == value, blue - red, red - green)
    ) / chroma.clamp(min=1e-6)
    sixths += torch.where(red == value, 0, torch.where(green == value, 2, 4)) + 6 * turns
    distances = [(sixths + shift) % 6 for shift in (5, 3, 1)]  # of each channel, along the circle
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in distances], dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """(B, 3, H, W) blurred by `sigma` (B, 1, 1, 1) pixels each, none above `largest`."""
    reach = math.ceil(3 * largest)
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    kernel = (-((offsets / sigma) ** 2) / 2).softmax(dim=3)  # B×1×1×K
    for pad in ((reach, reach, 0, 0), (0, 0, reach, reach)):
        wide = F.pad(x, pad, mode="reflect")
        size = x.shape[-1]
        parts = (
            wide[..., k : k + size] if pad[0] else wide[..., k : k + size, :] for k in range(len(offsets))
        )
        x = sum(part * kernel[..., k : k + 1] for k, part in enumerate(parts))
    return x


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


class FaceDataset(Dataset):
    """Faces of one split folder, decoded once and kept in memory as uint8, which all workers share.

    A batch is a dict of tensors: `image` uint8 (B, H, W, 3) RGB; `mask` uint8 (B, H, W) in {0, 1}, with
    `with_masks`; `age` (B,) in years; `group` (B,) 0–5. Without `view` the pictures are the faces resized to
    `image_size` (those squares are also in `.images` and `.masks`). With it, each face gives `views` of them
    in a row, drawn from (seed, epoch, index) alone, whatever worker asks. With `on_device` as well, drawing
    is left to `to_device`: pictures are a quarter larger, one a face, and masks have values 0–255. An index
    may be an int or the pair (epoch, index).

    `.faces` lists what the names say, `.ages` and `.groups` are int64 (N,), `.hashes` int64 (N,) name the
    pixels. Raises UserError for a missing or empty folder, an unreadable image, or a mask that is missing or
    of another size.
    """

    def __init__(
        self, folder, image_size, view=None, views=1, with_masks=True, seed=0, workers=1, on_device=False
    ):
        self.faces = list_pairs(folder, need_masks=with_masks)
        self.image_size, self.view, self.views, self.seed = image_size, view, views, seed
        self.on_device = on_device and view is not None
        self.augment = augmentation(view, image_size) if view and not on_device else None
        self.ages = np.array([face.age for face in self.faces])
        self.groups = age_to_group(self.ages)
        # A random crop is enlarged to the output's side: a quarter more pixels than that keep it sharp.
        side = image_size * 5 // 4 if view else image_size
        # Tensors, because where workers are not forked those are shared with them, and arrays copied.
        self.images = torch.empty((len(self), side, side, 3), dtype=torch.uint8)
        self.masks = torch.empty((len(self), side, side), dtype=torch.uint8) if with_masks else None
        images, masks = self.images.numpy(), self.masks.numpy() if with_masks else None
        self.hashes = np.empty(len(self), np.int64)

        def load(index):
            path = Path(folder) / f"{self.faces[index].stem}_image.png"
            image = read_image(path)
            self.hashes[index] = pixel_hash(image)
            images[index] = cv2.cvtColor(resize(image, side), cv2.COLOR_BGR2RGB)
            if with_masks:
                mask_path = path.with_name(f"{self.faces[index].stem}_mask.png")
                mask = read_image(mask_path, cv2.IMREAD_GRAYSCALE)
                if mask.shape != image.shape[:2]:
                    raise UserError(
                        f"{mask_path} is not of its image's size: delete it and run masks.py again"
                    )
                masks[index] = resize(mask, side)

        with ThreadPool(max(workers, 1)) as pool:
            loading = pool.imap_unordered(load, range(len(self)), chunksize=16)
            for _ in progress(loading, f"read {Path(folder).name}", len(self), unit="face"):
                pass
        if with_masks and view is None:
            self.masks = torch.from_numpy(binary(masks))

    def __len__(self):
        return len(self.faces)

    def __getitems__(self, keys):
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        rows = np.array([index for _, index in keys])
        if self.augment is None:
            image, mask = (None if pixels is None else pixels[rows] for pixels in (self.images, self.masks))
        else:
            rows = rows.repeat(self.views)
            side = self.image_size
            image = torch.empty((len(rows), side, side, 3), dtype=torch.uint8)
            mask = None if self.masks is None else torch.empty((len(rows), side, side), dtype=torch.uint8)
            for row, index in enumerate(rows):
                if row % self.views == 0:
                    seed_augmentation(self.augment, self.seed, *keys[row // self.views])
                parts = {"image": self.images} if mask is None else {"image": self.images, "mask": self.masks}
                moved = self.augment(**{name: pixels[index].numpy() for name, pixels in parts.items()})
                image[row] = torch.from_numpy(moved["image"])
                if mask is not None:
                    mask[row] = torch.from_numpy(binary(moved["mask"]))
        batch = {"image": image, "age": self.ages[rows], "group": self.groups[rows]}
        batch = batch if mask is None else {**batch, "mask": mask}
        return {name: torch.as_tensor(values) for name, values in batch.items()}

    def __getitem__(self, key):
        batch = self.__getitems__([key])
        return batch if self.views > 1 else {name: values[0] for name, values in batch.items()}


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes (H, W[, C]) to a square of `side` pixels, averaging over the pixels that fall into one."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def binary(mask: np.ndarray) -> np.ndarray:
    """uint8 masks with values 0–255 to uint8 in {0, 1}."""
    return (mask > 127).astype(np.uint8)


def pixel_hash(image: np.ndarray) -> int:
    """64-bit hash of a decoded image: survives a new file name or compression, not a changed pixel."""
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class EpochBatches(Sampler):
    """Batches of (epoch, index) keys, in a new order each epoch, the last incomplete one dropped.

    The key brings the epoch to the workers, so that they can stay alive between epochs. Under torchrun
    `batch_size` counts the faces of all processes, and each takes its share of every batch. The first
    `skip` batches of an epoch are left out, to go on within it.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch, self.skip = count, batch_size, seed, 0, 0

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
        for start in range(self.skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            share = order[start + rank() : start + self.batch_size : world_size()]
            yield [(self.epoch, index) for index in share]


def whole_batch(batch: dict) -> dict:
    """What `FaceDataset` hands out is a batch already."""
    return batch


def check_batch_size(batch_size: int, faces: int):
    """UserError unless `faces` fill a batch, and its shares are equal and fit for batch normalisation."""
    if batch_size > faces:
        raise UserError(f"--batch-size {batch_size} is larger than the train split ({faces} faces): lower it")
    if batch_size % world_size() or batch_size < 2 * world_size():
        raise UserError(
            f"--batch-size {batch_size} does not divide by {world_size()} processes into 2 or more: change it"
        )


def start_worker(worker: int, give_way: bool):
    """Leaves signals to the main process; with `give_way` works only while the arithmetic leaves a core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if give_way and hasattr(os, "nice"):
        os.nice(19)


def train_loader(
    dataset: FaceDataset, batch_size: int, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Shuffled batches for training; set `loader.batch_sampler.epoch` before each epoch."""
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed),
        collate_fn=whole_batch,
        num_workers=workers,
        worker_init_fn=partial(start_worker, give_way=device.type == "cpu"),
        generator=torch.Generator(),  # its own, lest the workers' number change what others draw
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # Forked workers start at once, with the pictures as they lie in memory.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for its weights' sake


@cache  # made once: a step must not wait while they travel to the device
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) of pixels with values 0–255."""
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return mean, std


def normalize(images: Tensor) -> Tensor:
    """RGB (B, 3, H, W) of any dtype with values 0–255 to normalised float32, in channels-last memory."""
    mean, std = pixel_statistics(images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 RGB (B, H, W, 3) to normalised float32 (B, 3, H, W) on `device`, in channels-last memory."""
    return normalize(images.to(device, non_blocking=True).permute(0, 3, 1, 2))


def to_device(batch: dict, dataset: FaceDataset, device: torch.device, key: tuple[int, ...]) -> dict:
    """A loader's batch on `device`, `image` normalised float32 (B, 3, H, W), `mask` uint8 (B, 1, H, W).

    Draws the views there, from (seed, *key), if the dataset leaves that to the device.
    """
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    if dataset.on_device:
        batch = {name: values.repeat_interleave(dataset.views, dim=0) for name, values in batch.items()}
        seed = int(np.random.default_rng((dataset.seed, *key)).integers(2**63))
        images, masks = augment_batch(
            batch["image"],
            batch.get("mask"),
            dataset.view,
            dataset.image_size,
            torch.Generator().manual_seed(seed),
        )
        batch |= {"image": normalize(images)} | ({} if masks is None else {"mask": masks})
    else:
        batch["image"] = to_input(batch["image"], device)
    if "mask" in batch:
        batch["mask"] = batch["mask"].unsqueeze(1)
    return batch


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class MaskDecoder(nn.Module):
    """Top-down decoder from the backbone's five maps to mask logits, after FPN (Lin et al. 2017)."""

    def __init__(self, channels=(64, 64, 128, 256, 512), width=32):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in channels[1:]
        )
        self.predict = nn.Conv2d(width, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps at strides 2, 4, 8, 16, 32, (B, C_i, H/stride, W/stride) each → logits (B, 1, H, W)."""
        x = self.laterals[-1](maps[-1])  # B×width×H/32×W/32
        for lateral, smooth, finer in list(zip(self.laterals, self.smooths, maps))[::-1]:
            x = smooth(F.interpolate(x, scale_factor=2.0, mode="nearest") + lateral(finer))  # twice the sides
        return F.interpolate(self.predict(x), scale_factor=2.0, mode="bilinear")  # B×1×H×W


class MultitaskResNet18(nn.Module):
    """ResNet18 (torchvision) with a head for age groups and, if `multitask`, a decoder for the face mask.

    by_year: the head tells `YEARS` single years, and forward sums them into the groups (num_groups is then
    the 6 of `AGE_GROUPS`). In eval mode, flip_averaging gives the mean over each image and its mirror image,
    crop_averaging that over the image and its middle, 7/8 of its sides, enlarged; together, over all four.
    Crops are not asked for masks.
    """

    def __init__(
        self,
        num_groups: int = 6,
        multitask: bool = True,
        by_year: bool = False,
        flip_averaging: bool = False,
        crop_averaging: bool = False,
    ):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # the backbone alone gives B×512 features
        self.head = nn.Linear(512, YEARS if by_year else num_groups)
        self.decoder = MaskDecoder() if multitask else None
        self.by_year, self.flip_averaging, self.crop_averaging = by_year, flip_averaging, crop_averaging

    def forward(self, images: Tensor, years: bool = False) -> tuple[Tensor, Tensor | None]:
        """Normalised images (B, 3, H, W) → group logits (B, 6), mask logits (B, 1, H, W) or None.

        years: the logits of single years (B, YEARS) instead, from a model `by_year` in training. Raises
        ValueError if there is a decoder and H or W is no multiple of 32.
        """
        if self.decoder is not None and (images.shape[-2] % 32 or images.shape[-1] % 32):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(images.shape[-2:])}")
        if self.training or not (self.flip_averaging or self.crop_averaging):
            return self.forward_once(images, years)
        views, probabilities, masks = [images], [], []
        if self.crop_averaging:
            y, x = (side // 16 for side in images.shape[-2:])
            middle = images[..., y:-y, x:-x]
            views.append(F.interpolate(middle, size=images.shape[-2:], mode="bilinear"))
        for view in views:
            for mirrored in (False, True) if self.flip_averaging else (False,):
                logits, mask_logits = self.forward_once(
                    view.flip(-1) if mirrored else view, years, with_mask=view is images
                )
                probabilities.append(logits.float().softmax(dim=1))  # B×6
                if mask_logits is not None:
                    masks.append(mask_logits.flip(-1) if mirrored else mask_logits)  # B×1×H×W
        logits = torch.stack(probabilities).mean(dim=0).clamp(min=1e-12).log()
        return logits, torch.stack(masks).mean(dim=0) if masks else None

    def forward_once(self, images: Tensor, years: bool, with_mask=True) -> tuple[Tensor, Tensor | None]:
        """`forward` without averaging."""
        net = self.backbone
        maps = [net.relu(net.bn1(net.conv1(images)))]  # B×64×H/2×W/2
        x = net.maxpool(maps[0])  # B×64×H/4×W/4
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)  # strides 4, 8, 16, 32 with 64, 128, 256, 512 channels
        logits = self.head(net.avgpool(x).flatten(1))  # B×6 or B×YEARS
        logits = group_logits(logits) if self.by_year and not years else logits
        return logits, self.decoder(maps) if self.decoder is not None and with_mask else None


def make_model(settings: dict) -> MultitaskResNet18:
    """The model, still untrained, that the settings of finetune.py ask for; one that is missing is off."""
    return MultitaskResNet18(
        len(GROUP_NAMES),
        multitask=bool(settings.get("multitask")),
        by_year=bool(settings.get("age_sigma")),
        flip_averaging=bool(settings.get("flip_averaging")),
        crop_averaging=bool(settings.get("crop_averaging")),
    )


def load_model(path: str | Path, device: torch.device) -> tuple[MultitaskResNet18, dict]:
    """The model of a checkpoint that finetune.py wrote, in eval mode on `device`, and the checkpoint.

    Raises UserError if the file is missing or anything else, or if its weights do not fit.
    """
    checkpoint = load_checkpoint(path, "model")
    model = make_model(checkpoint["config"])
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError:
        raise UserError(f"{path} is damaged: its weights do not fit the model; train again") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


@torch.inference_mode()
def predict_dataset(model, dataset: FaceDataset, device, dtype, batch_size: int = 256):
    """Scores every face of a dataset that has no augmentation, in order; processes take faces by turns.

    Returns group logits float32 (N, 6) on the CPU, and the predicted masks' overlap with the true ones at the
    dataset's image size, {"iou": (N,), "dice": (N,)}, or None where the model or the dataset has no masks.
    """
    model.eval()
    if world_size() > 1:  # batch statistics may differ between CPU processes
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    all_logits, overlaps = [], []
    turns = slice(rank(), None, world_size())
    images, masks = dataset.images[turns], None if dataset.masks is None else dataset.masks[turns]
    for start in range(0, max(len(images), 1), batch_size):
        batch = to_input(images[start : start + batch_size], device)
        with autocast(device, dtype):
            logits, mask_logits = model(batch)  # B×6, B×1×H×W
        all_logits.append(logits.float())
        if mask_logits is not None and masks is not None:
            truth = masks[start : start + batch_size].to(device) > 0  # B×H×W
            overlaps.append(mask_overlap(mask_logits[:, 0] > 0, truth))
    overlap = dict(zip(("iou", "dice"), merge_turns(torch.cat(overlaps)).T)) if overlaps else None
    return merge_turns(torch.cat(all_logits)), overlap


def mask_overlap(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU and Dice of boolean masks (B, H, W) each: float64 (B, 2) on the CPU; two empty masks agree."""
    both = (predicted & truth).sum(dim=(1, 2)).cpu().double()
    either = (predicted | truth).sum(dim=(1, 2)).cpu().double()
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return torch.stack([iou, 2 * iou / (1 + iou)], dim=1)


def init_backbone(backbone: nn.Module, init: str) -> tuple[Tensor, dict]:
    """Loads `init` (random, imagenet, or a checkpoint file) into a backbone, and prints what was loaded.

    Returns the hashes int64 (M,) of the faces that those weights have seen, and the settings that a
    checkpoint was trained with, {} for the others.

    Raises UserError if the ImageNet weights cannot be had, or if the file is no checkpoint or nothing in it
    fits.
    """
    seen, pretraining = torch.empty(0, dtype=torch.int64), {}
    if init == "random":
        print("backbone starts from random weights")
        return seen, pretraining
    if init == "imagenet":
        try:
            weights = ResNet18_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken download
            raise UserError(
                f"--init imagenet: torchvision could not download the weights ({error}); "
                "use --init random, or a checkpoint such as --init contrastive.pt"
            ) from None
    else:
        checkpoint = load_checkpoint(init, ("contrastive", "model"))
        weights = {key.removeprefix("backbone."): value for key, value in checkpoint["weights"].items()}
        seen, pretraining = checkpoint["train_hashes"], checkpoint["config"]
    own = backbone.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UserError(f"--init {init} holds no weight that fits the ResNet18 backbone")
    backbone.load_state_dict(fitting, strict=False)
    left_out = sorted({key.split(".")[0] for key in weights.keys() - fitting.keys()})
    line = f"backbone: {len(fitting)} of {len(own)} tensors loaded from {init}"
    print(line + (f"; not loaded: {', '.join(left_out)}" if left_out else "") + "; heads start fresh")
    return seen, pretraining


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------


def unit_rows(z: Tensor) -> Tensor:
    """(N, D) → (N, D) with rows of length one, in at least float32."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.07) -> Tensor:
    """NT-Xent over the 2N views of N faces (Chen et al. 2020, equation 1).

    z1, z2: (N, D) embeddings of two views, row by row of the same face; any scale, half precision allowed.
    Returns a scalar in nats; log(2N−1) when all embeddings coincide. Under torchrun the negatives are the
    faces of all W processes, with gradient, and the mean of the processes' losses is that of the whole batch.
    """
    z = torch.stack([unit_rows(z1), unit_rows(z2)], dim=1).flatten(0, 1)  # 2N×D, views of a face in a row
    everything = gather_rows(z)  # 2NW×D
    with torch.autocast(z.device.type, enabled=False):  # 1/temperature would overflow half precision's range
        logits = z @ everything.T / temperature  # 2N×2NW
    own = torch.arange(len(z), device=z.device) + rank() * len(z)  # 2N, columns of the rows themselves
    return F.cross_entropy(logits.scatter(1, own[:, None], -torch.inf), own ^ 1)


def age_contrastive_loss(z: Tensor, ages: Tensor, temperature: float = 0.07, sigma: float = 0.5) -> Tensor:
    """Supervised InfoNCE: faces of one age attract, others repel the more, the further apart in age.

    z: (N, D) embeddings; ages: (N,) years. Returns a scalar in nats, zero if no two rows share an age. With s
    the cosine similarity, τ the temperature and P(i) the other rows of i's age, it is the mean over i with
    non-empty P(i) of −1/|P(i)| Σ_{p∈P(i)} log[ e^{s_ip/τ} / (e^{s_ip/τ} + Σ_{age_k≠age_i}
    e^{|age_i−age_k|/(50σ)} e^{s_ik/τ}) ]: SupCon (Khosla et al. 2020) with one positive a term, negatives
    weighted by their distance in age. Under torchrun k and p run over the faces of all W processes, with
    gradient, and the mean of the processes' losses is that of the whole batch.
    """
    z = unit_rows(z)  # N×D
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ gather_rows(z).T / temperature  # N×NW
    gaps = (ages[:, None] - gather_rows(ages)[None, :]).abs().to(logits.dtype)  # N×NW
    same = gaps == 0
    # The lowest finite number, not −inf: a row without negatives then has a zero gradient instead of NaN.
    weighted = (logits + gaps / (50 * sigma)).masked_fill(same, torch.finfo(logits.dtype).min)
    negatives = weighted.logsumexp(dim=1, keepdim=True)  # N×1
    log_ratios = F.logsigmoid(logits - negatives)  # N×NW
    own = torch.arange(len(z), device=z.device) + rank() * len(z)  # N, columns of the rows themselves
    positives = same.scatter(1, own[:, None], False)
    counts = positives.sum(dim=1)  # N
    losses = -(log_ratios * positives).sum(dim=1) / counts.clamp(min=1)  # N
    anchors = mean_over_ranks((counts > 0).sum())
    return losses.sum() / torch.where(anchors > 0, anchors, 1)


YEARS = 101  # 0 to 99 and "100 or more"
GROUP_SIZES = [min(last, YEARS - 1) + 1 - first for first, last in AGE_GROUPS.values()]


def group_logits(logits: Tensor) -> Tensor:
    """Logits of years (B, YEARS) → of the age groups (B, 6), so that a group has its years' probability."""
    return torch.stack([part.logsumexp(dim=1) for part in logits.float().split(GROUP_SIZES, dim=1)], dim=1)


def soft_age_labels(ages: Tensor, sigma: float) -> Tensor:
    """Ages (B,) in years → probabilities (B, YEARS), a normal bell of `sigma` years around each.

    Soft labels as in Gao et al. 2018, section 3.1; what lies beyond 0 or 100 years is left out of the sum.
    """
    years = torch.arange(YEARS, device=ages.device)
    distance = years - ages.clamp(max=YEARS - 1)[:, None]  # B×YEARS
    return (-((distance / sigma) ** 2) / 2).softmax(dim=1)


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice (per image, then mean) for a one-channel mask.

    logits, mask: (B, 1, H, W), the mask in [0, 1] of any dtype. Returns a scalar, zero in the limit of a
    perfect mask. Raises ValueError if the shapes differ.
    """
    if logits.shape != mask.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)} differ in shape")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    mask = mask.to(logits.dtype)
    probability = logits.sigmoid()
    overlap = (probability * mask).sum(dim=(1, 2, 3))  # B
    total = (probability + mask).sum(dim=(1, 2, 3))  # B
    dice = (2 * overlap + 1) / (total + 1)  # the 1 makes an empty mask that is predicted empty perfect
    return F.binary_cross_entropy_with_logits(logits, mask) + (1 - dice).mean()


# ------------------------------------------------------------------------------------------------------------
# Optimisation
# ------------------------------------------------------------------------------------------------------------


def build_param_groups(
    model: nn.Module,
    lr: float,
    strategy: str = "uniform",
    backbone_lr_scale: float = 0.3,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Optimizer groups: every parameter in exactly one, none for biases and norms in `weight_decay`.

    strategy: "uniform" (one rate) or "differentiated" (parameters under `model.backbone` at lr ×
    backbone_lr_scale). Raises ValueError for another strategy.
    """
    if strategy not in ("uniform", "differentiated"):
        raise ValueError(f"strategy must be uniform or differentiated, not {strategy}")
    groups = {}
    for name, parameter in model.named_parameters():
        part = "backbone" if name.startswith("backbone.") else "heads"
        decays = parameter.ndim > 1  # biases and the scales of norms are vectors
        group = groups.setdefault(
            (part, decays),
            {
                "name": part if decays else f"{part}, no decay",
                "params": [],
                "lr": lr * backbone_lr_scale if (part, strategy) == ("backbone", "differentiated") else lr,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that rise linearly over the first 5 % of `steps`, then fall as a cosine to zero."""
    warmup = max(1, steps // 20)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


LOOK_EVERY = 50  # steps between looks at the loss: each waits for the device


def start_training(
    args: argparse.Namespace, kind: str, model: nn.Module, groups: list[dict], dataset: FaceDataset,
    device: torch.device, state: dict | None, start: tuple[Tensor, dict] | None,
) -> SimpleNamespace:  # fmt: skip
    """Everything that a run of training consists of, at its beginning or as `state` (a `.last.pt`) has it.

    Where it stands is in `epoch` and `step`, those that are done; `losses` of this epoch so far; `history`, a
    row an epoch; `average`, of the weights, with --ema; `best`, for finetune.py; `seen`, the hashes int64
    (M,) of all faces that the weights have learned from, and `pretraining`: `start` is what `init_backbone`
    returned. From here on SIGTERM waits until a step is done: see `train_one_epoch`.
    """
    hashes = torch.from_numpy(dataset.hashes)
    loader = train_loader(dataset, args.batch_size, args.seed, args.workers, device)
    network = distribute(model, device)
    dtype = choose_precision(args.precision, device)
    optimizer = torch.optim.AdamW(groups, fused=True)
    training = SimpleNamespace(
        args=args, kind=kind, model=model, network=network, loader=loader, device=device, dtype=dtype,
        optimizer=optimizer, schedule=warmup_cosine(optimizer, args.epochs * len(loader)),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), hashes=hashes,
        epoch=0, step=0, losses=[], history=[], best=None, seen=None, pretraining=None, stop=False,
        average=None,
    )  # fmt: skip
    if vars(args).get("ema"):
        # Early on the average would be of weights that have hardly begun to learn: it starts short.
        steps = len(loader)

        def update(averaged, current, count):
            done = training.epoch * steps + training.step
            get_ema_multi_avg_fn(min(args.ema, done / (10 + done)))(averaged, current, count)

        training.average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    if state is None:
        seen, training.pretraining = start
        training.seen = torch.cat([seen, hashes]).unique()
        if vars(args).get("overwrite") and not rank():
            last_path(args.out).unlink(missing_ok=True)  # lest --resume bring back what was overwritten
    else:
        last = last_path(args.out)
        if not torch.equal(state["hashes"], hashes):
            raise UserError(
                f"{last} learned from other faces than {args.data} holds: --overwrite starts again"
            )
        try:
            for name in parts_with_state(training):
                getattr(training, name).load_state_dict(state[name])
            torch.set_rng_state(state["rng"])
            for name in PLACE:
                setattr(training, name, state[name])
        except (RuntimeError, ValueError, KeyError, TypeError):
            raise UserError(f"{last} does not fit the model: --overwrite starts again") from None
    # The first process saves and goes; the others must not go before it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if rank() else lambda *_: setattr(training, "stop", True))
    return training


def parts_with_state(training: SimpleNamespace) -> list[str]:
    parts = ("model", "average", "optimizer", "schedule", "scaler")
    return [name for name in parts if getattr(training, name) is not None]


PLACE = ("epoch", "step", "losses", "history", "best", "seen", "pretraining")


def train_one_epoch(training: SimpleNamespace, compute_losses) -> Tensor:
    """Trains to the end of this epoch; returns the losses of all its steps, float32 (steps, K) on the CPU.

    compute_losses(model, batch) → (K,), of which the first is minimised; see `to_device` for the batch. Under
    torchrun the losses are means over processes. Raises UserError if the first becomes infinite or NaN, and
    Terminated after SIGTERM, with `.last.pt` written.
    """
    t, args = training, training.args
    steps = len(t.loader)
    t.network.train()
    t.loader.batch_sampler.epoch, t.loader.batch_sampler.skip = t.epoch, t.step
    recent = []
    title = f"epoch {t.epoch + 1}/{args.epochs}"
    for batch in progress(t.loader, title, steps, initial=t.step, unit="step") if t.step < steps else ():
        batch = to_device(batch, t.loader.dataset, t.device, (t.epoch, t.step, rank()))
        with autocast(t.device, t.dtype):
            losses = compute_losses(t.network, batch)  # K
        t.scaler.scale(losses[0]).backward()
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad()
        t.step += 1
        if t.average is not None:
            t.average.update_parameters(t.model)
        recent.append(losses.detach())
        stop = t.stop
        saves = stop or (bool(args.save_every_steps) and t.step % args.save_every_steps == 0)
        if saves or t.step % LOOK_EVERY == 0 or t.step == steps:
            values = torch.stack(recent).float()
            values = values.cpu() if stop else mean_over_ranks(values).cpu()  # the others do not stop here
            broken = ~values[:, 0].isfinite()
            # A gradient scaler skips the step of an overflow, and trains on with a smaller scale.
            if broken.all() if t.scaler.is_enabled() else broken.any():
                first = t.step - len(recent) + int(broken.int().argmax()) + 1
                stop_broken(t, f"the loss became {values[broken][0, 0]:g}", first)
            t.losses.append(values)
            recent = []
            if (saves or t.step == steps) and not all_finite(t.model):
                stop_broken(t, "weights became infinite or NaN", t.step)
        t.schedule.step()
        if saves:
            save_training(t)
    return torch.cat(t.losses)


def all_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics of a model are finite numbers."""
    return all(bool(values.isfinite().all()) for values in model.state_dict().values())


def stop_broken(training: SimpleNamespace, what: str, step: int):
    """Raises the UserError of a run whose numbers are no longer finite."""
    remedy = "lower --lr" + (" or raise --temperature" if "temperature" in training.args else "")
    raise UserError(
        f"{what} in epoch {training.epoch + 1}, step {step}, at a learning rate of "
        f"{training.schedule.get_last_lr()[-1]:.2g}: {remedy}; checkpoints from before are kept"
    )


def finish_epoch(training: SimpleNamespace, row: dict):
    """Adds a row to the history, moves on to the next epoch and writes `.last.pt` and the history."""
    training.history.append(row)
    training.epoch, training.step, training.losses = training.epoch + 1, 0, []
    save_training(training)
    if not rank():
        write_csv(Path(training.args.out).with_suffix(".csv"), training.history)
    if training.epoch == training.args.epochs:
        training.loader = None  # its workers end now, lest torch report that they were killed at exit


def save_training(training: SimpleNamespace):
    """Writes `.last.pt`, for --resume; then stops if SIGTERM asked for it."""
    t, args = training, training.args
    if not rank():
        state = {name: getattr(t, name).state_dict() for name in parts_with_state(t)}
        state |= {name: getattr(t, name) for name in (*PLACE, "hashes")} | {"rng": torch.get_rng_state()}
        save_checkpoint(last_path(args.out), f"{t.kind}.last", args, **state)
    if t.stop:
        raise Terminated(
            f"stopped by SIGTERM at epoch {t.epoch}, step {t.step}: --resume continues {last_path(args.out)}"
        )


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and the files beside them
# ------------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 2
WEIGHTS = {"weights": dict, "train_hashes": Tensor, "pretraining": dict}
RUN = {
    "epoch": int,
    "step": int,
    "losses": list,
    "history": list,
    "seen": Tensor,
    "pretraining": dict,
    "hashes": Tensor,
    "rng": Tensor,
}
CONTENT = {  # what a checkpoint of each kind holds, beside its header
    "contrastive": WEIGHTS,
    "model": WEIGHTS | {"epoch": int, "val": dict},
    "contrastive.last": RUN,
    "model.last": RUN,
}


def save_checkpoint(path: str | Path, kind: str, args: argparse.Namespace, **content):
    """Writes a checkpoint: tensors and builtins with kind, version, config, preprocessing, `content`."""
    preprocessing = {"image_size": args.image_size, "mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB"}
    header = {"kind": kind, "format_version": FORMAT_VERSION, "config": settings_of(args)}
    buffer = io.BytesIO()  # given a path, torch.save writes its (temporary) name into the file
    torch.save({**header, "preprocessing": preprocessing, **content}, buffer)
    with atomic_path(path, sync=True) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path, kinds: str | tuple[str, ...]) -> dict:
    """Reads a checkpoint of one of `kinds` onto the CPU; UserError if it is missing or anything else.

    Those that ship with the project are found from any working directory.
    """
    kinds, path = (kinds,) if isinstance(kinds, str) else kinds, shipped(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: run the stage that writes it, or name another file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or hostile file raises depends on where it breaks
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "kind" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of this project")
    if checkpoint["kind"] not in kinds:
        raise UserError(
            f"{path} is a {checkpoint['kind']} checkpoint, where a {' or '.join(kinds)} one is needed"
        )
    if checkpoint.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {checkpoint.get('format_version')}, not {FORMAT_VERSION}")
    types = {"config": dict, "preprocessing": dict, **CONTENT[checkpoint["kind"]]}
    wrong = [key for key, kind in types.items() if not isinstance(checkpoint.get(key), kind)]
    if not wrong and checkpoint["preprocessing"].get("image_size") not in range(32, 4097, 32):
        wrong = ["preprocessing"]
    weights = {} if wrong else checkpoint.get("weights", {})
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        wrong = ["weights"]
    if wrong:
        raise UserError(
            f"{path} is damaged: {', '.join(wrong)} missing or not what it should be; train again"
        )
    return checkpoint


def last_path(out: str | Path) -> Path:
    """`model.pt` → `model.last.pt`, where the state of an unfinished run is kept."""
    return Path(out).with_suffix(".last.pt")


def open_run(args: argparse.Namespace, kind: str) -> dict | None:
    """The state in `.last.pt` to continue from, or None; UserError if another run would be clobbered.

    A finished run with the same settings counts as one to continue: nothing is left to train.
    """
    out, last = Path(args.out), last_path(args.out)
    check_writable("--out", out.parent)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it, such as {out / f'{kind}.pt'}")
    if not rank():
        for name in (out, last):  # of a run that was killed
            for leftover in out.parent.glob(f".tmp-{name.stem}-????????{name.suffix}"):
                leftover.unlink(missing_ok=True)
    if args.overwrite:
        if args.resume:
            raise UserError("--resume and --overwrite contradict each other: give one")
        return None
    if not last.exists():
        if out.exists():
            raise UserError(
                f"{out} is there already, without {last.name} to continue: --overwrite replaces it"
            )
        if args.resume:
            print(f"no {last}: starting from the beginning")
        return None
    state = load_checkpoint(last, f"{kind}.last")
    settings = settings_of(args)
    for key in sorted(settings.keys() | state["config"].keys()):
        old, new = state["config"].get(key), settings.get(key)
        if old != new:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{last} was made with {flag} {old}, not {new}: --overwrite starts again")
    if not args.resume and state["epoch"] < args.epochs:
        raise UserError(f"{last} holds an unfinished run: --resume continues it, --overwrite starts again")
    print(f"resumed {last} at epoch {state['epoch']}, step {state['step']}")
    return state


def plot_history(path: str | Path, history: list[dict], panels: dict[str, list[str]]):
    """Draws curves of a history (a row an epoch) as PNG: a panel for each title, with the columns named."""
    import matplotlib  # here, since only training draws curves and the import takes a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    epochs = [row["epoch"] for row in history]
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for column in columns:
            marker = "o" if len(epochs) < 20 else None
            axis.plot(epochs, [row[column] for row in history], label=column.replace("_", " "), marker=marker)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
