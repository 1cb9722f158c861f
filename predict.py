"""Finds the faces in any photographs and tells their age group, their age, and where each face is.

    python predict.py photo.jpg folder/ --csv faces.csv --overlay drawn
    python predict.py clip.mp4 --every 10 --csv faces.csv --overlay drawn
    python predict.py --aligned UTKFace/  # pictures that are face crops already, as UTKFace's are

Faces are found by YuNet, which is downloaded once into torch.hub's cache. From Python: `load` and `predict`.
"""

import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, groupby, islice, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import cli
import drawing
from cli import UserError, as_text
from common import faces_at_once, infer, load_model, to_input
from devices import autocast, choose_device, choose_precision
from faces import LANDMARK_NAMES, MIN_FACE, MIN_SCORE, NOTICED, Crop, find_crops, open_detector, place_mask
from utkface import AGE_GROUPS, GROUP_NAMES, MIN_SIDE, decode_image, flatten, page_count, walk_files

AGES = ("predicted_age", "age_low", "age_high")
RELEASED = "weights/age_multitask.pt"
READABLE = 24  # pixels of a face's longer side, below which its age cannot be read (docs/model_card.md)
MAX_PIXELS = 100_000_000  # of a photograph, which takes 0.7 GB, or 1.4 if transparent
MAX_FRAME = 50_000_000  # pixels of a video's frame, of which more are held
MAX_BYTES = 2**30  # of a picture's file
CHUNK, FRAMES = 32, 8  # pictures read while those before are scored; of videos, which stay in memory, fewer
BATCH = 32  # faces scored at a time, as `faces_at_once` takes it
SUFFIXES = {  # what the decoder reads, where Pillow and OpenCV were built with it
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# The model on the faces of one picture
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """What `predict` needs, from `load`. It can be pickled, and threads can share it."""

    model: torch.nn.Module
    image_size: int
    device: torch.device
    dtype: torch.dtype
    detect: Callable | None  # as `open_detector` returns it
    process: int = field(default_factory=os.getpid)

    def __setstate__(self, state):
        self.__dict__ = state | {"process": os.getpid()}


@dataclass
class Prediction:
    """One face in a picture. What the model or the detector does not tell is None."""

    group: str  # the likeliest of `GROUP_NAMES`
    probabilities: np.ndarray  # float (6,), in their order
    predicted_age: float | None  # in years, within the group
    age_low: float | None  # the age lies between these with a probability of 80 %
    age_high: float | None
    box: tuple[int, int, int, int]  # x, y, width, height in pixels of the picture
    score: float | None  # the detector's, 0 to 1
    landmarks: np.ndarray | None  # float (5, 2), in the order of `LANDMARK_NAMES`
    too_small: bool  # for its age to be read
    crop_mask: np.ndarray | None  # probabilities float (S, S), in the crop
    warp: np.ndarray  # from the picture to the crop, as in `Crop`
    shape: tuple[int, int, int]  # the picture's

    @property
    def mask(self) -> np.ndarray | None:
        """Where the face is, bool (H, W), made when it is asked for."""
        return None if self.crop_mask is None else place_mask(self.crop_mask, self.warp, self.shape)


def load(
    checkpoint, detector=None, aligned=False, device="auto", precision="fp32", min_score=MIN_SCORE,
    min_face=MIN_FACE,
) -> Loaded:  # fmt: skip
    """A model written by finetune.py and, unless `aligned`, a detector of faces, as `open_detector` takes it.

    aligned: each picture is one face crop, as in UTKFace. UserError if a file is missing or anything else.
    """
    if aligned and detector:
        raise UserError("--aligned and --detector contradict each other: give one")
    if aligned and (min_score, min_face) != (MIN_SCORE, MIN_FACE):
        raise UserError("--aligned finds no faces: leave out --detector-score and --min-face")
    device = choose_device(device)
    model, content = load_model(checkpoint, device)
    detect = None if aligned else open_detector(detector, min_score, min_face)
    dtype = choose_precision(precision, device)
    return Loaded(model, content["preprocessing"]["image_size"], device, dtype, detect)


def outputs(model, images) -> dict:
    """What a model has learned to say of normalised images (B, 3, H, W), by name.

    `probabilities` (B, 6); `predicted_age`, `age_low`, `age_high` (B,) in years; `masks` (B, 1, H, W),
    probabilities. A median age outside the likeliest group, mostly by a year or two, is moved to its edge.
    """
    group_logits, years, mask_logits = infer(model, images)
    said = {"probabilities": group_logits.softmax(dim=1)}
    if years is not None:
        limits = torch.tensor(list(AGE_GROUPS.values()), dtype=torch.float32, device=images.device)  # 6×2
        first, last = limits[group_logits.argmax(dim=1)].unbind(dim=1)  # B each
        median, low, high = years.unbind(dim=1)  # B each
        said |= {"predicted_age": median.clamp(first, last), "age_low": low, "age_high": high}
    if mask_logits is not None:
        said["masks"] = mask_logits.float().sigmoid()
    return said


@torch.inference_mode()
def score(loaded, crops, masks=True) -> list[Prediction]:
    """What the model says of `Crop`s of its size, whichever pictures they are from."""
    faces, size = [], faces_at_once(BATCH, loaded.image_size)
    for start in range(0, len(crops), size):
        batch = crops[start : start + size]
        images = torch.from_numpy(np.stack([crop.pixels for crop in batch]))  # B×S×S×3
        with autocast(loaded.device, loaded.dtype):
            said = outputs(loaded.model, to_input(images, loaded.device))
        said = {name: values.float().cpu().numpy() for name, values in said.items()}
        for i, crop in enumerate(batch):
            chances = said["probabilities"][i]
            group = GROUP_NAMES[chances.argmax()]
            ages = [float(said[name][i]) if name in said else None for name in AGES]
            found = crop.box, crop.score, crop.landmarks
            too_small = crop.score is not None and max(crop.box[2:]) < READABLE
            mask = said["masks"][i, 0] if masks and "masks" in said else None
            faces.append(Prediction(group, chances, *ages, *found, too_small, mask, crop.warp, crop.shape))
    return faces


def predict(loaded, image, masks=True) -> list[Prediction]:
    """The faces in one picture, from left to right.

    image: uint8 RGB (H, W, 3) with values 0 to 255 (not BGR, as OpenCV reads pictures: nothing can tell), or
    a PIL image, which is turned as its EXIF says and lies on mid-grey where it is transparent. Without
    `masks`, `Prediction.mask` is None. Raises ValueError for anything else, or below `MIN_SIDE` a side.
    """
    if loaded.process != os.getpid() and torch.get_num_threads() > 1:
        raise UserError(
            "this process was forked after the model was loaded, and PyTorch's threads would hang: "
            "load in the process that predicts, or call torch.set_num_threads(1) before loading"
        )
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F"):
            raise ValueError(f"a PIL image of mode {image.mode}, whose range is not known")
        image = cv2.cvtColor(flatten(image), cv2.COLOR_BGR2RGB)
    elif isinstance(image, np.ndarray) and image.size and 0 < image.max() <= 1:
        raise ValueError("no value above 1: multiply a picture of values 0 to 1 by 255")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f"not a uint8 (H, W, 3) of {MIN_SIDE} or more a side: {image.dtype} {image.shape}")
    return score(loaded, find_crops(image, loaded.detect, loaded.image_size), masks)


