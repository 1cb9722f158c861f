import csv
import io
import os
import shutil
import tarfile
import time
import zipfile
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image

import synthesize
from cli import atomic_path
from conftest import ROOT, shell, write_pair
from inputs import open_files
from masks import (
    HEIGHT,
    TURN,
    WIDTH,
    contact_sheet,
    grabcut_mask,
    mask_function,
    network_mask,
    oval,
    write_pairs,
)
from test_faces import PLACES, photograph
from utkface import age_to_group, parse_name


def read(path, flags=cv2.IMREAD_UNCHANGED):
    return cv2.imread(str(path), flags)


def skipped(folder):
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def pairs(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*_*.png")}


@pytest.fixture(scope="module")
def raw(drawn, tmp_path_factory):
    """A folder of twelve drawn faces."""
    folder = tmp_path_factory.mktemp("raw")
    for path in sorted((drawn / "dataset/raw").iterdir())[::13]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def zipped(path, contents):
    """Writes a .zip of bytes by name."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in contents.items():
            packed.writestr(name, data)
    return path


def tarred(path, folder):
    """Packs a folder as the official download does."""
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, "UTKFace")
    return path


def add(packed, name, data=b"", kind=tarfile.REGTYPE, target=""):
    """Adds a file, or a link, to a .tar."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(data)
    packed.addfile(member, io.BytesIO(data))


def test_folder_and_archives_give_the_same_pairs(raw, tmp_path, cli):
    contents = {f"UTKFace/{path.name}": path.read_bytes() for path in raw.iterdir()}
    sources = [raw, tarred(tmp_path / "a.tar.gz", raw), zipped(tmp_path / "a.zip", contents)]
    results = []
    for i, source in enumerate(sources):
        code, out, _ = cli("masks", "--input", source, "--output", tmp_path / str(i), "--workers", i + 1)
        assert code == 0 and str(tmp_path / str(i)) in out.splitlines()[-1]
        results.append(pairs(tmp_path / str(i)))
    assert results[0] == results[1] == results[2]  # whatever the number of workers, too
    assert len(results[0]) == 2 * len(list(raw.iterdir()))
    assert skipped(tmp_path / "0") == {}
    assert read(tmp_path / "0/preview.png").shape[0] > 100


def test_pairs_keep_their_size_and_what_is_not_square_is_counted(raw, tmp_path, cli):
    picture = read(min(raw.iterdir()))
    oblong = picture[10:, 20:180]  # 190×160
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
    alpha = np.where(np.arange(200) < 30, 0, 255).astype(np.uint8) * np.ones((200, 1), np.uint8)
    stems = [f"{age}_1_2_20170000000000000" for age in range(5)]
    (tmp_path / "in").mkdir()
    for stem, image in zip(stems, [oblong, oblong[..., 0], picture, noise]):
        if stem > "2":  # the same face, with other colours under its transparent pixels
            image = np.dstack([np.where(alpha[..., None] > 0, picture, image), alpha])
        cv2.imwrite(str(tmp_path / f"in/{stem}.png"), image)
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    code, _, err = cli("masks", *flags)
    [warning] = [line for line in err.splitlines() if "square" in line]
    assert code == 0 and warning.startswith("warning: pictures that are not square")
    assert f": 2, such as {stems[0]}" in warning
    assert np.array_equal(read(tmp_path / f"out/{stems[0]}_image.png"), oblong)
    assert read(tmp_path / f"out/{stems[1]}_image.png").shape == (190, 160, 3)
    for stem in stems[:2]:
        mask = read(tmp_path / f"out/{stem}_mask.png")
        assert mask.shape == (190, 160) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
    for part in ("image", "mask"):
        black, noisy = (read(tmp_path / f"out/{stem}_{part}.png") for stem in stems[2:4])
        assert np.array_equal(black, noisy)
    assert (read(tmp_path / f"out/{stems[3]}_image.png")[:, :30] == 128).all()
    for stem in stems[:2]:
        (tmp_path / f"in/{stem}.png").unlink()
    assert "square" not in cli("masks", *flags, "--overwrite")[2]


def test_what_is_skipped_is_listed_and_counts_add_up(raw, tmp_path, cli):
    good = next(raw.iterdir())
    path = tmp_path / "a.tar.gz"
    files = {
        "UTKFace/1_0_0_20170000000000001.jpg.chip.jpg": good.read_bytes(),
        "UTKFace/1_1_0_20170000000000001.jpg.chip.jpg": good.read_bytes(),  # UTKFace has such names
        "UTKFace/39_1_20170116174525125.jpg.chip.jpg": good.read_bytes(),
        "UTKFace/24_0_1_20170116220224657 .jpg.chip.jpg": good.read_bytes(),
        "UTKFace/55_0_0_20170116232725357jpg.chip.jpg": good.read_bytes(),
        "UTKFace/2_0_0_20170000000000002.jpg": b"no image",
        "UTKFace/3_0_0_20170000000000003.jpg": b"",
        "again/1_0_0_20170000000000001.jpg.chip.jpg": good.read_bytes(),
        "UTKFace/README.txt": b"hello",
    }
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            add(packed, name, data)
    code, out, _ = cli("masks", "--input", path, "--output", tmp_path / "out")
    assert code == 0 and "2 pairs written" in out and "9 files:" in out and "7 skipped" in out
    assert "2 already there" in cli("masks", "--input", path, "--output", tmp_path / "out")[1]
    reasons = skipped(tmp_path / "out")
    assert len(reasons) == 7 and len(pairs(tmp_path / "out")) == 4
    assert [name for name, reason in sorted(reasons.items()) if "malformed" in reason] == [
        *sorted(list(files)[2:5]),
        "UTKFace/README.txt",
    ]
    assert "unreadable" in reasons["UTKFace/2_0_0_20170000000000002.jpg"]
    assert "unreadable" in reasons["UTKFace/3_0_0_20170000000000003.jpg"]
    used = "UTKFace/1_0_0_20170000000000001.jpg.chip.jpg"
    assert reasons["again/1_0_0_20170000000000001.jpg.chip.jpg"] == f"same name as {used}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, at: data[: at + 100],
        lambda data, at: data[:at],
        lambda data, at: data[:at] + b"x" + data[at + 1 :],
    ],
    ids=["within a header", "before one", "a broken one"],
)
def test_a_tar_that_ends_at_a_header_is_refused(raw, tmp_path, refuse, damage):
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.add(raw, "UTKFace")
        at = packed.getmembers()[-1].offset
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), at))
    words = ["a.tar", "whole .tar.gz"]
    refuse("masks", "--input", tmp_path / "a.tar", "--output", tmp_path / "o", words=words)


