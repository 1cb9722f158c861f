"""Own faces: each layout of docs/own_data.md by its own commands, and tables as people write them."""

import csv
import os
import re
import subprocess
from collections import Counter
from urllib.parse import unquote

import cv2
import numpy as np
import pytest

from conftest import ROOT, commands
from faces import LANDMARKS
from inputs import make_stem, match_labels, parse_age, parse_label, read_labels
from masks import looks_like_a_crop, single_face
from utkface import GENDERS, RACES, age_to_group, list_pairs, parse_name, parse_stem

PLACES = {  # height of a drawn photograph → where in it faces lie: x, y, side
    400: [(90, 60, 200)],
    410: [(20, 30, 120), (200, 100, 200)],
    420: [],
    300: [(50, 50, 200)],
}


@pytest.fixture(scope="module")
def faces(drawn):
    """Thirty drawn faces of all ages: picture (200, 200, 3) and what its name says."""
    paths = sorted((drawn / "dataset/raw").iterdir(), key=lambda path: parse_name(path.name).age)[::5]
    return [(cv2.imread(str(path)), parse_name(path.name)) for path in paths]


@pytest.fixture
def detector(monkeypatch):
    """In place of YuNet, a function that knows where the faces in photographs of `PLACES` lie."""

    def detect(image):
        rows = [
            [x, y, side, side, *(LANDMARKS * side + (x, y)).ravel(), 0.9]
            for x, y, side in PLACES[image.shape[0]]
        ]
        return np.array(rows).reshape(-1, 15)

    monkeypatch.setattr("faces.open_detector", lambda path: detect)


