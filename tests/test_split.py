import csv
import os
import random
import shutil
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import yaml

from conftest import noise_pairs, write_pair
from split import Pair, aligned_correlation, assign, connect, find_near_duplicates, share_out, unit_vectors
from utkface import AGE_GROUPS, resize

AGES = [
    age for first, last in AGE_GROUPS.values() for age in np.linspace(first, min(last, 95), 20).astype(int)
]
AS_IT_LIES = ("darker", "encoded")  # copies that need no aligning to be seen


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """A folder of pairs of noise, of all ages, that no test changes."""
    folder = tmp_path_factory.mktemp("processed")
    noise_pairs(folder, AGES)
    return folder


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(folder):
    """split.csv's rows by stem."""
    return {row["file"].removesuffix("_image.png"): row for row in read(folder / "split.csv")}


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def crops(rng):
    """A picture of smooth noise, what is a copy of it by name, and a stranger that resembles it."""
    noise = rng.integers(0, 256, (2, 10, 10, 3), np.uint8)
    picture, other = (cv2.resize(image, (110, 110), interpolation=cv2.INTER_CUBIC) for image in noise)
    first, moved = picture[5:105, 5:105], picture[5:105, 7:107]
    copies = {
        "darker": cv2.convertScaleAbs(first, alpha=0.8, beta=10),
        "encoded": cv2.imdecode(cv2.imencode(".jpg", first, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1),
        "mirrored": first[:, ::-1],
        "shifted": moved,
        "zoomed": picture[7:102, 7:102],
        "mirrored and shifted": moved[:, ::-1],
    }
    return first, copies, cv2.addWeighted(first, 0.75, other[5:105, 5:105], 0.25, 0)


def plant(folder, count):
    """Writes families of copies of differing ages, and a stranger to each; returns the stems of both."""
    rng, families, strangers = np.random.default_rng(3), [], []
    for i in range(count):
        first, copies, stranger = crops(rng)
        family = []
        for step, image in enumerate([first, *copies.values(), stranger]):
            age = (7 * i + 13 * step * (step != 2)) % 90  # one copy is of the first's age
            family.append(f"{age}_0_0_{3000 + 10 * i + step}")
            write_pair(folder, family[-1], image)
        strangers.append(family.pop())
        families.append(family)
    return families, strangers


def test_planted_copies_stay_together_and_strangers_do_not(tmp_path, cli):
    source = tmp_path / "processed"
    noise_pairs(source, AGES)
    families, strangers = plant(source, 10)
    code, out, _ = cli("split", "--input", source, "--output", tmp_path / "split")
    assert code == 0 and "Older Adult" in out and "in 10 groups stay together" in out
    rows = table(tmp_path / "split")
    for family in families:
        assert len({rows[stem]["split"] for stem in family}) == 1
        named = [rows[stem]["duplicate_of"] for stem in sorted(family)]
        assert named == ["", *[f"{min(family)}_image.png"] * 6]
    assert sum(row["duplicate_of"] != "" for row in rows.values()) == 60
    conflicts = read(tmp_path / "split/conflicts.csv")
    found = {(row["file"], row["other"]) for row in conflicts}
    for family in families:
        for copy in (family[1], *family[3:]):
            first, second = sorted((family[0], copy))
            assert (f"{first}_image.png", f"{second}_image.png") in found
    assert all(rows[row["file"][:-10]]["age"] == row["age"] != row["other_age"] for row in conflicts)
    assert f"; {len(conflicts)} pairs disagree on the age" in out  # not all: one copy is of the first's age
    assert f" {len(conflicts)} near-duplicate pairs" not in out
    correlations = {float(row["correlation"]) for row in conflicts}
    assert 0.97 < min(correlations) <= max(correlations) <= 1.0001 and len(correlations) > 5

    # The threshold is honoured: below, strangers are taken for copies; above, moved copies for strangers
    for threshold, others, least, most in ((0.9, strangers, 5, 10), (0.999, [f[4] for f in families], 0, 2)):
        flags = ["--near-duplicate", threshold, "--overwrite"]
        assert cli("split", "--input", source, "--output", tmp_path / "split", *flags)[0] == 0
        rows = table(tmp_path / "split")
        root = {stem: row["duplicate_of"] or row["file"] for stem, row in rows.items()}
        assert least <= sum(root[f[0]] == root[other] for f, other in zip(families, others)) <= most
        assert f"near_duplicate: {threshold}" in (tmp_path / "split/split.yaml").read_text()
    assert all(root[f[0]] == root[f[2]] for f in families)  # encoded alone, and so above 0.98 as they lie


def test_a_random_split_leaks_and_says_so(tmp_path, cli):
    source, target = tmp_path / "processed", tmp_path / "split"
    noise_pairs(source, AGES)
    families, _ = plant(source, 10)
    code, out, _ = cli("split", "--input", source, "--output", target, "--random")
    assert code == 0 and "may straddle" in out
    rows = table(target)
    assert sum(len({rows[stem]["split"] for stem in family}) > 1 for family in families) > 5
    for family in families:  # still named, so that evaluate.py can tell
        assert sum(rows[stem]["duplicate_of"] == f"{min(family)}_image.png" for stem in family) == 6


@pytest.mark.parametrize("block", [5, 2048])
def test_find_near_duplicates(block):
    rng, images, expected, strangers = np.random.default_rng(3), [], {}, set()
    for _ in range(4):
        first, copies, stranger = crops(rng)
        start = len(images)
        images += [first, stranger, *copies.values()]
        strangers.add(start + 1)
        expected |= {(start, start + 2 + i): name not in AS_IT_LIES for i, name in enumerate(copies)}
    symmetric = cv2.addWeighted(first, 0.5, first[:, ::-1], 0.5, 0)  # so a candidate twice, and as it lies
    expected[len(images), len(images) + 1] = False
    images += [symmetric, np.roll(symmetric, 1, axis=1)]
    strangers.add(len(images))
    images.append(np.full_like(first, 90))  # of no contrast, and so like nothing
    thumbnails = np.stack([resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), 64) for image in images])
    found = find_near_duplicates(thumbnails, 0.975, workers=2, block=block)
    assert found == sorted(found)
    aligned = {(pair.first, pair.second): pair.aligned for pair in found}
    assert expected.items() <= aligned.items()
    assert all((start + 2, start + 3) in aligned for start in range(0, 32, 8))  # copies among each other
    assert all(first < second and first // 8 == second // 8 for first, second in aligned)
    assert not strangers & {i for pair in aligned for i in pair}
    small = unit_vectors(np.stack([resize(image, 32) for image in thumbnails]))
    for pair in found:
        assert 0.975 < pair.correlation <= 1.0001
        if not pair.aligned:
            assert pair.correlation == pytest.approx(
                np.corrcoef(small[[pair.first, pair.second]])[0, 1], abs=1e-5
            )


@pytest.mark.parametrize("shift", [0, 6])
def test_many_copies_make_a_tree(shift, monkeypatch):
    aligned = []
    monkeypatch.setattr("split.aligned_correlation", lambda *a: aligned.append(1) or aligned_correlation(*a))
    rng = np.random.default_rng(4)
    picture = cv2.resize(rng.integers(0, 256, (9, 9), np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
    picture = picture // 2 + picture[:, ::-1] // 2  # each copy is a candidate mirrored as well
    thumbnails = [np.roll(picture, rng.integers(shift + 1), axis=1) for _ in range(300)]
    thumbnails.append(cv2.resize(rng.integers(0, 256, (9, 9), np.uint8), (64, 64)))
    thumbnails = np.stack(thumbnails)
    found = find_near_duplicates(thumbnails, 0.975, block=128)
    assert connect(301, found).tolist() == [0] * 300 + [300]
    assert len(found) < 3000 and len(aligned) < 1000 * (shift > 0) + 1  # of 44,850 pairs
    small = unit_vectors(np.stack([resize(image, 32) for image in thumbnails]))
    lying = connect(301, np.argwhere(small @ small.T > 0.98))  # the shares are dealt by these
    assert np.array_equal(connect(301, [pair for pair in found if not pair.aligned]), lying)


def test_connect_follows_chains():
    assert connect(6, [(4, 5, 1.0), (1, 4, 1.0), (2, 3, 1.0)]).tolist() == [0, 1, 2, 2, 1, 1]
    assert connect(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shift, same", [(40, 0), (24, 1)])
def test_aligned_faces_must_overlap(monkeypatch, shift, same):
    """Whatever the fit says, less than half of a face in common proves nothing."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    warp = np.array([[1, 0, shift], [0, 1, 0]], np.float32)
    monkeypatch.setattr("split.cv2.findTransformECC", lambda *_: (1.0, warp))
    assert aligned_correlation(image, np.roll(image, shift, axis=1)) == pytest.approx(same, abs=1e-4)


def test_what_cannot_be_aligned_is_no_copy():
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8), (64, 64))
    assert aligned_correlation(image, 255 - image) == 0  # OpenCV finds no fit, and raises


@pytest.mark.parametrize("seed", range(3))
def test_large_families_are_placed_first(seed):
    components = np.repeat([0, 10, 14, 16, 18], [10, 4, 2, 2, 2])
    splits = assign(np.zeros(20, int), components, (0.5, 0.3, 0.2), seed)
    assert np.bincount(splits).tolist() == [10, 6, 4]


@pytest.mark.parametrize("seed", range(20))
def test_families_are_dealt_by_age(seed):
    groups, components = np.repeat([0, 1], 4), np.repeat([0, 2, 4, 6], 2)
    splits = assign(groups, components, (0.5, 0.5, 0), seed)
    assert np.bincount(groups[splits == 0]).tolist() == [2, 2]


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
    families = np.bincount(splits[:900], minlength=3) / 900
    assert np.abs(families - fractions).max() < 0.05  # families are not all put where most faces go
    for group in range(6):
        shares = np.bincount(splits[groups == group], minlength=3) / (groups == group).sum()
        assert np.abs(shares - fractions).max() < 0.01
    assert not (splits[:, None] == np.flatnonzero(np.array(fractions) == 0)).any()


def test_a_seed_deals_as_it_always_did():
    """The released weights learned from one such split: another dealing makes its train faces test faces."""
    components = np.repeat([0, 2, 4, 6, 8, 9, 10, 11], [2, 2, 2, 2, 1, 1, 1, 1])
    splits = assign(np.zeros(12, int), components, (0.5, 0.25, 0.25), seed=0)
    assert "".join(map(str, splits)) == "112200002100"


def test_a_family_above_its_share_leaves_the_rest_to_the_others():
    components = np.r_[np.zeros(10, int), np.arange(10, 20)]
    splits = assign(np.zeros(20, int), components, (0.25, 0.25, 0.5), seed=0)
    assert sorted(np.bincount(splits, minlength=3).tolist()) == [3, 7, 10]
    assert (np.bincount(splits[10:], minlength=3) == 0).sum() == 1


def test_aligning_changes_an_older_split_only_where_it_must():
    groups = np.random.default_rng(3).integers(6, size=600)
    lying = [Pair(i, i + 1, 0.99, False) for i in range(0, 60, 2)]
    aligned = [Pair(i, 300 + i, 0.98, True) for i in range(0, 100, 2)]
    before = share_out(groups, lying, (0.7, 0.1, 0.2), seed=4)
    assert (before == assign(groups, connect(600, lying), (0.7, 0.1, 0.2), seed=4)).all()
    after = share_out(groups, lying + aligned, (0.7, 0.1, 0.2), seed=4)
    components = connect(600, lying + aligned)
    for root in np.unique(components):
        member = components == root
        assert (after[member] == before[member].min()).all()
    assert (after != before).sum() > 10


def test_every_pair_lands_in_exactly_one_split(processed, tmp_path, cli):
    target = tmp_path / "split"
    code, out, _ = cli("split", "--input", processed, "--output", target)
    assert code == 0
    assert out.splitlines()[0].split() == ["train", "val", "test", "all"]
    assert [line.split() for line in out.splitlines()[1:8:6]] == [
        ["Infant", "14", "2", "4", "20"],
        ["all", "84", "12", "24", "120"],
    ]
    assert sorted(os.listdir(target)) == ["conflicts.csv", "split.csv", "split.yaml", "test", "train", "val"]
    found = [name for split in ("train", "val", "test") for name in os.listdir(target / split)]
    assert sorted(found) == sorted(os.listdir(processed))
    rows = read(target / "split.csv")
    assert list(rows[0]) == ["file", "split", "age", "gender", "race", "group", "duplicate_of"]
    for row in rows:  # hard links, no copies
        assert os.path.samefile(target / row["split"] / row["file"], processed / row["file"])
    for group in "012345":
        chosen = [row["split"] for row in rows if row["group"] == group]
        assert [chosen.count(split) for split in ("train", "val", "test")] == [14, 2, 4]


def test_own_faces_with_ranges_and_unknown_labels(tmp_path, cli):
    noise_pairs(tmp_path / "p", [30, 50])
    picture = cv2.imread(str(next((tmp_path / "p").glob("30*_image.png"))))
    stems = ["20-29_x_x_a_image.png", "25_1_x_b.png", "31.5_x_4_c.png"]
    for i, stem in enumerate(stems):
        write_pair(tmp_path / "p", stem, cv2.convertScaleAbs(picture, alpha=1 - i / 20, beta=i))
    flags = ["--input", tmp_path / "p", "--output", tmp_path / "s", "--fractions", 1, 0, 0]
    assert cli("split", *flags)[0] == 0
    rows = table(tmp_path / "s")
    columns = ("age", "gender", "race", "group")
    assert [tuple(rows[stem][column] for column in columns) for stem in stems] == [
        ("20-29", "", "", ""), ("25", "1", "", "3"), ("31.5", "", "4", "3")
    ]  # fmt: skip
    assert all(
        (tmp_path / "s/train" / f"{stem}_{part}.png").is_file()
        for stem in stems
        for part in ("image", "mask")
    )
    disagree = {(row["age"], row["other_age"]) for row in read(tmp_path / "s/conflicts.csv")}
    assert disagree == {("20-29", "30"), ("20-29", "31.5"), ("25", "30"), ("25", "31.5"), ("30", "31.5")}
    assert "already" in cli("split", *flags)[1]


def test_split_depends_on_the_seed_and_not_on_file_order(processed, tmp_path, cli):
    shuffled, names = tmp_path / "shuffled", sorted(os.listdir(processed))
    shuffled.mkdir()
    for name in random.Random(0).sample(names, len(names)):
        shutil.copy(processed / name, shuffled)
    for folder, seed, out, workers in ((processed, 1, "x", 1), (shuffled, 1, "y", 2), (processed, 2, "z", 0)):
        flags = ["--seed", seed, "--workers", workers]
        assert cli("split", "--input", folder, "--output", tmp_path / out, *flags)[0] == 0
    assert tree(tmp_path / "x") == tree(tmp_path / "y")
    assert tree(tmp_path / "x" / "train") != tree(tmp_path / "z" / "train")
    for seed in "01":
        flags = ["--input", processed, "--output", tmp_path / f"r{seed}", "--random", "--seed", seed]
        assert cli("split", *flags)[0] == 0
    assert tree(tmp_path / "r0" / "train") != tree(tmp_path / "r1" / "train")


def test_zero_fractions_make_an_exam(processed, tmp_path, cli):
    flags = ["--input", processed, "--output", tmp_path / "s", "--fractions", 0, 0, 1]
    code, _, err = cli("split", *flags)
    assert code == 0 and err == ""
    assert sorted(os.listdir(tmp_path / "s/test")) == sorted(os.listdir(processed))
    assert os.listdir(tmp_path / "s/train") == os.listdir(tmp_path / "s/val") == []


@pytest.mark.parametrize(
    "ages, fractions, words, absent",
    [
        ([30] * 10 + [50] * 10, (0.7, 0.1, 0.2), ["no face of Infant, Child, Youth, Older Adult"], ["empty"]),
        ([1, 10, 20, 30, 50, 70], (0.7, 0.1, 0.2), ["val came", "test came out empty"], ["no"]),
        ([1, 10, 20, 30, 50, 70], (0.8, 0.2, 0), ["val came out empty", "add faces"], ["test"]),
        ([1, 10, 20, 30, 50, 70] * 4, (0.5, 0.25, 0.25), [], ["warning"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_a_warning(tmp_path, cli, ages, fractions, words, absent):
    noise_pairs(tmp_path / "p", ages)
    flags = ["--input", tmp_path / "p", "--output", tmp_path / "s", "--fractions", *fractions]
    code, _, err = cli("split", *flags)
    assert code == 0 and all(word in err for word in words) and not any(word in err for word in absent), err


def test_rerun_and_overwrite(tmp_path, cli, refuse):
    source, target = tmp_path / "processed", tmp_path / "split"
    noise_pairs(source, AGES)
    flags = ["--input", source, "--output", target]
    assert cli("split", *flags)[0] == 0
    before = tree(target)
    settings = yaml.safe_load(before["split.yaml"])
    assert settings == {"seed": 0, "fractions": [0.7, 0.1, 0.2], "near_duplicate": 0.975, "random": False}
    code, out, _ = cli("split", *flags)
    assert code == 0 and "holds this split already" in out and tree(target) == before
    for other in (["--seed", 5], ["--near-duplicate", 0.96], ["--random"]):
        refuse("split", *flags, *other, words=[str(target), "--overwrite"])
    assert tree(target) == before
    for damage in ((target / "split.yaml", "seed: ["), (target / "split.csv", "file\n")):
        damage[0].write_text(damage[1])
        refuse("split", *flags, words=["--overwrite"])
        assert cli("split", *flags, "--overwrite")[0] == 0 and tree(target) == before
    for missing in (target / "conflicts.csv", target / "test" / os.listdir(target / "test")[0]):
        missing.unlink()
        refuse("split", *flags, words=["--overwrite"])  # no longer whole
        missing.write_bytes(before[missing.relative_to(target).as_posix()])
    assert cli("split", *flags, "--seed", 5, "--overwrite")[0] == 0
    assert tree(target) != before
    mask = next((target / "train").glob("*_mask.png"))
    stem, image = mask.name.removesuffix("_mask.png"), np.zeros((40, 40, 3), np.uint8)
    write_pair(tmp_path / "new", stem, image, image[..., 0])
    os.replace(tmp_path / "new" / mask.name, source / mask.name)  # as masks.py --overwrite does
    refuse("split", *flags, "--seed", 5, words=["--overwrite"])
    assert cli("split", *flags, "--seed", 5, "--overwrite")[0] == 0
    assert mask.read_bytes() == (source / mask.name).read_bytes()
    shutil.rmtree(tmp_path / "new")
    # Other times, the same contents
    shutil.copytree(target, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy/train/.DS_Store").write_bytes(b"")
    code, out, _ = cli("split", "--input", source, "--output", tmp_path / "copy", "--seed", 5)
    assert code == 0 and "holds this split already" in out
    copy = ["--input", source, "--output", tmp_path / "copy", "--seed", 5]
    extra = tmp_path / "copy/train/30_0_0_1_mask.png"
    extra.write_bytes(mask.read_bytes())
    refuse("split", *copy, words=["--overwrite"])
    extra.unlink()
    stat, data = os.stat(source / mask.name), mask.read_bytes()
    other = tmp_path / "copy/train" / mask.name
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # another byte, at the same size and time
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refuse("split", *copy, words=["--overwrite"])
    assert sorted(os.listdir(tmp_path)) == ["copy", "processed", "split"]


def test_a_kill_while_a_split_is_replaced_leaves_none_by_halves(processed, tmp_path, cli, monkeypatch):
    flags = ["--input", processed, "--output", tmp_path / "s"]
    assert cli("split", *flags)[0] == 0
    monkeypatch.setattr("split.shutil.rmtree", lambda *_, **__: None)  # a kill cleans nothing up
    rename, seen = type(tmp_path).rename, []

    def killed(path, new):
        seen.append(sorted(os.listdir(tmp_path / "s")) if (tmp_path / "s").exists() else None)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return rename(path, new)

    with monkeypatch.context() as patch:
        patch.setattr("split.Path.rename", killed)
        assert cli("split", *flags, "--seed", 1, "--overwrite")[0] == 130
    assert "split.csv" in seen[0] and seen[1] is None and not (tmp_path / "s").exists()
    [leftover] = tmp_path.glob(".tmp-*")
    assert cli("split", *flags, "--seed", 1)[0] == 0
    assert leftover.exists()  # young: a living run's, for all it knows
    monkeypatch.undo()
    for path in (leftover, *tmp_path.glob(".tmp-*")):
        os.utime(path, (0, 0))
    (tmp_path / ".tmp-s-b-abcdefgh").mkdir()
    os.utime(tmp_path / ".tmp-s-b-abcdefgh", (0, 0))  # another output's
    assert "already" in cli("split", *flags, "--seed", 1)[1]
    assert sorted(os.listdir(tmp_path)) == [".tmp-s-b-abcdefgh", "s"]


def test_a_link_is_followed_and_other_folders_are_never_replaced(processed, tmp_path, cli, refuse):
    (tmp_path / "big").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "big")
    flags = ["--input", processed, "--output"]
    assert cli("split", *flags, tmp_path / "s")[0] == 0
    assert (tmp_path / "s").is_symlink() and (tmp_path / "big/split.csv").is_file()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("mine")
    refuse("split", *flags, tmp_path / "precious", "--overwrite", words=["precious", "another folder"])
    assert (tmp_path / "precious/thesis.txt").read_text() == "mine"
    (tmp_path / "big/model.pt").write_text("days of work")
    (tmp_path / "big/.DS_Store").touch()
    assert "already" in cli("split", *flags, tmp_path / "s")[1]
    again = ["split", *flags, tmp_path / "s", "--seed", 1, "--overwrite"]
    refuse(*again, words=["model.pt lies there beside a split", "move"])
    assert (tmp_path / "big/model.pt").read_text() == "days of work"
    (tmp_path / "big/model.pt").rename(tmp_path / "big/train/model.pt")
    refuse(*again, words=["train/model.pt lies there beside a split", "move"])
    (tmp_path / "big/train/model.pt").unlink()
    (tmp_path / "big/.git").mkdir()
    (tmp_path / "big/.git/HEAD").write_text("history")
    refuse(*again, words=[".git lies there beside a split"])
    assert (tmp_path / "big/.git/HEAD").read_text() == "history"
    part = ["--input", tmp_path / "big/train", "--output", tmp_path / "s", "--overwrite"]  # a link to big
    refuse("split", *part, words=["lies in --output"])


@pytest.mark.parametrize("what", ["other disk", "links"])
def test_pairs_arrive_whole_from_another_disk_and_through_links(tmp_path, cli, monkeypatch, what):
    noise_pairs(tmp_path / "all", [1, 2, 30, 40])
    source = tmp_path / "all"
    if what == "links":
        source = tmp_path / "some"
        source.mkdir()
        for path in (tmp_path / "all").iterdir():
            (source / path.name).symlink_to(f"../all/{path.name}")
    else:
        monkeypatch.setattr("split.os.link", Mock(side_effect=OSError(18, "Invalid cross-device link")))
    flags = ["--input", source, "--output", tmp_path / "s", "--fractions", 1, 0, 0]
    for said in ("written", "already"):
        code, out, err = cli("split", *flags)
        assert code == 0 and said in out, err
    assert {p.name: p.read_bytes() for p in (tmp_path / "s/train").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "all").iterdir()
    }


def test_bad_input(tmp_path, refuse):
    stems = noise_pairs(tmp_path / "p", [1, 2, 30, 40])
    (tmp_path / "empty").mkdir()
    flags = ["--output", tmp_path / "split", "--input"]
    refuse("split", *flags, tmp_path / "nowhere", words=["nowhere"])
    refuse("split", *flags, tmp_path / "empty", words=["empty"])
    refuse("split", *flags, tmp_path / "p", "--fractions", 0.7, 0.1, 0.1, words=["--fractions", "one"])
    refuse("split", *flags, tmp_path / "p", "--fractions", 1.2, -0.1, -0.1, words=["--fractions"])
    refuse(
        "split", *flags, tmp_path / "p", "--near-duplicate", 0.5, words=["--near-duplicate", "at least 0.9"]
    )
    refuse("split", *flags, tmp_path / "p", "--nonsense", words=["--nonsense"])
    write_pair(tmp_path / "p", stems[0], np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41), np.uint8))
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png", "size"])
    (tmp_path / "p" / f"{stems[0]}_mask.png").unlink()
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png"])
    (tmp_path / "p" / f"{stems[0]}_mask.png").write_text("no image")
    refuse("split", *flags, tmp_path / "p", words=[f"{stems[0]}_mask.png", "readable"])
    assert sorted(os.listdir(tmp_path)) == ["empty", "p"]