def test_a_picture_appended_to_a_tar_replaces_the_first(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        add(packed, "1_0_0_1.jpg", b"old")
        add(packed, "1_0_0_1.jpg", b"new")
        # As GNU tar stores what it meets again.
        add(packed, "1_0_0_1.jpg", b"", tarfile.LNKTYPE, "1_0_0_1.jpg")
    with open_files(tmp_path / "a.tar", tmp_path / "o") as (files, _):
        assert [read() for _, _, read in files] == [b"new"]


def test_names_in_a_zip_of_macos(raw, tmp_path, cli):
    path = zipped(tmp_path / "a.zip", {"Ju\u0308rgen.jpg": next(raw.iterdir()).read_bytes()})
    data = bytearray(path.read_bytes())
    data[7] &= ~8  # the bit that says UTF-8, in the member's header and in the directory
    data[data.rindex(b"PK\1\2") + 9] &= ~8
    path.write_bytes(data)
    (tmp_path / "t.csv").write_text("file,age\nJürgen.jpg,30\n", encoding="utf-8")
    flags = ["--input", path, "--labels", tmp_path / "t.csv", "--output", tmp_path / "o"]
    code, _, err = cli("masks", *flags)
    assert code == 0, err


def test_what_cannot_be_read_now_keeps_its_pair(raw, tmp_path, cli, monkeypatch):
    flags = ["masks", "--input", raw, "--output", tmp_path, "--overwrite"]
    assert cli(*flags)[0] == 0
    before = pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(raw), "read_bytes", Mock(side_effect=OSError(5, "Input/output error")))
        assert f"{len(before) // 2} pictures cannot be read now" in cli(*flags)[2]
    assert pairs(tmp_path) == before


