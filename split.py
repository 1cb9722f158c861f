"""Splits processed faces into train, val and test so that no near-duplicate straddles two of them.

    python split.py
    python split.py --fractions 0 0 1 --input exam --output exam_split

Every age group is shared out in the fractions asked for. Near-duplicates (thumbnails that correlate above a
threshold, and whatever they are linked to through others) stay together; those whose ages disagree are listed
in `conflicts.csv`. The result depends on the faces and the seed alone, not on the order of files.
"""

import csv
import os
import shutil
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import yaml

from cli import UserError, check_writable, number, progress, run, script_parser, write_csv
from utkface import GROUP_NAMES, age_to_group, list_pairs, read_image, resize

CANDIDATE = 0.90  # correlation of thumbnails, mirrored or not, above which a pair is worth aligning
AS_THEY_LIE = 0.98  # above which it needs no aligning
SPLITS = ("train", "val", "test")
COLUMNS = ["file", "split", "age", "gender", "race", "group", "duplicate_of"]
CONFLICT_COLUMNS = ["file", "other", "age", "other_age", "correlation"]


def read_thumbnails(folder, faces, workers):
    """Checks each pair and reduces its image to grey, uint8 (N, 64, 64).

    Raises UserError for a mask of another size than its image.
    """
    thumbnails = np.empty((len(faces), 64, 64), np.uint8)

    def load(index):
        path = folder / f"{faces[index].stem}_image.png"
        mask_path = folder / f"{faces[index].stem}_mask.png"
        image = read_image(path, cv2.IMREAD_GRAYSCALE)
        if read_image(mask_path, cv2.IMREAD_GRAYSCALE).shape != image.shape:
            raise UserError(f"{mask_path} is not of its image's size: delete it and run masks.py again")
        thumbnails[index] = resize(image, 64)

    with ThreadPool(max(workers, 1)) as pool:
        loading = pool.imap_unordered(load, range(len(faces)), chunksize=16)
        for _ in progress(loading, "thumbnails", len(faces), unit="face"):
            pass
    return thumbnails