# ------------------------------------------------------------------------------------------------------------
# Many pictures
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A photograph or a frame of a video, and what is found in it."""

    path: Path
    source: Path | bytes | np.ndarray  # of its pixels: a file, a file's bytes, or RGB (H, W, 3)
    frame: int | None = None  # of a video
    second: float | None = None
    rate: float | None = None  # frames of the video looked at in each second
    pages: int = 1  # of its file, of which the first is read
    shape: tuple | None = None  # (H, W, 3)
    reason: str | None = None  # why `faces` is empty
    crops: list[Crop] = field(default_factory=list)
    faces: list[Prediction] = field(default_factory=list)


def list_pictures(inputs, leave_out):
    """The picture files among `inputs`, each once, and a `Picture` with a reason for what cannot be read.

    Folders are searched, but for those in `leave_out` within them. What is passed over is named on stderr.
    """
    paths, unreadable = [], []
    for top in map(Path, inputs):
        if not os.path.exists(top):
            raise UserError(f"{top} is not there: name pictures, or a folder of them")
        if not top.is_dir():
            paths.append(top)
            continue
        own = [folder for folder in leave_out if os.path.realpath(folder) != os.path.realpath(top)]
        files, broken = walk_files(top, own)
        unreadable += [Picture(path, path, reason=reason) for path, reason in broken.items()]
        kinds = defaultdict(list)
        for file in files:
            kinds[kind_of_file(file)].append(file)
        if "photographs" not in kinds:
            reason = next((f" ({path}: {reason})" for path, reason in broken.items()), "")
            raise UserError(f"{top} holds no picture{reason}: name pictures, or a folder of them")
        paths += kinds.pop("photographs")
        for kind, files in kinds.items():
            names = ", ".join(map(as_text, files[:3])) + (", …" if len(files) > 3 else "")
            print(f"passed over {len(files)} {kind}: {names}", file=sys.stderr)
    return list({os.path.abspath(path): path for path in paths}.values()), unreadable


def kind_of_file(file):
    """What a file found in a folder is taken for, in the plural."""
    if file.name.endswith("_mask.png") and os.path.exists(str(file)[:-9] + "_image.png"):
        return "face masks"
    if file.suffix.lower() not in SUFFIXES:
        return "files that are no pictures"
    return "pictures drawn by an earlier run" if drawing.is_own(file) else "photographs"


def open_pictures(paths, every) -> Iterator[Picture]:
    """Yields a `Picture`, not yet read, for each path, and of a video one for every N-th frame."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what is wrong is said below
    for path in paths:
        if path.suffix.lower() not in drawing.VIDEOS:
            try:  # a pipe can be read only once
                picture = Picture(path, path.read_bytes() if cli.is_special(path) else path)
            except OSError as error:  # a socket, or nobody's business
                picture = Picture(path, path, reason=error.strerror)
            yield picture
            continue
        try:
            drawing.check_video_name(path)
        except ValueError as error:
            yield Picture(path, path, reason=str(error))
            continue
        video = cv2.VideoCapture(os.path.abspath(path))  # FFmpeg takes `12:30.mp4` for a protocol's address
        if video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_FRAME:
            yield Picture(path, path, reason=f"frames above {MAX_FRAME // 10**6} million pixels")
            continue
        fps, count = video.get(cv2.CAP_PROP_FPS) or 25, int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        frame = second = 0
        while video.grab():
            # Frames may differ in length.
            second = round(video.get(cv2.CAP_PROP_POS_MSEC) / 1000, 3) or frame / fps
            if frame % every == 0:
                whole, image = video.retrieve()
                if not whole:
                    break
                image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                yield Picture(path, image, frame, second, fps / every)
            frame += 1
        if frame == 0:
            yield Picture(path, path, reason="no video that can be read")
        elif frame < count - 2 and second + 0.5 < count / fps:  # some containers tell how long, not how many
            yield Picture(path, path, reason=f"breaks off after {frame} of {count} frames")


