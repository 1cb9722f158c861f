"""Tells the age group of faces, and where the face is, in any pictures; exports the model to ONNX.

    python predict.py face.jpg folder/ *.png
    python predict.py photo.jpg --detector face_detection_yunet.onnx --overlay drawn --json faces.json
    python predict.py --export model.onnx
    python predict.py --serve                   # a page to try it in a browser

A picture is taken for one aligned face, as UTKFace's crops are, unless --detector finds the faces in it. From
Python (see `load` and `predict`):

    from predict import load, predict
    model = load("model.pt")
    faces = predict(model, image)  # uint8 RGB (H, W, 3) → a list of `Prediction`
"""

import copy
import json
import os
import sys
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from common import (
    GROUP_NAMES,
    UserError,
    add_device_flags,
    atomic_path,
    autocast,
    check_writable,
    choose_device,
    choose_precision,
    decode_image,
    load_model,
    number,
    pixel_statistics,
    progress,
    resize,
    run,
    script_parser,
    shipped,
    to_input,
    write_csv,
)

RELEASED = "weights/age_multitask.pt"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

# ------------------------------------------------------------------------------------------------------------
# Faces in a picture
# ------------------------------------------------------------------------------------------------------------

# Where right eye, left eye, nose and the right and left corner of the mouth (the person's) lie in UTKFace's
# crops, as shares of the side: medians over 597 of them, as MediaPipe's mesh finds them.
LANDMARKS = np.array([(0.300, 0.300), (0.686, 0.302), (0.491, 0.547), (0.326, 0.690), (0.660, 0.690)])
DETECTOR_SIDE = 1024  # pixels to which a larger picture is reduced to find faces
LARGEST_CROP = 512


class Prediction(NamedTuple):
    """One face. `probabilities` float (6,) in the order of `GROUP_NAMES`, of which `group` is the likeliest.

    `box` is x, y, width, height in pixels of the picture. `mask` is bool (H, W), the picture's size, where
    the face is, or None from a model without a decoder.
    """

    group: str
    probabilities: np.ndarray
    box: tuple[int, int, int, int]
    mask: np.ndarray | None


class Crop(NamedTuple):
    """A face brought to UTKFace's geometry: uint8 RGB (S, S, 3), its box, and the map from picture to crop.

    The map is float (2, 3), from places in the picture, in pixels, to places in the crop, in sides.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    warp: np.ndarray


def to_pixels(warp, side):
    """A crop's map as OpenCV takes it, from pixel to pixel, where whole numbers are middles of pixels."""
    scaled = warp * side
    scaled[:, 2] += scaled[:, :2].sum(axis=1) / 2 - 0.5
    return scaled


