"""What UTKFace is on disk: age groups, file names, pairs of image and mask, decoding. No torch."""

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from PIL import Image, ImageOps

from cli import UserError

AGE_GROUPS = {  # WHO-based; first and last year of each
    "Infant": (0, 4),
    "Child": (5, 14),
    "Youth": (15, 24),
    "Young Adult": (25, 44),
    "Middle-aged": (45, 64),
    "Older Adult": (65, 999),
}
GROUP_NAMES = list(AGE_GROUPS)
GENDERS = ("male", "female")  # as UTKFace labels them
RACES = ("White", "Black", "Asian", "Indian", "Others")

UTKFACE_NAME = re.compile(
    r"(\d{1,3}_[01]_[0-4]_\d+)\.(?:jpg\.chip\.)?(?:jpg|jpeg|png|webp|bmp)", re.ASCII | re.IGNORECASE
)
YEARS = r"\d{1,3}(?:\.\d+)?"
STEM = re.compile(rf"({YEARS})(?:-({YEARS}))?_([01x])_([0-4x])_(.+)", re.ASCII)


class Face(NamedTuple):
    """What the name of a pair says: `<age>_<gender>_<race>_<timestamp>` in UTKFace.

    Own faces have their picture's path in place of the timestamp. Their age may have decimals or be a range
    of years (`31.5`, `20-29`), and `x` stands for an unknown gender or race.
    """

    stem: str
    age: float  # years, an int where they are whole; the middle of a range
    gender: int = -1  # index into GENDERS, -1 if unknown
    race: int = -1  # index into RACES, -1 if unknown
    spread: float = 0  # years from the middle of a range to its ends

    @property
    def group(self) -> int:
        """Index of the age group, 0–5, or -1 where a range crosses groups."""
        first, last = age_to_group([self.age - self.spread, self.age + self.spread]).tolist()
        return first if first == last else -1


def parse_stem(stem: str) -> Face | None:
    """What a stem such as `26_1_0_20170116184751593` or `20-29_x_3_train%2F1.jpg` says, None if malformed."""
    match = STEM.fullmatch(stem)
    if not match:
        return None
    first, last = (float(years) if "." in years else int(years) for years in (match[1], match[2] or match[1]))
    gender, race = (-1 if label == "x" else int(label) for label in (match[3], match[4]))
    age = first if first == last else (first + last) / 2
    return Face(stem, age, gender, race, spread=(last - first) / 2) if first <= last else None


def parse_name(name: str) -> Face | None:
    """What a file of UTKFace, such as `26_1_0_20170116184751593.jpg.chip.jpg`, says, None if malformed."""
    match = UTKFACE_NAME.fullmatch(name)
    return parse_stem(match[1]) if match else None


def age_to_group(ages):
    """Group index 0–5 of an age or an array of ages in years; 4.5 counts as 5."""
    return np.searchsorted([last for _, last in AGE_GROUPS.values()], np.floor(np.asarray(ages) + 0.5))