def read_picture(picture):
    """Pixels, uint8 RGB (H, W, 3), of a `Picture`, which learns its `pages`; raises ValueError or OSError."""
    source = picture.source
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Path) and source.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**30} GiB")
    data = source if isinstance(source, bytes) else source.read_bytes()
    image = cv2.cvtColor(decode_image(data, max_pixels=MAX_PIXELS), cv2.COLOR_BGR2RGB)
    picture.pages = page_count(data)
    return image


def read_faces(loaded, picture) -> Picture:
    """Reads a picture and cuts its faces out, or gives it the reason why there are none."""
    if picture.reason:
        return picture
    try:
        image = read_picture(picture)
    except (ValueError, OSError) as error:
        picture.reason = getattr(error, "strerror", None) or str(error)
        return picture
    picture.shape = image.shape
    picture.crops = find_crops(image, loaded.detect, loaded.image_size)
    picture.reason = None if picture.crops else "no face found"
    return picture


def score_pictures(pictures, loaded, workers, chunk) -> Iterator[Picture]:
    """Yields the pictures of an iterator with their `faces`; threads read the next `chunk` meanwhile."""
    with ThreadPool(max(workers, 1)) as pool:

        def read_next():
            return pool.map_async(partial(read_faces, loaded), list(islice(pictures, chunk)), chunksize=1)

        coming = read_next()
        while read := coming.get():
            coming = read_next()
            faces = iter(score(loaded, [crop for picture in read for crop in picture.crops]))
            for picture in read:
                picture.faces = list(islice(faces, len(picture.crops)))
                yield picture


