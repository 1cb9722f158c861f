"""What is drawn of the faces that predict.py finds: overlays of pictures and videos, and masks. No torch."""

import hashlib
import math
import os
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import UserError, atomic_path
from faces import place_mask, region
from utkface import FORMATS, GROUP_NAMES

VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
MADE_BY, MARK = 0x0131, "predict.py"  # in EXIF's field for software
PALETTE = (86, 180, 233), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167)
COLORS = dict(zip(GROUP_NAMES, PALETTE))  # by Okabe & Ito 2008


def label(face):
    """What an overlay says of a face: `Young Adult 79 %, about 31, 25 to 38`."""
    text = f"{face.group} {100 * face.probabilities.max():.0f} %"
    if face.predicted_age is None:
        return text
    if face.too_small:
        return f"{text}, too small for an age"
    return f"{text}, about {face.predicted_age:.0f}, {face.age_low:.0f} to {face.age_high:.0f}"


def draw_faces(image, faces, texts=None, size=None):
    """A PIL picture of pixels (H, W, 3) with box, outline of the mask and text at each of its faces.

    texts: by default the labels. size: of the letters, in pixels, by default in proportion to the face.
    """
    # Small pictures are enlarged, so that texts can be read; one that is small in one way alone is not.
    scale = max(1, min(math.ceil(360 / min(image.shape[:2])), 8192 // max(image.shape[:2])))
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    line = max(2, round(min(canvas.shape[:2]) / 250))
    for face in faces:
        if face.crop_mask is None:
            continue
        color = COLORS[face.group]
        warp = face.warp / [[scale, scale, 1]]
        part, _ = region(warp, canvas.shape)
        view, mask = canvas[part], place_mask(face.crop_mask, warp, canvas.shape)[part]
        view[mask] = (0.85 * view[mask] + 0.15 * np.array(color)).astype(np.uint8)
        outline = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        corner = (part[1].start, part[0].start)
        cv2.drawContours(canvas, outline, -1, color, line, cv2.LINE_AA, offset=corner)
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn, "RGBA")
    for face, text in zip(faces, texts or map(label, faces)):
        color = COLORS[face.group]
        x, y, width, height = (value * scale for value in face.box)
        letters = size or max(1, int(np.clip(width / 14, max(13, 4 * line), canvas.shape[0] / 18)))
        font = ImageFont.load_default(letters)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = letters // 2
        wide, high = right - left + 2 * pad + 2 * line, bottom - top + 2 * pad
        draw.rounded_rectangle((x, y, x + width, y + height), 2 * line, outline=color, width=line)
        x = max(0, min(x + 2 * line, canvas.shape[1] - wide))
        below = min(y + height, canvas.shape[0] - high - 2 * line)  # within the box where that is large
        y = y - high if y >= high else below
        draw.rounded_rectangle((x, y, x + wide, y + high), pad, fill=(20, 20, 20, 200))
        draw.rectangle((x + pad // 2, y + pad, x + pad // 2 + line, y + high - pad), fill=color)
        draw.text((x + pad + 2 * line - left, y + pad - top), text, font=font, fill=(255, 255, 255))
    return drawn


def output_path(path, folder, top, ending):
    """Where what is made of the picture at `path` goes: in `folder`, as the picture lies below `top`."""
    stem = path.stem if path.suffix == ending else path.name
    if len(os.fsencode(stem + ending)) > 255:  # bytes, more than file systems take
        mark = hashlib.blake2b(os.fsencode(stem), digest_size=4).hexdigest()
        kept = os.fsencode(stem)[: 254 - len(ending) - len(mark)]
        stem = f"{kept.decode(errors='ignore')}-{mark}"
    return Path(folder, os.path.relpath(path.parent, top), stem + ending)


def overlay_path(path, folder, top):
    """Where the overlay of a picture or video goes."""
    suffix = path.suffix.lower()
    kept = suffix in (".jpg", ".jpeg", ".png", ".webp", ".mp4")
    return output_path(path, folder, top, path.suffix if kept else ".mp4" if suffix in VIDEOS else ".png")


def write_picture(path, picture):
    """Saves a PIL picture, marked so that a later run does not take it for a photograph."""
    exif = Image.Exif()
    exif[MADE_BY] = MARK
    with atomic_path(path) as temporary:
        picture.save(temporary, quality=92, exif=exif)


def check_video_name(path):
    """Raises ValueError for a path that is no text, at which OpenCV would end the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("the path of a video must be UTF-8: rename it") from None


@contextmanager
def open_video(path, rate, size):
    """Yields a function that appends PIL pictures of one size to a video, shown at `rate` a second.

    Raises UserError if OpenCV lacks what writes it, or if it could not be written whole.
    """
    check_video_name(path)
    rate = min(max(round(rate, 2), 0.01), 600)  # MPEG-4 takes no finer ones
    with atomic_path(path) as temporary:
        video = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not video.isOpened():  # else nothing would be written, and nothing said
            raise UserError(f"{path}: this OpenCV writes no mp4: install opencv-python-headless")
        yield lambda picture: video.write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
        video.release()  # which says nothing of a full disk
        if not cv2.VideoCapture(str(temporary)).isOpened():
            raise UserError(f"{path} cannot be written whole: make room, or name another place")


def is_own(path):
    """Whether a file is an overlay or a mask that an earlier run has written."""
    try:
        with Image.open(path, formats=FORMATS) as header:
            if header.format == "PNG" and "exif" not in header.info:
                return False  # `getexif` would decode all pixels, to look behind them
            return header.getexif().get(MADE_BY) == MARK
    except Exception:  # what Pillow raises depends on where a file breaks
        return False
