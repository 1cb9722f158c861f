"""Finds the faces in any photographs and tells their age group, their age, and where each face is.

    python predict.py photo.jpg folder/ --csv faces.csv --overlay drawn
    python predict.py --aligned UTKFace/             # pictures that are face crops already, as UTKFace's are
    python predict.py --export model.onnx            # the model for other programs
    python predict.py --serve                        # a page to try it in a browser

Faces are found by YuNet, which is downloaded once into torch.hub's cache. From Python:

    from predict import load, predict
    model = load("model.pt")
    faces = predict(model, image)  # a PIL image, or uint8 RGB (H, W, 3) -> a list of `Prediction`
"""

import base64
import copy
import hashlib
import json
import os
import sys
import threading
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import cli
import common
from cli import UserError, atomic_path, progress, write_csv
from common import infer, load_model
from devices import autocast, choose_device, choose_precision
from utkface import GROUP_NAMES, MIN_SIDE, central_square, decode_image, flatten, resize

RELEASED = "weights/age_multitask.pt"
SUFFIXES = {  # what the decoder reads, where Pillow and OpenCV were built with it
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Faces in a picture, and the model on them
# ------------------------------------------------------------------------------------------------------------

ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models"
DETECTOR_URL = f"{ZOO}/face_detection_yunet/face_detection_yunet_2023mar.onnx"
DETECTOR_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
DETECTOR_SIDE = 1024  # pixels to which a larger picture is reduced to find faces
# Where right eye, left eye, nose and the right and left corner of the mouth (the person's) lie in UTKFace's
# crops, as shares of the side: medians over 597 of them, as MediaPipe's mesh finds them.
LANDMARKS = np.array([(0.300, 0.300), (0.686, 0.302), (0.491, 0.547), (0.326, 0.690), (0.660, 0.690)])
LARGEST_CROP = 512
OPENCV_LOG = threading.Lock()  # its level is the whole process's


class Prediction(NamedTuple):
    """One face. `probabilities` float (6,) in the order of `GROUP_NAMES`, of which `group` is the likeliest.

    `predicted_age` is in years, None from a model that learned groups alone; `box` x, y, width, height in
    pixels of the picture; `mask` bool (H, W), the picture's size, None from a model without a decoder.
    """

    group: str
    probabilities: np.ndarray
    predicted_age: float | None
    box: tuple[int, int, int, int]
    mask: np.ndarray | None


class Crop(NamedTuple):
    """A face brought to UTKFace's geometry: uint8 RGB (S, S, 3), its box, and the map from picture to crop.

    The map is float (2, 3), from places in the picture, in pixels, to places in the crop, in sides.
    """

    pixels: np.ndarray | None
    box: tuple[int, int, int, int]
    warp: np.ndarray


def to_pixels(warp, side):
    """A crop's map as OpenCV takes it, from pixel to pixel, where whole numbers are middles of pixels."""
    scaled = warp * side
    scaled[:, 2] += scaled[:, :2].sum(axis=1) / 2 - 0.5
    return scaled


def align(image, landmarks):
    """The crop of a picture (H, W, 3) in which five landmarks (5, 2) lie as in UTKFace, and its map.

    The map turns, scales and shifts alike in both directions, with the least squared distance.
    """
    source = landmarks[:, 0] + 1j * landmarks[:, 1]
    target = LANDMARKS[:, 0] + 1j * LANDMARKS[:, 1]
    (a, b), *_ = np.linalg.lstsq(np.stack([source, np.ones(5)], axis=1), target, rcond=None)
    warp = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    side = int(np.clip(round(1 / abs(a)), 32, LARGEST_CROP))  # the face's own size, so that nothing is lost
    pixels = cv2.warpAffine(image, to_pixels(warp, side), (side, side), borderMode=cv2.BORDER_REPLICATE)
    return pixels, warp


def released_detector():
    """YuNet's ONNX file as OpenCV publishes it, from torch.hub's cache, or from the network into it.

    It is checked by its hash before every use. Raises UserError if it cannot be had.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(DETECTOR_URL).name)
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(DETECTOR_URL, str(cached), DETECTOR_SHA256, progress=False)
            print(f"face detector downloaded to {cached}")
        data = cached.read_bytes()
    except (OSError, RuntimeError, HTTPException) as error:  # no network, another file, no room
        place = f"put {DETECTOR_URL} into {cached.parent}"
        raise UserError(f"no face detector ({error}): {place}, or give --aligned for face crops") from None
    if hashlib.sha256(data).hexdigest() != DETECTOR_SHA256:
        raise UserError(f"{cached} is not YuNet's file (its SHA-256 differs): delete it, and run again")
    return data


def open_detector(path=None):
    """A function from a picture to its faces, (N, 15) as YuNet gives them, that threads can share.

    Rows hold box, five landmarks and score. path: another file than `released_detector`, or UserError.
    """
    local = threading.local()  # a network is not for two threads at once
    log = cv2.utils.logging

    def detect(image):
        if not hasattr(local, "network"):
            with OPENCV_LOG:  # OpenCV 5 warns that its new engine knows no targets; none was asked for
                before = log.setLogLevel(log.LOG_LEVEL_SILENT)
                try:
                    local.network = cv2.FaceDetectorYN.create("onnx", data, data[:0], (32, 32), 0.7)
                finally:
                    log.setLogLevel(before)
        scale = min(1, DETECTOR_SIDE / max(image.shape[:2]))
        size = [max(32, round(length * scale)) for length in image.shape[1::-1]]
        local.network.setInputSize(size)
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        faces = local.network.detect(small[:, :, ::-1].copy())[1]  # it expects BGR
        faces = np.zeros((0, 15)) if faces is None else faces.astype(float)
        faces[:, :14] /= np.tile([size[0] / image.shape[1], size[1] / image.shape[0]], 7)
        return faces

    try:
        data = np.frombuffer(Path(path).read_bytes() if path else released_detector(), np.uint8)
        detect(np.zeros((64, 64, 3), np.uint8))
    except (OSError, cv2.error):
        raise UserError(f"--detector {path} cannot be read as a face detector: name YuNet's file") from None
    return detect


def find_crops(image, detect=None):
    """The faces of a picture, uint8 RGB (H, W, 3), as `Crop`s, from left to right; without `detect`, one."""
    if detect is None:
        square = central_square(image)
        side = len(square)
        y, x = ((length - side) // 2 for length in image.shape[:2])
        return [Crop(square, (x, y, side, side), np.array([[1, 0, -x], [0, 1, -y]]) / side)]
    found = sorted(detect(image).tolist())
    crops = [(face, *align(image, np.reshape(face[4:14], (5, 2)))) for face in found]
    return [Crop(pixels, tuple(map(round, face[:4])), warp) for face, pixels, warp in crops]


def load(checkpoint, detector=None, aligned=False, device="auto", precision="fp32"):
    """What `predict` needs: a model written by finetune.py and, unless `aligned`, a detector of faces.

    aligned: each picture is one face crop, as in UTKFace. detector: an ONNX file of YuNet, by default
    OpenCV's, which is downloaded once. Raises UserError if a file is missing or is anything else.
    """
    device = choose_device(device)
    model, content = load_model(checkpoint, device)
    return SimpleNamespace(
        model=model, image_size=content["preprocessing"]["image_size"], device=device,
        dtype=choose_precision(precision, device), detect=None if aligned else open_detector(detector),
    )  # fmt: skip


def outputs(model, images):
    """Probabilities of groups (B, 6), median ages (B,) and mask probabilities (B, 1, H, W), or None for
    what the model has not learned, of normalised images (B, 3, H, W)."""
    answers = infer(model, images)
    masks = None if answers.mask_logits is None else answers.mask_logits.float().sigmoid()
    return answers.group_logits.softmax(dim=1), answers.ages, masks


@torch.inference_mode()
def score(loaded, squares, batch_size=256):
    """Probabilities float (6,), median age or None, mask float (1, S, S) or None of each of N crops, given
    as a list of uint8 RGB (S, S, 3), S the model's image size."""
    scores = []
    for start in range(0, len(squares), batch_size):
        batch = torch.from_numpy(np.stack(squares[start : start + batch_size]))  # B×S×S×3
        with autocast(loaded.device, loaded.dtype):
            found = outputs(loaded.model, common.to_input(batch, loaded.device))
        scores += zip(
            *([None] * len(batch) if part is None else part.cpu().double().numpy() for part in found)
        )
    return scores


def place_mask(mask, warp, shape):
    """The mask of a crop, float (1, S, S), as bool (H, W) in its picture of that `shape`."""
    warp, flags = to_pixels(warp, mask.shape[-1]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask[0], warp, shape[1::-1], flags=flags) > 0.5


def predict(loaded, image):
    """The faces in one picture: a list of `Prediction`, from left to right.

    loaded: from `load`; image: uint8 RGB (H, W, 3), or a PIL image, which is turned as its EXIF says and lies
    on mid-grey where it is transparent. Raises ValueError for anything else or below `MIN_SIDE` a side.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F"):
            raise ValueError(f"a PIL image of mode {image.mode}, whose range is not known")
        image = cv2.cvtColor(flatten(image), cv2.COLOR_BGR2RGB)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f"not a uint8 (H, W, 3) of {MIN_SIDE} or more a side: {image.dtype} {image.shape}")
    crops = find_crops(image, loaded.detect)
    squares = [resize(crop.pixels, loaded.image_size) for crop in crops]
    faces = []
    for crop, (p, age, mask) in zip(crops, score(loaded, squares)):
        mask = None if mask is None else place_mask(mask, crop.warp, image.shape)
        faces.append(Prediction(GROUP_NAMES[p.argmax()], p, age, crop.box, mask))
    return faces


# ------------------------------------------------------------------------------------------------------------
# Many pictures, and what is written of them
# ------------------------------------------------------------------------------------------------------------

CHUNK = 64  # pictures read while those before are scored
COLORS = [(86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)]


def list_pictures(inputs, outputs):
    """The picture files among `inputs`, in order: files as they are, and folders searched through.

    Folders among `outputs` are not searched. What is passed over is counted and named on stderr.
    """
    paths, masks, others = [], [], []
    outputs = {os.path.realpath(folder) for folder in outputs if folder}
    for path in map(Path, inputs):
        pictures = [path] if path.is_file() else []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if os.path.realpath(f"{folder}/{name}") not in outputs]
            names = set(names)
            for file in map(Path(folder).joinpath, names):
                is_mask = file.name.endswith("_mask.png") and f"{file.name[:-9]}_image.png" in names
                known = file.suffix.lower() in SUFFIXES and file.is_file()
                (masks if is_mask else pictures if known else others).append(file)
        if not pictures:
            what = "holds no picture" if path.is_dir() else "is not there"
            raise UserError(f"{path} {what}: name pictures, or a folder of them")
        paths += sorted(pictures)
    paths = list({os.path.abspath(path): path for path in paths}.values())  # each once, however often named
    if others or masks:
        named = ", ".join(map(str, (sorted(others) + sorted(masks))[:3])) + ", …" * (len(others + masks) > 3)
        counts = f"{len(others)} files that are no pictures, {len(masks)} face masks"
        print(f"passed over {counts}: {named}", file=sys.stderr)
    return paths


def read_picture(source):
    """Decodes a file, given by its path or as bytes, to uint8 RGB (H, W, 3); raises ValueError or OSError."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return cv2.cvtColor(decode_image(data), cv2.COLOR_BGR2RGB)


def read_faces(source, loaded):
    """A picture's `crops`, without pixels, and those as `squares` (S, S, 3), or the `reason` for none."""
    try:
        image = read_picture(source)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return SimpleNamespace(path=source, crops=[], squares=[], reason=reason)
    crops = find_crops(image, loaded.detect)
    return SimpleNamespace(
        path=source, shape=image.shape, reason=None if crops else "no face found",
        squares=[resize(crop.pixels, loaded.image_size) for crop in crops],
        crops=[crop._replace(pixels=None) for crop in crops],  # lest a chunk's photographs stay in memory
    )  # fmt: skip


def score_pictures(paths, loaded, workers):
    """Yields each picture of `read_faces` with `faces` added: a `Crop`, and what `score` says, of each."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPool(max(workers, 1)) as pool:
        read = lambda chunk: pool.map_async(lambda path: read_faces(path, loaded), chunk, 1)  # noqa: E731
        coming = read(chunks[0])
        for index, _ in enumerate(progress(chunks, "faces", unit="chunk")):
            pictures = coming.get()
            if index + 1 < len(chunks):
                coming = read(chunks[index + 1])
            scores = iter(score(loaded, [square for picture in pictures for square in picture.squares]))
            for picture in pictures:
                picture.faces = [(crop, *next(scores)) for crop in picture.crops]
                yield picture


def table_rows(path, faces):
    """A row of --csv for each of a picture's faces; what in the name is no text is written as digits."""
    return [
        {
            "file": str(path).encode(errors="backslashreplace").decode(), "face": i,
            **dict(zip(("x", "y", "width", "height"), crop.box)),
            "group": GROUP_NAMES[p.argmax()], "predicted_age": None if age is None else round(age, 2),
            **{f"p{group}": round(float(chance), 6) for group, chance in enumerate(p)},
        }
        for i, (crop, p, age, _) in enumerate(faces)
    ]  # fmt: skip


def write_json(path, rows):
    """Writes the rows of `table_rows` as JSON, with the names of the groups."""
    faces = [
        {key: row[key] for key in ("file", "face", "group", "predicted_age")}
        | {"box": [row[key] for key in ("x", "y", "width", "height")]}
        | {"probabilities": {name: row[f"p{group}"] for group, name in enumerate(GROUP_NAMES)}}
        for row in rows
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(faces, indent=2) + "\n", encoding="utf-8")


def label(p, age):
    """What an overlay says of a face: probabilities (6,) and age → `Young Adult 79 %, about 31`."""
    return f"{GROUP_NAMES[p.argmax()]} {100 * p.max():.0f} %" + ("" if age is None else f", about {age:.0f}")


def draw_overlay(picture):
    """A PIL picture with box, outline of the mask and label at each face of a scored picture.

    Small ones are enlarged, so that the text can be read. Colours stand for groups (Okabe & Ito 2008).
    """
    image = read_picture(picture.path)  # decoded again: a chunk of photographs would fill the memory
    scale = max(1, -(-360 // min(image.shape[:2])))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    line = max(2, round(min(canvas.shape[:2]) / 250))
    for crop, p, _, mask in picture.faces:
        if mask is None:
            continue
        mask = place_mask(mask, crop.warp / [[scale, scale, 1]], canvas.shape).astype(np.uint8)
        color = COLORS[p.argmax()]
        canvas[mask > 0] = (0.85 * canvas[mask > 0] + 0.15 * np.array(color)).astype(np.uint8)
        outline = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(canvas, outline, -1, color, line, cv2.LINE_AA)
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn, "RGBA")
    for crop, p, age, _ in picture.faces:
        color, text = COLORS[p.argmax()], label(p, age)
        x, y, width, height = (value * scale for value in crop.box)
        size = int(np.clip(width / 14, max(13, 4 * line), canvas.shape[0] / 18))
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = size // 2
        wide, high = right - left + 2 * pad + 2 * line, bottom - top + 2 * pad
        draw.rounded_rectangle((x, y, x + width, y + height), 2 * line, outline=color, width=line)
        x, y = x + 2 * line, y - high if y >= high else y + height - high - 2 * line  # above it, or within
        x, y = min(max(0, x), max(0, canvas.shape[1] - wide)), min(y, canvas.shape[0] - high)
        draw.rounded_rectangle((x, y, x + wide, y + high), pad, fill=(20, 20, 20, 200))
        draw.rectangle((x + pad // 2, y + pad, x + pad // 2 + line, y + high - pad), fill=color)
        draw.text((x + pad + 2 * line - left, y + pad - top), text, font=font, fill=(255, 255, 255))
    return drawn


def overlay_path(path, folder, top):
    """Where the overlay of the picture at `path` goes: in `folder`, as the picture lies below `top`."""
    kept = path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # others become PNG
    return Path(folder, os.path.relpath(path, top) + ("" if kept else ".png"))


def write_picture(path, draw, *arguments):
    """Saves the PIL picture that `draw(*arguments)` gives."""
    with atomic_path(path) as temporary:
        draw(*arguments).save(temporary, quality=92)


# ------------------------------------------------------------------------------------------------------------
# For others: an ONNX file, and a page in the browser
# ------------------------------------------------------------------------------------------------------------


class ExportedModel(nn.Module):
    """The model from raw pixels to probabilities, so that whoever runs it needs to know nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for name, values in zip(("mean", "std"), common.pixel_statistics(torch.device("cpu"))):
            self.register_buffer(name, values)

    def forward(self, images):
        """RGB float32 (B, 3, S, S), values 0–255 → those of `outputs` that the model has learned."""
        return [part for part in outputs(self.model, (images - self.mean) / self.std) if part is not None]


def export(loaded, path):
    """Writes `ExportedModel` as one ONNX file: `images` in; `probabilities`, `predicted_age`, `masks` out.

    The batch size is free and the side fixed; the names of the groups are in the file's metadata.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401, which torch's exporter needs
    except ImportError as error:
        raise UserError(f"--export needs {error.name}: pip install onnx onnxscript") from None
    model = ExportedModel(copy.deepcopy(loaded.model).cpu().float()).eval()
    names = ["probabilities"] + ["predicted_age"] * model.model.by_year
    names += ["masks"] * (model.model.decoder is not None)
    with atomic_path(path) as temporary:
        torch.onnx.export(
            model, (torch.zeros(2, 3, loaded.image_size, loaded.image_size),), temporary,
            input_names=["images"], output_names=names, dynamo=True,
            external_data=False, dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
        )  # fmt: skip
        graph = onnx.load(temporary)
        about = "RGB, float32, 0 to 255, aligned face"
        onnx.helper.set_model_props(graph, {"groups": ",".join(GROUP_NAMES), "input": about})
        onnx.save(graph, temporary)


def answer(data, loaded):
    """What the page shows of an uploaded file's bytes: HTML, of the picture or a reason, and a table's rows.

    The picture is within the HTML, so that no file is left behind.
    """
    (picture,) = score_pictures([data or b""], loaded, 1)
    if picture.reason:
        return f"<p>This picture cannot be used: {picture.reason}.</p>", []
    code = base64.b64encode(cv2.imencode(".jpg", np.asarray(draw_overlay(picture))[..., ::-1])[1]).decode()
    shown = f'<img alt="faces" style="max-height:75vh;max-width:100%" src="data:image/jpeg;base64,{code}">'
    return shown, [[label(p, age), *(f"{chance:.1%}" for chance in p)] for _, p, age, _ in picture.faces]


def serve(loaded, host, port):
    """Serves a page on which one uploads a picture and sees faces, groups, ages and masks."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'gradio>=6'") from None
    wanted = "any photograph" if loaded.detect else "one face, cropped and upright"
    with gradio.Blocks(title="Age group of a face", delete_cache=(60, 60)) as page:
        gradio.Markdown(
            f"# Age group of a face\nGive {wanted}. It stays on the machine that serves this page, and is "
            "deleted within minutes. What is shown is an estimate."
        )
        # Bytes, for `decode_image` alone to touch: Gradio's image widgets decode what they are given.
        file = gradio.File(label="Picture", type="binary", height=140)
        shown = gradio.HTML()
        table = gradio.Dataframe(headers=["faces, from left to right", *GROUP_NAMES], interactive=False)
        reply = lambda data: (*answer(data, loaded), None)  # noqa: E731, the field is free for the next
        file.upload(reply, file, [shown, table, file], api_name="predict")
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    try:
        page.launch(server_name=host, server_port=port, max_file_size="20mb", theme=theme, footer_links=[])
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error}): name another") from None
    finally:
        page.close()  # deletes what was uploaded


def get_parser():
    parser = cli.script_parser("predict", __doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PICTURE", help="pictures, and folders of them")
    add(
        "--aligned",
        action="store_true",
        help="each picture is one face crop as in UTKFace: find no faces; not with --detector",
    )
    add("--checkpoint", metavar="FILE", help="written by finetune.py; else model.pt, else the released one")
    add("--detector", metavar="FILE.onnx", help="another YuNet than the one that is downloaded")
    add("--csv", metavar="FILE", help="table to write, a row a face")
    add("--json", metavar="FILE", help="the same as JSON, with the names of the groups")
    add("--overlay", metavar="DIR", help="folder for pictures with faces, groups and ages drawn in")
    add("--masks", metavar="DIR", help="folder for the face masks, as PNG of 0 and 255")
    add("--export", metavar="FILE.onnx", help="write the model as ONNX")
    add("--serve", action="store_true", help="serve a page to try it in a browser")
    add("--host", default="127.0.0.1", help="address that --serve listens on")
    add("--port", metavar="N", type=cli.number(int, 1, 65535), default=7860, help="port that it listens on")
    cli.add_device_flags(parser)
    return parser


def main(args):
    if not (args.inputs or args.export or args.serve):
        raise UserError("nothing to do: name pictures or a folder, or give --serve or --export (-h explains)")
    if args.aligned and args.detector:  # here, since either may stand in a YAML
        raise UserError("--aligned and --detector contradict each other: give one")
    for flag in ("csv", "json", "export", "overlay", "masks"):
        if getattr(args, flag):
            check = cli.check_writable if flag in ("overlay", "masks") else cli.check_output
            check(f"--{flag}", getattr(args, flag))
    paths = list_pictures(args.inputs, (args.overlay, args.masks))
    top = os.path.commonpath([os.path.abspath(path.parent) for path in paths]) if paths else "."
    drawn = {overlay_path(path, args.overlay, top).resolve() for path in paths if args.overlay}
    if drawn & {path.resolve() for path in paths}:
        raise UserError(f"--overlay {args.overlay} would replace the pictures: name another folder")
    checkpoint = args.checkpoint or ("model.pt" if Path("model.pt").is_file() else cli.shipped(RELEASED))
    print(f"model: {checkpoint}")
    without = args.aligned or not (paths or args.serve)  # --export alone needs no detector
    loaded = load(checkpoint, args.detector, without, args.device, args.precision)
    if args.masks and loaded.model.decoder is None:
        raise UserError(f"--masks: {checkpoint} has learned no masks; train one with finetune.py --multitask")
    if args.export:
        export(loaded, args.export)
        print(f"{args.export} written: {loaded.image_size} px, {', '.join(GROUP_NAMES)}")
    if args.serve:
        serve(loaded, args.host, args.port)
    if not paths:
        return

    rows, skipped, failed = [], [], []

    def attempt(write, *arguments):  # what cannot be written is named at the end, and the rest is done
        try:
            write(*arguments)
            return True
        except (UserError, ValueError, OSError) as error:
            failed.append(f"failed: {error}\n")
            return False

    for picture in score_pictures(paths, loaded, args.workers):
        if picture.reason:
            skipped.append(f"skipped {picture.path}: {picture.reason}\n")
            continue
        rows += table_rows(picture.path, picture.faces)
        for i, (crop, _, _, mask) in enumerate(picture.faces if args.masks else []):
            place = Path(args.masks, f"{os.path.relpath(picture.path, top)}_{i}_mask.png")
            mask = place_mask(mask, crop.warp, picture.shape).astype(np.uint8) * 255
            attempt(write_picture, place, Image.fromarray, mask)
        if args.overlay:
            attempt(write_picture, overlay_path(picture.path, args.overlay, top), draw_overlay, picture)
    sys.stderr.writelines(skipped)
    if not rows:
        hint = "" if args.aligned else "; if each is one face crop, give --aligned"
        raise UserError(f"none of {len(paths)} pictures holds a face that can be read{hint}")
    width = max(len(row["file"]) for row in rows)
    print(f"{'':{width}}  face  {'group':12}   age" + "".join(f"{name:>13}" for name in GROUP_NAMES))
    for row in rows:
        age = "" if row["predicted_age"] is None else f"{row['predicted_age']:.0f}"
        chances = "".join(f"{row[f'p{group}']:>13.1%}" for group in range(len(GROUP_NAMES)))
        print(f"{row['file']:{width}}  {row['face']:4}  {row['group']:12}  {age:>4}{chances}")
    tables = ((args.csv, write_csv), (args.json, write_json))
    tables = [path for path, write in tables if path and attempt(write, path, rows)]
    named = ", ".join(filter(None, (*tables, args.overlay, args.masks)))
    written = f"; written: {named}" if named else ""
    print(f"{len(rows)} faces in {len(paths) - len(skipped)} pictures, {len(skipped)} skipped{written}")
    if failed:
        sys.stderr.writelines(failed)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, get_parser())
