"""Faces in any photograph: YuNet finds them, and each is brought to UTKFace's geometry and back. No torch."""

import hashlib
import threading
from functools import partial
from http.client import HTTPException
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cli import UserError
from utkface import resize

# ------------------------------------------------------------------------------------------------------------
# Geometry. Places are in pixels from the picture's corner; the first pixel's middle lies at 0.5, 0.5.
# ------------------------------------------------------------------------------------------------------------

# Where right eye, left eye, nose and the right and left corner of the mouth (the person's) lie in UTKFace's
# crops, as shares of the side: medians over 597 of them, as MediaPipe's mesh finds them.
LANDMARKS = np.array([(0.300, 0.300), (0.686, 0.302), (0.491, 0.547), (0.326, 0.690), (0.660, 0.690)])
LANDMARK_NAMES = ("right_eye", "left_eye", "nose", "right_mouth", "left_mouth")
SQUARE = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])  # a crop's corners
LARGEST_CROP = 512


class Crop(NamedTuple):
    """A face brought to UTKFace's geometry."""

    pixels: np.ndarray  # uint8 RGB (S, S, 3)
    shape: tuple[int, int, int]  # of the picture that it was cut from
    box: tuple[int, int, int, int]  # x, y, width, height in the picture
    warp: np.ndarray  # float (2, 3), from places in the picture to places in the crop as shares of its side
    score: float | None = None  # the detector's, 0 to 1
    landmarks: np.ndarray | None = None  # float (5, 2) in the picture


def apply(warp, points):
    """Points (N, 2) moved by a map (2, 3)."""
    return points @ warp[:, :2].T + warp[:, 2]


def compose(outer, inner):
    """The map (2, 3) that applies `inner`, then `outer`."""
    return outer @ np.vstack([inner, (0, 0, 1)])


def to_pixels(warp, side):
    """A crop's map as OpenCV takes it, from pixel to pixel, where whole numbers are middles of pixels."""
    scaled = warp * side
    scaled[:, 2] += scaled[:, :2].sum(axis=1) / 2 - 0.5
    return scaled


def quarter_turn(quarters, width, height):
    """The map (2, 3) that turns a picture of that size by quarters, with its corner at 0, 0 again."""
    turn = np.linalg.matrix_power([[0, -1], [1, 0]], quarters)
    low = (SQUARE * (width, height) @ turn.T).min(axis=0)
    return np.column_stack([turn, -low])


def move(faces, warp):
    """Rows of YuNet's, (N, 15), moved by a map (2, 3); a box between its moved upper left and lower right."""
    first, last = apply(warp, faces[:, :2]), apply(warp, faces[:, :2] + faces[:, 2:4])
    landmarks = apply(warp, faces[:, 4:14].reshape(-1, 2)).reshape(-1, 10)
    return np.column_stack([np.minimum(first, last), np.abs(last - first), landmarks, faces[:, 14]])


def region(warp, shape):
    """The part of a picture of `shape` that a crop covers, two slices, not empty, and the map from there."""
    corners = apply(cv2.invertAffineTransform(warp), SQUARE)
    size = np.array(shape[1::-1])
    low = np.clip(np.floor(corners.min(axis=0) + 1e-6).astype(int), 0, size - 1)
    high = np.clip(np.ceil(corners.max(axis=0) - 1e-6).astype(int), low + 1, size)
    rows, columns = slice(low[1], high[1]), slice(low[0], high[0])
    return (rows, columns), compose(warp, np.column_stack([np.eye(2), low]))


def cut(image, warp, side, border=cv2.BORDER_REPLICATE):
    """The crop (side, side, 3) that `warp` maps out of a picture (H, W, 3), with `border` beyond its edge."""
    part, warp = region(warp, image.shape)
    image = image[part]
    scale = side * np.sqrt(abs(np.linalg.det(warp[:, :2])))  # pixels of the crop per pixel of the picture
    if scale < 1:  # averaged down first, since interpolation alone would skip pixels
        whole = np.array(image.shape[1::-1])
        size = np.maximum(1, np.rint(whole * scale).astype(int))
        image = cv2.resize(image, size.tolist(), interpolation=cv2.INTER_AREA)
        warp = warp @ np.diag([*(whole / size), 1])
    return cv2.warpAffine(image, to_pixels(warp, side), (side, side), borderMode=border)