def whole_picture(image):
    """The largest square at the centre of a picture (H, W, 3), as a `Crop`."""
    side = min(image.shape[:2])
    y, x = ((length - side) // 2 for length in image.shape[:2])
    warp = np.array([[1, 0, -x], [0, 1, -y]]) / side
    return Crop(image[y : y + side, x : x + side], (x, y, side, side), warp)


def align(image, landmarks):
    """The crop of a picture (H, W, 3) in which five landmarks (5, 2) lie as in UTKFace, and its map.

    The map turns, scales and shifts alike in both directions, with the least squared distance.
    """
    source = landmarks[:, 0] + 1j * landmarks[:, 1]
    target = LANDMARKS[:, 0] + 1j * LANDMARKS[:, 1]
    (a, b), *_ = np.linalg.lstsq(np.stack([source, np.ones(5)], axis=1), target, rcond=None)
    warp = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    side = int(np.clip(round(1 / abs(a)), 32, LARGEST_CROP))  # the face's own size, so that nothing is lost
    pixels = cv2.warpAffine(
        image, to_pixels(warp, side), (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return pixels, warp


def open_detector(path):
    """A function from a picture to its faces, (N, 15) as YuNet gives them, that threads can share.

    Rows hold box, five landmarks and score. Raises UserError if `path` is no such network.
    """
    if not Path(path).is_file():
        raise UserError(
            f"--detector {path} is not there: give the ONNX file of YuNet, from OpenCV's model zoo"
        )
    local = threading.local()  # a network is not for two threads at once

    def detect(image):
        if not hasattr(local, "network"):
            local.network = cv2.FaceDetectorYN.create(str(path), "", (32, 32), score_threshold=0.7)
        scale = min(1, DETECTOR_SIDE / max(image.shape[:2]))
        size = [max(32, round(length * scale)) for length in image.shape[1::-1]]
        local.network.setInputSize(size)
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        faces = local.network.detect(small[:, :, ::-1].copy())[1]  # it expects BGR
        faces = np.zeros((0, 15)) if faces is None else faces.astype(float)
        faces[:, :14] /= np.tile([size[0] / image.shape[1], size[1] / image.shape[0]], 7)
        return faces

    try:
        detect(np.zeros((64, 64, 3), np.uint8))
    except cv2.error:
        raise UserError(
            f"--detector {path} is no face detector that OpenCV can run: give YuNet's ONNX"
        ) from None
    return detect


def find_crops(image, detect=None):
    """The faces of a picture, uint8 RGB (H, W, 3), as `Crop`s, from left to right; without `detect`, one."""
    if detect is None:
        return [whole_picture(image)]
    crops = []
    for face in sorted(detect(image).tolist()):
        pixels, warp = align(image, np.reshape(face[4:14], (5, 2)))
        crops.append(Crop(pixels, tuple(round(value) for value in face[:4]), warp))
    return crops


# ------------------------------------------------------------------------------------------------------------
# The model on crops
# ------------------------------------------------------------------------------------------------------------


def load(checkpoint, detector=None, device="auto", precision="auto"):
    """What `predict` needs: a model written by finetune.py, and YuNet's ONNX file to find faces, if named.

    Raises UserError if a file is missing or is anything else.
    """
    device = choose_device(device)
    model, content = load_model(checkpoint, device)
    return SimpleNamespace(
        model=model, image_size=content["preprocessing"]["image_size"], device=device,
        dtype=choose_precision(precision, device), detect=open_detector(detector) if detector else None,
    )  # fmt: skip


@torch.inference_mode()
def score(loaded, crops, batch_size=256):
    """Probabilities float (N, 6) and mask probabilities float (N, S, S), or None, of N crops.

    crops: uint8 RGB (N, S, S, 3), S the model's image size.
    """
    probabilities, masks = [], []
    for batch in torch.from_numpy(crops).split(batch_size):
        with autocast(loaded.device, loaded.dtype):
            logits, mask_logits = loaded.model(to_input(batch, loaded.device))  # B×6, B×1×S×S
        probabilities.append(logits.cpu().double().softmax(dim=1).numpy())
        if mask_logits is not None:
            masks.append(mask_logits[:, 0].float().sigmoid().cpu().numpy())
    return np.concatenate(probabilities), np.concatenate(masks) if masks else None


def place_mask(mask, warp, shape):
    """The mask of a crop, float (S, S), as bool (H, W) in its picture of that `shape`."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask, to_pixels(warp, len(mask)), shape[1::-1], flags=flags) > 0.5


def predict(loaded, image):
    """The faces in one picture: a list of `Prediction`, from left to right.

    loaded: from `load`; image: uint8 RGB (H, W, 3). Raises ValueError for anything else.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    crops = find_crops(image, loaded.detect)
    if not crops:
        return []
    squares = np.stack([resize(crop.pixels, loaded.image_size) for crop in crops])
    probabilities, masks = score(loaded, squares)
    masks = [None] * len(crops) if masks is None else masks
    return [
        Prediction(
            GROUP_NAMES[p.argmax()], p, crop.box,
            None if mask is None else place_mask(mask, crop.warp, image.shape),
        )
        for crop, p, mask in zip(crops, probabilities, masks)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Many pictures
# ------------------------------------------------------------------------------------------------------------

CHUNK = 64  # pictures read while those before are scored


def list_pictures(inputs):
    """The picture files among `inputs`, files as they are and folders searched through, in order."""
    paths = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(
                    f"{path} holds no picture ({', '.join(sorted(SUFFIXES))}): name another folder"
                )
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path} is not there: name a picture or a folder of them")
    return paths


def read_faces(path, loaded, keep):
    """A picture's crops as N squares (S, S, 3), its `Crop`s, itself if `keep`; or the reason for none."""
    try:
        image = cv2.cvtColor(decode_image(path.read_bytes()), cv2.COLOR_BGR2RGB)
    except (ValueError, OSError) as error:
        return SimpleNamespace(path=path, crops=[], reason=getattr(error, "strerror", None) or str(error))
    crops = find_crops(image, loaded.detect)
    squares = [resize(crop.pixels, loaded.image_size) for crop in crops]
    crops = [crop._replace(pixels=None) for crop in crops]
    return SimpleNamespace(
        path=path, squares=squares, crops=crops, image=image if keep else None, shape=image.shape,
        reason=None if crops else "no face found",
    )  # fmt: skip


def score_pictures(paths, loaded, workers, keep=False):
    """Yields each picture of `read_faces` with `probabilities` (N, 6) and `masks` (N, S, S) or None added."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPool(max(workers, 1)) as pool:
        read = lambda chunk: pool.map_async(lambda path: read_faces(path, loaded, keep), chunk, 1)  # noqa: E731
        coming = read(chunks[0])
        for index, _ in enumerate(progress(chunks, "faces", unit="chunk")):
            pictures = coming.get()
            if index + 1 < len(chunks):
                coming = read(chunks[index + 1])
            squares = [square for picture in pictures if picture.crops for square in picture.squares]
            probabilities, masks = score(loaded, np.stack(squares)) if squares else (None, None)
            start = 0
            for picture in pictures:
                own = slice(start, start := start + len(picture.crops))
                picture.probabilities = [] if not picture.crops else probabilities[own]
                picture.masks = None if masks is None else masks[own]
                yield picture


# ------------------------------------------------------------------------------------------------------------
# Overlays
# ------------------------------------------------------------------------------------------------------------

COLORS = [(86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)]


def draw_overlay(image, crops, probabilities, masks):
    """A picture, uint8 RGB (H, W, 3), with a box, the mask's outline, group and probability at each face.

    Small pictures are enlarged, so that the text can be read. Colours stand for groups (Okabe & Ito 2008).
    """
    import matplotlib  # for its font

    scale = max(1, -(-360 // min(image.shape[:2])))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    line = max(2, round(min(canvas.shape[:2]) / 250))
    chosen = [int(p.argmax()) for p in probabilities]
    for i, group in enumerate(chosen):
        if masks is None:
            continue
        mask = place_mask(masks[i], crops[i].warp / [[scale, scale, 1]], canvas.shape).astype(np.uint8)
        tint = np.array(COLORS[group])
        canvas[mask > 0] = (0.85 * canvas[mask > 0] + 0.15 * tint).astype(np.uint8)
        outline = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(canvas, outline, -1, COLORS[group], line, cv2.LINE_AA)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture, "RGBA")
    whole = len(crops) == 1 and crops[0].box[2:] == (min(image.shape[:2]),) * 2
    for crop, p, group in zip(crops, probabilities, chosen):
        x, y, width, height = (value * scale for value in crop.box)
        size = int(np.clip(width / 11, 13, canvas.shape[0] / 18))
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)
        text = f"{GROUP_NAMES[group]} {p[group]:.0%}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = size // 2
        wide, high = right - left + 2 * pad + 2 * line, bottom - top + 2 * pad
        if whole:  # the picture is the face: its label lies within
            x, y = x + pad, y + height - high - pad
        else:
            draw.rounded_rectangle((x, y, x + width, y + height), 2 * line, outline=COLORS[group], width=line)
            y = y - high if y >= high else y + height
        x, y = min(max(0, x), max(0, canvas.shape[1] - wide)), min(y, canvas.shape[0] - high)
        draw.rounded_rectangle((x, y, x + wide, y + high), pad, fill=(20, 20, 20, 200))
        draw.rectangle((x + pad // 2, y + pad, x + pad // 2 + line, y + high - pad), fill=COLORS[group])
        draw.text((x + pad + 2 * line - left, y + pad - top), text, font=font, fill=(255, 255, 255))
    return picture


def overlay_path(path, args, top):
    """Where the overlay of the picture at `path` goes: in --overlay as the picture lies below `top`."""
    name = path.name + ("" if path.suffix.lower() in SUFFIXES else ".png")
    return Path(args.overlay, os.path.relpath(path.with_name(name), top))


def write_picture(picture, path):
    """Saves a PIL picture."""
    with atomic_path(path) as temporary:
        picture.save(temporary, quality=92)


# ------------------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------------------


class ExportedModel(nn.Module):
    """The model from raw pixels to probabilities, so that whoever runs it needs to know nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        mean, std = pixel_statistics(torch.device("cpu"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images):
        """RGB float32 (B, 3, S, S), values 0–255 → probabilities (B, 6) and, with a decoder, (B, 1, S, S)."""
        logits, mask_logits = self.model((images - self.mean) / self.std)
        probabilities = logits.softmax(dim=1)
        return probabilities if mask_logits is None else (probabilities, mask_logits.sigmoid())


def export(loaded, path):
    """Writes the model as one ONNX file: `images` in, `probabilities` and `masks` out (see `ExportedModel`).

    The batch size is free and the side fixed; the names of the groups are in the file's metadata.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401, which torch's exporter needs
    except ImportError as error:
        raise UserError(f"--export needs {error.name}: pip install onnx onnxscript") from None
    model = ExportedModel(copy.deepcopy(loaded.model).cpu().float()).eval()
    images = torch.zeros(2, 3, loaded.image_size, loaded.image_size)
    outputs = ["probabilities", "masks"][: 1 + (loaded.model.decoder is not None)]
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with atomic_path(path) as temporary:
        torch.onnx.export(
            model, (images,), temporary, input_names=["images"], output_names=outputs, dynamo=True,
            external_data=False, dynamic_shapes=shapes, verbose=False,
        )  # fmt: skip
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(
            graph, {"groups": ",".join(GROUP_NAMES), "input": "RGB, float32, 0 to 255, aligned face"}
        )
        onnx.save(graph, temporary)


# ------------------------------------------------------------------------------------------------------------
# A page in the browser
# ------------------------------------------------------------------------------------------------------------


def serve(loaded, host, port):
    """Serves a page on which one uploads a picture, or takes one, and sees faces, groups and masks."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'gradio>=6'") from None

    def answer(path):
        if path is None:
            return None, None
        picture = read_faces(Path(path), loaded, keep=True)
        if picture.reason:
            raise gradio.Error(f"This picture cannot be used: {picture.reason}.")
        probabilities, masks = score(loaded, np.stack(picture.squares))
        largest = max(range(len(probabilities)), key=lambda i: picture.crops[i].box[2])
        chances = dict(zip(GROUP_NAMES, probabilities[largest].tolist()))
        return draw_overlay(picture.image, picture.crops, probabilities, masks), chances

    wanted = "any photograph" if loaded.detect else "one face, cropped and upright"
    with gradio.Blocks(title="Age group of a face", delete_cache=(600, 600)) as page:
        gradio.Markdown(
            f"# Age group of a face\nGive {wanted}. Pictures stay on the machine that serves this page, "
            "and are deleted within minutes. What is shown is an estimate."
        )
        with gradio.Row():
            # Files, not decoded pictures: `decode_image` knows what to refuse.
            picture = gradio.Image(type="filepath", sources=["upload", "webcam"], label="Picture", height=420)
            buttons = ["fullscreen", "download"]
            drawn = gradio.Image(type="pil", label="Face", interactive=False, height=420, buttons=buttons)
            chances = gradio.Label(label="Age group (of the largest face)")
        picture.change(answer, picture, [drawn, chances], api_name="predict")
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    try:
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size="20mb",
            theme=theme,
            share=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error}): name another") from None


# ------------------------------------------------------------------------------------------------------------


def default_checkpoint():
    """`model.pt` in the working directory if there is one, else the released model beside this script."""
    return Path("model.pt") if Path("model.pt").is_file() else shipped(RELEASED)


def get_parser():
    parser = script_parser("predict", __doc__)
    parser.add_argument("inputs", nargs="*", metavar="PICTURE", help="pictures, and folders of them")
    parser.add_argument(
        "--checkpoint", help="model written by finetune.py; model.pt if it is there, else the released one"
    )
    parser.add_argument("--detector", metavar="FILE.onnx", help="YuNet, to find faces in whole photographs")
    parser.add_argument("--csv", metavar="FILE", help="table to write, a row a face")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, with the names of the groups")
    parser.add_argument("--overlay", metavar="DIR", help="folder for pictures with faces and groups drawn in")
    parser.add_argument("--masks", metavar="DIR", help="folder for the face masks, as PNG of 0 and 255")
    parser.add_argument("--export", metavar="FILE.onnx", help="write the model as ONNX")
    parser.add_argument("--serve", action="store_true", help="serve a page to try it in a browser")
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, help="port that it listens on")
    add_device_flags(parser)
    return parser


