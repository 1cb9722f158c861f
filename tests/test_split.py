import csv
import os
import random
import shutil

import cv2
import numpy as np
import pytest

from common import AGE_GROUPS
from conftest import noise_pairs, write_pair
from split import assign, connect, find_near_duplicates

AGES = [
    age for first, last in AGE_GROUPS.values() for age in np.linspace(first, min(last, 95), 20).astype(int)
]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def plant_copies(folder, stems):
    """Adds to each stem a brighter copy of another age, and a copy of that; returns the families."""
    families = []
    for i, stem in enumerate(stems):
        image = cv2.imread(str(folder / f"{stem}_image.png"))
        family = [stem]
        for step in (1, 2):
            age = (int(stem.split("_")[0]) + 12 * step) % 90
            family.append(f"{age}_0_0_{30000000000000000 + 10 * i + step}")
            write_pair(folder, family[-1], cv2.convertScaleAbs(image, alpha=0.9**step, beta=10))
        families.append(family)
    return families


def test_planted_copies_do_not_leak(tmp_path, cli):
    source, target = tmp_path / "processed", tmp_path / "split"
    stems = noise_pairs(source, AGES)
    families = plant_copies(source, stems[::6])
    code, out, _ = cli("split", "--input", source, "--output", target)
    assert code == 0 and "Older Adult" in out
    rows = {row["file"].removesuffix("_image.png"): row for row in read(target / "split.csv")}
    for family in families:
        assert len({rows[stem]["split"] for stem in family}) == 1
        first = min(family)
        assert [rows[stem]["duplicate_of"] for stem in family if stem != first] == [f"{first}_image.png"] * 2
    conflicts = {frozenset((row["file"], row["other"])) for row in read(target / "conflicts.csv")}
    for family in families:
        assert frozenset(f"{stem}_image.png" for stem in family[:2]) in conflicts
    assert len(conflicts) == 3 * len(families)


def test_a_random_split_leaks_and_says_so(tmp_path, cli):
    source, target = tmp_path / "processed", tmp_path / "split"
    families = plant_copies(source, noise_pairs(source, AGES)[::3])
    code, out, _ = cli("split", "--input", source, "--output", target, "--random")
    assert code == 0 and "may straddle" in out
    rows = {row["file"].removesuffix("_image.png"): row for row in read(target / "split.csv")}
    straddling = [family for family in families if len({rows[stem]["split"] for stem in family}) > 1]
    assert len(straddling) > len(families) / 4
    for family in families:  # still named, so that evaluate.py can tell
        assert sum(rows[stem]["duplicate_of"] == f"{min(family)}_image.png" for stem in family) == 2


def test_every_pair_lands_in_exactly_one_split(tmp_path, cli):
    source, target = tmp_path / "processed", tmp_path / "split"
    stems = noise_pairs(source, AGES)
    assert cli("split", "--input", source, "--output", target)[0] == 0
    assert sorted(os.listdir(target)) == ["conflicts.csv", "split.csv", "split.yaml", "test", "train", "val"]
    found = [name for split in ("train", "val", "test") for name in os.listdir(target / split)]
    assert sorted(found) == sorted(f"{stem}_{part}.png" for stem in stems for part in ("image", "mask"))
    rows = read(target / "split.csv")
    assert list(rows[0]) == ["file", "split", "age", "gender", "race", "group", "duplicate_of"]
    for row in rows:
        assert (target / row["split"] / row["file"]).is_file()
    for group in range(6):
        counts = [
            sum(row["split"] == s and row["group"] == str(group) for row in rows)
            for s in ("train", "val", "test")
        ]
        assert counts == [14, 2, 4]
    assert os.stat(source / f"{stems[0]}_image.png").st_nlink == 2  # a hard link, no copy


def test_split_depends_on_the_seed_and_not_on_file_order(tmp_path, cli):
    source, shuffled = tmp_path / "a", tmp_path / "b"
    stems = noise_pairs(source, AGES)
    shuffled.mkdir()
    for stem in random.Random(0).sample(stems, len(stems)):
        for part in ("mask", "image"):
            (shuffled / f"{stem}_{part}.png").write_bytes((source / f"{stem}_{part}.png").read_bytes())
    for folder, seed, out in ((source, 1, "x"), (shuffled, 1, "y"), (source, 2, "z")):
        assert (
            cli("split", "--input", folder, "--output", tmp_path / out, "--seed", seed, "--workers", 2)[0]
            == 0
        )
    assert tree(tmp_path / "x") == tree(tmp_path / "y")
    assert tree(tmp_path / "x") != tree(tmp_path / "z")


def test_zero_fractions_make_an_exam(tmp_path, cli):
    stems = noise_pairs(tmp_path / "processed", AGES)
    code, _, err = cli(
        "split", "--input", tmp_path / "processed", "--output", tmp_path / "s", "--fractions", 0, 0, 1
    )
    assert code == 0 and err == ""
    assert len(os.listdir(tmp_path / "s/test")) == 2 * len(stems)
    assert os.listdir(tmp_path / "s/train") == os.listdir(tmp_path / "s/val") == []


