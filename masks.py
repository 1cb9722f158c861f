"""Finds the face in each crop and writes it as an image and a mask.

    python masks.py --input UTKFace.tar.gz                      # or a folder, or a .zip
    python masks.py --input faces/ --labels faces.csv           # own faces: a table of file and age
    python masks.py --input photos/ --labels faces.csv --detect # whole photographs
    python masks.py --input faces/ --parser resnet18.onnx       # masks by a face-parsing network

Writes `<age>_<gender>_<race>_<timestamp>_image.png` (RGB, original size) and `…_mask.png` (same size, one
channel, 0/255) into `--output`, with `skipped.csv` (what was left out, and why) and `preview.png` (a contact
sheet to look at). Own faces have the path of their picture in place of the timestamp; docs/own_data.md tells
more. Pairs that are already there stay as they are: an interrupted run goes on where it stopped.
"""

import posixpath
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path

import cv2
import numpy as np

import cli
import faces
import inputs
import utkface

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

NETWORK_SIDE, NETWORK_OUTPUT = 512, (1, 19, 512, 512)
FACE_CLASSES = (1, 13)  # first and last: skin, brows, eyes, glasses, ears, earrings, nose, mouth, lips


@cache
def load_network(path: str, thread: int) -> cv2.dnn.Net:
    """The network of one thread, since it holds the activations of the picture at work."""
    return cv2.dnn.readNetFromONNX(path)


def network_mask(image: np.ndarray, path: str) -> np.ndarray:
    """Face mask, uint8 0/255 (H, W), of an image, uint8 BGR (H, W, 3): where a face's class is likeliest.

    path: an ONNX file. Raises ValueError or cv2.error if it is no face-parsing network.
    """
    rgb = cv2.cvtColor(cv2.resize(image, (NETWORK_SIDE, NETWORK_SIDE)), cv2.COLOR_BGR2RGB)
    blob = ((rgb / 255 - utkface.PIXEL_MEAN) / utkface.PIXEL_STD).astype(np.float32)
    network = load_network(path, threading.get_ident())
    network.setInput(np.ascontiguousarray(blob.transpose(2, 0, 1)[None]))  # 1x3x512x512
    # The first declared output: the others only served in training
    logits = network.forward(network.getUnconnectedOutLayersNames()[0])  # 1x19x512x512
    if logits.shape != NETWORK_OUTPUT:
        raise ValueError(f"logits {logits.shape}, not {NETWORK_OUTPUT}")
    mask = cv2.inRange(logits[0].argmax(0).astype(np.uint8), *FACE_CLASSES)  # 512x512
    mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def mask_function(parser: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """From `--parser` a function of image (H, W, 3) to mask (H, W) that threads can share, or a UserError."""
    if parser == "grabcut":
        return partial(grabcut_mask, seed=seed % 2**31)
    try:
        network_mask(np.zeros((64, 64, 3), np.uint8), parser)
    except (cv2.error, ValueError):
        known = "grabcut, or resnet18.onnx of yakhyo/face-parsing"
        raise cli.UserError(f"--parser {parser} is no face-parsing ONNX: give {known}") from None
    return partial(network_mask, path=parser)


# ------------------------------------------------------------------------------------------------------------
# Whole photographs
# ------------------------------------------------------------------------------------------------------------

# How much edges speak for a crop like UTKFace's, on the left half of an 8x8 grid, which the right half
# mirrors: upright edges (left four columns) and level ones. By linear discriminant analysis of 4,000 faces
# against 2,800 photographs that other faces were pasted into. Of 6,000 further faces 0.3 % lie below.
EDGE_WEIGHTS = np.array([
    [1, 2, 0, -4, 0, -2, 0, 3],
    [-1, -2, -4, -2, -2, 0, 8, -1],
    [2, -1, 1, 9, -2, 4, 6, -7],
    [2, -1, -9, 1, -1, -1, 4, -6],
    [0, -1, 1, 0, -3, -1, -2, 5],
    [0, 2, 1, -7, 0, -5, 0, 8],
    [0, 1, 1, -2, 1, -1, -5, 5],
    [2, 1, 2, 4, 2, 1, 2, 3],
])  # fmt: skip
EDGE_THRESHOLD, LONGEST_ASPECT = 40, 1.3


def looks_like_a_crop(image: np.ndarray) -> bool:
    """Whether a picture, uint8 BGR (H, W, 3), has its edges where UTKFace's crops have theirs."""
    grey = cv2.cvtColor(utkface.resize(image, 64), cv2.COLOR_BGR2GRAY).astype(np.float32)
    grey -= cv2.GaussianBlur(grey, (0, 0), 8)
    grey /= np.sqrt(cv2.GaussianBlur(grey * grey, (0, 0), 8)) + 4  # whatever the light
    edges = [np.abs(cv2.Sobel(grey, cv2.CV_32F, *axis)) for axis in ((1, 0), (0, 1))]
    edges = [cv2.resize(edge, (8, 8), interpolation=cv2.INTER_AREA) for edge in edges]
    edges = np.hstack([(edge + edge[:, ::-1])[:, :4] / 2 for edge in edges])  # 8x8
    aspect = max(image.shape[:2]) / min(image.shape[:2])
    return aspect <= LONGEST_ASPECT and (edges * EDGE_WEIGHTS).sum() >= EDGE_THRESHOLD


def single_face(image: np.ndarray, detect: Callable, largest: bool) -> np.ndarray:
    """The crop, uint8 BGR (S, S, 3), of the face in a photograph (H, W, 3); ValueError if it is not clear."""
    crops = faces.find_crops(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), detect)
    if not crops:
        raise ValueError("no face found")
    if len(crops) > 1 and not largest:
        raise ValueError("several faces found, of which --detect largest takes the largest")
    crop = max(crops, key=lambda crop: crop.box[2] * crop.box[3])
    return cv2.cvtColor(crop.pixels, cv2.COLOR_RGB2BGR)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

