"""Draws faces of known age, with their true masks, under UTKFace's own file names.

    python tools/synthesize.py
    python tools/synthesize.py --output dataset/raw --count 2000 --seed 0

Writes 200×200 crops `<age>_<gender>_<race>_<timestamp>.jpg.chip.jpg` into `--output`, and the visible skin of
each face as `<age>_<gender>_<race>_<timestamp>_mask.png` (one channel, 0/255) into `<output>_masks`. Age
groups have UTKFace's shares, and each sign of age follows an apparent age of its own, so that groups overlap
as they do in photographs.
"""

import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError, atomic_path, number, progress, remove_leftovers, run, script_parser
from utkface import AGE_GROUPS

SIDE = 200  # pixels, UTKFace's
HALF = SIDE / 2  # the unit of all lengths below: from the crop's centre, y downwards
Y, X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
T = np.linspace(-1, 1, 24)[:, None]  # along a curve
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 40)), np.sin(np.linspace(0, 2 * np.pi, 40))], 1)

# ------------------------------------------------------------------------------------------------------------
# Looks: what a face is like, given its labels
# ------------------------------------------------------------------------------------------------------------

SHARES = (0.09, 0.065, 0.135, 0.45, 0.175, 0.085)  # of the age groups in UTKFace
OLDEST = 95
SHARED_ERROR, OWN_ERROR = 0.06, 0.14  # log-normal, of the apparent age: the face's, and each trend's own

YEARS = (0, 4, 10, 16, 24, 35, 50, 65, 85)
TRENDS = {
    "width": (0.89, 0.87, 0.84, 0.82, 0.80, 0.78, 0.79, 0.80, 0.79),  # half the face's
    "chin": (0.77, 0.81, 0.86, 0.89, 0.91, 0.91, 0.92, 0.93, 0.95),
    "jaw": (0.03, 0.05, 0.09, 0.12, 0.15, 0.19, 0.16, 0.12, 0.10),  # how much the face narrows downwards
    "hairline": (-1.06, -1.02, -0.98, -0.96, -0.96, -0.98, -1.00, -1.02, -1.04),
    "density": (0.30, 0.90, 1.00, 1.00, 1.00, 1.00, 0.97, 0.88, 0.75),  # of hair
    "grey": (0.00, 0.00, 0.00, 0.00, 0.00, 0.08, 0.42, 0.80, 1.00),
    "receding": (0.00, 0.00, 0.00, 0.00, 0.04, 0.22, 0.50, 0.72, 0.90),
    "eye_y": (-0.28, -0.32, -0.37, -0.40, -0.41, -0.42, -0.42, -0.41, -0.41),
    "eye": (1.42, 1.30, 1.16, 1.07, 1.01, 0.94, 0.87, 0.81, 0.76),
    "brow": (0.20, 0.45, 0.70, 0.95, 1.00, 1.00, 0.95, 0.80, 0.65),
    "nose": (0.60, 0.68, 0.81, 0.94, 1.00, 1.02, 1.07, 1.15, 1.25),
    "mouth": (0.18, 0.20, 0.24, 0.27, 0.28, 0.28, 0.28, 0.27, 0.26),  # half its width
    "lips": (1.10, 1.10, 1.10, 1.15, 1.10, 0.92, 0.72, 0.52, 0.36),
    "cheeks": (1.00, 0.85, 0.60, 0.38, 0.20, 0.05, 0.00, 0.00, 0.00),
    "blush": (1.00, 0.90, 0.70, 0.50, 0.32, 0.12, 0.10, 0.10, 0.10),
    "beard": (0.00, 0.00, 0.00, 0.12, 0.70, 1.00, 1.00, 1.00, 1.00),
    "forehead": (0.00, 0.00, 0.00, 0.00, 0.06, 0.34, 0.62, 0.85, 1.05),  # from here on, wrinkles and skin
    "crow": (0.00, 0.00, 0.00, 0.00, 0.06, 0.34, 0.62, 0.85, 1.05),
    "folds": (0.08, 0.08, 0.06, 0.06, 0.16, 0.44, 0.68, 0.88, 1.05),
    "bags": (0.00, 0.00, 0.00, 0.02, 0.10, 0.34, 0.60, 0.85, 1.05),
    "sag": (0.00, 0.00, 0.00, 0.00, 0.00, 0.06, 0.36, 0.72, 1.05),
    "rough": (0.00, 0.02, 0.05, 0.18, 0.18, 0.28, 0.48, 0.75, 1.00),
    "spots": (0.00, 0.00, 0.00, 0.00, 0.00, 0.04, 0.22, 0.60, 1.00),
}
SKIN = ((234, 192, 168), (136, 94, 72), (232, 192, 156), (182, 132, 98), (206, 158, 124))  # RGB, by race
HAIR = ((26, 22, 22), (50, 34, 24), (92, 62, 38), (176, 136, 84), (140, 66, 34))  # black to blond, red
IRIS = ((58, 36, 22), (92, 62, 36), (84, 104, 120), (88, 112, 76))
GREY_HAIR = np.array((188, 186, 184))