def test_a_class_missing_in_train_is_a_warning(tmp_path, cli):
    noise_pairs(tmp_path / "processed", [30] * 10 + [50] * 10)
    code, _, err = cli("split", "--input", tmp_path / "processed", "--output", tmp_path / "s")
    assert code == 0 and "Infant" in err and "Youth" in err and "Young Adult" not in err


def test_rerun_and_overwrite(tmp_path, cli, refuse):
    source, target = tmp_path / "processed", tmp_path / "split"
    noise_pairs(source, AGES)
    flags = ["--input", source, "--output", target]
    assert cli("split", *flags)[0] == 0
    before = tree(target)
    code, out, _ = cli("split", *flags)
    assert code == 0 and "already" in out and tree(target) == before
    refuse("split", *flags, "--seed", 5, words=[str(target), "--overwrite"])
    assert tree(target) == before
    (target / "test" / os.listdir(target / "test")[0]).unlink()
    refuse("split", *flags, words=["--overwrite"])  # no longer whole
    assert cli("split", *flags, "--seed", 5, "--overwrite")[0] == 0
    assert tree(target) != before
    mask = next((target / "train").glob("*_mask.png"))
    write_pair(tmp_path / "new", mask.name.removesuffix("_mask.png"), np.zeros((40, 40, 3), np.uint8))
    os.replace(tmp_path / "new" / mask.name, source / mask.name)  # as masks.py --overwrite does
    refuse("split", *flags, "--seed", 5, words=["--overwrite"])
    assert cli("split", *flags, "--seed", 5, "--overwrite")[0] == 0
    assert mask.read_bytes() == (source / mask.name).read_bytes()
    shutil.rmtree(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["processed", "split"]


def test_a_folder_that_is_no_split_is_never_replaced(tmp_path, refuse):
    noise_pairs(tmp_path / "processed", AGES)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("mine")
    refuse(
        "split", "--input", tmp_path / "processed", "--output", tmp_path / "precious", "--overwrite",
        words=["precious", "another folder"],
    )  # fmt: skip
    assert (tmp_path / "precious/thesis.txt").read_text() == "mine"


def test_bad_input(tmp_path, refuse):
    target = tmp_path / "split"
    stems = noise_pairs(tmp_path / "p", [1, 2, 30, 40])
    (tmp_path / "empty").mkdir()
    flags = ["--output", target, "--input"]
    refuse("split", *flags, tmp_path / "nowhere", words=["nowhere"])
    refuse("split", *flags, tmp_path / "empty", words=["empty"])
    refuse("split", *flags, tmp_path / "p", "--fractions", 0.7, 0.1, 0.1, words=["--fractions", "one"])
    refuse("split", *flags, tmp_path / "p", "--fractions", 1.2, -0.1, -0.1, words=["--fractions"])
    refuse("split", *flags, tmp_path / "p", "--nonsense", words=["--nonsense"])
    write_pair(tmp_path / "p", stems[0], np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41), np.uint8))
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png", "size"])
    (tmp_path / "p" / f"{stems[0]}_mask.png").unlink()
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png"])
    (tmp_path / "p" / f"{stems[0]}_mask.png").write_text("no image")
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png", "readable"])
    assert sorted(os.listdir(tmp_path)) == ["empty", "p"]


def test_find_near_duplicates_equals_numpy():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 64))
    images[7] = 2 * images[31] + 5 + rng.normal(size=64) * 0.05
    images[8] = images[9]
    expected = np.argwhere(np.triu(np.corrcoef(images), 1) > 0.3)
    rows = images - images.mean(axis=1, keepdims=True)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found = find_near_duplicates(rows, 0.3, block=16)
    assert sorted((i, j) for i, j, _ in found) == [tuple(pair) for pair in expected.tolist()]
    assert {(i, j) for i, j, _ in find_near_duplicates(rows, 0.98, block=16)} == {(7, 31), (8, 9)}


def test_connect_follows_chains():
    assert connect(6, [(4, 5, 1.0), (1, 4, 1.0), (2, 3, 1.0)]).tolist() == [0, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.5, 0.5, 0), (0, 0.25, 0.75)])
def test_shares_hold_for_every_group_despite_duplicates(fractions):
    rng = np.random.default_rng(1)
    groups = rng.choice(6, size=6000, p=[0.09, 0.06, 0.14, 0.45, 0.17, 0.09])
    components = np.arange(6000)
    for start in range(0, 900, 3):  # families of three, their ages mixed
        components[start : start + 3] = start
    splits = assign(groups, components, fractions, seed=0)
    for start in range(0, 900, 3):
        assert len(set(splits[start : start + 3])) == 1
    for group in range(6):
        shares = np.bincount(splits[groups == group], minlength=3) / (groups == group).sum()
        assert np.abs(shares - fractions).max() < 0.01
    assert not (splits[:, None] == np.flatnonzero(np.array(fractions) == 0)).any()
