"""Finds the face in each UTKFace crop and writes it as an image and a mask.

    python masks.py --input UTKFace.tar.gz                  # or a folder, or a .zip
    python masks.py --input photos/ --parser resnet18.onnx  # masks by a face-parsing network

Writes `<age>_<gender>_<race>_<timestamp>_image.png` (RGB, original size) and `…_mask.png` (same size, one channel,
0/255) into `--output`, with `skipped.csv` (what was left out, and why) and `preview.png` (a contact sheet to look at).
Pairs that are already there stay as they are, so an interrupted run goes on where it stopped.
"""

import os
import tarfile
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import UserError, atomic_path, parse_name, run, script_parser, write_csv

# ----------------------------------------------------------------------------------------------------------------
# Default parser: GrabCut, then the face oval that agrees best with it
# ----------------------------------------------------------------------------------------------------------------

# The face oval in UTKFace's aligned crops, as mean and standard deviation over faces, in fractions of the crop's
# sides. Eyes and mouth are aligned, so faces differ in how far chin and cheeks reach and in how far they are turned.
TOP = -0.026  # where the hairline lies: just outside the crop
HEIGHT = (0.975, 0.03)  # hairline to chin
WIDTH = (0.403, 0.02)  # half the face's breadth
TURN = (0.0, 0.14)  # shift of the cheeks when the head is turned
TURN_ENDS = 0.45  # how much of that shift the chin and the hairline share
JAW = 0.1755  # how much the oval narrows towards the chin
SQUARENESS = 2.6  # of the oval; an ellipse has 2

SIDE = 48  # pixels at which GrabCut runs: what is finer does not help to place an oval
CORE, FACE, RIM = 0.4, 0.97, 1.28  # of the mean oval: face within CORE, probably so to FACE, background beyond RIM
NEUTRAL, CONTRAST = (0, 128, 128), (1, 2, 2)  # of L, a, b: colour tells skin from background better than light
EVIDENCE = 0.27  # log-odds that a pixel's label adds: neighbours repeat each other, so far less than it seems
RELIABLE = (0.6, 0.2)  # height (mean, deviation) at which labels count most: above is hair, below is neck


def oval(shape: tuple[int, int], height: float, width: float, turn: float) -> np.ndarray:
    """Distance from the oval's centre as float (H, W): below 1 inside the oval, 1 on its contour."""
    y = (np.arange(shape[0])[:, None] + 0.5) / shape[0]
    x = (np.arange(shape[1])[None] + 0.5) / shape[1]
    v = 2 * (y - TOP) / height - 1  # -1 at the hairline, 1 at the chin
    centre = 0.5 + turn * (1 - (1 - TURN_ENDS) * np.minimum(v * v, 1))
    u = (x - centre) / (width * (1 - JAW * v))
    return (np.abs(u) ** SQUARENESS + np.abs(v) ** SQUARENESS) ** (1 / SQUARENESS)