# The quickest level and filter that do not cost size: two PNGs take a third as long as the mask itself
PNG_FLAGS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
MAX_BYTES = 64 * 2**20  # of one file: an archive may say less than it unpacks to
MALFORMED = "malformed name"
NOTES = {  # what is said of pictures that are used
    "crop": "may be no face crops like UTKFace's (give --detect --overwrite for whole photographs)",
    "square": "are not square (training, evaluation and prediction look at the central square)",
    "pages": "have several pages, of which the first is used",
}


def list_jobs(args, files: list, skipped: list) -> list[tuple[str, str, Callable]]:
    """(file, stem, reader) of each picture to use; adds (file, reason) of the others to `skipped`."""
    names = [name for name, *_ in files]
    if args.labels:
        stems, reasons = inputs.match_labels(inputs.read_labels(args.labels), names, Path(args.input))
    else:
        labels = {name: utkface.parse_name(posixpath.basename(name)) for name in names}
        stems = {name: face.stem for name, face in labels.items() if face}
        reasons = dict.fromkeys(labels.keys() - stems.keys(), MALFORMED)
    skipped += reasons.items()
    jobs, first = [], {}
    for name, size, read in files:
        stem = stems.get(name)
        if stem in first:
            skipped.append((name, f"same name as {first[stem]}"))
        elif stem and size > MAX_BYTES:
            skipped.append((name, f"larger than {MAX_BYTES // 2**20} MiB"))
        elif stem:
            first[stem] = name
            jobs.append((name, stem, read))
    return jobs


def remove_other_labels(output: Path, names: list[str], jobs: list, overwrite: bool):
    """Removes pairs of the pictures `names` that have another label now, or none.

    UserError without `overwrite`.
    """
    stems = dict.fromkeys(map(inputs.encode_path, names))  # by picture
    stems |= {inputs.encode_path(name): stem for name, stem, _ in jobs}
    for path in output.glob("[!.]*_image.png"):
        stem = path.name.removesuffix("_image.png")
        if stems.get(stem.split("_", 3)[-1], stem) != stem:
            if not overwrite:
                why = "has another label in --labels, or none"
                raise cli.UserError(f"{path} {why}: --overwrite replaces or removes it")
            remove_pair(output, stem)


def remove_pair(output: Path, stem: str):
    for part in ("image", "mask"):  # in this order: there is never an image without its mask
        (output / f"{stem}_{part}.png").unlink(missing_ok=True)


def write_png(path: Path, pixels: np.ndarray):
    encoded = cv2.imencode(".png", pixels, PNG_FLAGS)[1]
    with cli.atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def is_written(output: Path, stem: str) -> bool:
    return all((output / f"{stem}_{part}.png").is_file() for part in ("image", "mask"))


def write_pair(data: bytes, stem: str, output: Path, find_mask: Callable, find_face: Callable) -> list[str]:
    """Writes image and mask of an encoded picture; returns which of `NOTES` hold of it.

    find_face: from a photograph to the crop of its face, or None for crops. Raises ValueError if the picture
    cannot be used.
    """
    image = utkface.decode_image(data, max_pixels=utkface.MAX_PIXELS * (2 if find_face else 1))
    notes = ["pages"] if utkface.page_count(data) > 1 else []
    if find_face:
        image = find_face(image)
    elif not looks_like_a_crop(image):
        notes.append("crop")
    if image.shape[0] != image.shape[1]:
        notes.append("square")
    write_png(output / f"{stem}_mask.png", find_mask(image))
    write_png(output / f"{stem}_image.png", image)  # last: there is never an image without its mask
    return notes


def write_pairs(jobs: list, write: Callable, workers: int) -> list[tuple[str, list[str], str]]:
    """Writes each (file, stem, reader); returns each file, its notes, and why it was skipped ("" if not)."""
    queue, lock = iter(jobs), threading.Lock()

    def write_next(_):
        try:
            with lock:  # an archive is read in its order, and only as fast as it is written
                name, stem, read = next(queue)
                data = read()
            return name, write(data, stem), ""
        except ValueError as error:
            return name, [], str(error)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            results = pool.map(write_next, jobs)
            return list(cli.progress(results, "masks", len(jobs), unit=" files"))
        finally:
            pool.shutdown(cancel_futures=True)