def list_pairs(folder: str | Path, need_masks: bool = True) -> list[Face]:
    """Faces in a folder of pairs, sorted by file name; UserError if it is missing, empty or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: run the stage that writes it, or name another")
    names = set(os.listdir(folder))
    images = sorted(name for name in names if name.endswith("_image.png") and not name.startswith("."))
    if not images:
        raise UserError(f"{folder} holds no *_image.png: run masks.py and split.py, with more faces")
    faces = [parse_stem(name.removesuffix("_image.png")) for name in images]
    for name, face in zip(images, faces):
        if face is None:
            raise UserError(f"{folder / name}: the name does not start <age>_<gender>_<race>_; remove it")
        if need_masks and f"{face.stem}_mask.png" not in names:
            remedy = "run masks.py, then split.py --overwrite"
            raise UserError(f"{folder / name} has no {face.stem}_mask.png beside it: {remedy}")
    return faces


def walk_files(folder: str | Path, leave_out: Iterable = ()) -> tuple[list[Path], dict[Path, str]]:
    """The files below a folder, sorted, and the reason for each path that cannot be read.

    Links are followed, each folder is read once, those in `leave_out` and Synology's `@eaDir` are not.
    """
    files, unreadable, tops = [], {}, [folder]
    seen = {os.path.realpath(path) for path in leave_out}

    def refuse(error):
        unreadable[Path(error.filename)] = error.strerror

    while tops:  # links to folders come last: what lies below `folder` goes by its own name
        for place, folders, names in os.walk(tops.pop(0), onerror=refuse):
            if os.path.realpath(place) in seen or os.path.basename(place) == "@eaDir":
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            tops += [Path(place, name) for name in sorted(folders) if Path(place, name).is_symlink()]
            for path in (Path(place, name) for name in names):
                if os.path.isfile(path):
                    files.append(path)
                else:
                    unreadable[path] = "not a file that can be read"
    return sorted(files), unreadable


SPLIT_SETTINGS = ("seed", "fractions", "near_duplicate", "random")


def split_settings(folder: str | Path) -> dict:
    """The `SPLIT_SETTINGS` that split.py made `folder` with, {} if others made it."""
    try:
        made = dict(yaml.safe_load((Path(folder) / "split.yaml").read_text(encoding="utf-8")))
        own = {key: value for key, value in made.items() if key in SPLIT_SETTINGS}  # no notes of others
        return {key: value for key, value in own.items() if isinstance(value, int | float | list)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        raise UserError(f"{folder}/split.yaml cannot be read: run split.py again with --overwrite") from None


PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for its weights' sake
MIN_SIDE = 16  # pixels below which a picture shows no face
MAX_PIXELS = 50_000_000
# Without these OpenCV fills what is missing with grey. MPO is a JPEG with more pictures behind it.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
# No others: Pillow hands PostScript to Ghostscript, whatever the file is named. Older versions lack the last.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
MID_GREY = (128, 128, 128, 255)  # what lies under transparent pixels


def decode_image(data: bytes, flags: int = cv2.IMREAD_COLOR, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image to uint8 BGR (H, W, 3), or grey (H, W), upright as its EXIF says, on mid-grey.

    Raises ValueError if it is no whole image, below `MIN_SIDE` a side, or above `max_pixels` in all.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)  # reads no pixels yet
    except Image.DecompressionBombError:
        raise ValueError(f"above {max_pixels // 10**6} million pixels") from None
    except Exception:  # what Pillow raises depends on where a file breaks
        raise ValueError("unreadable image") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels, above {max_pixels // 10**6} million")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels, below {MIN_SIDE} a side")
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    by_pillow = transparent or picture.format == "AVIF"  # which OpenCV does not turn as EXIF says
    ends_well = ENDS.get(picture.format, b"") in data[-1024:]  # else it is cut, or appended to: slow to tell
    try:
        if by_pillow:
            return flatten(picture, flags)
        if not ends_well:
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


def page_count(data: bytes) -> int:
    """How many pages an encoded TIFF has, of which `decode_image` reads the first; 1 for what is no TIFF."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        return picture.n_frames if picture.format == "TIFF" else 1
    except Exception:  # what Pillow raises depends on where the chain of pages breaks
        return 1


def flatten(picture: Image.Image, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """A PIL image, upright as its EXIF says, as `decode_image` returns it."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, MID_GREY), picture)
    grey = flags == cv2.IMREAD_GRAYSCALE
    return cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGBA2GRAY if grey else cv2.COLOR_RGBA2BGR)


def read_image(path: str | Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decodes an image file to uint8 BGR (H, W, 3), or grey (H, W); UserError if it cannot be."""
    try:
        return decode_image(Path(path).read_bytes(), flags)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        remedy = "delete it and run the stage that wrote it again"
        raise UserError(f"{path} is not a readable image ({reason}): {remedy}") from None


def read_pair(folder: str | Path, stem: str, flags: int = cv2.IMREAD_COLOR) -> tuple[np.ndarray, np.ndarray]:
    """Image, uint8 BGR (H, W, 3) or grey (H, W), and mask, uint8 (H, W), of one face.

    UserError if one cannot be read or their sizes differ.
    """
    image = read_image(Path(folder) / f"{stem}_image.png", flags)
    path = Path(folder) / f"{stem}_mask.png"
    mask = read_image(path, cv2.IMREAD_GRAYSCALE)
    if mask.shape != image.shape[:2]:
        remedy = "delete it in the folder that masks.py writes, and run masks.py, then split.py --overwrite"
        raise UserError(f"{path} is not of its image's size: {remedy}")
    return image, mask


def central_square(image: np.ndarray) -> np.ndarray:
    """The largest square at the centre of (H, W[, C]), as a view."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """The central square of (H, W[, C]) at `side` pixels, averaged over the pixels that fall into one."""
    return cv2.resize(central_square(image), (side, side), interpolation=cv2.INTER_AREA)


def pixel_hash(image: np.ndarray) -> int:
    """64-bit hash of a decoded image: survives a new file name or compression, not a changed pixel."""
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
