"""Draws faces of known age, with their true masks, under UTKFace's own file names.

    python tools/synthesize.py --output dataset/raw --count 2000

Writes 200×200 crops `<age>_<gender>_<race>_<timestamp>.jpg.chip.jpg` into `--output`, and the visible skin of
each as `…_mask.png` (one channel, 0/255) into `<output>_masks`. Age groups have UTKFace's shares, and each
sign of age follows an apparent age of its own, so that groups overlap as they do in photographs.
"""

import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError, atomic_path, check_writable, number, progress, remove_leftovers, run, script_parser
from utkface import AGE_GROUPS

SIDE = 200  # pixels, UTKFace's
HALF = SIDE / 2  # the unit of all lengths below: from the crop's centre, y downwards
Y, X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
U = np.linspace(-1, 1, 25)  # along a curve

SHARES = (0.09, 0.065, 0.135, 0.45, 0.175, 0.085)  # of the age groups in UTKFace
SHARED_ERROR, OWN_ERROR = 0.06, 0.14  # log-normal, of the apparent age: the face's, and each trend's own

YEARS = (0, 4, 10, 16, 24, 35, 50, 65, 85)
TRENDS = {
    "width": (0.89, 0.87, 0.84, 0.82, 0.80, 0.78, 0.79, 0.80, 0.79),  # half the face's
    "chin": (0.77, 0.81, 0.86, 0.89, 0.91, 0.91, 0.92, 0.93, 0.95),
    "density": (0.30, 0.90, 1.00, 1.00, 1.00, 1.00, 0.97, 0.88, 0.75),  # of hair
    "grey": (0.00, 0.00, 0.00, 0.00, 0.00, 0.08, 0.42, 0.80, 1.00),
    "bald": (0.00, 0.00, 0.00, 0.00, 0.04, 0.22, 0.50, 0.72, 0.90),
    "eye_y": (-0.28, -0.32, -0.37, -0.40, -0.41, -0.42, -0.42, -0.41, -0.41),
    "eye": (1.42, 1.30, 1.16, 1.07, 1.01, 0.94, 0.87, 0.81, 0.76),
    "nose": (0.60, 0.68, 0.81, 0.94, 1.00, 1.02, 1.07, 1.15, 1.25),
    "mouth": (0.18, 0.20, 0.24, 0.27, 0.28, 0.28, 0.28, 0.27, 0.26),  # half its width
    "lips": (1.10, 1.10, 1.10, 1.15, 1.10, 0.92, 0.72, 0.52, 0.36),
    "blush": (0.50, 0.45, 0.35, 0.25, 0.16, 0.06, 0.05, 0.05, 0.05),
    "creases": (0.00, 0.00, 0.00, 0.02, 0.10, 0.34, 0.62, 0.85, 1.05),
}
SKIN = ((234, 192, 168), (136, 94, 72), (232, 192, 156), (182, 132, 98), (206, 158, 124))  # RGB, by race
HAIR = ((26, 22, 22), (50, 34, 24), (92, 62, 38), (176, 136, 84), (140, 66, 34))  # black to blond, red
GREY_HAIR = np.array((188, 186, 184))


def sample_looks(rng: np.random.Generator, age: int, gender: int, race: int) -> SimpleNamespace:
    """What `draw_face` draws: proportions, colours and signs of age of a face with these UTKFace labels."""
    error = rng.normal(0, SHARED_ERROR) + rng.normal(0, OWN_ERROR, len(TRENDS))
    apparent_ages = zip(TRENDS, (age + 3) * np.exp(error) - 3)
    looks = SimpleNamespace(**{key: np.interp(years, YEARS, TRENDS[key]) for key, years in apparent_ages})
    looks.man, looks.race = gender == 0, race
    looks.width, looks.chin = (looks.width, looks.chin) * rng.normal(1, 0.03, 2)
    looks.eye_x, looks.mouth_y = rng.normal((0.37, 0.42 + 0.4 * (looks.chin - 0.91)), 0.02)
    looks.skin = np.clip(np.array(SKIN[race]) * rng.normal(1, 0.09) + rng.normal(0, 4, 3), 20, 245)
    looks.hair = np.array(HAIR[rng.choice(5 if race == 0 else 2)]) * rng.uniform(0.7, 1.6)
    looks.curly = race == 1 or rng.random() < 0.12
    looks.long = rng.random() < (0.03 if looks.man else 0.2 if age < 3 else 0.75)
    looks.volume = rng.uniform(0.06, 0.14) + looks.long * rng.uniform(-0.02, 0.25) + looks.curly * 0.06
    looks.fringe = rng.uniform(0.08, 0.28) if rng.random() < 0.3 else rng.uniform(-0.04, 0.05)
    looks.bald *= rng.uniform(0.1, 1.1) if looks.man else 0.1
    return looks