# ------------------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------------------


def table_rows(picture, model):
    """What is written of a picture: a dict a face, or one with the `reason` why there is none."""
    about = {
        "file": as_text(picture.path), "frame": picture.frame, "second": picture.second,
        "picture": picture.shape and picture.shape[1::-1], "reason": picture.reason, "model": model,
    }  # fmt: skip
    rows = []
    for i, face in enumerate(picture.faces):
        row = about | {"face": i}
        row |= {name: getattr(face, name) for name in ("group", "box", "score", *AGES, "too_small")}
        row["probabilities"] = dict(zip(GROUP_NAMES, face.probabilities.astype(float).round(6).tolist()))
        if face.landmarks is not None:
            row["landmarks"] = dict(zip(LANDMARK_NAMES, face.landmarks.round(1).tolist()))
        rows.append(row)
    return rows or [about]


def flatten_row(row):
    """A row of `table_rows` as --csv has it: a number a column, and the same columns for all."""
    flat = {name: row.get(name) for name in ("file", "frame", "second", "face")}
    flat |= dict(zip(("x", "y", "width", "height"), row.get("box", [None] * 4)))
    flat |= {name: row.get(name) for name in ("group", *AGES)}
    chances, landmarks = row.get("probabilities", {}), row.get("landmarks", {})
    flat |= {f"p{group}": chances.get(name) for group, name in enumerate(GROUP_NAMES)}
    flat |= {name: row.get(name) for name in ("too_small", "reason", "score")}
    for name in LANDMARK_NAMES:
        flat[f"{name}_x"], flat[f"{name}_y"] = landmarks.get(name, (None, None))
    flat["picture_width"], flat["picture_height"] = row["picture"] or (None, None)
    return flat | {"model": row["model"]["name"], "model_sha256": row["model"]["sha256"]}


@contextmanager
def others_go_on(failed):
    """What cannot be written is noted in the list `failed`, to be named at the end."""
    try:
        yield
    except (UserError, ValueError, OSError) as error:
        reason = as_text(error)
        if reason not in failed:  # a video that cannot be written fails at every frame
            failed.append(reason)


def write_masks(picture, folder, top, failed):
    """Writes the mask of each face of a picture as a PNG; those of faces that an earlier run found go."""
    frame = "" if picture.frame is None else f"_{picture.frame:06}"
    places = (drawing.output_path(picture.path, folder, top, f"{frame}_{i}_mask.png") for i in count())
    for face, place in zip(picture.faces, places):
        with others_go_on(failed):
            drawing.write_picture(place, Image.fromarray(face.mask.astype(np.uint8) * 255))
    with others_go_on(failed):
        for place in takewhile(drawing.is_own, places):
            place.unlink()