def unit_rows(images):
    """(N, H, W) → float32 (N, H·W), rows of zero mean and unit length, whose products are correlations."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def aligned_correlation(image, other):
    """Correlation of two grey images (H, W) where they overlap, once an affine map lays one on the other.

    The map maximises the enhanced correlation coefficient (Evangelidis & Psarakis 2008); 0 if none does.
    """
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    try:
        warp = cv2.findTransformECC(image, other, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, stop)[1]
    except cv2.error:  # it does not converge
        return 0.0
    size = image.shape[::-1]
    moved = cv2.warpAffine(other, warp, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    inside = cv2.warpAffine(np.ones_like(other), warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    if inside.mean() < 0.5:
        return 0.0
    first, second = unit_rows(np.stack([image[inside > 0], moved[inside > 0]])[:, None])
    return float(first @ second)


def find_near_duplicates(thumbnails, threshold, workers=1, block=2048):
    """Pairs that show one photograph, as a sorted list of (i, j, correlation, aligned) with i < j.

    thumbnails: uint8 (N, 64, 64). A pair counts above `AS_THEY_LIE` at 32×32, or, mirrored or not, above
    `threshold` once aligned. Compares block by block: time grows with N², memory with N.
    """
    small = np.stack([resize(thumbnail, 32) for thumbnail in thumbnails])
    rows, mirrored = unit_rows(small), unit_rows(small[:, :, ::-1])
    pairs, candidates = {}, []
    starts = range(0, len(rows), block)
    blocks = [(top, left) for top in starts for left in starts if left >= top]
    for top, left in progress(blocks, "near-duplicates", unit="block"):
        for others in (rows, mirrored):
            correlation = rows[top : top + block] @ others[left : left + block].T  # block×block
            for i, j in np.argwhere(correlation > CANDIDATE):
                pair = (int(top + i), int(left + j))
                if pair[0] >= pair[1]:
                    continue
                if others is rows and correlation[i, j] > max(AS_THEY_LIE, threshold):
                    pairs[pair] = (float(correlation[i, j]), False)
                else:
                    candidates.append((*pair, others is mirrored))

    def align(candidate):
        i, j, flip = candidate
        return aligned_correlation(thumbnails[i], thumbnails[j][:, ::-1].copy() if flip else thumbnails[j])

    with ThreadPool(max(workers, 1)) as pool:
        aligned = pool.imap(align, candidates, chunksize=64)
        for (i, j, _), correlation in zip(candidates, progress(aligned, "align", len(candidates))):
            if correlation > threshold and ((i, j) not in pairs or pairs[i, j][1]):
                pairs[i, j] = (max(correlation, pairs.get((i, j), (0,))[0]), True)
    return [(*pair, *pairs[pair]) for pair in sorted(pairs)]


def connect(count, pairs):
    """The smallest index that each item is linked to through `pairs`, directly or not: int (count,)."""
    root = list(range(count))

    def find(i):
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j, *_ in pairs:
        low, high = sorted((find(i), find(j)))
        root[high] = low
    return np.array([find(i) for i in range(count)])


def assign(groups, components, fractions, seed):
    """Splits 0–2 for N faces: components stay whole, and every age group is shared out in `fractions`.

    groups, components: int (N,). Components of several faces are placed first, the largest first, each where
    its age groups are furthest below their share; single faces then fill every share exactly.
    """
    fractions = np.asarray(fractions)
    rng = np.random.default_rng(seed)
    sizes = np.bincount(groups, minlength=len(GROUP_NAMES))
    wanted = fractions[:, None] * sizes  # 3×6 faces still to be placed
    splits = np.full(len(groups), -1)
    roots, counts = np.unique(components, return_counts=True)
    several = rng.permutation(roots[counts > 1])
    members = {root: np.flatnonzero(components == root) for root in several}
    for root in sorted(several, key=lambda root: -len(members[root])):
        histogram = np.bincount(groups[members[root]], minlength=len(GROUP_NAMES))
        need = (wanted * histogram).sum(axis=1) / np.where(fractions > 0, fractions, np.inf)
        choice = np.argmax(np.where(fractions > 0, need, -np.inf))
        splits[members[root]] = choice
        wanted[choice] -= histogram
    for group in range(len(GROUP_NAMES)):
        single = rng.permutation(np.flatnonzero((groups == group) & (splits < 0)))
        ends = np.cumsum(np.clip(wanted[:, group], 0, None))
        ends = np.rint(ends * len(single) / max(ends[-1], 1e-9)).astype(int)
        for split, part in enumerate(np.split(single, ends[:-1])):
            splits[part] = split
    return splits


def print_table(groups, splits):
    """Prints how many faces of each age group lie in each split, and their share of the group."""
    print(f"{'':14}" + "".join(f"{name:>16}" for name in (*SPLITS, "all")))
    for name, chosen in [*((n, groups == g) for g, n in enumerate(GROUP_NAMES)), ("all", groups >= 0)]:
        counts = [int((chosen & (splits == split)).sum()) for split in range(3)]
        total = sum(counts)
        cells = "".join(f"{count:>8} {count / max(total, 1):>6.1%} " for count in counts)
        print(f"{name:14}{cells}{total:>16}")


def write_split(source, target, rows, conflicts, settings, overwrite):
    """Builds the folders beside `target`, with hard links to the pairs where possible, and renames."""
    building = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    try:
        building.chmod(0o755)
        for split in SPLITS:
            (building / split).mkdir()
        for row in progress(rows, "link", unit="face"):
            mask = row["file"].replace("_image.png", "_mask.png")
            for name in (row["file"], mask):
                try:
                    os.link(source / name, building / row["split"] / name)
                except OSError:  # another file system, or one without hard links
                    shutil.copy2(source / name, building / row["split"] / name)
        write_csv(building / "split.csv", rows, COLUMNS)
        write_csv(building / "conflicts.csv", conflicts, CONFLICT_COLUMNS)
        (building / "split.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if overwrite and target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".old-{target.name}-", dir=target.parent))
            target.rename(old / target.name)
            building.rename(target)
            shutil.rmtree(old)
        else:
            building.rename(target)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--output {target} cannot be written ({error.strerror}): make room") from None
        raise


def is_there(source, target, rows, conflicts):
    """Whether `target` holds exactly this split: the same two tables and every pair, as it is in `source`."""
    for name, table, columns in (
        ("split.csv", rows, COLUMNS),
        ("conflicts.csv", conflicts, CONFLICT_COLUMNS),
    ):
        try:
            with open(target / name, newline="", encoding="utf-8") as file:
                if [tuple(row) for row in csv.reader(file)] != [
                    tuple(columns),
                    *(tuple(map(str, row.values())) for row in table),
                ]:
                    return False
        except OSError:
            return False
    wanted = {(row["split"], row["file"]) for row in rows}
    wanted |= {(split, name.replace("_image.png", "_mask.png")) for split, name in wanted}
    if wanted != {(s, name) for s in SPLITS if (target / s).is_dir() for name in os.listdir(target / s)}:
        return False
    stats = ((os.stat(target / split / name), os.stat(source / name)) for split, name in wanted)
    return all((a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns) for a, b in stats)  # links, copies


def get_parser():
    parser = script_parser("split", __doc__)
    parser.add_argument("--input", default="dataset/processed", help="folder of pairs written by masks.py")
    parser.add_argument("--output", default="dataset/processed_split", help="folder to write")
    parser.add_argument(
        "--fractions",
        type=number(float, low=0, high=1),
        nargs=3,
        default=[0.7, 0.1, 0.2],
        metavar=("TRAIN", "VAL", "TEST"),
        help="share of each split; they sum to one and may be zero",
    )
    parser.add_argument(
        "--near-duplicate",
        type=number(float, low=0, high=1),
        default=0.975,
        help="correlation of 32x32 grey thumbnails above which two faces stay together",
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="let near-duplicates straddle splits, to measure what that leaks",
    )
    return parser


def main(args):
    if abs(sum(args.fractions) - 1) > 1e-6:
        raise UserError(
            f"--fractions sum to {sum(args.fractions):g}, not to one: mend them, such as 0.7 0.1 0.2"
        )
    source, target = Path(args.input), Path(args.output)
    check_writable("--output", target)
    faces = list_pairs(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".old-{target.name}-????????/{target.name}"):
        if not target.exists():  # after a kill while it was replaced
            old.rename(target)
    for kind in ("old", "tmp"):
        for leftover in target.parent.glob(f".{kind}-{target.name}-????????"):
            shutil.rmtree(leftover)
    if (
        target.exists()
        and not (target / "split.csv").is_file()
        and (target.is_file() or any(target.iterdir()))
    ):
        raise UserError(f"--output {target} is there and is not a split: name another folder")

    thumbnails = read_thumbnails(source, faces, args.workers)
    pairs = find_near_duplicates(thumbnails, args.near_duplicate, args.workers)
    components = connect(len(faces), pairs)
    groups = age_to_group([face.age for face in faces])
    as_they_lie = connect(len(faces), [pair for pair in pairs if not pair[3]])
    units = np.arange(len(faces)) if args.random else as_they_lie
    splits = assign(groups, units, args.fractions, args.seed)
    if not args.random:  # what aligning links follows its first face's group into the earliest split
        earliest = np.full(len(faces), 2)
        np.minimum.at(earliest, components, splits)
        splits = earliest[components]

    names = [f"{face.stem}_image.png" for face in faces]
    rows = [
        {
            "file": names[i],
            "split": SPLITS[splits[i]],
            "age": face.age,
            "gender": face.gender,
            "race": face.race,
            "group": int(groups[i]),
            "duplicate_of": "" if components[i] == i else names[components[i]],
        }
        for i, face in enumerate(faces)
    ]
    conflicts = [
        {
            "file": names[i],
            "other": names[j],
            "age": faces[i].age,
            "other_age": faces[j].age,
            "correlation": f"{correlation:.4f}",
        }
        for i, j, correlation, _ in pairs
        if faces[i].age != faces[j].age
    ]
    there = is_there(source, target, rows, conflicts)
    if not there and (target / "split.csv").exists() and not args.overwrite:
        raise UserError(f"--output {target} was made from other faces or settings: --overwrite replaces it")
    if not there:
        settings = {key: getattr(args, key) for key in ("seed", "fractions", "near_duplicate", "random")}
        write_split(source, target, rows, conflicts, settings, args.overwrite)

    print_table(groups, splits)
    missing = np.setdiff1d(np.arange(len(GROUP_NAMES)), groups[splits == 0])
    if len(missing) and args.fractions[0] > 0:
        names = ", ".join(GROUP_NAMES[group] for group in missing)
        print(f"warning: train holds no face of {names}: finetune.py will refuse it", file=sys.stderr)
    several = np.unique(components, return_counts=True)[1]
    several = several[several > 1]
    print(
        f"{target} {'holds this split already' if there else 'written'}: {len(faces)} faces; {len(pairs)} "
        f"near-duplicate pairs in {len(several)} groups of {several.sum()} faces "
        f"{'may straddle splits' if args.random else 'stay together'}; "
        f"{len(conflicts)} pairs disagree on the age (conflicts.csv)"
    )


if __name__ == "__main__":
    run(main, get_parser())