def test_what_is_skipped_is_sorted(raw, tmp_path, cli):
    shutil.copytree(raw, tmp_path / "in")
    names = [f"{i:02}.txt" for i in range(20)]
    for name in names:
        (tmp_path / "in" / name).touch()
    assert cli("masks", "--input", tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    assert list(skipped(tmp_path / "out")) == names


def test_links_in_an_archive_are_followed_and_others_named(raw, tmp_path, cli, monkeypatch):
    first, second = (path.read_bytes() for path in sorted(raw.iterdir())[:2])
    stem = "{}_0_0_20170000000000000"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as packed:
        add(packed, "./f/" + stem.format(1) + ".jpg", first)
        add(packed, "./f/data/second", second)
        add(packed, "f/data", kind=tarfile.DIRTYPE)
        for age, kind, target in (
            (2, tarfile.LNKTYPE, "f/data/second"), (3, tarfile.SYMTYPE, "data/second"),
            (4, tarfile.SYMTYPE, stem.format(3) + ".jpg"), (5, tarfile.LNKTYPE, f"./f/{stem.format(1)}.jpg"),
            (6, tarfile.SYMTYPE, "../../etc/passwd"), (7, tarfile.SYMTYPE, stem.format(7) + ".jpg"),
            (8, tarfile.SYMTYPE, "data"), (9, tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            add(packed, f"f/{stem.format(age)}.jpg", kind=kind, target=target)
    code, out, _ = cli(
        "masks", "--input", tmp_path / "a.tar.gz", "--output", tmp_path / "out", "--workers", 1
    )
    assert code == 0 and "10 files: 5 pairs written" in out and "5 skipped" in out
    images = {age: read(tmp_path / f"out/{stem.format(age)}_image.png") for age in range(1, 6)}
    assert np.array_equal(images[1], images[5]) and not np.array_equal(images[1], images[2])
    assert np.array_equal(images[2], images[3]) and np.array_equal(images[2], images[4])
    assert skipped(tmp_path / "out") == {"./f/data/second": "malformed name"} | {
        f"f/{stem.format(age)}.jpg": "neither a file nor a link to one in the archive" for age in range(6, 10)
    }
    opened, extract = [], tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *a: opened.append(1) or extract(*a))
    with open_files(tmp_path / "a.tar.gz", tmp_path / "out") as (files, others):
        contents = {name: read() for name, _, read in files}
    ages = [int(name.removeprefix("f/").split("_")[0]) for name in list(contents)[3:]]
    # In the order of what they lead to, which is read once for all of its links.
    assert list(contents)[:3] == [f"./f/{stem.format(1)}.jpg", f"f/{stem.format(5)}.jpg", "./f/data/second"]
    assert ages == [2, 3, 4] and len(opened) == 2 and set(contents.values()) == {first, second}
    assert len(others) == 4


def test_archives_made_on_windows(raw, tmp_path, cli):
    contents = {f"UTKFace\\part1\\{path.name}": path.read_bytes() for path in raw.iterdir()}
    path = zipped(tmp_path / "a.zip", {"UTKFace\\": b""} | contents)
    code, out, _ = cli("masks", "--input", path, "--output", tmp_path / "out")
    assert code == 0 and "12 files: 12 pairs written" in out


def test_linked_folders_are_read_and_the_output_is_not(raw, tmp_path, cli):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(raw)
    (tmp_path / "in/gone.jpg").symlink_to("nowhere")
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "in/out"]
    for word in ("12 pairs written", "12 already there"):
        code, out, _ = cli("masks", *flags)
        assert code == 0 and "13 files" in out and word in out
        assert skipped(tmp_path / "in/out") == {"gone.jpg": "not a file that can be read"}


def test_an_archive_of_a_folder_itself_matches_its_table(raw, tmp_path, cli):
    """`tar -C faces .` begins names with ./, which no row has."""
    path = next(raw.iterdir())
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        for name in ("./a.jpg", "./sub/b.jpg"):
            add(packed, name, path.read_bytes())
    (tmp_path / "t.csv").write_text("file,age\na.jpg,30\nsub/b.jpg,40\n")
    flags = ["--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    assert cli("masks", "--input", tmp_path / "a.tar", *flags)[0] == 0 and skipped(tmp_path / "out") == {}
    stems = {name.removesuffix("_image.png") for name in pairs(tmp_path / "out") if "_image" in name}
    assert stems == {"30_x_x_a.jpg", "40_x_x_sub%2Fb.jpg"}  # as those of the folder


def test_no_fault_of_the_machine_is_blamed_on_the_archive(raw, tmp_path, cli, monkeypatch):
    flags = ["masks", "--input", tarred(tmp_path / "a.tar.gz", raw), "--output", tmp_path / "out"]
    errors = {"--workers 0": RuntimeError("can't start new thread"), "denied": PermissionError(13, "denied")}
    for word, error in errors.items():
        monkeypatch.setattr("masks.write_pairs", Mock(side_effect=error))
        code, _, err = cli(*flags)
        assert code == 2 and word in err and "give a folder" not in err


def test_what_cannot_be_used_at_all_is_an_error(raw, tmp_path, refuse, monkeypatch):
    names = sorted(os.listdir(raw))
    path = zipped(tmp_path / "a.zip", {name: (raw / name).read_bytes() for name in names})
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.find(signature)
        while place >= 0:
            data[place + flags] |= 1  # encrypted
            place = data.find(signature, place + 1)
    path.write_bytes(data)
    flags = ["--output", tmp_path / "out", "--input"]
    words = ["a.zip", "none of its 12 files can be used", "(12) for: encrypted", "skipped.csv"]
    refuse("masks", *flags, path, words=words)
    assert set(skipped(tmp_path / "out").values()) == {"encrypted"}
    (tmp_path / "lfs").mkdir()
    for name in names[:3]:
        (tmp_path / "lfs" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "lfs/Icon\r").write_text("")
    refuse("masks", *flags, tmp_path / "lfs", words=["none of its 4 files", "(3) for: unreadable image"])
    assert skipped(tmp_path / "out")["Icon\r"] == "malformed name" and len(skipped(tmp_path / "out")) == 4
    assert os.listdir(tmp_path / "out") == ["skipped.csv"]
    monkeypatch.setattr("masks.MAX_BYTES", 2**20)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / names[0]).write_bytes((raw / names[0]).read_bytes() + bytes(2**20))
    refuse("masks", *flags, tmp_path / "large", words=["(1) for: larger than 1 MiB"])


def test_of_several_pages_the_first_is_used_and_the_rest_named(raw, tmp_path, cli):
    pages = [Image.open(path) for path in sorted(raw.iterdir())[:2]]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in/a.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "in/b.tif")
    (tmp_path / "t.csv").write_text("file,age\na.tif,30\nb.tif,40\n")
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    code, _, err = cli("masks", *flags)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("warning: pictures that have several pages") and ": 1, such as a.tif" in err
    for name, page in (("30_x_x_a", pages[0]), ("40_x_x_b", pages[1])):
        assert np.array_equal(read(tmp_path / f"out/{name}.tif_image.png")[..., ::-1], np.asarray(page))