def write_drawings(pictures, masks, overlay, top, failed) -> Iterator[Picture]:
    """Passes scored pictures on and writes their masks and overlays into the folders that are given."""
    for path, same in groupby(pictures, key=lambda picture: picture.path):  # a video's frames together
        if overlay:
            draw = draw_video if path.suffix.lower() in drawing.VIDEOS else draw_photograph
            same = draw(same, drawing.overlay_path(path, overlay, top), failed)
        for picture in same:
            if masks:
                write_masks(picture, masks, top, failed)
            yield picture


def draw_photograph(pictures, place, failed):
    """Passes a picture, the only one, on and writes its overlay if it has faces; else an earlier one goes."""
    for picture in pictures:
        with others_go_on(failed):
            if picture.faces:  # read again, since a chunk of photographs would fill the memory
                drawing.write_picture(place, drawing.draw_faces(read_picture(picture), picture.faces))
            elif drawing.is_own(place):
                place.unlink()
        yield picture


def draw_video(pictures, place, failed):
    """Passes the frames of a video on and appends each, drawn, to another one, which is there at the end."""
    append = None
    with ExitStack() as video:
        for picture in pictures:
            if picture.rate:  # else it only says what is wrong with the video
                with others_go_on(failed):
                    drawn = drawing.draw_faces(picture.source, picture.faces)
                    if append is None:
                        append = video.enter_context(drawing.open_video(place, picture.rate, drawn.size))
                    append(drawn)
            yield picture
        with others_go_on(failed):
            video.close()  # the video takes its place


def choose_checkpoint(named):
    """The model named, else model.pt where there is one, else the one released; prints which."""
    checkpoint = named or ("model.pt" if Path("model.pt").is_file() else cli.ROOT / RELEASED)
    print(f"model: {checkpoint}")
    return checkpoint


def check_outputs(args, checkpoint, paths, top):
    """UserError if an output cannot be written, or would replace another one or an input."""
    outputs = [(flag, path) for flag, path in (("--csv", args.csv), ("--json", args.json)) if path]
    for flag, path in outputs:
        cli.check_output(flag, path)
    for flag, folder in (("--overlay", args.overlay), ("--masks", args.masks)):
        if folder:
            cli.check_writable(flag, folder)
    if args.overlay:
        outputs += [("--overlay", drawing.overlay_path(path, args.overlay, top)) for path in paths]
    if args.masks:  # how many faces there are is not known yet
        owners = {os.path.realpath(drawing.output_path(path, args.masks, top, "")) for path in paths}
        for path in paths:
            owner, found = re.subn(r"(_\d{6,})?_\d+_mask\.png$", "", os.path.realpath(path))
            if found and owner in owners:
                outputs.append(("--masks", path))
    taken = {os.path.realpath(path): "the pictures" for path in paths}
    taken |= {os.path.realpath(path): path for path in (checkpoint, args.detector) if path}
    for flag, path in outputs:
        place = os.path.realpath(path)
        if place in taken and not cli.is_special(Path(path)):
            raise UserError(f"{flag} {path} would replace {taken[place]}: name another place")
        drawn = flag == "--overlay" and Path(path).suffix.lower() not in drawing.VIDEOS
        if drawn and os.path.isfile(place) and not drawing.is_own(place):
            raise UserError(
                f"{flag} {path} would replace a picture that no run has drawn: name another place"
            )
        taken[place] = f"what {flag} writes"


def add_model_flags(parser):
    """Adds the flags that say which model and which detector there are, and where the model runs."""
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="written by finetune.py; else model.pt, else the released one")
    add("--aligned", action="store_true", help="each picture is one face crop as in UTKFace: find no faces")
    add("--detector", metavar="FILE.onnx", help="another YuNet than the one that is downloaded")
    cli.add_device_flags(parser)


