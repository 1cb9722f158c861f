"""Splits processed faces into train, val and test so that no near-duplicate straddles two of them.

    python split.py
    python split.py --fractions 0 0 1 --input exam --output exam_split

Every age group is shared out in the fractions asked for. Near-duplicates, which are crops of one photograph,
stay together, and so does what they are linked to through others. A pair counts where its 32×32 grey
thumbnails correlate above 0.98, or, once an affine fit has laid one face on the other, mirrored or not, above
--near-duplicate. Pairs whose ages disagree are listed in `conflicts.csv`. An unchanged split stays as it is.
"""

import filecmp
import os
import shutil
import sys
import tempfile
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import cli
from utkface import GROUP_NAMES, SPLIT_SETTINGS, age_to_group, list_pairs, read_pair, resize

CANDIDATE = 0.90  # correlation of thumbnails, mirrored or not, above which a pair is worth aligning
AS_THEY_LIE = 0.98  # above which it needs no aligning
MANY = 32  # faces in a group beyond which not all of its pairs are listed
SPLITS = ("train", "val", "test")
COLUMNS = ["file", "split", "age", "gender", "race", "group", "duplicate_of"]
CONFLICT_COLUMNS = ["file", "other", "age", "other_age", "correlation"]


class Pair(NamedTuple):
    """Two near-duplicates, by index, `first` < `second`; `aligned` if only an affine fit shows it."""

    first: int
    second: int
    correlation: float
    aligned: bool


def read_thumbnails(folder, faces, workers):
    """The images in grey, uint8 (N, 64, 64); UserError if a pair cannot be read, or its sizes differ."""

    def load(face):
        return resize(read_pair(folder, face.stem, cv2.IMREAD_GRAYSCALE)[0], 64)

    with ThreadPool(max(workers, 1)) as pool:
        loading = pool.imap(load, faces, chunksize=16)
        return np.stack(list(cli.progress(loading, "thumbnails", len(faces), unit="face")))


