"""Finds the face in each UTKFace crop and writes it as an image and a mask.

    python masks.py --input UTKFace.tar.gz                  # or a folder, or a .zip
    python masks.py --input photos/ --parser resnet18.onnx  # masks by a face-parsing network

Writes `<age>_<gender>_<race>_<timestamp>_image.png` (RGB, original size) and `…_mask.png` (same size, one
channel, 0/255) into `--output`, with `skipped.csv` (what was left out, and why) and `preview.png` (a contact
sheet to look at). Pairs that are already there stay as they are: an interrupted run goes on where it stopped.
Transparent pixels are laid on mid-grey. What is not square is counted, since the later stages look at its
central square alone.
"""

import os
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import (
    UserError,
    atomic_path,
    check_writable,
    progress,
    remove_leftovers,
    run,
    script_parser,
    write_csv,
)
from utkface import PIXEL_MEAN, PIXEL_STD, decode_image, parse_name, read_image

# ------------------------------------------------------------------------------------------------------------
# By default: GrabCut, then the face oval that explains its labels best
# ------------------------------------------------------------------------------------------------------------

# The face oval of UTKFace's crops in fractions of their sides: mean and deviation over faces. The crops are
# aligned at eyes and mouth, so faces differ in where chin and cheeks end, and in how far they are turned.
TOP = -0.026  # the hairline: just outside the crop
HEIGHT = (0.975, 0.03)  # hairline to chin
WIDTH = (0.403, 0.02)  # half the breadth
TURN = (0.0, 0.14)  # shift of the cheeks when the head is turned
TURN_ENDS = 0.45  # share of that shift that chin and hairline take
JAW = 0.1755  # how much the oval narrows towards the chin
SQUARENESS = 2.6  # of the oval; an ellipse has 2
GRID = (*HEIGHT, 4), (*WIDTH, 8), (*TURN, 17)  # and how many of each are tried

SIDE = 48  # pixels at which GrabCut runs: finer ones do not place an oval better
CORE, FACE, RIM = 0.4, 0.97, 1.28  # of the mean oval: face in the core, background beyond the rim
NEUTRAL, CONTRAST = (0, 128, 128), (1, 2, 2)  # of L, a, b: colour tells skin better than light does
EVIDENCE = 0.27  # log-odds of a label at half of SIDE: neighbours repeat each other, so less than it seems
RELIABLE = (0.6, 0.2)  # height (mean, deviation) at which labels count: above is hair, below is neck


def oval(shape: tuple[int, int], height: float, width: float, turn: float) -> np.ndarray:
    """Distance from the centre of a face oval as float32 (H, W): below 1 inside, 1 on the contour."""
    y = (np.arange(shape[0], dtype=np.float32)[:, None] + 0.5) / shape[0]
    x = (np.arange(shape[1], dtype=np.float32)[None] + 0.5) / shape[1]
    v = 2 * (y - TOP) / height - 1  # -1 at the hairline, 1 at the chin
    centre = 0.5 + turn * (1 - (1 - TURN_ENDS) * np.minimum(v * v, 1))
    u = (x - centre) / (width * (1 - JAW * v))
    return (np.abs(u) ** SQUARENESS + np.abs(v) ** SQUARENESS) ** (1 / SQUARENESS)