def fit(landmarks):
    """The similarity (2, 3) that brings five landmarks (5, 2) closest to where UTKFace's crops have them."""
    source, target = (points[:, 0] + 1j * points[:, 1] for points in (landmarks, LANDMARKS))
    (a, b), *_ = np.linalg.lstsq(np.stack([source, np.ones(5)], axis=1), target, rcond=None)
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def place_mask(mask, warp, shape):
    """The mask of a crop, float (S, S) with values 0 to 1, as bool (H, W) in its picture of that `shape`."""
    placed = np.zeros(shape[:2], bool)
    part, warp = region(warp, shape)
    size = placed[part].shape[::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    placed[part] = cv2.warpAffine(mask, to_pixels(warp, len(mask)), size, flags=flags) > 0.5
    return placed


# ------------------------------------------------------------------------------------------------------------
# YuNet
# ------------------------------------------------------------------------------------------------------------

ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models"
DETECTOR_URL = f"{ZOO}/face_detection_yunet/face_detection_yunet_2023mar.onnx"
DETECTOR_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
MIN_FACE = 20  # pixels
MIN_SCORE = 0.75  # reached by all of 200 padded test faces of UTKFace (docs/model_card.md)
SEEN = 20  # pixels that a face must be wide for YuNet to notice most
NOTICED = 0.3  # score at which a second look is worth while
STEP, COARSEST = 4, 512  # from scale to scale, down to pictures this long
TILE, OVERLAP = 1280, 128  # pixels searched at a time, lest memory grow with the picture
PATCH, WIDER = 128, 1.6  # pixels of the second look at a face, and how much wider than the face it is
WITHIN = np.array([[0.75, 0, 0.125], [0, 0.75, 0.125]])  # a crop in the middle of what is a third wider
SAME = 0.2  # intersection over union above which two boxes are of one face
OPENCV_LOG = threading.Lock()  # its level is the whole process's
THREAD = threading.local()  # a network is not for two threads at once


def released_detector():
    """The bytes of YuNet's file, from torch.hub's cache or the network; UserError if they cannot be had."""
    from torch import hub  # here, since nothing else in this file needs torch

    cached = Path(hub.get_dir(), "checkpoints", Path(DETECTOR_URL).name)
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(DETECTOR_URL, str(cached), DETECTOR_SHA256, progress=False)
            print(f"face detector downloaded to {cached}")
        data = cached.read_bytes()
    except (OSError, RuntimeError, HTTPException) as error:  # no network, another file, no room
        place = f"put {DETECTOR_URL} into {cached.parent}"
        raise UserError(f"no face detector ({error}): {place}, or name YuNet's file by --detector") from None
    if hashlib.sha256(data).hexdigest() != DETECTOR_SHA256:
        raise UserError(f"{cached} is not YuNet's file (its SHA-256 differs): delete it, and run again")
    return data


def open_detector(path=None, min_score=MIN_SCORE, min_face=MIN_FACE):
    """A function from a picture, uint8 RGB (H, W, 3), to its faces, float (N, 15), from left to right.

    Rows are YuNet's: box (x, y, width, height), five landmarks (x, y each), score. Threads can share the
    function, and it can be pickled. path: of YuNet's file, by default the released one. min_score: `NOTICED`
    to 1. min_face: pixels of a box's longer side. Raises UserError if the file is missing or anything else.
    """
    try:
        look = partial(run_network, Path(path).read_bytes() if path else released_detector())
        look(np.zeros((64, 64, 3), np.uint8))
    except (OSError, cv2.error):
        raise UserError(f"--detector {path} cannot be read as a face detector: name YuNet's file") from None
    return partial(detect, look, min_score, min_face)


def run_network(data, image):
    """What YuNet, given as its file's bytes, says of a picture as it is: rows as in `open_detector`."""
    if getattr(THREAD, "data", None) is not data:
        buffer, log = np.frombuffer(data, np.uint8), cv2.utils.logging
        with OPENCV_LOG:  # OpenCV 5 warns that its new engine knows no targets; none was asked for
            before = log.setLogLevel(log.LOG_LEVEL_SILENT)
            try:
                THREAD.network = cv2.FaceDetectorYN.create("onnx", buffer, buffer[:0], (32, 32), NOTICED)
            finally:
                log.setLogLevel(before)
        THREAD.data = data
    THREAD.network.setInputSize(image.shape[1::-1])
    faces = THREAD.network.detect(np.ascontiguousarray(image[:, :, ::-1]))[1]  # it expects BGR
    return np.zeros((0, 15)) if faces is None else faces.astype(float)


def detect(look, min_score, min_face, image):
    """The faces of a picture, as in `open_detector`: what `search` notices and a closer look is sure of."""
    ways = []
    for quarters in range(4):  # until most faces stand upright: cameras forget to say how they were held
        turned = np.rot90(image, quarters)
        found = [look_closely(look, turned, face) for face in search(look, min_face, turned)]
        found = [pair for pair in found if pair[0][14] >= min_score and max(pair[0][2:4]) >= min_face]
        upright = sum(turns == 0 for _, turns in found)
        back = quarter_turn(quarters, turned.shape[1], turned.shape[0])
        ways.append((upright, move(np.array([face for face, _ in found]).reshape(-1, 15), back)))
        if upright > len(found) / 2:
            break
    return each_once(max(ways, key=lambda way: way[0])[1])


def search(look, min_face, image):
    """The faces in a picture, (N, 15), each once: at several scales, tile by tile, as the picture lies."""
    found = []
    size = np.array(image.shape[1::-1])
    scale = min(1, SEEN / min_face)
    while True:
        reduced = np.maximum(32, np.rint(size * scale).astype(int))
        small = cv2.resize(image, reduced.tolist(), interpolation=cv2.INTER_AREA)
        for left, top in product(*(range(0, max(1, length - OVERLAP), TILE - OVERLAP) for length in reduced)):
            faces = look(small[top : top + TILE, left : left + TILE])
            found.append(move(faces, np.diag(size / reduced) @ [[1, 0, left], [0, 1, top]]))
        if max(reduced) <= COARSEST:
            break
        scale /= STEP
    found = np.concatenate(found)
    return each_once(found[found[:, 2:4].max(axis=1) >= min_face])


def look_closely(look, image, face):
    """A face noticed, (15,), as YuNet is surest of it, and by how many quarters it was turned for that."""
    side = WIDER * max(face[2:4])
    centre = face[:2] + face[2:4] / 2
    upright = np.column_stack([np.eye(2) / side, 0.5 - centre / side])
    ways = []
    for quarters in range(4):  # only its score tells that a face stands on its head, not its landmarks
        faces = look_through(look, image, compose(quarter_turn(quarters, 1, 1), upright))
        ways += [(one, quarters) for one in near(face, faces)]
    best, quarters = max(ways, key=lambda way: way[0][14], default=(np.zeros(15), 0))
    if best[14]:  # once more, with its tilt undone: landmarks of a tilted face are less sure
        straight = near(best, look_through(look, image, compose(WITHIN, fit(best[4:14].reshape(5, 2)))))
        if len(straight):
            best[4:14] = straight[straight[:, 14].argmax(), 4:14]
    return best, quarters


def near(face, faces):
    """Those of `faces` (N, 15) whose box lies about where that of `face` (15,) does: no neighbour's."""
    middles = faces[:, :2] + faces[:, 2:4] / 2
    return faces[np.abs(middles - face[:2] - face[2:4] / 2).max(axis=1) < max(face[2:4]) / 4]


def look_through(look, image, warp):
    """What a network says of the part of a picture that `warp` maps to a square."""
    faces = look(cut(image, warp, PATCH, border=cv2.BORDER_CONSTANT))
    return move(faces, cv2.invertAffineTransform(warp * PATCH))


def each_once(faces):
    """Of faces (N, 15) that overlap the surest, from left to right."""
    kept = cv2.dnn.NMSBoxes(faces[:, :4].tolist(), faces[:, 14].tolist(), 0, SAME)
    faces = faces[np.array(kept, int)]
    return faces[np.lexsort((faces[:, 1], faces[:, 0]))]


def find_crops(image, detect=None, size=None):
    """The faces of a picture, uint8 RGB (H, W, 3), as `Crop`s, from left to right.

    Without `detect`, its central square is one. size: of the crops, by default about that of each face.
    """
    height, width = image.shape[:2]
    if detect is None:
        side = min(height, width)
        x, y = (width - side) // 2, (height - side) // 2
        warp = np.array([[1, 0, -x], [0, 1, -y]]) / side
        return [Crop(resize(image, size or side), image.shape, (x, y, side, side), warp)]
    crops = []
    for face in detect(image):
        landmarks = face[4:14].reshape(5, 2)
        warp = fit(landmarks)
        own_size = round(1 / np.hypot(*warp[:, 0]))  # at which nothing is lost
        pixels = cut(image, warp, int(np.clip(own_size, 32, LARGEST_CROP)))
        corners = np.rint([face[:2], face[:2] + face[2:4]]).astype(int)
        (left, top), (right, bottom) = np.clip(corners, 0, (width, height)).tolist()
        box = (left, top, right - left, bottom - top)
        crops.append(Crop(pixels, image.shape, box, warp, float(face[14]), landmarks))
    return [crop._replace(pixels=resize(crop.pixels, size or len(crop.pixels))) for crop in crops]