def sample_looks(rng: np.random.Generator, age: int, gender: int, race: int) -> SimpleNamespace:
    """What `draw_face` draws: proportions, colours and signs of age of a face with these UTKFace labels."""
    shared = np.exp(rng.normal(0, SHARED_ERROR))

    def apparent_age():
        return (age + 3) * shared * np.exp(rng.normal(0, OWN_ERROR)) - 3

    looks = SimpleNamespace(**{key: np.interp(apparent_age(), YEARS, trend) for key, trend in TRENDS.items()})
    spreads = {"width": 0.02, "chin": 0.02, "eye": 0.06, "nose": 0.06, "mouth": 0.07, "lips": 0.15}
    for key, spread in spreads.items():
        setattr(looks, key, getattr(looks, key) * rng.normal(1, spread))
    looks.race, looks.man, looks.grown = race, gender == 0, apparent_age() > 16
    looks.eye_x = rng.normal(0.37, 0.012)
    looks.mouth_y = rng.normal(0.42, 0.015) + 0.4 * (looks.chin - 0.91)
    looks.square = rng.normal(2.4 if looks.man and looks.grown else 2.15, 0.12)  # 2 is an ellipse
    looks.yaw = rng.normal(0, 0.07)

    looks.skin = np.clip(np.array(SKIN[race]) * rng.normal(1, 0.09) + rng.normal(0, 4, 3), 20, 245)
    shade = rng.choice(5, p=(0.15, 0.3, 0.25, 0.2, 0.1) if race == 0 else (0.7, 0.3, 0, 0, 0))
    looks.hair = np.array(HAIR[shade]) * rng.uniform(0.8, 1.25)
    looks.iris = np.array(IRIS[rng.choice(4, p=(0.3, 0.3, 0.25, 0.15)) if race == 0 else rng.choice(2)])
    looks.cloth = np.clip(rng.uniform(30, 220) + rng.normal(0, 35, 3), 0, 255)
    looks.curly = race == 1 or rng.random() < 0.12
    looks.long = rng.random() < (0.03 if looks.man else 0.2 if age < 3 else 0.75)
    looks.volume = rng.uniform(0.06, 0.14) + looks.long * rng.uniform(0.04, 0.25) + looks.curly * 0.06
    looks.cover = rng.uniform(0.92, 1.12) if looks.long else 9  # where hair hangs over the cheeks
    looks.fringe = rng.uniform(0.08, 0.28) if rng.random() < 0.25 else rng.uniform(-0.04, 0.05)
    looks.sweep = rng.normal(0, 0.08)
    looks.receding *= rng.uniform(0.1, 1.1) if looks.man else 0.1
    looks.hat = rng.random() < 0.05  # a scarf over long hair, a cap over short
    if looks.hat:
        looks.density, looks.receding, looks.fringe = 1, 0, rng.uniform(0.08, 0.2)

    style = rng.choice(4, p=(0.5, 0.28, 0.11, 0.11)) if looks.man else 0  # shaven, stubble, moustache, full
    looks.stubble = looks.beard * looks.man * (rng.uniform(0.25, 0.6) if style == 1 else 0.12)
    looks.moustache, looks.full_beard = looks.beard * (style >= 2), looks.beard * (style == 3)
    looks.makeup = rng.uniform(0.2, 1) * (looks.grown and not looks.man and rng.random() < 0.6)
    looks.glasses = rng.random() < np.interp(apparent_age(), (3, 12, 40, 70), (0, 0.08, 0.14, 0.35))
    looks.smile = rng.normal(0.4, 0.4)
    looks.gape = max(0, rng.normal(0.1 if looks.smile > 0.2 else -0.8, 0.5))
    return looks


# ------------------------------------------------------------------------------------------------------------
# Drawing: shapes in half sides, seen through the pose of the face
# ------------------------------------------------------------------------------------------------------------


def make_sheet(rng: np.random.Generator, looks: SimpleNamespace) -> SimpleNamespace:
    """Empty `pixels` (S, S, 3), their `relief` and opacity of `skin` (S, S), and the `pose` to draw in."""
    pose = cv2.getRotationMatrix2D((0, 0), np.clip(rng.normal(0, 4.5), -12, 12), HALF * rng.normal(1, 0.02))
    pose[:, 2] = HALF + HALF * (rng.normal(0, 0.02, 2) - (looks.yaw / 2, 0))
    pixels, relief, skin = (np.zeros((SIDE, SIDE, n), np.float32).squeeze() for n in (3, 1, 1))
    return SimpleNamespace(pixels=pixels, relief=relief, skin=skin, pose=pose, yaw=looks.yaw)