def stamp(pose: np.ndarray, points, soft=0.0, line=0.0) -> np.ndarray:
    """Opacity, uint8 (S, S), of a polygon (n, 2), or of a polyline `line` wide; its edge is `soft`."""
    corners = np.rint(16 * (np.asarray(points) @ pose[:, :2].T + pose[:, 2])).astype(np.int32)
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    if line:
        cv2.polylines(alpha, [corners], False, 255, round(line * HALF), cv2.LINE_AA, shift=4)
    else:
        cv2.fillPoly(alpha, [corners], 255, cv2.LINE_AA, shift=4)
    width = 2 * round(2.4 * soft * HALF) + 1  # close to a Gaussian of deviation `soft`, and quick
    return cv2.stackBlur(alpha, (width, width))


def paint(sheet, points, colour, opacity=1.0, **shape):
    """Lays a colour, or a picture (S, S, 3), over the sheet within a shape."""
    alpha = stamp(sheet.pose, points, **shape)
    x, y, width, height = cv2.boundingRect(alpha)
    part = slice(y, y + height), slice(x, x + width)
    colour = np.broadcast_to(np.asarray(colour, np.float32), sheet.pixels.shape)[part]
    sheet.pixels[part] += (colour - sheet.pixels[part]) * (alpha[part] * np.float32(opacity / 255))[..., None]


def ellipse(x, y, rx, ry) -> np.ndarray:
    """Outline (40, 2) of an ellipse."""
    t = np.linspace(0, 2 * np.pi, 40)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def curve(start, middle, end) -> np.ndarray:
    """Parabola (25, 2) through three points."""
    start, middle, end = np.array((start, middle, end), float)
    return middle + U[:, None] * ((end - start) / 2) + U[:, None] ** 2 * ((start + end) / 2 - middle)


def band(x, top, bottom) -> np.ndarray:
    """Outline (2n, 2) of what lies between two curves y(x)."""
    return np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])


def noise(rng, cells) -> np.ndarray:
    """Noise (S, S), standard normal at `cells` × `cells` points and smooth between them."""
    grid = rng.standard_normal((cells, cells), np.float32)
    return cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def head(looks, top, grow=0.0) -> np.ndarray:
    """Outline (40, 2) of the face from `top` to the chin, or of the hair, which stands out by `grow`."""
    x, v = (np.sign(side) * np.abs(side) ** 0.85 for side in ellipse(0, 0, 1, 1).T)
    y = (looks.chin + top) / 2 + ((looks.chin - top) / 2 + grow) * v
    return np.stack([x * (looks.width + grow) * (1 - 0.12 * v), y], 1)


def make_hair(rng, looks) -> np.ndarray:
    """Picture (S, S, 3) of strands that run from the crown and grey one by one, or of curls."""
    strands = cv2.blur(rng.standard_normal((2048, 1), np.float32), (1, 3)).ravel()
    angle = np.arctan2(Y + np.float32(1.6), X - np.float32(rng.normal(0, 0.3)))
    strand = 0.45 * noise(rng, 36) if looks.curly else strands[(angle * 300).astype(int) % 2048]
    grey = np.clip(2.2 * looks.grey - 0.6 + 0.22 * strand, 0, 1)[..., None]
    return (looks.hair + (GREY_HAIR - looks.hair) * grey) * (1 + 0.2 * strand[..., None])