@cache
def candidate_ovals() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid of K ovals: height, width, turn (K, 3); weighted pixels (K, SIDE²/4); log prior (K,)."""
    ovals = np.array(list(product(*(np.linspace(m - 2.5 * s, m + 2.5 * s, n) for m, s, n in GRID))))
    inside = np.stack([oval((2 * SIDE, 2 * SIDE), *shape) < 1 for shape in ovals])
    inside = inside.reshape(len(ovals), SIDE // 2, 4, SIDE // 2, 4).mean((2, 4))
    y = (np.arange(SIDE // 2) + 0.5) / (SIDE // 2)
    weight = EVIDENCE * np.exp(-(((y - RELIABLE[0]) / RELIABLE[1]) ** 2) / 2)
    templates = (inside * weight[:, None]).reshape(len(ovals), -1).astype(np.float32)
    mean, deviation, _ = np.array(GRID).T
    return ovals, templates, -(((ovals - mean) / deviation) ** 2).sum(1) / 2


GRID = (*HEIGHT, 4), (*WIDTH, 8), (*TURN, 17)


def grabcut_mask(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """Face mask uint8 0/255 (H, W) of a UTKFace-like crop uint8 BGR (H, W, 3).

    GrabCut (Rother et al. 2004) labels pixels but also takes neck, ears and hair for face; so the mask is the oval
    expected given its labels, under a Gaussian prior on the oval's height, width and turn.
    """
    small = cv2.cvtColor(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2Lab)
    small = np.clip((small - NEUTRAL) * CONTRAST + NEUTRAL, 0, 255).astype(np.uint8)
    distance = oval((SIDE, SIDE), HEIGHT[0], WIDTH[0], TURN[0])
    labels = np.select(
        [distance < CORE, distance < FACE, distance < RIM],
        [cv2.GC_FGD, cv2.GC_PR_FGD, cv2.GC_PR_BGD],
        cv2.GC_BGD,
    ).astype(np.uint8)
    cv2.setRNGSeed(seed)  # the generator is the thread's own: masks must not depend on who made the last one
    cv2.grabCut(small, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 1, cv2.GC_INIT_WITH_MASK)
    is_face = (labels & 1).astype(np.float32)  # GC_FGD and GC_PR_FGD are the odd labels
    is_face = cv2.resize(is_face, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_AREA)

    ovals, templates, log_prior = candidate_ovals()
    # einsum, not @: BLAS would start threads of its own, and sum in an order that depends on them
    score = np.einsum("kp,p->k", templates, 2 * is_face.ravel() - 1) + log_prior
    posterior = np.exp(score - score.max())
    expected = posterior @ ovals / posterior.sum()
    return np.where(oval(image.shape[:2], *expected) < 1, 255, 0).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------
# Face-parsing network
# ----------------------------------------------------------------------------------------------------------------

PARSER_SIDE, PARSER_CLASSES = 512, 19
FACE_CLASSES = (1, 13)  # first and last: skin, brows, eyes, glasses, ears, earring, nose, mouth and lips
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB


def load_network(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Function from a blob float32 (1, 3, 512, 512) to logits (1, 19, 512, 512); UserError if it is no such net."""
    try:
        network = cv2.dnn.readNetFromONNX(path)
        name = network.getUnconnectedOutLayersNames()[0]  # the others are auxiliary, for training

        def logits(blob: np.ndarray) -> np.ndarray:
            network.setInput(blob)
            return network.forward(name)

        shape = logits(np.zeros((1, 3, PARSER_SIDE, PARSER_SIDE), np.float32)).shape
    except cv2.error:
        shape = None
    if shape != (1, PARSER_CLASSES, PARSER_SIDE, PARSER_SIDE):
        raise UserError(f"--parser {path} is no face-parsing ONNX: take resnet18.onnx of yakhyo/face-parsing")
    return logits