def stamp(sheet, points, soft=0.0, line=0.0, depth=1.0):
    """Opacity (h, w) of a polygon (n, 2) or of a polyline `line` wide, and the slices of the sheet it covers.

    `soft` blurs its edge. What lies `depth` before the outline of the face (0) moves as the head turns.
    """
    points = np.array(points, float)
    points[:, 0] += depth * sheet.yaw * np.maximum(1 - (points[:, 0] / 0.95) ** 2, 0)
    corners = np.rint(16 * (points @ sheet.pose[:, :2].T + sheet.pose[:, 2])).astype(np.int32)
    soft, line = soft * HALF, line * HALF
    x, y, width, height = cv2.boundingRect(corners)  # as the corners, in sixteenths of pixels
    pad = int(3 * soft + line + 2)
    left, right = (min(max(edge, 0), SIDE) for edge in (x // 16 - pad, (x + width) // 16 + pad))
    top, bottom = (min(max(edge, 0), SIDE) for edge in (y // 16 - pad, (y + height) // 16 + pad))
    alpha = np.zeros((bottom - top, right - left), np.uint8)
    if alpha.size:
        corners -= np.array((16 * left, 16 * top), np.int32)
        if line:
            cv2.polylines(alpha, [corners], False, 255, max(1, round(line)), cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(alpha, [corners], 255, cv2.LINE_AA, 4)
        if soft:  # close to a Gaussian of deviation `soft`, and quick whatever its size
            alpha = cv2.stackBlur(alpha, (2 * round(2.4 * soft) + 1,) * 2)
    return alpha * np.float32(min(line or 1, 1) / 255), (slice(top, bottom), slice(left, right))


def paint(sheet, points, colour, opacity=1.0, **shape):
    """Lays a colour, or a picture (S, S, 3), over the sheet within a shape; returns the shape's stamp."""
    alpha, at = stamp(sheet, points, **shape)
    colour = colour[at] if np.ndim(colour) == 3 else np.asarray(colour, np.float32)
    sheet.pixels[at] += (colour - sheet.pixels[at]) * (alpha * np.float32(opacity))[..., None]
    return alpha, at


def carve(sheet, points, height, **shape):
    """Raises the relief of the skin by `height` within a shape, or sinks it."""
    alpha, at = stamp(sheet, points, **shape)
    sheet.relief[at] += alpha * np.float32(height)


def ellipse(x, y, rx, ry) -> np.ndarray:
    """Outline (40, 2) of an ellipse."""
    return CIRCLE * (rx, ry) + (x, y)


def curve(start, middle, end) -> np.ndarray:
    """Parabola (24, 2) through three points."""
    start, middle, end = np.array((start, middle, end), float)
    return middle + T * ((end - start) / 2) + T * T * ((start + end) / 2 - middle)


def band(x, top, bottom) -> np.ndarray:
    """Outline (2n, 2) of what lies between two curves y(x)."""
    return np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])


def noise(rng, cells) -> np.ndarray:
    """Noise (S, S), standard normal at `cells` × `cells` points and smooth between them."""
    grid = rng.standard_normal((cells, cells), np.float32)
    return cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


# ------------------------------------------------------------------------------------------------------------
# Parts, from back to front
# ------------------------------------------------------------------------------------------------------------


def draw_background(sheet, rng, looks):
    """A gradient, blobs or stripes; now and then in the colour of skin."""
    near_skin = rng.random() < 0.06
    base = looks.skin * rng.uniform(0.7, 1.2) if near_skin else rng.uniform(20, 235) + rng.normal(0, 28, 3)
    angle, kind = rng.uniform(0, 2 * np.pi), rng.integers(3)
    mix = X * np.float32(np.cos(angle)) + Y * np.float32(np.sin(angle))
    if kind == 1:
        mix = noise(rng, rng.integers(4, 12))
    elif kind == 2:
        mix = np.tanh(3 * np.sin(mix * np.float32(rng.uniform(4, 20))))
    colours = np.array((base, rng.uniform(20, 45) * rng.normal(0, 1) + rng.normal(0, 12, 3)), np.float32)
    sheet.pixels[:] = np.clip(colours[0] + colours[1] * mix[..., None], 0, 255)


def make_hair(sheet, rng, looks) -> np.ndarray:
    """Picture (S, S, 3) of strands that run from the crown and grey one by one; of a hat's cloth."""
    if looks.hat:
        return looks.cloth[::-1].astype(np.float32) * (1 + 0.05 * noise(rng, 60)[..., None])
    crown = np.float32(4 * looks.sweep), np.float32(-1.6)
    radius, angle = cv2.cartToPolar(X - crown[0], Y - crown[1])
    strands = cv2.blur(rng.normal(0, 1.5, (2048, 4)).astype(np.float32), (1, 5))
    bent = angle + noise(rng, 4) * np.float32(0.04)
    strand = strands[(bent * 300).astype(int) % 2048, np.minimum(radius, 3).astype(int)]
    if looks.curly:
        strand = 0.45 * noise(rng, 36)
    grey = np.clip(2.2 * looks.grey - 0.6 + 0.22 * strand, 0, 1)[..., None]
    gloss = 1 + 0.16 * strand + 0.35 * np.exp(-(((radius - 0.95) / 0.2) ** 2)) * (not looks.curly)
    return ((looks.hair + (GREY_HAIR - looks.hair) * grey) * gloss[..., None]).astype(np.float32)


def face_outline(looks, top=-1.12, grow=0.0) -> np.ndarray:
    """Outline (96, 2) of the face from above the forehead to the chin, or of a hood `grow` outside it."""
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    power = 2 / np.where(np.sin(t) < 0, 2.6, looks.square)
    x, v = (np.sign(side) * np.abs(side) ** power for side in (np.cos(t), np.sin(t)))
    bulge = 0.05 * looks.cheeks * np.exp(-(((v - 0.35) / 0.3) ** 2))
    bulge += 0.06 * looks.sag * np.exp(-(((v - 0.7) / 0.16) ** 2))
    x = x * (looks.width + grow) * (1 - looks.jaw * v) + np.sign(x) * bulge * np.abs(x) ** 0.3
    return np.stack([x, (looks.chin + top) / 2 + ((looks.chin - top) / 2 + grow) * v], 1)


def hair_outline(looks) -> np.ndarray:
    """Outline (96, 2) of the hair behind and around the head."""
    outline = face_outline(looks, -1.35, looks.volume)
    low = outline[:, 1] > -0.1
    if looks.long:
        wavy = looks.width + looks.volume + 0.05 * np.sin(5 * outline[low, 1])
        outline[low] = np.stack([np.sign(outline[low, 0]) * wavy, 1.6 * outline[low, 1]], 1)
    else:
        outline[low, 1] = -0.1
    return outline


def draw_back(sheet, rng, looks):
    """Hair behind the head, neck, clothes and ears."""
    flat = partial(paint, sheet, depth=0)
    flat(hair_outline(looks), sheet.hair, looks.density * (looks.long or looks.receding < 0.85), soft=0.015)
    neck, drop = 0.52 if looks.man and looks.grown else 0.42, rng.uniform(0.9, 1.08)
    throat = [(-neck, 0.4), (neck, 0.4), (neck + 0.05, 2), (-neck - 0.05, 2)]
    flat(throat, looks.skin * (0.6, 0.56, 0.54), soft=0.02)
    collar = [(-neck - 0.12, drop), (-0.25, drop + 0.2), (0.25, drop + 0.2), (neck + 0.12, drop)]
    flat([(-2, 1.2), *collar, (2, 1.2), (2, 3), (-2, 3)], looks.cloth, soft=0.01)
    for x in (-looks.width - 0.02, looks.width + 0.02):
        flat(ellipse(x, -0.12, 0.06 + 0.04 * looks.nose, 0.21 * looks.nose), looks.skin * 0.86, soft=0.006)
        flat(ellipse(x * 1.02, -0.12, 0.045, 0.13 * looks.nose), looks.skin * (0.62, 0.55, 0.53), soft=0.02)


def draw_skin(sheet, rng, looks):
    """The bare face: tone, blush and spots, and the relief of cheeks, sockets, brow ridge and chin."""
    tone = looks.skin.astype(np.float32) * (1 + 0.015 * noise(rng, 5)[..., None])
    alpha, at = paint(sheet, face_outline(looks), tone, soft=0.004, depth=0)
    sheet.skin[at] = alpha
    for s in (-1, 1):
        rosy = 0.5 * looks.blush + 0.3 * looks.makeup
        paint(sheet, ellipse(s * 0.48, 0.1, 0.2, 0.15), looks.skin * (1.05, 0.8, 0.8), rosy, soft=0.09)
        carve(sheet, ellipse(s * 0.46, 0.1, 0.2, 0.16), 0.05 + 0.06 * looks.cheeks, soft=0.1)
        carve(sheet, ellipse(s * looks.eye_x * 0.95, looks.eye_y - 0.02, 0.18, 0.1), -0.05, soft=0.05)
        carve(sheet, ellipse(s * 0.33, looks.eye_y - 0.22, 0.2, 0.04), 0.03, soft=0.05)
        carve(sheet, ellipse(s * 0.52, 0.4, 0.1, 0.16), -0.06 * looks.sag, soft=0.08)
        carve(sheet, ellipse(s * 0.5, 0.66, 0.1, 0.08), 0.05 * looks.sag, soft=0.05)
    carve(sheet, ellipse(0, looks.chin - 0.16, 0.16, 0.1), 0.05, soft=0.06)
    carve(sheet, ellipse(0, looks.mouth_y + 0.16, 0.14, 0.02), -0.03, soft=0.03)
    for _ in range(rng.poisson(22 * looks.spots + 8 * (rng.random() < 0.2))):
        spot = ellipse(*rng.normal((0, -0.1), (0.35, 0.45)), *rng.uniform(0.01, 0.03, 2))
        paint(sheet, spot, looks.skin * (0.74, 0.62, 0.54), rng.uniform(0.15, 0.5), soft=0.01)
    sheet.relief += (0.0004 + 0.0007 * looks.rough) * (noise(rng, 100) + 1.5 * noise(rng, 40))


def draw_wrinkles(sheet, rng, looks):
    """Lines of forehead, frown, eyes, cheeks and mouth: grooves that also darken."""
    eye_x, eye_y, mouth, mouth_y = looks.eye_x, looks.eye_y, looks.mouth, looks.mouth_y

    def groove(depth, points, line=0.012, soft=0.012):
        depth *= rng.uniform(0.6, 1.2)
        if depth > 0.03:
            points = points + rng.normal(0, 0.006, 2)
            carve(sheet, points, -0.05 * depth, soft=soft, line=line)
            carve(sheet, np.add(points, (0, 0.04)), 0.02 * depth, soft=0.02, line=line)
            paint(sheet, points, looks.skin * (0.5, 0.4, 0.36), 0.55 * depth, soft=soft * 0.7, line=line)

    for y in eye_y - np.array((0.32, 0.4, 0.48, 0.56)):
        u, reach, bow = np.linspace(-1, 1, 24), rng.uniform(0.25, 0.48), rng.normal(0, 0.02)
        groove(looks.forehead, np.stack([reach * u, y + bow * np.cos(2 * np.pi * u)], 1))
    for s in (-1, 1):

        def side(*points, s=s):
            return curve(*np.multiply(points, (s, 1)))

        groove(looks.forehead * 0.8, side((0.06, eye_y - 0.2), (0.05, eye_y - 0.13), (0.07, eye_y - 0.06)))
        for slope in (-0.09, -0.01, 0.07, 0.13):
            x, y = eye_x + 0.22, eye_y + slope / 2
            groove(looks.crow, side((x, y), (x + 0.06, y + slope / 2), (x + 0.12, y + slope)))
        x, y = eye_x, eye_y + 0.1
        bag = side((x - 0.16, y), (x, y + 0.01 + 0.06 * looks.eye), (x + 0.15, y))
        groove(looks.bags, bag, line=0.016, soft=0.018)
        groove(looks.bags - 0.3, np.add(bag, (0, 0.06)))
        fold = side((0.17 * looks.nose, 0.04), (mouth + 0.03, mouth_y - 0.17), (mouth + 0.1, mouth_y + 0.02))
        groove(looks.folds * 1.2, fold, line=0.016, soft=0.02)
        x, y = mouth + 0.03, mouth_y + 0.05
        groove(looks.sag, side((x, y), (x + 0.03, y + 0.09), (x + 0.01, y + 0.19)), soft=0.018)
        groove(looks.sag - 0.3, side((0.6, 0.1), (0.54, 0.3), (0.56, 0.46)), soft=0.02)


def draw_nose(sheet, rng, looks):
    """Bridge, tip, wings and nostrils."""
    long, y = looks.nose, -0.06 + 0.14 * looks.nose
    wide = long * (0.95, 1.25, 1.05, 1.05, 1.05)[looks.race]
    shade = looks.skin * (0.5, 0.38, 0.36)
    bridge = [(-0.02, looks.eye_y), (0.02, looks.eye_y), (0.06 * wide, y), (-0.06 * wide, y)]
    carve(sheet, bridge, 0.045 * long, soft=0.05, depth=1.2)
    carve(sheet, ellipse(0, y - 0.02, 0.07 * wide, 0.06 * long), 0.06, soft=0.04, depth=1.4)
    paint(sheet, ellipse(0, y + 0.065, 0.13 * wide, 0.015), shade, 0.4, soft=0.025, depth=1.2)
    for s in (-1, 1):
        carve(sheet, ellipse(s * 0.115 * wide, y, 0.04 * wide, 0.045), 0.04, soft=0.02, depth=1.2)
        wing = curve(*[(s * a * wide, y + b) for a, b in ((0.15, -0.05), (0.175, 0.005), (0.13, 0.05))])
        paint(sheet, wing, shade, 0.5, soft=0.008, line=0.012, depth=1.2)
        nostril = ellipse(s * 0.068 * wide, y + 0.04, 0.036 * wide, 0.016)
        paint(sheet, nostril, shade * 0.5, 0.8, soft=0.008, depth=1.3)


def draw_mouth(sheet, rng, looks):
    """Lips that smile or not; teeth if they part."""
    u, smile = np.linspace(-1, 1, 25), max(looks.smile, 0)
    width = looks.mouth * (1 + 0.15 * smile)
    full = looks.lips * (1.25 if looks.race == 1 else 1) * (1 - 0.2 * smile)
    line = looks.mouth_y + 0.08 * looks.smile * (0.4 - u**2)
    upper, lower = line - 0.03 * looks.gape * (1 - u**2), line + 0.11 * looks.gape * (1 - u**2)
    top = upper - 0.06 * full * (1 - np.abs(u) ** 1.6) * (1 - 0.25 * np.exp(-((u / 0.16) ** 2)))
    bottom = lower + 0.085 * full * (1 - np.abs(u) ** 2.4)
    rouge = np.array((1, rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.6))) * rng.uniform(170, 230)
    colour = looks.skin * (0.86, 0.62, 0.6)
    colour += 0.6 * looks.makeup * (rouge - colour)
    carve(sheet, band(width * u, top, bottom), 0.03, soft=0.02)
    paint(sheet, band(width * u, top, bottom), colour, 0.9, soft=0.006)
    if looks.gape > 0.1:
        inner = width * 0.9 * u
        paint(sheet, band(inner, upper, lower), (70, 26, 28), soft=0.004)
        teeth = upper if looks.cheeks > 0.9 else np.minimum(upper + 0.065 * (1 - u**4), lower)
        paint(sheet, band(inner * 0.92, upper, teeth), np.array((236, 230, 218)) - 35 * looks.sag, soft=0.004)
    paint(sheet, np.stack([width * u, upper], 1), looks.skin * (0.36, 0.2, 0.2), 0.7, soft=0.006, line=0.012)
    paint(sheet, ellipse(0, bottom[12] + 0.05, width * 0.5, 0.012), looks.skin * 0.6, 0.3, soft=0.02)


def draw_eyes(sheet, rng, looks):
    """Eyes with lids, lashes and gaze, and the brows above them."""
    size, y, u = looks.eye, looks.eye_y, np.linspace(-1, 1, 15)
    width, iris = 0.16 * size**0.5, 0.076 * size**0.6
    height = 0.075 * size * rng.normal(1, 0.08) * (1 - 0.2 * max(looks.smile, 0)) * (1 - 0.15 * looks.sag)
    height *= 0.8 if looks.race == 2 else 1
    tilt = rng.normal(0.01, 0.008) + 0.012 * (looks.race == 2) - 0.015 * looks.sag
    gaze, lift, heavy = rng.normal(0, (0.02, 0.015, 0.08))
    white, dark = np.clip(1.6 * looks.grey - 0.5, 0, 0.9), looks.skin * (0.28, 0.22, 0.2)
    brow = (looks.hair * 0.7 + looks.skin * 0.12) * (1 - white) + GREY_HAIR * 0.9 * white
    for s in (-1, 1):
        x = s * looks.eye_x
        span = x + s * width * u
        upper = y - tilt * u - height * (1 - np.abs(u) ** 2.2)
        lower = y - tilt * u + 0.65 * height * (1 - u**2)
        lid = np.stack([span, upper], 1)
        paint(sheet, ellipse(x, y - 0.03, width, 0.09), looks.skin * (0.72, 0.62, 0.62), 0.35, soft=0.04)
        paint(sheet, band(span, upper - 0.08, upper), looks.cloth * 0.5 + 30, 0.45 * looks.makeup, soft=0.025)
        carve(sheet, ellipse(x, y, width * 0.9, height), 0.03, soft=0.03)
        paint(sheet, band(span, upper, lower), (226, 220, 214), soft=0.003)
        for share, colour in ((1, looks.iris * 0.5), (0.85, looks.iris), (0.42, (8, 8, 10))):
            disc = ellipse(x + gaze, y - 0.1 * height, iris * share, iris * share)
            at = np.clip(s * (disc[:, 0] - x) / width, -1, 1)
            disc[:, 1] = np.clip(disc[:, 1], np.interp(at, u, upper), np.interp(at, u, lower))
            paint(sheet, disc, colour, soft=0.003)
        paint(sheet, np.add(lid, (0, 0.015)), (70, 50, 46), 0.5, soft=0.01, line=0.03)  # the lid's shadow
        paint(sheet, ellipse(x + gaze - 0.02, y - 0.35 * height, 0.013, 0.013), (255, 255, 255), 0.9)
        paint(sheet, lid, dark, 0.9, soft=0.003, line=0.014 + 0.02 * looks.makeup)
        paint(sheet, np.stack([span, lower], 1), dark, 0.4, soft=0.004, line=0.01)
        crease = 0.3 if looks.race == 2 else 0.6
        paint(sheet, lid[2:-1] - (0, 0.045), dark * 1.8, crease, soft=0.006, line=0.012)
        top = y - 0.18 - lift - 0.03 * size
        arch = curve((x - s * 0.18, top + 0.04), (x + s * 0.02, top), (x + s * 0.21, top + 0.045))
        thick = (
            (0.04 if looks.man else 0.026) * (1 + heavy) * (0.5 + 0.5 * looks.brow) * np.linspace(1, 0.35, 24)
        )
        shape = band(arch[:, 0], arch[:, 1] - thick, arch[:, 1] + thick)
        paint(sheet, shape, brow, 0.2 + 0.6 * looks.brow, soft=0.012)


def draw_beard(sheet, rng, looks):
    """Stubble or a beard on the jaw, a moustache under the nose."""
    width, mouth, y = looks.width, looks.mouth + 0.02, looks.mouth_y
    half = [(width, -0.1), (width * 0.9, 0.08), (width * 0.7, 0.22), (mouth, y - 0.14), (0, y - 0.19)]
    chin = [(-width * 0.85, looks.chin * 0.75), (0, looks.chin + 0.06), (width * 0.85, looks.chin * 0.75)]
    jaw = np.array([*half, *[(-x, y) for x, y in half[::-1]], *chin])
    beard = looks.hair if looks.hat else sheet.hair
    paint(sheet, jaw, looks.skin * 0.45 + looks.hair * 0.3, 0.75 * looks.stubble, soft=0.08)
    paint(sheet, jaw, beard, 0.85 * looks.full_beard, soft=0.04)
    above, below = curve((-mouth, y), (0, y - 0.2), (mouth, y)), curve((mouth, y), (0, y - 0.1), (-mouth, y))
    paint(sheet, np.concatenate([above, below]), beard, 0.9 * looks.moustache, soft=0.012)


def draw_hair(sheet, rng, looks):
    """Hair, or a hat, over forehead, temples and cheeks: the skin that it covers is no longer seen."""
    u, bald = np.linspace(-1.6, 1.6, 161), looks.receding
    y = looks.hairline - 0.5 * bald * np.exp(-(((np.abs(u) - 0.5) / 0.3) ** 2)) - 0.5 * max(bald - 0.45, 0)
    y += (looks.fringe + looks.sweep * u) * np.exp(-((u / 0.75) ** 6))
    y += 0.62 * np.minimum(np.abs(u), 1) ** (5 + 6 * bald) * (1 - 0.3 * bald)
    ragged = (0.02 + 0.05 * max(looks.fringe, 0)) * (not looks.hat)
    y += ragged * cv2.blur(rng.normal(0, 1, (161, 1)), (1, 3)).ravel()
    y += 3 * np.clip((np.abs(u) - looks.cover) / 0.12, 0, 1) ** 0.7
    x = u * looks.width * (1 - 0.15 * np.clip(y + 0.2, 0, 1))
    edge = np.concatenate([np.stack([x, y], 1), [(1.6, -2), (-1.6, -2)]])
    cover, whole = np.zeros_like(sheet.skin), np.zeros_like(sheet.skin)
    softness = 0.008 + 0.03 * (1 - looks.density)
    for layer, shape, soft in ((cover, edge, softness), (whole, hair_outline(looks), 0.015)):
        alpha, at = stamp(sheet, shape, soft=soft, depth=0)
        layer[at] = alpha
    cover *= whole * np.float32(looks.density)
    sheet.pixels *= 1 - 0.4 * (cv2.blur(cover, (13, 13)) * sheet.skin)[..., None]  # its shadow
    sheet.pixels += (sheet.hair - sheet.pixels) * cover[..., None]
    sheet.skin *= 1 - cover
    if looks.hat:
        paint(sheet, edge[30:-32] - (0, 0.03), looks.cloth[::-1] * 0.7, soft=0.004, line=0.06, depth=0)


def shine(sheet, rng, looks):
    """Lights the sheet: skin by its relief on a rounded head, all else evenly."""
    inverse = cv2.invertAffineTransform(sheet.pose).astype(np.float32) * np.float32(HALF)
    x, y = (row[0] * (X + 1) + row[1] * (Y + 1) + row[2] / np.float32(HALF) for row in inverse)
    slope = partial(cv2.Sobel, sheet.relief, cv2.CV_32F, scale=HALF / 8)
    normal_x = x * (0.75 * x * x + 0.35) - slope(dx=1, dy=0)
    normal_y = y * (0.35 * y * y + 0.25) + 0.025 - slope(dx=0, dy=1)
    light_x, light_y, hard = rng.normal(0, 0.45), rng.uniform(-0.9, -0.1), rng.uniform(0.45, 0.85)
    strength = (1 + light_x**2 + light_y**2) ** -0.5
    length = np.sqrt(normal_x * normal_x + normal_y * normal_y + 1)
    lit = np.maximum((normal_x * light_x + normal_y * light_y + 1) / length, 0).astype(np.float32)
    shade = 1 - hard + hard * lit + 0.2 * hard * cv2.pow(lit * strength, 14)
    even = 1 + 0.12 * strength * (light_x * x + light_y * y)
    sheet.pixels *= (even + (shade - even) * sheet.skin)[..., None]


def draw_glasses(sheet, rng, looks):
    """Frames with a bridge, temples and a faint reflection, if any."""
    if not looks.glasses:
        return
    metal = {"opacity": 0.95, "soft": 0.003, "line": rng.uniform(0.012, 0.035)}
    colour, glare = rng.choice(((20, 18, 18), (70, 46, 30), (150, 148, 145))), rng.uniform(0, 0.14)
    rx, ry, y = rng.uniform(0.22, 0.26), rng.uniform(0.14, 0.2), looks.eye_y + 0.03
    for s in (-1, 1):
        x, rim = s * (looks.eye_x + 0.01), ellipse(0, 0, 1, 1)
        rim = np.sign(rim) * np.abs(rim) ** 0.7 * (rx, ry) + (x, y)
        paint(sheet, rim, (255, 255, 255), glare)
        paint(sheet, rim, colour, **metal)
        paint(sheet, [(x + s * rx, y - 0.03), (s * looks.width * 1.02, y - 0.06)], colour, **metal)
    gap = looks.eye_x + 0.01 - rx
    paint(sheet, curve((-gap, y), (0, y - 0.04), (gap, y)), colour, **metal)


def photograph(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (S, S, 3), as cameras of differing focus, exposure, colour and noise take it."""
    image, small = pixels, int(rng.uniform(70, 150))
    if rng.random() < 0.3:  # enlarged, as many of UTKFace's crops were
        image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (SIDE, SIDE))
    image = cv2.GaussianBlur(image, (0, 0), rng.gamma(2, 0.3) + 0.3)
    warm, green = rng.normal(0, 0.06), rng.normal(0, 0.015)
    cast = np.exp(np.array((warm, green, -warm))) * np.exp(rng.normal(0, 0.06))
    image = cv2.pow(np.clip(image * cast.astype(np.float32) / 255, 0, 1), np.exp(rng.normal(-0.1, 0.2))) * 255
    image = (image - 128) * np.float32(rng.uniform(0.8, 1.1)) + np.float32(128 + rng.normal(0, 8))
    if rng.random() < 0.05:
        image = np.repeat(image.mean(2, keepdims=True), 3, 2)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.gamma(2, 1.2))
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_face(looks: SimpleNamespace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A face, uint8 RGB (200, 200, 3), and its visible skin, uint8 0/255 (200, 200)."""
    sheet = make_sheet(rng, looks)
    sheet.hair = make_hair(sheet, rng, looks)
    for draw in (
        draw_background, draw_back, draw_skin, draw_wrinkles, draw_nose, draw_mouth, draw_eyes, draw_beard,
        draw_hair, shine, draw_glasses,
    ):  # fmt: skip
        draw(sheet, rng, looks)
    return photograph(sheet.pixels, rng), np.where(sheet.skin > 0.5, 255, 0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def plan_faces(count: int, seed: int) -> list[tuple[str, int, int, int]]:
    """Stem, age, gender and race of each face: groups by their shares, two of each where there is room."""
    rng = np.random.default_rng(seed)
    sizes = np.full(len(SHARES), min(2, count // len(SHARES)))
    while sizes.sum() < count:
        sizes[np.argmax(np.multiply(SHARES, count) - sizes)] += 1
    spans = [(first, min(last, OLDEST)) for first, last in AGE_GROUPS.values()]
    ages = [rng.integers(*span, size, endpoint=True) for span, size in zip(spans, sizes)]
    labels = rng.permutation(np.concatenate(ages)), rng.integers(2, size=count), rng.integers(5, size=count)
    return [
        ("{}_{}_{}_2017{:06}{:07}".format(*face, seed % 10**6, index), *face)
        for index, face in enumerate(zip(*(label.tolist() for label in labels)))
    ]


def write_face(index: int, seed: int, labels: tuple[int, int, int], image_path: Path, mask_path: Path):
    """Draws and writes a face and its mask."""
    rng = np.random.default_rng((seed, index))  # its own: a face must not depend on who draws it, or when
    image, mask = draw_face(sample_looks(rng, *labels), rng)
    image = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    for path, encoded in ((mask_path, cv2.imencode(".png", mask)[1]), (image_path, image)):
        with atomic_path(path) as temporary:
            temporary.write_bytes(encoded)


def get_parser():
    parser = script_parser("synthesize", __doc__)
    add = parser.add_argument
    add("--output", default="dataset/raw", help="folder to write; masks go to <output>_masks")
    add("--count", metavar="N", type=number(int, low=1, high=10**7), default=2000, help="faces to draw")
    return parser


def main(args):
    images, masks = Path(args.output), Path(f"{Path(args.output)}_masks")
    plan = plan_faces(args.count, args.seed)
    files = [(images / f"{stem}.jpg.chip.jpg", masks / f"{stem}_mask.png") for stem, *_ in plan]
    try:
        there = set()
        for folder in (images, masks):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            there.update(path for path in folder.iterdir() if not path.name.startswith("."))
        if there.difference(*files):
            raise UserError(f"--output {images} holds other files: empty it, or name another folder")
        todo = [i for i in range(args.count) if args.overwrite or not there.issuperset(files[i])]
        with ThreadPool(max(args.workers, 1)) as pool:
            drawing = pool.imap_unordered(lambda i: write_face(i, args.seed, plan[i][1:], *files[i]), todo)
            for _ in progress(drawing, "faces", len(todo), unit="face"):
                pass
    except OSError as error:
        raise UserError(f"--output {images} cannot be written ({error.strerror}): name another") from None
    print(f"{images}: {len(todo):,} faces drawn, {args.count - len(todo):,} already there; masks in {masks}")


if __name__ == "__main__":
    run(main, get_parser())
