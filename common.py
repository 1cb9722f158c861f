"""What the stages share: names, flags, files, data, augmentation, model, losses, optimisation, checkpoints.

Every script imports from here and nothing imports a script, so a stage can be read with this file alone
beside it. The rooms, in order, are marked by banner comments.
"""

import argparse
import csv
import hashlib
import math
import os
import random
import re
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # read on import: the check for updates needs a network

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
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

SCRIPTS = ("synthesize", "masks", "split", "pretrain", "finetune", "evaluate")


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
        if not (math.isfinite(value) and low <= value <= high and value > above):
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
    parser.add_argument("--seed", type=number(int, low=0), default=0, help="seed of everything random")
    parser.add_argument(
        "--workers", type=number(int, low=0), default=os.cpu_count(), help="parallel workers (cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
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
    parser.add_argument("--batch-size", type=number(int, low=2), default=batch_size, help="faces a step")
    parser.add_argument("--lr", type=number(float, above=0), default=lr, help="peak learning rate of AdamW")
    parser.add_argument(
        "--weight-decay", type=number(float, low=0), default=0.05, help="AdamW's decay of weights"
    )
    parser.add_argument(
        "--image-size", type=image_side, default=image_size, help="side in pixels, a multiple of 32"
    )
    add_device_flags(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the .last.pt file beside --out")


def read_config(path: str, parser: Parser) -> list[str]:
    """Command-line arguments equivalent to a YAML file, so that argparse checks both alike.

    Top-level keys are this script's flags, or sections named after scripts, of which only this script's own
    is read.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines")
    flags = {option: action for action in parser._actions for option in action.option_strings}
    settings = {key: value for key, value in loaded.items() if key not in SCRIPTS}
    section = loaded.get(parser.prog.removesuffix(".py")) or {}
    if not isinstance(section, dict):
        raise UserError(
            f"--config {path}: section {parser.prog.removesuffix('.py')!r} must hold `flag: value` lines"
        )
    arguments = []
    for key, value in {**settings, **section}.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in flags or flag in ("--config", "--help"):
            raise UserError(f"--config {path}: unknown key {key!r}; see {parser.prog} -h for the flags")
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


def run(main, parser: Parser, argv: list[str] | None = None):
    """Calls `main(args)`; a `UserError` ends in one line on stderr and exit code 2, Ctrl-C in 130."""
    try:
        main(parse_args(parser, argv))
    except UserError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)


# Silent where output is no terminal (a log), and for what is over within a second.
progress = partial(tqdm, leave=False, delay=1, disable=None)


# Flags that change where and how a run happens, not what comes out.
NOT_SETTINGS = ("config", "workers", "overwrite", "resume", "out", "device")


def settings_of(args: argparse.Namespace) -> dict:
    """The arguments that define a run's result: what `--resume` compares and checkpoints carry."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


# ------------------------------------------------------------------------------------------------------------
# Files, whole or absent
# ------------------------------------------------------------------------------------------------------------


UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)


@contextmanager
def atomic_path(path: str | Path, sync: bool = False):
    """Yields a temporary path that takes `path`'s place on success and vanishes on failure.

    It has the same folder and suffix. `sync` has it on the disk before the old file goes, for what took long.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp's files are private
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_csv(path: str | Path, rows: list[dict], columns: list[str] | None = None):
    """Writes rows (dicts with the same keys) as CSV; `columns` names the header when there may be no rows."""
    with (
        atomic_path(path, sync=True) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_image(path: str | Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decodes an image file to uint8 BGR (H, W, 3), or grey (H, W); UserError if it cannot be."""
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise UserError(f"{path} is not a readable image: delete it and run the stage that wrote it again")
    return image


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


# ------------------------------------------------------------------------------------------------------------
# Device, precision and seeds
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


# ------------------------------------------------------------------------------------------------------------
# Augmentation (albumentations: image and mask move together)
# ------------------------------------------------------------------------------------------------------------


def random_crop(image_size: int, **options) -> A.RandomResizedCrop:
    """A random crop resized to a square of `image_size`, averaging over pixels, the mask's too."""
    how = {"interpolation": cv2.INTER_AREA, "mask_interpolation": cv2.INTER_AREA}
    return A.RandomResizedCrop((image_size, image_size), **options, **how)


def contrastive_augmentation(image_size: int) -> A.Compose:
    """SimCLR's view (Chen et al. 2020, appendix A), with crops mild enough to keep most of a face."""
    light = (0.6, 1.4)
    return A.Compose(
        [
            random_crop(image_size, scale=(0.5, 1.0)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=light, contrast=light, saturation=light, hue=(-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.5), p=0.3),
        ]
    )


def supervised_augmentation(image_size: int) -> A.Compose:
    """A milder view that leaves the signs of age alone: slight turn and crop, flip, light and colour."""
    light = (0.7, 1.3)
    return A.Compose(
        [
            A.Rotate(
                limit=12,
                mask_interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.5,
            ),
            random_crop(image_size, scale=(0.7, 1.0), ratio=(0.9, 1.1)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=light, contrast=light, saturation=light, hue=(-0.03, 0.03), p=0.8),
            A.ToGray(p=0.1),
        ]
    )


def seed_augmentation(augment: A.Compose, *key: int):
    """Makes the next draws of a pipeline depend on `key` alone.

    One generator is shared by all transforms: `Compose.set_random_seed` would give each its own copy of the
    same stream, so that a picture would be turned grey only when it is also flipped.
    """
    generator = np.random.default_rng(key)
    augment.set_random_state(generator, random.Random(int(generator.integers(2**63))))


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


class FaceDataset(Dataset):
    """Faces of one split folder, decoded once and kept in memory as uint8.

    A sample is a dict: `image` uint8 (H, W, 3) RGB, or (views, H, W, 3) with several views; `mask` uint8 (H,
    W) in {0, 1}, or (views, H, W), with `with_masks`; `age` in years; `group` 0–5. Without `augment` the
    picture is the face resized to `image_size` (that square is also in `.images` and `.masks`); with it, each
    view is drawn from (seed, epoch, index) alone, whatever worker asks. An index may be an int or the pair
    (epoch, index).

    `.faces` lists what the names say, `.ages` and `.groups` are int64 (N,), `.hashes` int64 (N,) name the
    pixels. Raises UserError for a missing or empty folder, an unreadable image, or a mask that is missing or
    of another size.
    """

    def __init__(self, folder, image_size, augment=None, views=1, with_masks=True, seed=0, workers=1):
        self.faces = list_pairs(folder, need_masks=with_masks)
        self.augment = augment(image_size) if augment else None
        self.views, self.seed = views, seed
        self.ages = np.array([face.age for face in self.faces])
        self.groups = age_to_group(self.ages)
        # A random crop is enlarged to the output's side: a quarter more pixels than that keep it sharp.
        side = image_size * 5 // 4 if augment else image_size
        self.images = np.empty((len(self), side, side, 3), np.uint8)
        self.masks = np.empty((len(self), side, side), np.uint8) if with_masks else None
        self.hashes = np.empty(len(self), np.int64)

        def load(index):
            path = Path(folder) / f"{self.faces[index].stem}_image.png"
            image = read_image(path)
            self.hashes[index] = pixel_hash(image)
            self.images[index] = cv2.cvtColor(resize(image, side), cv2.COLOR_BGR2RGB)
            if with_masks:
                mask_path = path.with_name(f"{self.faces[index].stem}_mask.png")
                mask = read_image(mask_path, cv2.IMREAD_GRAYSCALE)
                if mask.shape != image.shape[:2]:
                    raise UserError(
                        f"{mask_path} is not of its image's size: delete it and run masks.py again"
                    )
                self.masks[index] = resize(mask, side)

        with ThreadPool(max(workers, 1)) as pool:
            loading = pool.imap_unordered(load, range(len(self)), chunksize=16)
            for _ in progress(loading, f"read {Path(folder).name}", len(self), unit="face"):
                pass
        if with_masks and self.augment is None:
            self.masks = binary(self.masks)

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.images[index], None if self.masks is None else self.masks[index]
        if self.augment is not None:
            seed_augmentation(self.augment, self.seed, epoch, index)
            moved = [
                self.augment(image=image) if mask is None else self.augment(image=image, mask=mask)
                for _ in range(self.views)
            ]
            image = np.stack([view["image"] for view in moved])  # V×H×W×3
            mask = None if mask is None else binary(np.stack([view["mask"] for view in moved]))  # V×H×W
            if self.views == 1:
                image, mask = image[0], None if mask is None else mask[0]
        sample = {"image": image, "age": self.ages[index], "group": self.groups[index]}
        return sample if mask is None else {**sample, "mask": mask}


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

    The key brings the epoch to the workers, so that they can stay alive between epochs.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


def train_loader(
    dataset: FaceDataset, batch_size: int, seed: int, workers: int, device: torch.device
) -> DataLoader:
    """Shuffled batches for training; set `loader.batch_sampler.epoch` before each epoch."""
    if batch_size > len(dataset):
        raise UserError(
            f"--batch-size {batch_size} is larger than the train split ({len(dataset)} faces): lower it"
        )
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # Forked workers share the pictures in memory; other ways of starting them would copy all to each.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for its weights' sake


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 RGB (B, H, W, 3) to normalised float32 (B, 3, H, W) on `device`, in channels-last memory."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # B×3×H×W
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return (images.float() - mean) / std


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
    """ResNet18 (torchvision) with a head for age groups and, if `multitask`, a decoder for the face mask."""

    def __init__(self, num_groups: int = 6, multitask: bool = True):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # the backbone alone gives B×512 features
        self.head = nn.Linear(512, num_groups)
        self.decoder = MaskDecoder() if multitask else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised images (B, 3, H, W) → group logits (B, 6), mask logits (B, 1, H, W) or None.

        Raises ValueError if there is a decoder and H or W is no multiple of 32.
        """
        if self.decoder is not None and (images.shape[-2] % 32 or images.shape[-1] % 32):
            raise ValueError(f"image sides must be multiples of 32, not {tuple(images.shape[-2:])}")
        net = self.backbone
        maps = [net.relu(net.bn1(net.conv1(images)))]  # B×64×H/2×W/2
        x = net.maxpool(maps[0])  # B×64×H/4×W/4
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)  # strides 4, 8, 16, 32 with 64, 128, 256, 512 channels
        logits = self.head(net.avgpool(x).flatten(1))  # B×6
        return logits, None if self.decoder is None else self.decoder(maps)


@torch.inference_mode()
def predict_dataset(model, dataset: FaceDataset, device, dtype, batch_size: int = 256):
    """Scores every face of a dataset that has no augmentation, in order.

    Returns group logits float32 (N, 6) on the CPU, and the predicted masks' overlap with the true ones at the
    dataset's image size, {"iou": (N,), "dice": (N,)}, or None where the model or the dataset has no masks.
    """
    model.eval()
    all_logits, overlaps = [], []
    for start in range(0, len(dataset), batch_size):
        images = to_input(torch.from_numpy(dataset.images[start : start + batch_size]), device)
        with autocast(device, dtype):
            logits, mask_logits = model(images)  # B×6, B×1×H×W
        all_logits.append(logits.float())
        if mask_logits is not None and dataset.masks is not None:
            truth = torch.from_numpy(dataset.masks[start : start + batch_size]).to(device) > 0  # B×H×W
            overlaps.append(mask_overlap(mask_logits[:, 0] > 0, truth))
    overlap = dict(zip(("iou", "dice"), torch.cat(overlaps, dim=1).cpu())) if overlaps else None
    return torch.cat(all_logits).cpu(), overlap


def mask_overlap(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU and Dice of boolean masks (B, H, W) each: float64 (2, B); two empty masks agree perfectly."""
    both = (predicted & truth).sum(dim=(1, 2)).double()
    either = (predicted | truth).sum(dim=(1, 2)).double()
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return torch.stack([iou, 2 * iou / (1 + iou)])


def init_backbone(backbone: nn.Module, init: str) -> tuple[str, Tensor]:
    """Loads `init` (random, imagenet, or a checkpoint file) into a backbone.

    Returns one line on what was loaded, and the int64 hashes of the faces that those weights have seen.

    Raises UserError if the ImageNet weights cannot be had, or if the file is no checkpoint or nothing in it
    fits.
    """
    seen = torch.empty(0, dtype=torch.int64)
    if init == "random":
        return "backbone starts from random weights", seen
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
        seen = checkpoint["train_hashes"]
    own = backbone.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UserError(f"--init {init} holds no weight that fits the ResNet18 backbone")
    backbone.load_state_dict(fitting, strict=False)
    left_out = sorted({key.split(".")[0] for key in weights.keys() - fitting.keys()})
    line = f"backbone: {len(fitting)} of {len(own)} tensors loaded from {init}"
    return line + (f"; not loaded: {', '.join(left_out)}" if left_out else "") + "; heads start fresh", seen


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------


def unit_rows(z: Tensor) -> Tensor:
    """(N, D) → (N, D) with rows of length one, in at least float32."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.07) -> Tensor:
    """NT-Xent over the 2N views of N faces (Chen et al. 2020, equation 1).

    z1, z2: (N, D) embeddings of two views, row by row of the same face; any scale, half precision allowed.
    Returns a scalar in nats; log(2N−1) when all embeddings coincide.
    """
    z = torch.cat([unit_rows(z1), unit_rows(z2)])  # 2N×D
    with torch.autocast(z.device.type, enabled=False):  # 1/temperature would overflow half precision's range
        logits = z @ z.T / temperature  # 2N×2N
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    other_view = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, other_view)


def age_contrastive_loss(z: Tensor, ages: Tensor, temperature: float = 0.07, sigma: float = 0.5) -> Tensor:
    """Supervised InfoNCE: faces of one age attract, others repel the more, the further apart in age.

    z: (N, D) embeddings; ages: (N,) years. Returns a scalar in nats, zero if no two rows share an age. With s
    the cosine similarity, τ the temperature and P(i) the other rows of i's age, it is the mean over i with
    non-empty P(i) of −1/|P(i)| Σ_{p∈P(i)} log[ e^{s_ip/τ} / (e^{s_ip/τ} + Σ_{age_k≠age_i}
    e^{|age_i−age_k|/(50σ)} e^{s_ik/τ}) ]: SupCon (Khosla et al. 2020) with one positive a term, negatives
    weighted by their distance in age.
    """
    z = unit_rows(z)  # N×D
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature  # N×N
    gaps = (ages[:, None] - ages[None, :]).abs().to(logits.dtype)  # N×N
    same = gaps == 0
    # The lowest finite number, not −inf: a row without negatives then has a zero gradient instead of NaN.
    weighted = (logits + gaps / (50 * sigma)).masked_fill(same, torch.finfo(logits.dtype).min)
    negatives = weighted.logsumexp(dim=1, keepdim=True)  # N×1
    log_ratios = F.logsigmoid(logits - negatives)  # N×N
    positives = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    counts = positives.sum(dim=1)  # N
    losses = -(log_ratios * positives).sum(dim=1) / counts.clamp(min=1)  # N
    return losses.sum() / (counts > 0).sum().clamp(min=1)


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
    backbone_lr_scale: float = 0.1,
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


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and the files beside them
# ------------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1


def save_checkpoint(path: str | Path, kind: str, args: argparse.Namespace, **content):
    """Writes a checkpoint: tensors and builtins with kind, version, config, preprocessing, `content`."""
    preprocessing = {"image_size": args.image_size, "mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB"}
    header = {"kind": kind, "format_version": FORMAT_VERSION, "config": settings_of(args)}
    # To a file object: given a path, torch.save writes its (temporary) name into the file.
    with atomic_path(path, sync=True) as temporary, open(temporary, "wb") as file:
        torch.save({**header, "preprocessing": preprocessing, **content}, file)


def load_checkpoint(path: str | Path, kinds: str | tuple[str, ...]) -> dict:
    """Reads a checkpoint of one of `kinds` onto the CPU; UserError if it is missing or anything else."""
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if not Path(path).is_file():
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
    return checkpoint


def last_path(out: str | Path) -> Path:
    """`model.pt` → `model.last.pt`, where the state of an unfinished run is kept."""
    return Path(out).with_suffix(".last.pt")


def open_run(args: argparse.Namespace, kind: str) -> dict | None:
    """The state in `.last.pt` to continue from, or None; UserError if another run would be clobbered.

    A finished run with the same settings counts as one to continue: nothing is left to train.
    """
    out, last = Path(args.out), last_path(args.out)
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
    print(f"resumed {last} at epoch {state['epoch']}")
    return state


def check_same_faces(state: dict, hashes: Tensor, args: argparse.Namespace):
    """UserError if the faces to train on, by their hashes int64 (N,), are not the interrupted run's."""
    if not torch.equal(state["hashes"], hashes):
        last = last_path(args.out)
        raise UserError(f"{last} learned from other faces than {args.data} holds: --overwrite starts again")


def training_state(model, optimizer, schedule, scaler) -> dict:
    """What `.last.pt` keeps of these objects, and torch's random state; see `restore_training`."""
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    return {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}


def restore_training(state: dict, model, optimizer, schedule, scaler):
    """Puts back what `training_state` returned."""
    for name, part in (
        ("model", model),
        ("optimizer", optimizer),
        ("schedule", schedule),
        ("scaler", scaler),
    ):
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])


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