def unit_vectors(images):
    """(N, H, W) → float32 (N, H·W) of zero mean and unit length, whose products are correlations."""
    vectors = images.reshape(len(images), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def aligned_correlation(image, other):
    """Correlation of two grey images (H, W) where they overlap, once an affine map lays one on the other.

    The map is by Evangelidis & Psarakis, TPAMI 2008. 0 if that does not converge, or leaves less than half.
    """
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    try:
        warp = cv2.findTransformECC(image, other, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, stop)[1]
    except cv2.error:
        return 0.0
    size = image.shape[::-1]
    moved = cv2.warpAffine(other, warp, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    inside = cv2.warpAffine(np.ones_like(other), warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    if inside.mean() < 0.5:
        return 0.0
    first, second = unit_vectors(np.stack([image[inside > 0], moved[inside > 0]])[:, None])
    return float(first @ second)


def find_candidates(vectors, others, least, groups, block):
    """Yields an index, later ones (K,) that correlate with it above `least`, and their correlations (K,).

    vectors, others: (N, D). groups: (N,), which the caller joins as it goes: within a group of more than
    `MANY` nothing is yielded. Compares block by block: time grows with N², memory with N.
    """
    starts = range(0, len(vectors), block)
    blocks = [(top, left) for top in starts for left in starts if left >= top]
    for top, left in cli.progress(blocks, "near-duplicates", unit="block"):
        correlation = vectors[top : top + block] @ others[left : left + block].T  # block×block
        for row in np.flatnonzero((correlation > least).any(axis=1)).tolist():
            first, found = top + row, left + np.flatnonzero(correlation[row] > least)
            found = found[found > first]
            together = groups == groups[first]
            if together.sum() > MANY:
                found = found[~together[found]]
            if len(found):
                yield first, found, correlation[row, found - left]


def find_near_duplicates(thumbnails, threshold, workers=1, block=2048):
    """Sorted list of `Pair`s of uint8 thumbnails (N, 64, 64) that show one photograph.

    A pair counts above `AS_THEY_LIE` at 32×32, or above `threshold` once aligned at 64×64, mirrored or not.
    All pairs of a group are listed, but beyond `MANY` faces only those that link two parts of it: many copies
    of one picture cost in proportion to their number.
    """
    small = np.stack([resize(thumbnail, 32) for thumbnail in thumbnails])
    upright, mirrored = unit_vectors(small), unit_vectors(small[:, :, ::-1])
    groups = np.arange(len(small))  # of each item, so far
    lying, aligned = {}, {}  # the correlation of each pair
    for first, others, correlations in find_candidates(upright, upright, AS_THEY_LIE, groups, block):
        lying |= {(first, second): value for second, value in zip(others.tolist(), correlations.tolist())}
        groups[np.isin(groups, groups[others])] = groups[first]
    with ThreadPool(max(workers, 1)) as pool:
        for pictures, vectors in ((thumbnails, upright), (thumbnails[:, :, ::-1], mirrored)):
            for first, others, _ in find_candidates(upright, vectors, CANDIDATE, groups, block):
                others = [second for second in others.tolist() if (first, second) not in lying]
                align = partial(aligned_correlation, thumbnails[first])
                correlations = pool.map(align, np.ascontiguousarray(pictures[others]))
                for second, correlation in zip(others, correlations):
                    if correlation > aligned.get((first, second), threshold):
                        aligned[first, second] = correlation
                        groups[groups == groups[second]] = groups[first]
    pairs = [Pair(*pair, correlation, aligned=False) for pair, correlation in lying.items()]
    pairs += [Pair(*pair, correlation, aligned=True) for pair, correlation in aligned.items()]
    return sorted(pairs)


def connect(count, pairs):
    """The smallest index that each item is linked to through `pairs`, directly or not: int (count,)."""
    first, second = np.array([pair[:2] for pair in pairs], int).reshape(-1, 2).T
    links = coo_array((np.ones(len(first)), (first, second)), (count, count))
    labels = connected_components(links, directed=False)[1]
    smallest = np.unique(labels, return_index=True)[1]
    return smallest[labels]


def assign(groups, components, fractions, seed):
    """Splits 0–2 for N faces: components stay whole, and every age group is shared out in `fractions`.

    groups, components: int (N,). Components of several faces are placed first, the largest first, each where
    its age groups are furthest below their share; single faces then fill every share exactly.
    """
    fractions, rng = np.asarray(fractions), np.random.default_rng(seed)
    wanted = np.outer(fractions, np.bincount(groups, minlength=len(GROUP_NAMES)))  # 3×6 faces to be placed
    splits = np.full(len(groups), -1)
    roots, counts = np.unique(components, return_counts=True)
    families = [np.flatnonzero(components == root) for root in rng.permutation(roots[counts > 1])]
    for family in sorted(families, key=len, reverse=True):
        histogram = np.bincount(groups[family], minlength=len(GROUP_NAMES))
        choice = np.argmax((wanted * histogram).sum(axis=1) / np.where(fractions > 0, fractions, np.inf))
        splits[family] = choice
        wanted[choice] -= histogram
    for group in range(len(GROUP_NAMES)):
        single = rng.permutation(np.flatnonzero((groups == group) & (splits < 0)))
        ends = np.cumsum(np.clip(wanted[:, group], 0, None))
        ends = np.rint(ends * len(single) / max(ends[-1], 1e-9)).astype(int)
        for split, part in enumerate(np.split(single, ends[:-1])):
            splits[part] = split
    return splits


def share_out(groups, pairs, fractions, seed):
    """Splits 0–2 for N faces of age `groups`, near-duplicates together.

    Shares are dealt by pairs as they lie, and what aligning links moves to the earliest split that one of
    them is in: so the train and val faces of splits made before there was aligning never become test faces.
    """
    as_they_lie = [pair for pair in pairs if not pair.aligned]
    dealt = assign(groups, connect(len(groups), as_they_lie), fractions, seed)
    components = connect(len(groups), pairs)
    earliest = np.full(len(groups), len(SPLITS))
    np.minimum.at(earliest, components, dealt)
    return earliest[components]


def report(groups, splits, fractions):
    """Prints how many faces of each age group lie in each split, and warns of what is empty."""
    print(f"{'':14}" + "".join(f"{name:>8}" for name in (*SPLITS, "all")))
    for row, name in enumerate([*GROUP_NAMES, "all"]):
        chosen = splits[groups == row] if row < len(GROUP_NAMES) else splits
        counts = np.bincount(chosen, minlength=len(SPLITS))
        print(f"{name:14}" + "".join(f"{count:>8}" for count in (*counts, len(chosen))))
    for i, name in enumerate(SPLITS):
        if fractions[i] > 0 and i not in splits:
            print(f"warning: {name} came out empty: add faces, or give other --fractions", file=sys.stderr)
    missing = [name for i, name in enumerate(GROUP_NAMES) if i not in groups[splits == 0]]
    if missing and fractions[0] > 0:
        print(
            f"warning: train holds no face of {', '.join(missing)}, so no model learns them", file=sys.stderr
        )


def tabulate(faces, splits, pairs):
    """The rows of `split.csv` and of `conflicts.csv`, as dicts; what is not known is empty."""
    names = [f"{face.stem}_image.png" for face in faces]
    ages = [face.stem.split("_")[0] for face in faces]  # a range as it is
    rows, conflicts = [], []
    for i, first in enumerate(connect(len(faces), pairs)):
        labels = ("" if label < 0 else label for label in (faces[i].gender, faces[i].race, faces[i].group))
        original = "" if first == i else names[first]
        rows.append(dict(zip(COLUMNS, (names[i], SPLITS[splits[i]], ages[i], *labels, original))))
    for i, j, correlation, _ in pairs:
        if abs(faces[i].age - faces[j].age) > faces[i].spread + faces[j].spread:
            row = (names[i], names[j], ages[i], ages[j], f"{correlation:.4f}")
            conflicts.append(dict(zip(CONFLICT_COLUMNS, row)))
    return rows, conflicts


def same_split(new, old):
    """Whether two folders hold the same split: the same pairs, and the same in each file."""
    pictures = {path.relative_to(new) for path in new.glob("*/*.png")}
    if pictures != {path.relative_to(old) for path in old.glob("*/*.png")}:
        return False
    names = ["split.csv", "conflicts.csv", "split.yaml"]
    names += [name for name in pictures if not os.path.samefile(new / name, old / name)]
    _, other, missing = filecmp.cmpfiles(new, old, names, shallow=False)
    return not other + missing


def write_split(source, target, rows, conflicts, settings, overwrite):
    """Builds the folders beside `target`, with hard links to the pairs where possible, and renames.

    Returns whether `target` holds this split already; raises UserError if it holds another one. A kill leaves
    the old split, the new one or none.
    """
    building = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    new = building / "new"
    try:
        for split in SPLITS:
            (new / split).mkdir(parents=True)
        for row in cli.progress(rows, "link", unit="face"):
            mask = row["file"].removesuffix("_image.png") + "_mask.png"
            for name in (row["file"], mask):
                try:
                    os.link(os.path.realpath(source / name), new / row["split"] / name)
                except OSError:  # another file system, or one without hard links
                    shutil.copy2(source / name, new / row["split"] / name)
        cli.write_csv(new / "split.csv", rows, COLUMNS)
        cli.write_csv(new / "conflicts.csv", conflicts, CONFLICT_COLUMNS)
        (new / "split.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if same_split(new, target):
            return True
        if target.exists():
            if not overwrite and any(target.iterdir()):
                raise cli.UserError(f"--output {target} holds another split: --overwrite replaces it")
            own = {path.name for path in new.iterdir()}
            foreign = [path for path in target.iterdir() if path.name not in own]
            inside = [path for split in SPLITS for path in target.glob(f"{split}/*")]
            foreign += [path for path in inside if not path.name.endswith(("_image.png", "_mask.png"))]
            foreign = [path for path in foreign if not path.name.startswith((".DS_Store", "._"))]  # macOS
            if foreign:
                raise cli.UserError(f"--output: {min(foreign)} lies there beside a split: move it away")
            target.rename(building / "old")
        new.rename(target)
        return False
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise cli.UserError(f"--output {target} {why}: make room, or name another place") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def get_parser():
    parser = cli.script_parser("split", __doc__)
    # fmt: off
    add, share = parser.add_argument, cli.number(float, low=0, high=1)
    add("--input", default="dataset/processed", help="folder of pairs written by masks.py")
    add("--output", default="dataset/processed_split", help="folder to write")
    add("--fractions", type=share, nargs=3, default=[0.7, 0.1, 0.2], metavar=("TRAIN", "VAL", "TEST"),
        help="share of each split; they sum to one and may be zero")
    add("--near-duplicate", metavar="R", type=cli.number(float, low=CANDIDATE, high=1), default=0.975,
        help=f"correlation of two aligned faces, {CANDIDATE} to 1, above which they stay together")
    add("--random", action="store_true",
        help="let near-duplicates straddle splits, to measure what that leaks")
    # fmt: on
    return parser


def main(args):
    if abs(sum(args.fractions) - 1) > 1e-6:
        raise cli.UserError("--fractions do not sum to one: mend them, such as 0.7 0.1 0.2")
    source, target = Path(args.input), Path(os.path.realpath(args.output))  # what a link leads to is replaced
    cli.check_writable("--output", target.parent)
    faces = list_pairs(source)
    if target in Path(os.path.realpath(source)).parents:
        raise cli.UserError(f"--input {source} lies in --output {target}, which is replaced: name another")
    others = target.is_dir() and any(target.iterdir()) and not (target / "split.csv").is_file()
    if target.is_file() or others:
        raise cli.UserError(f"--output {args.output} is there and is not a split: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    cli.remove_leftovers(target.parent, f".tmp-{target.name}-????????")

    thumbnails = read_thumbnails(source, faces, args.workers)
    pairs = find_near_duplicates(thumbnails, args.near_duplicate, args.workers)
    groups = age_to_group([face.age for face in faces])
    if args.random:
        splits = assign(groups, np.arange(len(faces)), args.fractions, args.seed)
    else:
        splits = share_out(groups, pairs, args.fractions, args.seed)

    rows, conflicts = tabulate(faces, splits, pairs)
    settings = {key: getattr(args, key) for key in SPLIT_SETTINGS}
    there = write_split(source, target, rows, conflicts, settings, args.overwrite)

    report(groups, splits, args.fractions)
    families = {row["duplicate_of"] for row in rows if row["duplicate_of"]}
    print(
        f"{args.output} {'holds this split already' if there else 'written'}: {len(faces)} faces; "
        f"{len(pairs)} near-duplicate pairs in {len(families)} groups "
        f"{'may straddle splits' if args.random else 'stay together'}; "
        f"{len(conflicts)} pairs disagree on the age (conflicts.csv)"
    )


if __name__ == "__main__":
    cli.run(main, get_parser())