def test_nothing_is_extracted_by_path(raw, tmp_path, cli):
    path = tmp_path / "in/a.zip"
    path.parent.mkdir()
    zipped(path, {"../../1_0_0_20170000000000001.jpg": next(raw.iterdir()).read_bytes()})
    assert cli("masks", "--input", path, "--output", tmp_path / "x/y")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "x"] and os.listdir(tmp_path / "x") == ["y"]
    assert "1_0_0_20170000000000001_mask.png" in os.listdir(tmp_path / "x/y")


def test_resumes_with_what_is_missing(raw, tmp_path, cli, refuse, monkeypatch):
    out, order = tmp_path / "out", []

    def watched(path, **options):
        order.append(path.name)
        return atomic_path(path, **options)

    monkeypatch.setattr("cli.atomic_path", watched)
    assert cli("masks", "--input", raw, "--output", out, "--workers", 1)[0] == 0
    for mask, image in zip(order[:24:2], order[1:24:2]):  # a kill leaves no image without its mask
        assert image == mask.removesuffix("_mask.png") + "_image.png"
    before = pairs(out)
    names = sorted(before)
    (out / names[0]).unlink()
    (out / names[5]).unlink()  # a mask
    kept = cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))[1].tobytes()
    (out / names[8]).write_bytes(kept)
    for name in (".tmp-young.png", ".tmp-old.png"):  # another run's, at work here, and a killed one's
        (out / name).write_bytes(b"half")
    os.utime(out / ".tmp-old.png", (0, 0))
    code, printed, _ = cli("masks", "--input", raw, "--output", out)
    assert [name for name in os.listdir(out) if name.startswith(".")] == [".tmp-young.png"]
    assert code == 0 and f"{2} pairs written" in printed and f"{len(names) // 2 - 2} already there" in printed
    after = pairs(out)
    assert after.pop(names[8]) == kept and before.pop(names[8]) and after == before
    assert cli("masks", "--input", raw, "--output", out, "--overwrite")[0] == 0
    assert pairs(out)[names[8]] != kept
    (out / names[0]).write_bytes(b"no image")  # the first pair is always in the preview
    refuse("masks", "--input", raw, "--output", out, words=[names[0], "delete it"])


