"""How good the masks of masks.py are on UTKFace: a yardstick for development, not a test.

    python tests/yardstick_masks.py dataset/processed   # where mediapipe==0.10.14 is installed

Compares the masks with the face oval of MediaPipe's mesh, on faces that did not serve to fit the constants in
masks.py.
"""

import random
import sys
from pathlib import Path

import cv2
import numpy as np

FITTED, HELD_OUT = 550, 550  # of the well-formed names in a random order, the first FITTED served for fitting


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


if __name__ == "__main__":
    overlap(sys.argv[1])