def draw_background(sheet, rng, looks):
    """A gradient or blobs, now and then coloured as skin; hair behind, neck, clothes, ears."""
    base = looks.skin if rng.random() < 0.06 else rng.uniform(20, 235) + rng.normal(0, 28, 3)
    mix = noise(rng, rng.integers(2, 12))[..., None]
    tint = rng.choice((-1, 1)) * rng.uniform(25, 70) + rng.normal(0, 12, 3)
    sheet.pixels = np.clip(base + tint * mix, 0, 255).astype(np.float32)
    hood = head(looks, -1.35, looks.volume)
    hood[hood[:, 1] > -0.1, 1] *= rng.uniform(0.8, 1.6) if looks.long else 0
    paint(sheet, hood, sheet.hair, looks.density, soft=0.015)
    paint(sheet, [(-0.45, 0.4), (0.45, 0.4), (0.45, 2), (-0.45, 2)], looks.skin * 0.57, soft=0.02)
    paint(sheet, ellipse(0, 1.7, 1.5, rng.uniform(0.65, 0.8)), rng.uniform(20, 235, 3), soft=0.01)
    for x in (-looks.width, looks.width):
        paint(sheet, ellipse(x, -0.12, 0.06 + 0.06 * looks.nose, 0.2), looks.skin * 0.85, soft=0.01)


def draw_skin(sheet, rng, looks):
    """The bare face, lit as a rounded head is; blush, sockets, and lines of forehead, eyes and cheeks."""
    sheet.skin = stamp(sheet.pose, head(looks, -1.12), soft=0.004) / np.float32(255)
    slope_x, slope_y = X * (0.35 + 0.75 * X * X), Y * (0.25 + 0.35 * Y * Y)
    light_x, light_y = rng.normal(0, 0.5), rng.uniform(-1, 0)
    lit = np.maximum(1 + slope_x * light_x + slope_y * light_y, 0) / np.sqrt(1 + slope_x**2 + slope_y**2)
    grain = (0.01 + 0.02 * looks.creases) * (noise(rng, 100) + noise(rng, 40))
    shade = 1 + rng.uniform(0.4, 0.9) * (lit - 1) + grain
    sheet.pixels += (looks.skin * shade[..., None] - sheet.pixels) * sheet.skin[..., None]
    for s in (-1, 1):
        paint(sheet, ellipse(s * 0.48, 0.1, 0.2, 0.15), looks.skin * (1, 0.7, 0.7), looks.blush, soft=0.09)
        paint(sheet, ellipse(s * 0.35, looks.eye_y - 0.03, 0.18, 0.1), looks.skin * 0.58, 0.4, soft=0.05)
    x, y, mouth, corner = looks.eye_x, looks.eye_y, looks.mouth + 0.04, looks.mouth_y
    forehead = [curve((-0.4, y - up), (0, y - up - 0.03), (0.4, y - up)) for up in (0.3, 0.38, 0.46)]
    right = [curve((x + 0.22, y + d), (x + 0.28, y + 2 * d), (x + 0.34, y + 3 * d)) for d in (-0.04, 0, 0.04)]
    right.append(curve((x - 0.16, y + 0.1), (x, y + 0.17), (x + 0.15, y + 0.1)))  # the bag below the eye
    right.append(curve((0.17 * looks.nose, 0.04), (mouth, corner - 0.17), (mouth + 0.06, corner + 0.02)))
    for line in [*forehead, *right, *[line * (-1, 1) for line in right]]:
        opacity = 0.6 * looks.creases * rng.uniform(0.5, 1.2)
        paint(sheet, np.add(line, (0, 0.025)), looks.skin * 1.15, opacity / 2, soft=0.014, line=0.015)
        paint(sheet, line, looks.skin * (0.45, 0.35, 0.32), opacity, soft=0.012, line=0.015)