def get_parser():
    parser = cli.script_parser("predict", __doc__)
    # fmt: off
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PICTURE", help="pictures, folders of them, and videos")
    add_model_flags(parser)
    add("--detector-score", metavar="S", type=cli.number(float, NOTICED, 1), default=MIN_SCORE,
        help=f"how sure the detector must be of a face, {NOTICED} to 1")
    add("--min-face", metavar="N", type=cli.number(int, 10), default=MIN_FACE,
        help="pixels of a face's longer side at least; below the default, more are found")
    add("--every", metavar="N", type=cli.number(int, 1), default=1, help="look at each N-th frame of a video")
    add("--csv", metavar="FILE", help="table to write, a row a face")
    add("--json", metavar="FILE", help="the same as JSON, with the names of the groups")
    add("--overlay", metavar="DIR", help="folder for pictures with faces, groups and ages drawn in")
    add("--masks", metavar="DIR", help="folder for the face masks, as PNG of 0 and 255")
    # fmt: on
    return parser


def main(args):
    if not args.inputs:
        raise UserError("nothing to do: name pictures, videos, or a folder (-h explains)")
    folders = [folder for folder in (args.overlay, args.masks) if folder]
    paths, unreadable = list_pictures(args.inputs, folders)
    try:
        top = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    except ValueError:
        raise UserError("the pictures lie on several drives: run predict.py once for each") from None
    if any(path and cli.is_stdout(path) for path in (args.csv, args.json)):
        sys.stdout = sys.stderr  # the table alone goes there
    checkpoint = cli.shipped(choose_checkpoint(args.checkpoint))
    check_outputs(args, checkpoint, paths, top)
    thresholds = args.detector_score, args.min_face
    loaded = load(checkpoint, args.detector, args.aligned, args.device, args.precision, *thresholds)
    model = {"name": checkpoint.name, "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    if args.masks and loaded.model.decoder is None:
        raise UserError(f"--masks: {checkpoint.name} has learned none; train with finetune.py --multitask")

    rows, lines, failed = [], [], []
    videos = any(path.suffix.lower() in drawing.VIDEOS for path in paths)
    opened = chain(unreadable, open_pictures(paths, args.every))
    scored = score_pictures(opened, loaded, args.workers, FRAMES if videos else CHUNK)
    drawn = write_drawings(scored, args.masks, args.overlay, top, failed)
    total = None if videos else len(unreadable) + len(paths)
    for picture in cli.progress(drawn, "faces", total, unit=" pictures"):
        rows += table_rows(picture, model)
        name = as_text(picture.path) + ("" if picture.frame is None else f" {picture.second:.2f} s")
        lines += [f"{name}, face {i}: {drawing.label(face)}" for i, face in enumerate(picture.faces)]
        if picture.pages > 1:
            print(f"{name}: the first of {picture.pages} pages is read", file=sys.stderr)
    written = folders
    with others_go_on(failed):
        if args.csv:
            cli.write_csv(args.csv, list(map(flatten_row, rows)))
            written.append(args.csv)
    with others_go_on(failed):
        if args.json:
            with cli.atomic_path(args.json, sync=True) as temporary:
                temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            written.append(args.json)

    skipped = [row for row in rows if row["reason"]]
    for row in skipped:
        if row["frame"] is None:
            print(f"skipped {row['file']}: {row['reason']}", file=sys.stderr)
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    if not lines:
        hint = "" if args.aligned else "; if each is one face crop, give --aligned"
        raise UserError(f"none of {len(rows)} pictures holds a face that can be read{hint}")
    pictures = sum(row.get("face") == 0 for row in rows)
    named = f"; written: {', '.join(written)}" if written else ""
    print(*lines, f"{len(lines)} faces in {pictures} pictures, {len(skipped)} skipped{named}", sep="\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, get_parser())