def main(args):
    if not (args.inputs or args.export or args.serve):
        raise UserError("nothing to do: name pictures or a folder, or give --serve or --export (-h explains)")
    for flag in ("csv", "json", "export", "overlay", "masks"):
        if getattr(args, flag):
            path = Path(getattr(args, flag))
            check_writable(f"--{flag}", path if flag in ("overlay", "masks") else path.parent)
    paths = list_pictures(args.inputs)
    top = os.path.commonpath([os.path.abspath(path.parent) for path in paths]) if paths else "."
    if args.overlay and {path.resolve() for path in paths} & {
        overlay_path(path, args, top).resolve() for path in paths
    }:
        raise UserError(
            f"--overlay {args.overlay} would replace the pictures themselves: name another folder"
        )
    checkpoint = args.checkpoint or default_checkpoint()
    print(f"model: {checkpoint}")
    loaded = load(checkpoint, args.detector, args.device, args.precision)
    if args.masks and loaded.model.decoder is None:
        raise UserError(f"--masks: {checkpoint} has learned no masks; train one with finetune.py --multitask")
    if args.export:
        export(loaded, args.export)
        print(f"{args.export} written: {loaded.image_size} px, {', '.join(GROUP_NAMES)}")
    if args.serve:
        serve(loaded, args.host, args.port)
    if not paths:
        return

    rows, skipped, oblong = [], [], 0
    for picture in score_pictures(paths, loaded, args.workers, keep=bool(args.overlay)):
        if picture.reason:
            skipped.append(f"{picture.path}: {picture.reason}")
            continue
        oblong += not 0.87 < picture.shape[0] / picture.shape[1] < 1.15
        for i, (crop, p) in enumerate(zip(picture.crops, picture.probabilities)):
            rows.append(
                {
                    "file": str(picture.path),
                    "face": i,
                    **dict(zip(("x", "y", "width", "height"), crop.box)),
                    "group": GROUP_NAMES[p.argmax()],
                    **{f"p{group}": round(float(chance), 6) for group, chance in enumerate(p)},
                }
            )
            if args.masks:
                mask = place_mask(picture.masks[i], crop.warp, picture.shape).astype(np.uint8) * 255
                name = f"{picture.path.name}_{i}_mask.png"
                path = Path(args.masks, os.path.relpath(picture.path.with_name(name), top))
                write_picture(Image.fromarray(mask), path)
        if args.overlay:
            drawn = draw_overlay(picture.image, picture.crops, picture.probabilities, picture.masks)
            write_picture(drawn, overlay_path(picture.path, args, top))

    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not rows:
        raise UserError(f"none of {len(paths)} pictures holds a face that can be read")
    width = max(len(row["file"]) for row in rows)
    print(f"{'':{width}}  face  {'group':13}" + "".join(f"{name:>13}" for name in GROUP_NAMES))
    for row in rows:
        chances = "".join(f"{row[f'p{group}']:>13.1%}" for group in range(len(GROUP_NAMES)))
        print(f"{row['file']:{width}}  {row['face']:4}  {row['group']:13}{chances}")
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        faces = [
            {
                **{key: row[key] for key in ("file", "face", "group")},
                "box": [row[key] for key in ("x", "y", "width", "height")],
                "probabilities": {name: row[f"p{group}"] for group, name in enumerate(GROUP_NAMES)},
            }
            for row in rows
        ]
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(faces, indent=2) + "\n", encoding="utf-8")
    if oblong and not args.detector:
        print(
            f"warning: {oblong} pictures are not square; the square at their centre was taken for the face: "
            "give --detector for whole photographs",
            file=sys.stderr,
        )
    written = [str(path) for path in (args.csv, args.json, args.overlay, args.masks) if path]
    print(
        f"{len(rows)} faces in {len(paths) - len(skipped)} pictures, {len(skipped)} skipped"
        + (f"; written: {', '.join(written)}" if written else "")
    )


if __name__ == "__main__":
    run(main, get_parser())