@cache
def candidate_ovals() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K ovals on a grid: height, width, turn (K, 3); pixels, weighted (K, SIDE²/4); log prior (K,)."""
    mean, deviation, _ = np.array(GRID).T
    ovals = np.array(list(product(*(np.linspace(m - 2.5 * s, m + 2.5 * s, n) for m, s, n in GRID))))
    inside = np.stack([oval((2 * SIDE, 2 * SIDE), *shape) < 1 for shape in ovals])
    inside = inside.reshape(len(ovals), SIDE // 2, 4, SIDE // 2, 4).mean((2, 4))
    y = (np.arange(SIDE // 2)[:, None] + 0.5) / (SIDE // 2)
    weighted = inside * EVIDENCE * np.exp(-(((y - RELIABLE[0]) / RELIABLE[1]) ** 2) / 2)
    log_prior = -(((ovals - mean) / deviation) ** 2).sum(1) / 2
    return ovals, weighted.reshape(len(ovals), -1).astype(np.float32), log_prior


def grabcut_mask(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """Face mask, uint8 0/255 (H, W), of a crop like UTKFace's, uint8 BGR (H, W, 3).

    GrabCut (Rother et al. 2004) labels the pixels, but takes neck, ears and hair for face too. So the mask
    is the oval to expect given its labels, under a Gaussian prior on height, width and turn.
    """
    small = cv2.cvtColor(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2Lab)
    small = np.clip((small - NEUTRAL) * CONTRAST + NEUTRAL, 0, 255).astype(np.uint8)
    distance = oval((SIDE, SIDE), HEIGHT[0], WIDTH[0], TURN[0])
    zones = [distance < CORE, distance < FACE, distance < RIM]
    labels = np.select(zones, [cv2.GC_FGD, cv2.GC_PR_FGD, cv2.GC_PR_BGD], cv2.GC_BGD).astype(np.uint8)
    cv2.setRNGSeed(seed)  # GrabCut's generator is its thread's own, and moved on with the last face
    cv2.grabCut(small, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 1, cv2.GC_INIT_WITH_MASK)
    is_face = (labels & 1).astype(np.float32)  # GC_FGD and GC_PR_FGD are odd
    is_face = cv2.resize(is_face, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA)

    ovals, weighted, log_prior = candidate_ovals()
    # einsum, not @: BLAS starts threads of its own and may sum in an order that depends on them
    score = np.einsum("kp,p->k", weighted, 2 * is_face.ravel() - 1) + log_prior
    posterior = np.exp(score - score.max())
    height, width, turn = (posterior[:, None] * ovals).sum(0) / posterior.sum()
    return np.where(oval(image.shape[:2], height, width, turn) < 1, 255, 0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Face-parsing network
# ------------------------------------------------------------------------------------------------------------

NETWORK_INPUT, NETWORK_OUTPUT = (1, 3, 512, 512), (1, 19, 512, 512)
FACE_CLASSES = (1, 13)  # first and last: skin, brows, eyes, glasses, ears, earrings, nose, mouth, lips


def network_logits(network: cv2.dnn.Net, blob: np.ndarray) -> np.ndarray:
    """Logits (1, 19, 512, 512) of RGB (1, 3, 512, 512), ImageNet-normalised: the first declared output."""
    network.setInput(blob)
    return network.forward(network.getUnconnectedOutLayersNames()[0])  # the others only served in training


def network_mask(image: np.ndarray, network: cv2.dnn.Net) -> np.ndarray:
    """Face mask, uint8 0/255 (H, W), of an image, uint8 BGR (H, W, 3): where a face's class is likeliest."""
    rgb = cv2.cvtColor(cv2.resize(image, NETWORK_INPUT[2:]), cv2.COLOR_BGR2RGB)
    blob = ((rgb / 255 - PIXEL_MEAN) / PIXEL_STD).astype(np.float32).transpose(2, 0, 1)[None]
    classes = network_logits(network, np.ascontiguousarray(blob))[0].argmax(0)  # 512x512
    mask = cv2.inRange(classes.astype(np.uint8), *FACE_CLASSES)
    mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def mask_function(name: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """From `--parser` a function of image (H, W, 3) to mask (H, W) that threads can share, or a UserError."""
    if name == "grabcut":
        return partial(grabcut_mask, seed=seed % 2**31)
    if not Path(name).is_file():
        raise UserError(f"--parser {name} is not a file: give grabcut or the path of a face-parsing ONNX")
    try:
        shape = network_logits(cv2.dnn.readNetFromONNX(name), np.zeros(NETWORK_INPUT, np.float32)).shape
    except cv2.error:
        shape = None
    if shape != NETWORK_OUTPUT:
        raise UserError(f"--parser {name} is no face-parsing ONNX: take resnet18.onnx of yakhyo/face-parsing")
    local = threading.local()  # a network holds its activations: one a thread

    def find_mask(image: np.ndarray) -> np.ndarray:
        if not hasattr(local, "network"):
            local.network = cv2.dnn.readNetFromONNX(name)
        return network_mask(image, local.network)

    return find_mask


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

# The quickest level and filter that do not cost size: two PNGs take a third as long as the mask itself
PNG_FLAGS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
MAX_BYTES = 64 * 2**20  # of one file: an archive may say less than it unpacks to


def read_alone(read: Callable, *args) -> bytes:
    """What `read` returns of a file whose damage is its own: in a folder or a .zip, not in a .tar.gz."""
    try:
        return read(*args)
    except (OSError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_files(source: Path, output: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yields name, size, reader of each file in a folder (but for the output's) or archive, in a fixed order.

    Nothing is unpacked: call a reader before asking for the next file; it raises ValueError for a file that
    cannot be read though others can. UserError if there is no source.
    """
    if source.is_dir():
        root, output = source.resolve(), output.resolve()
        own = output if root in output.parents else None
        for path in sorted(root.rglob("*")):
            if path.is_file() and own not in path.parents:
                yield (
                    path.relative_to(root).as_posix(),
                    path.stat().st_size,
                    partial(read_alone, path.read_bytes),
                )
    elif not source.is_file():
        raise UserError(f"--input {source} does not exist: name a folder, .tar.gz or .zip of UTKFace's faces")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    yield member.filename, member.file_size, partial(read_alone, archive.read, member)
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, member.size, archive.extractfile(member).read


def write_pair(data: bytes, stem: str, output: Path, find_mask: Callable) -> tuple[str | None, bool]:
    """Writes image and mask of an encoded face: why it cannot be used, if so, and whether it is square."""
    try:
        image = decode_image(data)
    except ValueError as error:
        return str(error), False
    for part, pixels in (("mask", find_mask(image)), ("image", image)):  # never an image without its mask
        encoded = cv2.imencode(".png", pixels, PNG_FLAGS)[1]
        with atomic_path(output / f"{stem}_{part}.png") as temporary:
            temporary.write_bytes(encoded)
    return None, image.shape[0] == image.shape[1]


def write_pairs(args, find_mask: Callable) -> tuple[int, int, int, list[dict]]:
    """Writes the missing pairs; how many, how many of them not square, how many were there; skipped files."""
    source, output, workers = Path(args.input), Path(args.output), max(args.workers, 1)
    there = set(os.listdir(output)) if output.is_dir() and not args.overwrite else set()
    written, not_square, found, first, skipped, pending = 0, 0, 0, {}, [], deque()

    def skip(name: str, reason: str):
        skipped.append({"file": name, "reason": reason})

    def finish_oldest():
        nonlocal written, not_square
        name, pair = pending.popleft()
        reason, square = pair.result()
        if reason:
            skip(name, reason)
        else:
            written, not_square = written + 1, not_square + (not square)

    with ThreadPoolExecutor(workers) as pool, progress(desc="masks", unit=" files") as bar:
        try:
            for name, size, read in read_files(source, output):
                bar.update()
                face = parse_name(PurePosixPath(name).name)
                if not face:
                    skip(name, "malformed name")
                elif face.stem in first:
                    skip(name, f"same name as {first[face.stem]}")
                else:
                    first[face.stem] = name
                    if size > MAX_BYTES:
                        skip(name, f"larger than {MAX_BYTES // 2**20} MiB")
                    elif {f"{face.stem}_image.png", f"{face.stem}_mask.png"} <= there:
                        found += 1
                    else:
                        try:
                            data = read()
                        except ValueError as error:
                            skip(name, str(error))
                            continue
                        pending.append((name, pool.submit(write_pair, data, face.stem, output, find_mask)))
                if len(pending) > 16 * workers:  # an archive need not fit in memory
                    finish_oldest()
            while pending:
                finish_oldest()
        except (OSError, EOFError, RuntimeError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            reason = str(error).split(":")[0]  # tarfile goes on with a line for each format that it tried
            raise UserError(
                f"--input {source}: {reason}; give a folder, or a whole .tar.gz or .zip"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if not first:
        raise UserError(
            f"--input {source}: none of its {len(skipped)} files is named "
            "<age>_<gender>_<race>_<timestamp>.jpg; name UTKFace's folder or archive"
        )
    return written, not_square, found, skipped


def contact_sheet(output: Path, stems: list[str], count: int = 36, columns: int = 4, side: int = 104):
    """PIL image that shows image, mask and overlay of `count` faces spread evenly over `stems`."""
    margin, header, footer = 28, 64, 30
    chosen = [stems[i] for i in np.unique(np.linspace(0, len(stems) - 1, count).astype(int))]
    size = (margin + columns * (3 * side + margin), header + -(-len(chosen) // columns) * (side + footer))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 20), f"{len(stems):,} faces: image, mask, overlay", "#222", ImageFont.load_default(20))
    for i, stem in enumerate(chosen):
        image, mask = (read_image(output / f"{stem}_{part}.png") for part in ("image", "mask"))
        image, mask = (cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA) for a in (image, mask))
        overlay = (image * (0.35 + 0.65 * mask / 255)).astype(np.uint8)
        contours = cv2.findContours(mask[..., 0] // 128, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(overlay, contours, -1, (120, 230, 90), 1, cv2.LINE_AA)
        triple = cv2.cvtColor(np.hstack([image, mask, overlay]), cv2.COLOR_BGR2RGB)
        left, top = margin + i % columns * (3 * side + margin), header + i // columns * (side + footer)
        sheet.paste(Image.fromarray(triple), (left, top))
        draw.text((left, top + side + 3), f"age {stem.split('_')[0]}", "#777", ImageFont.load_default(12))
    return sheet


def get_parser():
    parser = script_parser("masks", __doc__)
    add = parser.add_argument
    add("--input", default="dataset/raw", help="folder, .tar.gz or .zip of UTKFace's faces")
    add("--output", default="dataset/processed", help="folder for images and masks")
    add("--parser", default="grabcut", help="grabcut, or the path of a face-parsing ONNX")
    return parser


def main(args):
    output = Path(args.output)
    check_writable("--output", output)
    if output.resolve() == Path(args.input).resolve():
        raise UserError(f"--output {output} is --input as well: name another folder")
    find_mask = mask_function(args.parser, args.seed)
    remove_leftovers(output)

    start = time.perf_counter()
    written, not_square, found, skipped = write_pairs(args, find_mask)
    speed = written / (time.perf_counter() - start)

    skipped.sort(key=lambda row: (row["file"], row["reason"]))
    write_csv(output / "skipped.csv", skipped, ["file", "reason"])
    names = set(os.listdir(output))
    stems = [name.removesuffix("_mask.png") for name in sorted(names) if name.endswith("_mask.png")]
    stems = [stem for stem in stems if f"{stem}_image.png" in names]
    if stems:
        with atomic_path(output / "preview.png") as temporary:
            contact_sheet(output, stems).save(temporary)
    if not_square:
        print(
            f"warning: {not_square:,} pictures are not square: training, evaluation and prediction look at "
            "their central square",
            file=sys.stderr,
        )
    print(
        f"{output}: {written + found + len(skipped):,} files: {written:,} pairs written ({speed:.0f}/s), "
        f"{found:,} already there, {len(skipped):,} skipped (see skipped.csv); preview.png shows some"
    )


if __name__ == "__main__":
    run(main, get_parser())
