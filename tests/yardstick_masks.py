"""How good masks.py is on UTKFace: a yardstick for development, not a test.

    python tests/yardstick_masks.py masks dataset/processed   # where mediapipe==0.10.14 is installed
    python tests/yardstick_masks.py crops dataset/processed photos/

`masks` compares the masks with the face oval of MediaPipe's mesh, on faces that did not serve to fit the
constants in masks.py. `crops` counts the faces that masks.py takes for whole photographs, and the whole
photographs, of others of these faces and of any pictures, that it takes for faces.
"""

import random
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from masks import looks_like_a_crop

FITTED, HELD_OUT = 550, 550  # of the well-formed names in a random order, the first FITTED served for fitting
PHOTOGRAPHS = 100  # of each kind


def overlap(processed):
    """Prints the mean IoU of masks.py's masks, and of their own mean, with MediaPipe's face oval."""
    import mediapipe

    meshes = mediapipe.solutions.face_mesh
    following = dict(meshes.FACEMESH_FACE_OVAL)
    oval = [next(iter(following))]
    while following[oval[-1]] != oval[0]:
        oval.append(following[oval[-1]])
    detector = meshes.FaceMesh(static_image_mode=True, max_num_faces=1)

    stems = sorted(path.name.removesuffix("_image.png") for path in Path(processed).glob("*_image.png"))
    random.Random(0).shuffle(stems)
    truths, found, undetected = [], [], 0
    for stem in stems[FITTED : FITTED + HELD_OUT]:
        image = cv2.imread(f"{processed}/{stem}_image.png")
        faces = detector.process(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).multi_face_landmarks
        if not faces:
            undetected += 1
            continue
        corners = np.array([(faces[0].landmark[i].x, faces[0].landmark[i].y) for i in oval])
        corners = np.rint(corners * image.shape[1::-1]).astype(np.int32)
        truths.append(cv2.fillPoly(np.zeros(image.shape[:2], np.uint8), [corners], 1) > 0)
        found.append(cv2.imread(f"{processed}/{stem}_mask.png", cv2.IMREAD_GRAYSCALE) > 127)
    constant = np.mean(truths, axis=0) > 0.5
    ious = np.array([(a & b).sum() / (a | b).sum() for a, b in zip(found, truths)])
    constants = [(constant & truth).sum() / (constant | truth).sum() for truth in truths]
    print(f"{len(ious)} faces, {undetected} more not detected by MediaPipe")
    print(f"mean IoU {ious.mean():.3f}, 5th percentile {np.percentile(ious, 5):.3f}, lowest {ious.min():.3f}")
    print(f"the ovals' own mean shape, for comparison: {np.mean(constants):.3f}")


def scene(rng, faces, photos, kind):
    """A whole photograph (H, W, 3): a face with a border, before a background, several in one, or a photo."""
    face = cv2.imread(str(rng.choice(faces)))
    side = len(face)
    if kind == "padded":
        borders = rng.integers(side // 4, 2 * side, 4).tolist()
        modes = [cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT, cv2.BORDER_CONSTANT]
        return cv2.copyMakeBorder(
            face, *borders, modes[rng.integers(3)], value=rng.integers(0, 256, 3).tolist()
        )
    height, width = rng.integers(2 * side, 4 * side, 2)
    photo = cv2.imread(str(rng.choice(photos)))
    top, left = (rng.integers(length // 2) for length in photo.shape[:2])
    background = photo[top:, left:] if rng.random() < 0.5 else rng.integers(0, 256, (6, 8, 3), np.uint8)
    canvas = cv2.resize(background, (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
    if kind == "photo":
        return cv2.resize(photo[top:, left:], (int(width), int(height)), interpolation=cv2.INTER_AREA)
    for _ in range(1 if kind == "portrait" else rng.integers(2, 5)):
        top, left = ((length - side) // 2 for length in canvas.shape[:2])
        if kind == "group":
            top, left = (rng.integers(length - side) for length in canvas.shape[:2])
        canvas[top : top + side, left : left + side] = cv2.imread(str(rng.choice(faces)))
    return canvas


def crops(processed, photos):
    """Prints how often masks.py takes UTKFace's faces for photographs, and photographs for faces."""
    faces, photos = sorted(Path(processed).glob("*_image.png")), sorted(Path(photos).iterdir())
    taken = sum(not looks_like_a_crop(cv2.imread(str(path))) for path in faces)
    print(f"{taken} of {len(faces)} faces are taken for photographs, {taken / len(faces):.2%}")
    rng = np.random.default_rng(0)
    for kind in ("padded", "portrait", "group", "photo"):
        noticed = sum(not looks_like_a_crop(scene(rng, faces, photos, kind)) for _ in range(PHOTOGRAPHS))
        print(f"{noticed} of {PHOTOGRAPHS} photographs are noticed: {kind}")


if __name__ == "__main__":
    {"masks": overlap, "crops": crops}[sys.argv[1]](*sys.argv[2:])
