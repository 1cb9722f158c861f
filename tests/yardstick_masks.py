"""How good and how fast masks.py is on UTKFace: a yardstick for development, not a test.

    python tests/yardstick_masks.py overlap dataset/processed   # where mediapipe==0.10.14 is installed
    python tests/yardstick_masks.py speed UTKFace.tar.gz        # in the project's own environment

`overlap` compares the masks with the face oval of MediaPipe's mesh, on faces that did not serve to fit the
constants in masks.py. `speed` runs masks.py and a bare loop of cv2.grabCut by turns on the same faces.
"""

import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np

FITTED, HELD_OUT = 550, 550  # of the well-formed names in a random order, the first FITTED served for fitting
ROOT = Path(__file__).parents[1]


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
        corners = [(faces[0].landmark[i].x, faces[0].landmark[i].y) for i in oval] * np.array(
            image.shape[1::-1]
        )
        truths.append(
            cv2.fillPoly(np.zeros(image.shape[:2], np.uint8), [np.rint(corners).astype(np.int32)], 1) > 0
        )
        found.append(cv2.imread(f"{processed}/{stem}_mask.png", cv2.IMREAD_GRAYSCALE) > 127)
    constant = np.mean(truths, axis=0) > 0.5
    ious = np.array([(a & b).sum() / (a | b).sum() for a, b in zip(found, truths)])
    constants = [(constant & truth).sum() / (constant | truth).sum() for truth in truths]
    print(f"{len(ious)} faces, {undetected} more not detected by MediaPipe")
    print(f"mean IoU {ious.mean():.3f}, 5th percentile {np.percentile(ious, 5):.3f}, lowest {ious.min():.3f}")
    print(f"the ovals' own mean shape, for comparison: {np.mean(constants):.3f}")


def bare_loop(images):
    """Faces a second of cv2.grabCut alone, one iteration at 64×64, on decoded images."""
    cv2.setNumThreads(1)
    began = time.perf_counter()
    for image in images:
        mask, models = np.zeros((64, 64), np.uint8), np.zeros((2, 1, 65))
        cv2.grabCut(image, mask, (8, 2, 48, 60), models[0], models[1], 1, cv2.GC_INIT_WITH_RECT)
    return len(images) / (time.perf_counter() - began)


def speed(archive, count=2000, repeats=3):
    """Prints faces a second of masks.py from start to end, of the bare loop on all cores, and their ratio."""
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            members = [member for member in packed if member.isfile()]
            for member in members[:: len(members) // count]:
                Path(folder, Path(member.name).name).write_bytes(packed.extractfile(member).read())
        images = [cv2.resize(cv2.imread(str(path)), (64, 64)) for path in sorted(Path(folder).iterdir())]
        ratios = []
        for repeat in range(repeats):
            with Pool(cores) as pool:
                bare = sum(pool.map(bare_loop, [images[core::cores] for core in range(cores)]))
            command = [sys.executable, ROOT / "masks.py", "--input", folder, "--output", f"{folder}-{repeat}"]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            ours = float(line.split("(")[1].split(" faces/s")[0])
            ratios.append(ours / bare)
            print(f"masks.py {ours:.0f} faces/s, bare {bare:.0f} on {cores} cores, ratio {ratios[-1]:.2f}")
            subprocess.run(["rm", "-r", f"{folder}-{repeat}"], check=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    {"overlap": overlap, "speed": speed}[sys.argv[1]](sys.argv[2])