def test_only_what_fails_is_removed(raw, tmp_path, cli, monkeypatch):
    monkeypatch.setattr("masks.write_pairs", lambda *a: write_pairs(*a)[::-1])  # threads end in any order
    shutil.copytree(raw, tmp_path / "in")
    min((tmp_path / "in").iterdir()).write_bytes(b"no image")
    code, out, _ = cli("masks", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 0 and "11 pairs written" in out and len(pairs(tmp_path / "out")) == 22


def test_an_archive_is_read_by_one_thread_at_a_time():
    busy = []

    def read():
        busy.append(1)
        for _ in range(20):
            time.sleep(0)  # lets the others go
        alone = len(busy) == 1
        busy.pop()
        return alone

    jobs = [(f"{i}.jpg", str(i), read) for i in range(100)]
    results = write_pairs(jobs, lambda alone, _: [alone], workers=4)
    assert all(alone for _, [alone], _ in results)


def test_one_file_that_cannot_be_read(raw, tmp_path, cli, monkeypatch):
    locked, read_bytes = min(raw.iterdir()), type(raw).read_bytes

    def read(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(raw), "read_bytes", read)
    assert "11 pairs written" in cli("masks", "--input", raw, "--output", tmp_path)[1]
    assert skipped(tmp_path) == {locked.name: "cannot be read: Permission denied"}


def test_masks_agree_with_the_truth(drawn):
    overlaps = []
    for path in sorted((drawn / "dataset/processed").glob("*_mask.png")):
        found, true = read(path) > 0, read(drawn / "dataset/raw_masks" / path.name) > 0
        overlaps.append((found & true).sum() / (found | true).sum())
    assert set(np.unique(read(drawn / "dataset/raw_masks" / path.name))) == {0, 255}
    assert len(overlaps) == 150 and np.mean(overlaps) > 0.87 and np.percentile(overlaps, 5) > 0.75


def test_masks_keep_to_the_usual_shape_where_the_picture_says_nothing():
    usual = oval((200, 200), HEIGHT[0], WIDTH[0], TURN[0]) < 1
    found = grabcut_mask(np.full((200, 200, 3), 128, np.uint8)) > 0
    assert (found & usual).sum() / (found | usual).sum() > 0.89


def test_masks_follow_the_picture(drawn):
    """Shifting a face must shift its mask: a constant mean shape would not do."""
    shifts = []
    for path in sorted((drawn / "dataset/processed").glob("*_image.png"))[:40]:
        image = read(path)
        wide = cv2.copyMakeBorder(image, 0, 0, 14, 14, cv2.BORDER_REPLICATE)
        left, right = wide[:, 28:], wide[:, :-28]
        centres = [np.flatnonzero(grabcut_mask(image).any(axis=0)).mean() for image in (left, right)]
        shifts.append(centres[1] - centres[0])
    assert np.mean(shifts) > 6


def parsing_network(path, classes=19, side=512):
    """A stand-in for a face-parsing ONNX: 1×1 convolution to logits, an auxiliary output beside them."""
    onnx = pytest.importorskip("onnx", exc_type=ModuleNotFoundError)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(classes, 3, 1, 1)).astype(np.float32)
    shape = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["input", "weight"], ["output"]),
            onnx.helper.make_node("Neg", ["output"], ["auxiliary"]),
        ],
        "parsing",
        [shape("input", kind, (1, 3, side, side))],
        [shape("output", kind, (1, classes, side, side)), shape("auxiliary", kind, (1, classes, side, side))],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path
    )
    return weight[:, :, 0, 0]