def draw_nose_and_mouth(sheet, rng, looks):
    """Bridge, tip and nostrils; lips that smile or not, and teeth if they part."""
    y, wide, dark = 0.14 * looks.nose - 0.06, looks.nose * (1.25 if looks.race == 1 else 1), looks.skin * 0.4
    paint(sheet, [(0, looks.eye_y), (0.06, y), (-0.06, y)], looks.skin * 1.1, 0.6, soft=0.03)
    paint(sheet, ellipse(0, y + 0.06, 0.14 * wide, 0.02), dark, 0.6, soft=0.025)
    for s in (-1, 1):
        paint(sheet, ellipse(s * 0.068 * wide, y + 0.04, 0.036 * wide, 0.016), dark * 0.5, 0.8, soft=0.008)
    x, full = U * looks.mouth * rng.normal(1.05, 0.06), looks.lips * (1 - U**2)
    upper = looks.mouth_y + 0.08 * rng.normal(0.4, 0.4) * (0.4 - U**2)
    lower = upper + 0.14 * max(0, rng.normal(-0.1, 0.4)) * (1 - U**2)
    lips = band(x, upper - 0.06 * full, lower + 0.085 * full)
    paint(sheet, lips, looks.skin * (0.86, rng.uniform(0.4, 0.62), 0.6), 0.9, soft=0.006)
    paint(sheet, band(0.9 * x, upper, lower), (220, 210, 196), soft=0.004)
    paint(sheet, np.stack([x, upper], 1), looks.skin * (0.36, 0.2, 0.2), 0.7, soft=0.006, line=0.012)


def draw_eyes(sheet, rng, looks):
    """Eyes with lids, lashes and gaze, and the brows above them."""
    y, gaze, size = looks.eye_y, rng.normal(0, 0.02), looks.eye * rng.normal(1, 0.06)
    width, iris, height = 0.16 * size**0.5, 0.076 * size**0.6, size * (0.055 if looks.race == 2 else 0.07)
    colour = np.array((90, 108, 110) if looks.race == 0 and rng.random() < 0.4 else (75, 52, 36))
    brow = looks.hair + (GREY_HAIR - looks.hair) * np.clip(1.6 * looks.grey - 0.5, 0, 0.9)
    thick = (0.04 if looks.man else 0.026) * np.linspace(1, 0.35, 25) * np.interp(size, (1, 1.4), (1, 0.6))
    for s in (-1, 1):
        x = s * looks.eye_x + width * U
        upper, lower = y - height * (1 - np.abs(U) ** 2.2), y + 0.65 * height * (1 - U**2)
        paint(sheet, band(x, upper, lower), (226, 220, 214), soft=0.003)
        for share, tint in ((1, colour * 0.5), (0.85, colour), (0.42, (8, 8, 10))):
            disc = ellipse(s * looks.eye_x + gaze, y - 0.1 * height, iris * share, iris * share)
            disc[:, 1] = np.clip(disc[:, 1], np.interp(disc[:, 0], x, upper), np.interp(disc[:, 0], x, lower))
            paint(sheet, disc, tint, soft=0.003)
        paint(sheet, np.stack([x, upper], 1), looks.skin * 0.24, 0.9, soft=0.004, line=0.02)
        arch = curve((s * 0.19, y - 0.17), (s * 0.39, y - 0.21), (s * 0.58, y - 0.165)).T
        paint(sheet, band(arch[0], arch[1] - thick, arch[1] + thick), brow * 0.9, 0.8, soft=0.012)


def draw_hair(sheet, rng, looks):
    """Hair over forehead and temples: the skin that it covers is no longer seen."""
    u, bald = np.linspace(-1.6, 1.6, 161), looks.bald
    y = (looks.fringe + rng.normal(0, 0.1) * u) * np.exp(-((u / 0.75) ** 6)) - 0.98
    y += 0.62 * np.minimum(np.abs(u), 1) ** rng.uniform(3, 6) * (1 - 0.5 * bald)
    y -= 0.5 * bald * np.exp(-(((np.abs(u) - 0.5) / 0.3) ** 2)) + 0.5 * max(bald - 0.45, 0)
    y += 0.03 * cv2.blur(rng.normal(0, 1, (161, 1)), (1, 3)).ravel()
    front = stamp(sheet.pose, band(u * looks.width, y, 0 * u - 2), soft=0.008 + 0.03 * (1 - looks.density))
    hood = stamp(sheet.pose, head(looks, -1.35, looks.volume), soft=0.015)
    cover = np.float32(looks.density / 255**2) * front * hood
    sheet.pixels += (sheet.hair - sheet.pixels) * cover[..., None]
    sheet.skin *= 1 - cover


