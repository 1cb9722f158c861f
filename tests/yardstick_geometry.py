"""What predict.py makes of faces in photographs, turned and reduced: a yardstick for development, not a test.

    python tests/yardstick_geometry.py dataset/processed_split/test --checkpoint weights/age_multitask.pt

Takes faces at random and pads each by a third of its side with its edge. The first table turns those pictures
and compares with the crops as they are; the second reduces the crops and enlarges them again, as a small face
in a photograph is.
"""

import argparse
import random
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli import progress
from predict import RELEASED, load, predict
from utkface import GROUP_NAMES, age_to_group, list_pairs, read_image

TURNS = (0, 90, 170, 180, 270)  # degrees
SIDES = (10, 14, 20, 24, 32, 48, 64, 128, 200)  # pixels of a crop, of which the face is some nine tenths


def turn(image, degrees):
    """A square picture turned about its middle; what comes in at the corners is its edge."""
    middle = (len(image) - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), degrees, 1)
    return cv2.warpAffine(image, matrix, image.shape[:2], borderMode=cv2.BORDER_REPLICATE)


def main(args):
    faces = list_pairs(args.folder, need_masks=False)
    faces = random.Random(0).sample(faces, min(args.count, len(faces)))
    anywhere = load(args.checkpoint, args.detector, device=args.device)
    aligned = load(args.checkpoint, aligned=True, device=args.device)
    ages = np.array([face.age for face in faces])
    turned, reduced, crops = {degrees: [] for degrees in TURNS}, {side: [] for side in SIDES}, []
    for face in progress(faces, "faces"):
        image = cv2.cvtColor(read_image(Path(args.folder, f"{face.stem}_image.png")), cv2.COLOR_BGR2RGB)
        crops.append(predict(aligned, image)[0])
        border = round(max(image.shape) / 3)
        padded = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_REPLICATE)
        for degrees in TURNS:
            found = predict(anywhere, turn(padded, degrees), masks=False)
            turned[degrees].append(max(found, key=lambda one: one.box[2], default=None))
        for side in SIDES:
            small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
            reduced[side].append(predict(aligned, small if side >= 16 else cv2.resize(small, (32, 32)))[0])

    def row(name, answers):
        there = np.array([answer is not None for answer in answers])
        years = np.array([answer.predicted_age for answer in answers if answer])
        upright = np.array([turned[0][i] is not None for i in np.flatnonzero(there)])
        first = np.array([turned[0][i].predicted_age for i in np.flatnonzero(there)[upright]])
        groups = [answer.group for answer in answers if answer]
        truth = [GROUP_NAMES[group] for group in age_to_group(ages[there])]
        print(
            f"{name:>10} {there.mean():8.1%} {np.mean(np.equal(groups, truth)):8.1%} "
            f"{np.abs(years - ages[there]).mean():8.2f} {np.abs(years[upright] - first).mean():8.2f}"
        )

    print(f"{'':>10} {'found':>8} {'right':>8} {'years off':>8} {'from 0°':>8}")
    for name, answers in [("the crops", crops), *((f"{degrees}°", turned[degrees]) for degrees in TURNS)]:
        row(name, answers)
    for side in SIDES:
        row(f"{side} px", reduced[side])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="*_image.png whose names tell the age, as split.py writes them")
    parser.add_argument("--checkpoint", default=RELEASED)
    parser.add_argument("--detector", help="YuNet's ONNX file, where it cannot be downloaded")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--device", default="auto")
    main(parser.parse_args())
