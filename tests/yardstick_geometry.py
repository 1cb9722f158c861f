"""How well YuNet brings faces to UTKFace's geometry: a yardstick for development, not a test.

    python tests/yardstick_geometry.py dataset/processed_split/test --checkpoint weights/age_multitask.pt

Takes faces at random, pads each by a third of its side with its edge, has predict.py find it there, and
compares the accuracy on what it found with that on the crops as they are.
"""

import argparse
import random
import sys
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli import progress
from predict import RELEASED, load, predict
from utkface import GROUP_NAMES, age_to_group, list_pairs, read_image


def main(args):
    faces = list_pairs(args.folder, need_masks=False)
    faces = random.Random(0).sample(faces, min(args.count, len(faces)))
    anywhere = load(args.checkpoint, args.detector, device=args.device)
    aligned = load(args.checkpoint, aligned=True, device=args.device)
    found, as_it_is, as_found = 0, 0, 0
    for face in progress(faces, "faces"):
        image = cv2.cvtColor(read_image(Path(args.folder, f"{face.stem}_image.png")), cv2.COLOR_BGR2RGB)
        border = round(max(image.shape) / 3)
        padded = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_REPLICATE)
        group = GROUP_NAMES[age_to_group(face.age)]
        detected = predict(anywhere, padded)
        if not detected:
            continue
        found += 1
        largest = max(detected, key=lambda one: one.box[2])
        as_found += largest.group == group
        as_it_is += predict(aligned, image)[0].group == group
    print(
        f"{found} of {len(faces)} faces found; right on these: {as_found / found:.1%} as YuNet brings them,",
        end=" ",
    )
    print(f"{as_it_is / found:.1%} as the crops are")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="*_image.png whose names tell the age, as split.py writes them")
    parser.add_argument("--checkpoint", default=RELEASED)
    parser.add_argument("--detector", help="YuNet's ONNX file, where it cannot be downloaded")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--device", default="auto")
    main(parser.parse_args())