def draw_face(looks: SimpleNamespace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A face, uint8 RGB (200, 200, 3), and its visible skin, uint8 0/255 (200, 200)."""
    pose = cv2.getRotationMatrix2D((0, 0), np.clip(rng.normal(0, 4.5), -12, 12), HALF * rng.normal(1, 0.02))
    pose[:, 2] = HALF * (1 + rng.normal(0, 0.025, 2))
    sheet = SimpleNamespace(pose=pose, hair=make_hair(rng, looks))
    for draw in (draw_background, draw_skin, draw_nose_and_mouth, draw_eyes, draw_hair):
        draw(sheet, rng, looks)
    # Cameras differ in focus, colour, exposure and noise.
    image = cv2.GaussianBlur(sheet.pixels, (0, 0), rng.gamma(2, 0.4) + 0.3) / 255
    image = cv2.pow(np.clip(image * np.exp(rng.normal(0, 0.06, 3)), 0, 1), np.exp(rng.normal(-0.1, 0.2)))
    image = image * rng.uniform(205, 280) + rng.normal(8, 8) + rng.normal(0, rng.gamma(2, 1.2), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), np.where(sheet.skin > 0.5, 255, 0).astype(np.uint8)


def plan_faces(count: int, seed: int) -> list[tuple[str, int, int, int]]:
    """Stem, age, gender and race of each face: first two of each group, then groups by their shares."""
    rng = np.random.default_rng(seed)
    groups = [*range(6), *range(6), *rng.choice(6, max(count - 12, 0), p=SHARES)][:count]
    youngest, oldest = np.minimum(list(AGE_GROUPS.values()), 95)[groups].T
    ages = rng.integers(youngest, oldest, endpoint=True)
    faces = enumerate(zip(ages, rng.integers(2, size=count), rng.integers(5, size=count)))
    return [("{}_{}_{}_2017{:06}{:07}".format(*face, seed % 10**6, i), *face) for i, face in faces]


def get_parser():
    parser = script_parser("synthesize", __doc__)
    parser.add_argument("--output", default="dataset/raw", help="folder to write; masks go to <output>_masks")
    parser.add_argument("--count", metavar="N", type=number(int, 1, 10**7), default=2000, help="faces drawn")
    return parser


def main(args):
    images, masks = Path(args.output), Path(f"{Path(args.output)}_masks")
    plan = plan_faces(args.count, args.seed)
    files = [(images / f"{stem}.jpg.chip.jpg", masks / f"{stem}_mask.png") for stem, *_ in plan]

    def write_face(index):
        rng = np.random.default_rng((args.seed, index))  # its own: a face must not depend on who draws it
        image, mask = draw_face(sample_looks(rng, *plan[index][1:]), rng)
        for path, picture in zip(files[index], (image[..., ::-1], mask)):
            with atomic_path(path) as temporary:
                temporary.write_bytes(cv2.imencode(path.suffix, picture)[1])

    for folder in (images, masks):
        check_writable("--output", folder)
        remove_leftovers(folder)
    there = {path for folder in (images, masks) for path in folder.glob("[!.]*")}
    if others := there.difference(*files):
        raise UserError(f"--output: {min(others).parent} holds other files: empty it, or name another folder")
    todo = [i for i in range(args.count) if args.overwrite or not there.issuperset(files[i])]
    with ThreadPool(max(args.workers, 1)) as pool:
        list(progress(pool.imap_unordered(write_face, todo), "faces", len(todo), unit="face"))
    print(f"{images}: {len(todo):,} faces drawn, {args.count - len(todo):,} already there; masks in {masks}")


if __name__ == "__main__":
    run(main, get_parser())