def photograph(image, height):
    """A picture of that height with a face at each of its places."""
    canvas = np.random.default_rng(height).integers(0, 256, (6, 8, 3), np.uint8)
    canvas = cv2.resize(canvas, (height + 100, height), interpolation=cv2.INTER_CUBIC)
    for x, y, side in PLACES[height]:
        canvas[y : y + side, x : x + side] = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return canvas


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_table(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def found(folder):
    """What the names of the pairs say: path of the picture → age, gender, race, spread."""
    return {unquote(face.stem.split("_", 3)[3]): face[1:] for face in list_pairs(folder)}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def skipped(folder):
    return {row["file"]: row["reason"] for row in read(folder / "skipped.csv")}


def follow_the_page(title, folder, cli):
    """Runs the commands under a heading of docs/own_data.md; what masks.py and split.py print on stderr."""
    page = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
    [part] = re.findall(rf"^### {title}\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE)
    errors = ""
    for line in "".join(re.findall(r"```\n(.*?)```", part, re.DOTALL)).splitlines():
        if line.startswith("("):
            assert subprocess.run(["bash", "-c", line], cwd=folder).returncode == 0
            continue
        [(script, arguments)] = commands(line)
        code, _, err = cli(script, *arguments, cwd=folder)
        assert code == 0, err
        errors += err
    return errors


def test_a_table_with_gaps(faces, tmp_path, cli):
    rows, expected = [["file", "age", "gender", "race"]], {}
    for i, (image, face) in enumerate(faces):
        age, gender, race = i and face.age + 0.25, i % 3, i % 6
        rows.append([f"{i}.png", age or "", ["male", "Female", ""][gender], [*RACES, "nan"][race]])
        save(tmp_path / "faces" / f"{i}.png", image)
        expected[f"{i}.png"] = (age, -1 if gender == 2 else gender, -1 if race == 5 else race, 0)
    write_table(tmp_path / "faces.csv", rows)
    assert follow_the_page("A table with gaps", tmp_path, cli) == ""
    del expected["0.png"]
    assert found(tmp_path / "dataset/processed") == expected
    assert skipped(tmp_path / "dataset/processed") == {"0.png": "no age"}
    assert cli("split", cwd=tmp_path)[0] == 0
    rows = read(tmp_path / "dataset/processed_split/split.csv")
    assert len(rows) == 29
    for row in rows:
        age, gender, race, _ = expected[unquote(row["file"].split("_", 3)[3]).removesuffix("_image.png")]
        assert float(row["age"]) == age and int(row["group"]) == age_to_group(age)
        assert (row["gender"], row["race"]) == tuple("" if x < 0 else str(x) for x in (gender, race))


def test_appa_real(faces, tmp_path, cli, detector):
    release = tmp_path / "appa-real-release"
    rows, expected = [["file_name", "num_ratings", "apparent_age_avg", "apparent_age_std", "real_age"]], {}
    for i, (image, face) in enumerate(faces):
        rows.append([f"{i:06}.jpg", 38, face.age + 0.123456, 4.2, face.age])
        save(release / f"train/{i:06}.jpg", photograph(image, 420))  # no face can be found in it
        save(release / f"train/{i:06}.jpg_face.jpg", photograph(image, 300))
        expected[f"{i:06}.jpg_face.jpg"] = (face.age, -1, -1, 0)
    (release / "train/000000.jpg.mat").write_bytes(b"matlab")
    write_table(release / "gt_avg_train.csv", rows)
    follow_the_page("APPA-REAL", tmp_path, cli)
    assert found(tmp_path / "dataset/processed") == expected
    reasons = skipped(tmp_path / "dataset/processed")
    assert reasons.pop("000000.jpg.mat") == "no row in --labels"
    assert len(reasons) == 30 and set(reasons.values()) == {"its _face.jpg is taken"}
    write_table(release / "guesses.csv", [row[:4] for row in rows])
    flags = ["--input", release / "train", "--labels", release / "guesses.csv", "--detect"]
    assert cli("masks", *flags, "--output", tmp_path / "guessed")[0] == 0
    ages = sorted(age for age, *_ in found(tmp_path / "guessed").values())
    assert ages == sorted(round(age + 0.123456, 2) for age, *_ in expected.values())


def test_fairface(faces, tmp_path, cli):
    ranges = ["0-2", "3-9", *(f"{start}-{start + 9}" for start in range(10, 70, 10)), "more than 70"]
    races = ["White", "Black", "East Asian", "Southeast Asian", "Indian", "Latino_Hispanic", "Middle Eastern"]
    rows, expected = [["file", "age", "gender", "race", "service_test"]], {}
    for i, (image, _) in enumerate(faces):
        rows.append([f"train/{i}.jpg", ranges[i % 9], ("Male", "Female")[i % 2], races[i % 7], i % 2 == 0])
        save(tmp_path / f"fairface/train/{i}.jpg", image)
        first, last = [(0, 2), (3, 9), *((n, n + 9) for n in range(10, 70, 10)), (70, 100)][i % 9]
        race = (0, 1, 2, 2, 3, 4, 4)[i % 7]
        expected[f"train/{i}.jpg"] = ((first + last) / 2, i % 2, race, (last - first) / 2)
    save(tmp_path / "fairface/val/1.jpg", faces[0][0])
    write_table(tmp_path / "fairface/fairface_label_train.csv", rows)
    follow_the_page("FairFace", tmp_path, cli)
    assert found(tmp_path / "dataset/processed") == expected
    assert skipped(tmp_path / "dataset/processed") == {
        "val/1.jpg": "no row in --labels", "fairface_label_train.csv": "no row in --labels"
    }  # fmt: skip
    groups = [face.group for face in list_pairs(tmp_path / "dataset/processed")]
    assert sorted(set(groups)) == [-1, 0, 3, 4, 5] and groups.count(-1) == 17
    assert cli("split", cwd=tmp_path)[0] == 0
    table = read(tmp_path / "dataset/processed_split/split.csv")
    assert {(row["age"], row["group"]) for row in table} == set(
        zip(
            ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70-100"],
            ["0", "", "", "", "3", "", "4", "", "5"],
        )
    )


def test_adults_only(faces, tmp_path, cli):
    rows = [["img_name", "age"]]
    for i, (image, face) in enumerate(faces):
        if face.age >= 18:
            save(tmp_path / f"adults/{i}.jpg", image)
            rows.append([f"{i}.jpg", face.age])
    write_table(tmp_path / "adults.csv", rows, ";")
    assert "train holds no face of Infant, Child" in follow_the_page("Adults only", tmp_path, cli)
    assert {path: face[0] for path, face in found(tmp_path / "dataset/processed").items()} == dict(rows[1:])


def test_a_folder_for_each_age(faces, tmp_path, cli):
    names = {0: "20-29", 1: "Young Adult"}
    expected = {"20-29/0, a.jpg": (24.5, 4.5), "Young Adult/1, a.jpg": (34.5, 9.5)}
    for i, (image, face) in enumerate(faces):
        path = f"{names.get(i, face.age)}/{i}, a.jpg"
        save(tmp_path / "classes" / path, image)
        expected.setdefault(path, (face.age, 0))
    follow_the_page("A folder for each age", tmp_path, cli)
    pairs = found(tmp_path / "dataset/processed")
    assert {path: (age, spread) for path, (age, *_, spread) in pairs.items()} == expected


def test_photographs(faces, tmp_path, cli, refuse, detector, monkeypatch):
    rows = [["file", "age"]]
    for i, (image, face) in enumerate(faces):
        save(tmp_path / f"photos/{i}.png", photograph(image, (400, 400, 410, 420)[i % 4]))
        rows.append([f"{i}.png", face.age])
    write_table(tmp_path / "photos.csv", rows)
    assert follow_the_page("Photographs", tmp_path, cli) == ""
    reasons = skipped(tmp_path / "dataset/processed")
    several = "several faces found, of which --detect largest takes the largest"
    assert reasons == {
        f"{i}.png": ("no face found", several)[i % 4 == 2] for i in range(30) if i % 4 in (2, 3)
    }
    flags = ["--input", "photos", "--labels", "photos.csv"]
    with monkeypatch.context() as patch:
        patch.setattr("utkface.MAX_PIXELS", 110_000)  # photographs may have twice as many
        assert cli("masks", *flags, "--detect", "largest")[0] == 0
        refuse("masks", *flags, "--output", "none", words=["pixels, above 0 million"])
    for i in (0, 1, 2, 29):
        [path] = (tmp_path / "dataset/processed").glob(f"*_x_x_{i}.png_image.png")
        difference = np.abs(cv2.imread(str(path)).astype(int) - faces[i][0])
        assert difference.shape == (200, 200, 3) and difference[2:-2, 2:-2].mean() < 1
    _, _, err = cli("masks", *flags, "--output", "whole")
    [count] = re.findall(r"warning: pictures that may be no face crops .*--detect.*: (\d+), such as", err)
    assert int(count) >= 24  # of 30
    assert cli("masks", *flags, "--output", "whole", "--detect", "--overwrite")[0] == 0
    used = {f"{i}.png" for i in range(30) if i % 4 not in (2, 3)}  # what is left out leaves nothing behind
    assert set(found(tmp_path / "whole")) == used
    assert len(list((tmp_path / "whole").glob("*_mask.png"))) == len(used)
    refuse("masks", *flags, "--detector", "yunet.onnx", words=["--detector", "--detect"])


def test_a_face_in_a_long_picture_is_taken_for_a_photograph(faces):
    for margin, expected in ((0, True), (20, True), (40, False)):
        wide = cv2.copyMakeBorder(faces[10][0], 0, 0, margin, margin, cv2.BORDER_REFLECT)
        assert looks_like_a_crop(wide) == expected  # its central square is the face
    assert not looks_like_a_crop(cv2.rotate(faces[10][0], cv2.ROTATE_180))


def test_drawn_faces_are_not_taken_for_photographs(drawn, tmp_path, cli):
    assert cli("masks", "--input", drawn / "dataset/raw", "--output", tmp_path)[2] == ""


# Tables as people write them


@pytest.mark.parametrize(
    "text, years",
    [
        ("31", (31, 31)), (" 4.5 ", (4.5, 4.5)), ("31,5", (31.5, 31.5)), ("130", (130, 130)),
        ("20-29", (20, 29)), ("0 – 2", (0, 2)), ("(25, 32)", (25, 32)), ("(8,12)", (8, 12)),
        ("70+", (70, 100)), ("more than 70", (70, 100)), (">=60", (60, 100)), ("infant", (0, 4)),
        ("Older Adult", (65, 100)), ("3 to 9", (3, 9)), ("105+", (105, 105)),
        ("", "no age"), ("NaN", "no age"), ("-3", "outside 0 to 130"), ("131", "outside 0 to 130"),
        ("29-20", "outside 0 to 130"), ("thirty", "neither a number nor a range"), ("1990-05-01", "neither"),
        ("1e1", "neither"), ("inf", "neither"),
    ],
)  # fmt: skip
def test_ages(text, years):
    if isinstance(years, tuple):
        assert parse_age(text) == years
    else:
        with pytest.raises(ValueError, match=years):
            parse_age(text)


def test_minus_nought_is_nought():
    """As pandas writes it."""
    for text in ("-0.0", "-0", "-0.0-3"):
        assert parse_stem(make_stem(*parse_age(text), -1, -1, "a.jpg")).group == 0


def test_labels_in_words_and_numbers():
    strange = Counter()
    for kind, names in (("gender", GENDERS), ("race", RACES)):
        for i, name in enumerate(names):
            for text in (name, f" {name.upper()} ", str(i), f"{i}.0"):
                assert parse_label(kind, text, strange) == i
        assert [parse_label(kind, text, strange) for text in ("", "nan", "N/A", "-1", "unknown")] == [-1] * 5
        assert not strange
        assert parse_label(kind, " 7", strange) == -1 and strange.pop(f"{kind} '7'") == 1
    for text, i in (("M", 0), ("f", 1), ("man", 0), ("Woman", 1)):
        assert parse_label("gender", text, strange) == i
    for text, i in (("caucasian", 0), ("afroamerican", 1), ("other", 4)):
        assert parse_label("race", text, strange) == i
    assert not strange


def test_a_row_finds_its_file_by_path_or_bare_name(tmp_path):
    names = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c/e\u0301.jpg", "4.jpg", "5.jpg"]
    label, other = (30, 30, 0, 0), (31, 31, 0, 0)
    rows = [
        ("a\\1.jpg", label), ("1.jpg", label), ("./b/2.jpg", label), ("\u00e9.jpg", label),
        (str(tmp_path / "4.jpg"), label), ("4.jpg", label), ("../secret/5.jpg", label), ("/etc/5.jpg", label),
        ("x/5.jpg", label), ("b/1.jpg", label), ("b/1.jpg", other), ("b/1.jpg", label), ("6.jpg", "no age"),
    ]  # fmt: skip
    both = ["1.jpg", "b/1.jpg"]  # the first's path is the bare name of both
    assert match_labels([("1.jpg", label), ("b/1.jpg", other)], both, tmp_path)[0].keys() == set(both)
    for row in ("c/e\u0301.jpg", "e\u0301.jpg", "c/\u00e9.jpg"):  # accents composed and taken apart
        for name in ("c/\u00e9.jpg", "c/e\u0301.jpg"):
            assert match_labels([(row, label)], [name], tmp_path)[0].keys() == {name}
    (tmp_path / "link").symlink_to(tmp_path)  # a row that leads there by another way
    rows.append((os.path.realpath(tmp_path / "7.jpg"), label))
    assert match_labels(rows, [*names, "7.jpg"], tmp_path / "link")[0].keys() >= {"7.jpg"}
    stems, reasons = match_labels(rows[:-1], names, tmp_path)
    assert set(stems) == {"a/1.jpg", "b/2.jpg", "c/e\u0301.jpg", "4.jpg"}
    assert reasons == {
        "1.jpg": "2 files have this name: give their folders", "../secret/5.jpg": "leads out of --input",
        "/etc/5.jpg": "leads out of --input", "x/5.jpg": "no such file", "b/1.jpg": "its rows disagree",
        "6.jpg": "no such file", "5.jpg": "no row in --labels",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile;age\n1.png;30\n",
        'AGE\tfoo\tFile \n30\t"a ""b"""\t1.png\n',
        'file,age\n"1.png","30"\n1.png,30\n\n2.png\n',
        "apparent_age_avg,Path,,real_age\n20,1.png,x,30,more\n",
        "age, file\n30, 1.png \n",
    ],
    ids=[
        "semicolons and a byte order mark",
        "tabs",
        "quotes, repetition, an empty and a short row",
        "names",
        "spaces",
    ],
)
def test_tables_of_many_kinds(faces, tmp_path, cli, text):
    save(tmp_path / "in/1.png", faces[20][0])
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    code, _, err = cli("masks", *flags)
    assert code == 0 and found(tmp_path / "out") == {"1.png": (30, -1, -1, 0)}, err


def test_bad_tables(faces, tmp_path, cli, refuse):
    save(tmp_path / "in/1.png", faces[20][0])
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--labels", tmp_path / "t.csv"]
    refuse("masks", *flags, words=["--labels", "t.csv", "No such file"])
    for content, words in (
        (b"", ["no column file", "first line"]),
        (b"1.png,30\n2.png,40\n", ["no column file", "1.png, 30", "name it there"]),
        (b"file,years\n1.png,30\n", ["no column age", "file, years"]),
        (b"file,age\n\xff\xfe\n", ["UTF-8"]),
        (b'file,age\n"1.png,30\n' + b"2.png,30\n" * 20_000, ["t.csv cannot be read", "field larger"]),
        (b"file,age\n2.png,30\n3.png,30\n", ["none of its 1 files", "(2) for: no such file", "skipped.csv"]),
    ):
        (tmp_path / "t.csv").write_bytes(content)
        refuse("masks", *flags, words=words)
    save(tmp_path / "in/2.png", faces[20][0])
    (tmp_path / "t.csv").write_text("file,age\n1.png,young\n2.png,old\n")
    refuse(
        "masks",
        *flags,
        words=["none of its 2 files", "(2) for: age is neither a number nor a range of years;"],
    )
    (tmp_path / "t.csv").write_text("file,age,race\n1.png,30,Martian\n")
    code, _, err = cli("masks", *flags)
    assert code == 0 and "warning: race 'Martian' is unknown to --labels, in 1 rows" in err
    assert list(found(tmp_path / "out").values()) == [(30, -1, -1, 0)]
    (tmp_path / "t.csv").write_text("file,age,race\n1.png,30,Martian\n2.png,30,Martian\n")
    assert "race 'Martian' is unknown to --labels, in 2 rows" in cli("masks", *flags, "--overwrite")[2]


@pytest.mark.parametrize(
    "column, names",
    [
        ("file", "file file_name filename img_name image path"), ("age", "age real_age apparent_age_avg"),
        ("gender", "gender sex"), ("race", "race ethnicity"),
    ],
)  # fmt: skip
def test_columns_by_all_their_names(tmp_path, column, names):
    for name in names.split():
        values = {"file": "1.png", "age": "30", "gender": "female", "race": "Asian"}
        header = [name if key == column else key for key in values]
        write_table(tmp_path / "t.csv", [header, list(values.values())])
        assert read_labels(str(tmp_path / "t.csv")) == [("1.png", (30, 30, 1, 2))]


def test_the_largest_face_is_taken_wherever_it_lies():
    rows = [
        [x, y, side, side, *(LANDMARKS * side + (x, y)).ravel(), 0.9]
        for x, y, side in ((20, 30, 200), (250, 250, 120))
    ]
    for faces in (rows, rows[::-1]):
        crop = single_face(np.zeros((400, 400, 3), np.uint8), lambda _, faces=faces: np.array(faces), True)
        assert len(crop) == 200


def test_many_rows_without_files(faces, tmp_path, cli):
    for i in range(10):
        save(tmp_path / f"in/{i}.png", faces[i][0])
    write_table(tmp_path / "t.csv", [["file", "age"], *([f"{i}.png", 30] for i in range(100_000))])
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    code, out, _ = cli("masks", *flags)
    assert (
        code == 0 and "10 files: 10 pairs written" in out and "most of them (99,990) for: no such file" in out
    )
    assert len(skipped(tmp_path / "out")) == 99_990


def test_a_corrected_table_replaces_a_pair_only_when_told(faces, tmp_path, cli, refuse):
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    for i in range(2):
        save(tmp_path / f"in/{i}.png", faces[i][0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.tmp-0a1b2c3d-7_x_x_1.png_image.png").touch()  # of a run that was killed
    tables = {"": (30, 40), "30_x_x_0": (31, 40), "31_x_x_0": ("", 40), "40_x_x_1": (32,)}
    for old, ages in tables.items():
        write_table(tmp_path / "t.csv", [["file", "age"], *([f"{i}.png", age] for i, age in enumerate(ages))])
        if old:
            refuse("masks", *flags, words=[f"{old}.png_image.png", "another label", "none", "--overwrite"])
        assert cli("masks", *flags, *(["--overwrite"] if old else []))[0] == 0
        assert sorted(face[0] for face in found(tmp_path / "out").values()) == [age for age in ages if age]
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 1


def test_a_corrected_label_of_a_path_with_underscores(faces, tmp_path, cli):
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    save(tmp_path / "in/a_b/1_2.png", faces[0][0])
    for age, overwrite in ((30, []), (31, ["--overwrite"])):
        write_table(tmp_path / "t.csv", [["file", "age"], ["a_b/1_2.png", age]])
        assert cli("masks", *flags, *overwrite)[0] == 0
    assert [face.age for face in list_pairs(tmp_path / "out")] == [31]


def test_pairs_of_another_input_are_counted(faces, tmp_path, cli):
    for i in range(3):
        save(tmp_path / f"{i % 2}/{i}.png", faces[i][0])
        write_table(tmp_path / f"{i}.csv", [["file", "age"], [f"{i}.png", 30]])
    flags = ["masks", "--output", tmp_path / "out"]
    assert cli(*flags, "--input", tmp_path / "0", "--labels", tmp_path / "2.csv")[2] == ""
    code, _, err = cli(*flags, "--input", tmp_path / "1", "--labels", tmp_path / "1.csv")
    assert code == 0 and err == f"warning: {tmp_path / 'out'} holds 1 pairs that are not of this --input\n"