def test_face_parsing_network(raw, tmp_path, cli):
    weight = parsing_network(tmp_path / "parsing.onnx")
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):  # at the network's own side, resizing leaves pixels as they are
        picture = cv2.resize(read(sorted(raw.iterdir())[i]), (512, 512))
        cv2.imwrite(str(source / f"3{i}_0_0_20170000000000001.png"), picture)
    flags = ["--input", source, "--parser", tmp_path / "parsing.onnx", "--workers", 2]
    code, _, err = cli("masks", *flags, "--output", tmp_path / "out")
    assert code == 0, err
    for i in range(3):
        stem = f"3{i}_0_0_20170000000000001"
        rgb = read(tmp_path / f"out/{stem}_image.png")[..., ::-1] / 255
        logits = ((rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]) @ weight.T  # 512×512×19
        top = np.sort(logits, axis=2)
        clear = top[..., -1] - top[..., -2] > 1e-3  # float32 may break a tie the other way
        expected = np.isin(logits.argmax(axis=2), range(1, 14))
        found = read(tmp_path / f"out/{stem}_mask.png") > 0
        assert 0 < expected.mean() < 1 and np.array_equal(found[clear], expected[clear])


def test_a_parsing_network_on_a_picture_that_is_not_square(tmp_path):
    weight = parsing_network(tmp_path / "parsing.onnx")
    image = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    image = cv2.resize(image, (96, 128), interpolation=cv2.INTER_NEAREST)  # of 32-pixel tiles
    mask = network_mask(image, str(tmp_path / "parsing.onnx"))
    logits = ((image[..., ::-1] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]) @ weight.T
    expected = np.isin(logits.argmax(axis=2), range(1, 14))
    assert mask.shape == (128, 96) and ((mask > 0) == expected).mean() > 0.9


def test_bad_input(raw, tmp_path, cli, refuse):
    out = ["--output", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar.gz").write_text("no archive")
    (tmp_path / "names").mkdir()
    (tmp_path / "names/face.jpg").write_bytes(next(raw.iterdir()).read_bytes())
    whole = tarred(tmp_path / "whole.tar.gz", raw).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    refuse("masks", *out, "--input", tmp_path / "nowhere", words=["--input", "nowhere"])
    refuse("masks", "--input", raw, "--output", raw / "../" / raw.name, words=["is --input as well"])
    refuse("masks", *out, "--input", tmp_path / "empty", words=["empty", "0 files"])
    assert "skipped.csv" not in cli("masks", *out, "--input", tmp_path / "empty")[2]
    (tmp_path / "empty/gone.jpg").symlink_to("nowhere")
    assert cli("masks", "--output", tmp_path / "o", "--input", tmp_path / "empty")[0] == 2
    assert skipped(tmp_path / "o") == {"gone.jpg": "not a file that can be read"}
    refuse("masks", *out, "--input", tmp_path / "text.tar.gz", words=["text.tar.gz"])
    refuse("masks", *out, "--input", raw, "--parser", "nowhere.onnx", words=["--parser", "nowhere.onnx"])
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    refuse("masks", *out, "--input", raw, "--parser", tmp_path / "bad.onnx", words=["--parser", "bad.onnx"])
    parsing_network(tmp_path / "eight.onnx", classes=8, side=64)
    refuse("masks", *out, "--input", raw, "--parser", tmp_path / "eight.onnx", words=["--parser"])
    refuse("masks", *out, "--input", tmp_path / "cut.tar.gz", words=["cut.tar.gz", "whole .tar.gz"])
    assert not (tmp_path / "out").exists()
    refuse(
        "masks", *out, "--input", tmp_path / "names", words=["names", "1 files", "malformed name", "--labels"]
    )
    assert skipped(tmp_path / "out") == {"face.jpg": "malformed name"}


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1])
def test_any_seed_that_the_flag_takes(seed):
    assert mask_function("grabcut", seed)(np.full((64, 64, 3), 128, np.uint8)).shape == (64, 64)


def test_photographs_by_a_detector_of_ones_own(detector, tmp_path, cli):
    """Which sees colours, so that it must be given them in their order."""
    picture, [crop] = photograph(PLACES[:1])
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in/a.png")
    (tmp_path / "t.csv").write_text("file,age\na.png,30\n")
    flags = ["--input", tmp_path / "in", "--labels", tmp_path / "t.csv", "--output", tmp_path / "out"]
    code, _, err = cli("masks", *flags, "--detect", "--detector", detector)
    assert code == 0, err
    assert np.array_equal(read(tmp_path / "out/30_x_x_a.png_image.png")[..., ::-1], crop)