def contact_sheet(output: Path, stems: list[str]) -> np.ndarray:
    """Image, mask and overlay of 36 faces spread evenly over `stems`, uint8 BGR (H, W, 3)."""
    side, columns, tiles = 104, 4, []
    for i in np.unique(np.linspace(0, len(stems) - 1, 36).astype(int)):
        image, mask = (utkface.read_image(output / f"{stems[i]}_{part}.png") for part in ("image", "mask"))
        image, mask = utkface.resize(image, side), utkface.resize(mask, side)
        overlay = (image * (0.35 + 0.65 * mask / 255)).astype(np.uint8)
        tile = np.hstack([image, mask, overlay])
        tile = cv2.copyMakeBorder(tile, 8, 24, 14, 14, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        age, font = stems[i].split("_")[0], cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(tile, f"age {age}", (14, side + 24), font, 0.4, (100, 100, 100), 1, cv2.LINE_AA)
        tiles.append(tile)
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def get_parser():
    parser = cli.script_parser("masks", __doc__)
    # fmt: off
    add = parser.add_argument
    add("--input", default="dataset/raw", help="folder, .tar.gz or .zip of UTKFace's faces, or of own ones")
    add("--labels", metavar="FILE.csv", help="table of own faces: file, age, and perhaps gender and race")
    add("--detect", nargs="?", choices=["single", "largest"], const="single",
        help="whole photographs: find the one face in each, or the largest")
    add("--detector", metavar="FILE.onnx", help="another YuNet than the one that is downloaded")
    add("--output", default="dataset/processed", help="folder for images and masks")
    add("--parser", default="grabcut", help="grabcut, or the path of a face-parsing ONNX")
    # fmt: on
    return parser


def main(args):
    output = Path(args.output)
    cli.check_writable("--output", output)
    if output.resolve() == Path(args.input).resolve():
        raise cli.UserError(f"--output {output} is --input as well: name another folder")
    if args.detector and not args.detect:
        raise cli.UserError("--detector serves --detect alone: give both, or neither")
    find_mask, find_face = mask_function(args.parser, args.seed), None
    if args.detect:
        detect = faces.open_detector(args.detector)
        find_face = partial(single_face, detect=detect, largest=args.detect == "largest")
    write = partial(write_pair, output=output, find_mask=find_mask, find_face=find_face)
    cli.remove_leftovers(output)

    with inputs.open_files(Path(args.input), output) as (files, skipped):
        total = len(files) + len(skipped)
        jobs = list_jobs(args, files, skipped)
        if args.labels:
            remove_other_labels(output, [name for name, *_ in files], jobs, args.overwrite)
        missing = [job for job in jobs if args.overwrite or not is_written(output, job[1])]
        results = write_pairs(missing, write, args.workers)
    failed = {name: reason for name, _, reason in results if reason}
    kept = 0
    for name, stem, _ in missing:
        if failed.get(name, "").startswith("cannot be read"):  # today, and tomorrow it may be
            kept += is_written(output, stem)
        elif name in failed:
            remove_pair(output, stem)  # that an earlier run has made of it
    if kept:
        print(f"warning: {kept:,} pictures cannot be read now; their pairs stay", file=sys.stderr)
    skipped = sorted([*skipped, *failed.items()])
    written, there = len(missing) - len(failed), len(jobs) - len(missing)

    skips = f"{len(skipped):,} skipped"
    if skipped:
        [(reason, count)] = Counter(reason.split(":")[0] for _, reason in skipped).most_common(1)
        skips += f", most of them ({count:,}) for: {reason}"
    if total:
        rows = [{"file": name, "reason": reason} for name, reason in skipped]
        cli.write_csv(output / "skipped.csv", rows, ["file", "reason"])
    if not written + there:
        remedy = f"see {output / 'skipped.csv'}"
        if MALFORMED in skips or not skipped:
            remedy = "name UTKFace's folder or archive, or give --labels"
        raise cli.UserError(
            f"--input {args.input}: none of its {total:,} files can be used: {skips}; {remedy}"
        )
    stems = sorted(stem for _, stem, _ in jobs if is_written(output, stem))
    write_png(output / "preview.png", contact_sheet(output, stems))
    others = len(list(output.glob("[!.]*_image.png"))) - len(stems)
    if others:
        print(f"warning: {output} holds {others:,} pairs that are not of this --input", file=sys.stderr)
    for note, text in NOTES.items():
        names = [name for name, notes, _ in results if note in notes]
        if names:
            such = cli.as_text(min(names))
            print(f"warning: pictures that {text}: {len(names):,}, such as {such}", file=sys.stderr)
    print(
        f"{output}: {total:,} files: {written:,} pairs written, {there:,} already there, {skips}; "
        "see skipped.csv and preview.png"
    )


if __name__ == "__main__":
    cli.run(main, get_parser())