def network_mask(image: np.ndarray, logits: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Face mask uint8 0/255 (H, W) of an image uint8 BGR (H, W, 3): where one of the face's classes is likeliest."""
    rgb = cv2.cvtColor(cv2.resize(image, (PARSER_SIDE, PARSER_SIDE)), cv2.COLOR_BGR2RGB)
    blob = ((rgb / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32).transpose(2, 0, 1)[None]
    classes = logits(np.ascontiguousarray(blob))[0].argmax(0)  # 512x512
    mask = cv2.inRange(classes.astype(np.uint8), *FACE_CLASSES)
    mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def choose_parser(name: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Function from image (H, W, 3) to mask (H, W), safe to call from many threads; UserError for a bad `--parser`."""
    if name == "grabcut":
        return lambda image: grabcut_mask(image, seed % 2**31)
    if not Path(name).is_file():
        raise UserError(f"--parser {name} is not a file: give grabcut or the path of a face-parsing ONNX")
    load_network(name)  # a wrong file should be reported before any work
    local = threading.local()  # a network holds its activations: one a thread

    def parse(image: np.ndarray) -> np.ndarray:
        if not hasattr(local, "logits"):
            local.logits = load_network(name)
        return network_mask(image, local.logits)

    return parse


# ----------------------------------------------------------------------------------------------------------------
# Reading faces, writing pairs
# ----------------------------------------------------------------------------------------------------------------


def read_files(source: Path, output: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the name and a reader of each file in a folder or archive, in a fixed order, without unpacking it.

    A reader must be called before the next file is asked for. UserError if there is nothing to read.
    """
    if source.is_dir():
        inside = output.resolve()
        for path in sorted(source.rglob("*")):
            if path.is_file() and inside not in path.resolve().parents:
                yield path.relative_to(source).as_posix(), path.read_bytes
    elif not source.is_file():
        raise UserError(f"--input {source} does not exist: name a folder, .tar.gz or .zip of UTKFace's faces")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    yield member.filename, lambda member=member: archive.read(member)
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, lambda member=member: archive.extractfile(member).read()


def write_pair(data: bytes, stem: str, output: Path, parse: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Writes the image and mask of one encoded face; False if it cannot be decoded."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        return False
    for part, pixels in (("mask", parse(image)), ("image", image)):  # never an image without its mask
        encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        with atomic_path(output / f"{stem}_{part}.png") as temporary:
            temporary.write_bytes(encoded)
    return True


def contact_sheet(output: Path, stems: list[str], count: int = 36, columns: int = 4, side: int = 104) -> Image.Image:
    """Image, mask and overlay of faces spread evenly over the pairs in a folder."""
    margin, header, footer = 28, 64, 30
    chosen = [stems[i] for i in np.unique(np.linspace(0, len(stems) - 1, count).astype(int))]
    rows, columns = -(-len(chosen) // columns), min(columns, len(chosen))
    size = (margin + columns * (3 * side + margin), header + rows * (side + footer))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 20), f"{len(stems):,} faces: image, mask, overlay", "#222", ImageFont.load_default(20))
    for i, stem in enumerate(chosen):
        image = cv2.imread(str(output / f"{stem}_image.png"))
        mask = cv2.imread(str(output / f"{stem}_mask.png"), cv2.IMREAD_GRAYSCALE)
        image, mask = (cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA) for a in (image, mask))
        overlay = (image * (0.35 + 0.65 * (mask[..., None] / 255))).astype(np.uint8)
        contours = cv2.findContours(cv2.inRange(mask, 128, 255), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(overlay, contours, -1, (120, 230, 90), 1, cv2.LINE_AA)
        triple = np.hstack([image, cv2.cvtColor(mask, cv2.COLOR_GRAY2BGR), overlay])[..., ::-1]
        left, top = margin + i % columns * (3 * side + margin), header + i // columns * (side + footer)
        sheet.paste(Image.fromarray(np.ascontiguousarray(triple)), (left, top))
        draw.text((left, top + side + 3), f"age {parse_name(stem + '.png').age}", "#777", ImageFont.load_default(12))
    return sheet


def get_parser():
    parser = script_parser("masks", __doc__)
    parser.add_argument("--input", default="dataset/raw", help="folder, .tar.gz or .zip of UTKFace's faces")
    parser.add_argument("--output", default="dataset/processed", help="folder for images and masks")
    parser.add_argument("--parser", default="grabcut", help="grabcut, or the path of a face-parsing ONNX (BiSeNet)")
    return parser


def main(args):
    source, output, workers = Path(args.input), Path(args.output), max(args.workers, 1)
    parse = choose_parser(args.parser, args.seed)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    there = set(os.listdir(output)) if output.is_dir() else set()
    for name in there:
        if name.startswith(".tmp-"):  # what a killed run could not clean up
            (output / name).unlink()

    seen, first, skipped, pending = 0, {}, [], deque()
    written = kept = 0
    start = time.perf_counter()

    def skip(name: str, reason: str):
        skipped.append({"file": name.encode(errors="backslashreplace").decode(), "reason": reason})

    def finish_oldest():
        nonlocal written
        name, future = pending.popleft()
        if future.result():
            written += 1
        else:
            skip(name, "unreadable image")

    with ThreadPoolExecutor(workers) as pool, tqdm(unit=" files", desc="masks") as bar:
        try:
            for name, read in read_files(source, output):
                seen += 1
                bar.update()
                face = parse_name(Path(name).name)
                if not face:
                    skip(name, "malformed name")
                elif face.stem in first:
                    skip(name, f"same name as {first[face.stem]}")
                else:
                    first[face.stem] = name
                    if not args.overwrite and {f"{face.stem}_image.png", f"{face.stem}_mask.png"} <= there:
                        kept += 1
                        continue
                    pending.append((name, pool.submit(write_pair, read(), face.stem, output, parse)))
                    if len(pending) > 16 * workers:  # an archive need not fit in memory
                        finish_oldest()
            while pending:
                finish_oldest()
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"--input {source} is no archive, or a damaged one ({error}): get it again") from None
        finally:
            pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - start
    if not first:
        raise UserError(
            f"--input {source} holds no file named like UTKFace's, <age>_<gender>_<race>_<timestamp>.jpg: "
            f"{seen} files seen"
        )
    write_csv(output / "skipped.csv", sorted(skipped, key=lambda row: tuple(row.values())), ["file", "reason"])
    names = set(os.listdir(output))
    stems = sorted(n[:-9] for n in names if n.endswith("_mask.png") and f"{n[:-9]}_image.png" in names)
    if stems:
        with atomic_path(output / "preview.png") as temporary:
            contact_sheet(output, stems).save(temporary)
    print(
        f"masks: {written} pairs written, {kept} already there, {len(skipped)} skipped of {seen} files "
        f"({written / seconds:.0f} faces/s) in {output}"
    )


if __name__ == "__main__":
    run(main, get_parser())