def test_the_preview_shows_faces_of_all_ages_before_a_dark_background(tmp_path):
    stems, mask = [f"{i}_0_0_{i}" for i in range(72)], np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    for i, stem in enumerate(stems):
        write_pair(tmp_path, stem, np.full((40, 40, 3), (0, 0, 255) if i == 71 else 200, np.uint8), mask)
    sheet = contact_sheet(tmp_path, stems)
    assert (sheet == (0, 0, 255)).all(axis=2).any()
    overlay = sheet[8:112, 222:326]  # the third picture of the first face
    assert overlay[52, 52, 0] == 200 > 100 > overlay[2, 2, 0]


# Drawn faces


def test_drawn_faces_have_the_shares_the_colours_and_the_seed_that_are_said(tmp_path, cli, monkeypatch):
    ages = [age for _, age, *_ in synthesize.plan_faces(20_000, 0)]
    assert np.bincount(age_to_group(ages)) / 20_000 == pytest.approx(synthesize.SHARES, abs=0.02)
    monkeypatch.setattr("synthesize.plan_faces", lambda *_: [("30_0_0_1", 30, 0, 0)])
    for seed in (0, 1):  # the same labels
        assert cli("synthesize", "--count", 1, "--seed", seed, "--output", tmp_path / str(seed))[0] == 0
    first, second = (read(next((tmp_path / seed).iterdir())) for seed in "01")
    assert not np.array_equal(first, second)
    blue, _, red, _ = cv2.mean(first, read(tmp_path / "0_masks/30_0_0_1_mask.png"))
    assert red > blue


def test_the_docs_show_what_is_drawn():
    """Each sign of age, colour and label as the README's figures have them."""
    plan = synthesize.plan_faces(2000, 0)
    for path in (ROOT / "docs").glob("*.chip.jpg"):
        stem = path.name.split(".")[0]
        assert plan[int(stem[-7:])][0] == stem
    for index, age in ((1475, 10), (454, 65)):
        rng = np.random.default_rng((0, index))
        image, _ = synthesize.draw_face(synthesize.sample_looks(rng, *plan[index][1:]), rng)
        again = cv2.imdecode(cv2.imencode(".jpg", image[..., ::-1])[1], cv2.IMREAD_COLOR)
        shown = read(ROOT / f"docs/drawn_{age}.jpg").astype(int)
        assert plan[index][1] == age and np.abs(again - shown).mean() < 2


def test_drawn_faces_from_any_folder(tmp_path, cli, refuse):
    done = shell("synthesize", "--count", 7, "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    images, masks = tmp_path / "dataset/raw", tmp_path / "dataset/raw_masks"
    before = {path: path.read_bytes() for folder in (images, masks) for path in folder.iterdir()}
    stems = [path.name.removesuffix(".jpg.chip.jpg") for path in images.iterdir()]
    assert len(stems) == 7 and all(parse_name(f"{stem}.jpg") for stem in stems)
    assert {path.name for path in masks.iterdir()} == {f"{stem}_mask.png" for stem in stems}
    min(before).unlink()
    (images / ".tmp-1234-a.jpg").write_bytes(b"half")  # a killed run's
    code, out, _ = cli("synthesize", "--count", 7, "--seed", 3, "--workers", 2, cwd=tmp_path)
    assert code == 0 and "1 faces drawn, 6 already there" in out
    (images / ".tmp-1234-a.jpg").unlink()
    max(before).unlink()  # a mask
    assert "1 faces drawn" in cli("synthesize", "--count", 7, "--seed", 3, cwd=tmp_path)[1]
    min(before).write_bytes(b"old")
    _, out, _ = cli("synthesize", "--count", 7, "--seed", 3, "--overwrite", cwd=tmp_path)
    assert "7 faces drawn, 0 already there" in out
    assert before == {path: path.read_bytes() for folder in (images, masks) for path in folder.iterdir()}
    assert cli("synthesize", "--count", 1, "--workers", 0, "--output", f"{tmp_path}/a/")[0] == 0
    assert len(list((tmp_path / "a").iterdir())) == len(list((tmp_path / "a_masks").iterdir())) == 1
    for flags in (["--count", 3, "--seed", 3], ["--count", 7, "--seed", 4]):  # nobody's pictures are deleted
        refuse("synthesize", *flags, "--overwrite", words=["dataset/raw holds other files"], cwd=tmp_path)
    assert all(path.exists() for path in before)
    shutil.rmtree(images)
    words = ["dataset/raw_masks holds other files"]
    refuse("synthesize", "--count", 7, "--seed", 4, words=words, cwd=tmp_path)
