"""predict.py: which pictures it reads, what it says of their faces, and what it writes."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import threading
import weakref
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile

import drawing
import faces
import predict
from common import FaceDataset, score_dataset
from conftest import ROOT, noise_pairs, script_path, shell, write_model
from test_faces import BOX, PLACES, POINTS, YUNET, photograph
from utkface import AGE_GROUPS, GROUP_NAMES, decode_image

CPU = ["--device", "cpu", "--workers", 2]
ALIGNED = ["--aligned", *CPU]


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """An empty cache, and an address at which nobody answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(faces, "DETECTOR_URL", "http://127.0.0.1:9/yunet.onnx")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model that has learned neither years nor masks."""
    return write_model(tmp_path_factory.mktemp("plain") / "model.pt", multitask=False, age_sigma=0)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def a_face(drawn):
    return str(next((drawn / "dataset/processed_split/test").glob("*_image.png")))


# What it says, and where it writes it


def test_says_what_evaluate_would_say(drawn, model, tmp_path, cli):
    """Groups and years of a folder of pairs, of which one is not square, as `score_dataset` gives them."""
    folder = tmp_path / "in"
    shutil.copytree(drawn / "dataset/processed_split/test", folder)
    stem = Path(a_face(drawn)).name.removesuffix("_image.png")
    for part in ("image", "mask"):
        cropped = cv2.imread(str(folder / f"{stem}_{part}.png"))[:, 30:150]
        cv2.imwrite(str(folder / f"{stem}_{part}.png"), cropped)
    dataset = FaceDataset(folder, 64)
    loaded = predict.load(model, aligned=True, device="cpu")
    expected, years, _ = score_dataset(loaded.model, dataset, loaded.device)
    files = ["--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "in", "--checkpoint", model, *files, *ALIGNED, cwd=tmp_path)
    assert code == 0 and f"model: {model}" in out
    assert err.count("\n") == 1 and f"passed over {len(dataset)} face masks: " in err
    rows = read(tmp_path / "f.csv")
    assert [row["file"] for row in rows] == [f"in/{face.stem}_image.png" for face in dataset.faces]
    for row, logits, (age, low, high) in zip(rows, expected, years):
        found = torch.tensor([float(row[f"p{group}"]) for group in range(6)])
        assert torch.allclose(found, logits.softmax(0), atol=2e-5)
        assert row["group"] == GROUP_NAMES[logits.argmax()]
        assert f"{row['file']}, face 0: {row['group']} {100 * logits.softmax(0).max():.0f} %, about" in out
        first, last = AGE_GROUPS[row["group"]]
        assert float(row["predicted_age"]) == pytest.approx(min(max(age.item(), first), last), abs=0.02)
        assert [float(row["age_low"]), float(row["age_high"])] == [low, high]
    faces = json.loads((tmp_path / "f.json").read_text())
    assert list(faces[0]["probabilities"]) == GROUP_NAMES
    for face, row in zip(faces, rows):
        assert str(face["predicted_age"]) == row["predicted_age"] and face["group"] == row["group"]
        assert face["box"] == [int(row[key]) for key in ("x", "y", "width", "height")]
    assert {tuple(face["box"]) for face in faces} == {(0, 0, 200, 200), (0, 40, 120, 120)}


def test_a_model_of_groups_alone_has_no_age(drawn, plain, tmp_path, cli, refuse, monkeypatch):
    texts = spy_texts(monkeypatch)
    files = ["--csv", "f.csv", "--json", "f.json", "--overlay", "o"]
    assert cli("predict", a_face(drawn), "--checkpoint", plain, *files, *ALIGNED, cwd=tmp_path)[0] == 0
    assert read(tmp_path / "f.csv")[0]["predicted_age"] == ""
    assert json.loads((tmp_path / "f.json").read_text())[0]["predicted_age"] is None
    assert texts and "about" not in texts[0]
    (face,) = predict.predict(predict.load(plain, aligned=True, device="cpu"), Image.open(a_face(drawn)))
    assert face.predicted_age is None and face.mask is None
    flags = ["--checkpoint", plain, "--masks", tmp_path / "m", *ALIGNED]
    refuse("predict", a_face(drawn), *flags, words=["--masks", "has learned none"])


def spy_texts(monkeypatch):
    """What overlays say from now on."""
    texts, text = [], ImageDraw.ImageDraw.text

    def spy(self, place, said, *args, **options):
        texts.append(said)
        return text(self, place, said, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return texts


def test_overlays_and_masks(drawn, model, tmp_path, cli, monkeypatch):
    """Each overlay names the group, chance and age that the table gives, in the group's colour."""
    texts = spy_texts(monkeypatch)
    chances = np.eye(6) * 0.7 + 0.05
    masks = np.full((6, 64, 64), 0.3)
    masks[:, 16:48, 16:48] = 0.7  # half as sure as a careless threshold would ask for
    scored = [
        predict.Prediction(
            name, chances[i], 10 * i, 9 * i, 12 * i, (0, 0, 200, 200), None, None, False, masks[i],
            np.array([[1, 0, 0], [0, 1, 0]]) / 200, (200, 200, 3),
        )
        for i, name in enumerate(GROUP_NAMES)
    ]  # fmt: skip
    monkeypatch.setattr(predict, "score", lambda _, crops: scored[: len(crops)])
    faces = sorted((drawn / "dataset/processed_split/test").glob("*_image.png"))[:6]
    (tmp_path / "in").mkdir()
    for i, path in enumerate(faces):
        Image.open(path).save(tmp_path / f"in/{i}{['.png', '.jpg', '.gif'][i % 3]}")
    flags = ["--checkpoint", model, *ALIGNED, "--overlay", "o", "--masks", "m"]
    assert cli("predict", "in", *flags, cwd=tmp_path)[0] == 0
    assert texts == [
        f"{name} 75 %, about {10 * i}, {9 * i} to {12 * i}" for i, name in enumerate(GROUP_NAMES)
    ]
    names = ["0.png", "1.jpg", "2.gif.png", "3.png", "4.jpg", "5.gif.png"]
    assert sorted(os.listdir(tmp_path / "o")) == names
    for group, name in enumerate(names):
        overlay = np.asarray(Image.open(tmp_path / "o" / name).convert("RGB")).astype(int)
        assert overlay.shape == (400, 400, 3)
        near = [(np.abs(overlay - color).sum(axis=2) < 40).sum() for color in drawing.COLORS.values()]
        assert near[group] > 400 and near[group] == max(near)
    mask = cv2.imread(str(tmp_path / "m/0.png_0_mask.png"), cv2.IMREAD_UNCHANGED)
    expected = np.zeros((200, 200), bool)
    expected[50:150, 50:150] = True
    assert mask.shape == (200, 200) and set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) != expected).sum() < 400  # of 10,000


def test_default_checkpoint(model, tmp_path, cli, refuse, monkeypatch):
    noise_pairs(tmp_path, [30])
    picture = next(tmp_path.glob("*_image.png"))
    monkeypatch.setattr(predict, "RELEASED", tmp_path / "weights/age_multitask.pt")
    refuse("predict", picture, *ALIGNED, words=["age_multitask.pt is not there"], cwd=tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(model, tmp_path / "weights/age_multitask.pt")
    code, out, _ = cli("predict", picture, *ALIGNED, cwd=tmp_path)
    assert code == 0 and f"model: {tmp_path / 'weights/age_multitask.pt'}" in out
    shutil.copy(model, tmp_path / "model.pt")
    assert "model: model.pt\n" in cli("predict", picture, *ALIGNED, cwd=tmp_path)[1]
    flags = ["--checkpoint", "weights/age_multitask.pt", *ALIGNED]
    (tmp_path / "new").mkdir()  # from where it is found beside the scripts
    code, out, err = cli("predict", picture, *flags, cwd=tmp_path / "new")
    assert code == 0 and "model: weights/age_multitask.pt\n" in out, err
    refuse("predict", picture, *ALIGNED, "--json", "model.pt", words=["would replace model.pt"], cwd=tmp_path)


# Which pictures


def test_a_folder_gives_all_that_the_decoder_reads(model, tmp_path, cli):
    """Every format that Pillow writes and `decode_image` reads is searched for; the rest is named."""
    face = Image.fromarray(
        cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), (64, 64))
    )
    Image.init()
    known, unread = [], ["notes.txt", "broken.heic"]
    (tmp_path / "in/deeper").mkdir(parents=True)
    for suffix, form in Image.registered_extensions().items():
        if suffix in (".pdf", ".icns", ".pfm", ".avifs", ".im") or suffix in (".j2c", ".jpc"):
            continue  # documents, icons, and what nobody keeps photographs in
        buffer = io.BytesIO()
        try:
            face.save(buffer, form)
            decode_image(buffer.getvalue())
        except (KeyError, OSError, ValueError):
            continue
        known.append(f"in/deeper/x{suffix.upper() if suffix == '.tif' else suffix}")
        (tmp_path / known[-1]).write_bytes(buffer.getvalue())
    for name in unread:
        (tmp_path / "in" / name).write_text("no picture")
    (tmp_path / "in/broken.jfif").write_text("no picture")
    (tmp_path / "in/drawn").mkdir()
    face.save(tmp_path / "in/drawn/of_an_earlier_run.png")
    flags = ["--checkpoint", model, *ALIGNED, "--csv", "f.csv", "--overlay", "in/drawn"]
    code, _, err = cli("predict", "in", *flags, cwd=tmp_path)
    lines = err.splitlines()
    assert code == 0 and lines[1:] == ["skipped in/broken.jfif: unreadable image"]
    assert lines[0] == "passed over 2 files that are no pictures: in/broken.heic, in/notes.txt"
    assert {row["file"] for row in read(tmp_path / "f.csv")} == {*known, "in/broken.jfif"}
    assert {".jpg", ".jpe", ".jfif", ".tiff", ".gif", ".webp", ".jp2"} <= {Path(x).suffix for x in known}


def test_names_that_are_no_text_or_too_long(model, tmp_path, cli):
    """Pictures have their rows, overlays and masks whatever they are called."""
    (tmp_path / "in").mkdir()
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    names = [
        b"a.png",
        b"caf\xe9.png",
        b"Icon\r.png",
        b"n" * 250 + b"1.png",
        b"n" * 250 + b"2.png",
        "\u5bb6".encode() * 83 + b".jpg",
    ]
    for name in names:
        face.save(tmp_path / "in" / os.fsdecode(name))
    flags = ["--checkpoint", model, *ALIGNED, "--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "in", *flags, "--overlay", "o", "--masks", "m", cwd=tmp_path)
    assert code == 0 and err == "" and "6 faces in 6 pictures, 0 skipped" in out
    written = [
        r"in/Icon\r.png",
        "in/a.png",
        r"in/caf\udce9.png",
        f"in/{'n' * 250}1.png",
        f"in/{'n' * 250}2.png",
        f"in/{'家' * 83}.jpg",
    ]
    assert sorted(row["file"] for row in read(tmp_path / "f.csv")) == sorted(written)
    assert {row["model"] for row in read(tmp_path / "f.csv")} == {"model.pt"}  # no field is shifted
    assert sorted(row["file"] for row in json.loads((tmp_path / "f.json").read_text())) == sorted(written)
    assert sorted(os.listdir(os.fsencode(tmp_path / "o"))) == sorted(names)
    masks = os.listdir(tmp_path / "m")
    assert len(masks) == 6 and all(name.endswith("_0_mask.png") for name in masks)
    code, out, err = cli("predict", "o", "m", "in/a.png", *flags, cwd=tmp_path)
    assert code == 2 and "o holds no picture" in err  # but for what the run before has drawn
    for drawn in (0, 6):  # masks may lie beside the pictures
        code, out, err = cli("predict", "in", *flags, "--masks", "in", cwd=tmp_path)
        assert code == 0 and "6 faces in 6 pictures" in out, err
        assert err.startswith(f"passed over {drawn} pictures drawn by an earlier run") == (drawn > 0)
    (tmp_path / "n").mkdir()
    face.save(tmp_path / "n/a\x1b[2J.png")
    (tmp_path / "n/b\x1b[2J.txt").touch()
    _, out, err = cli("predict", "n", "--checkpoint", model, *ALIGNED, cwd=tmp_path)
    assert r"n/a\x1b[2J.png, face 0: " in out and r"b\x1b[2J.txt" in err and "\x1b" not in out + err


def test_pixels_are_not_decoded_to_tell_a_photograph(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    decoded = []
    monkeypatch.setattr(PngImageFile, "load", lambda picture: decoded.append(picture))
    assert not drawing.is_own(tmp_path / "a.png") and decoded == []


def test_what_other_programs_have_saved_is_a_photograph(tmp_path):
    picture, exif = Image.new("RGB", (64, 64)), Image.Exif()
    exif[0x0131] = "Adobe Photoshop 25.0"
    picture.save(tmp_path / "a.jpg", exif=exif)
    drawing.write_picture(tmp_path / "b.jpg", picture)
    assert not drawing.is_own(tmp_path / "a.jpg") and drawing.is_own(tmp_path / "b.jpg")


def test_outputs_lie_as_their_pictures_do(model, tmp_path, cli):
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / f"in/{name}/x.png")
    flags = ["--checkpoint", model, *ALIGNED, "--overlay", "o", "--masks", "m"]
    assert cli("predict", "in", *flags, cwd=tmp_path)[0] == 0
    for name in "ab":
        assert (tmp_path / f"o/{name}/x.png").exists() and (tmp_path / f"m/{name}/x.png_0_mask.png").exists()
    assert (
        drawing.output_path(Path("x_0_mask.png"), "m", ".", "_0_mask.png").name == "x_0_mask.png_0_mask.png"
    )
    for name in "ab":
        place = drawing.output_path(tmp_path / f"in/{name}/x.png", "m", tmp_path / "in", "_0_mask.png")
        assert place == Path(f"m/{name}/x.png_0_mask.png")
    (tmp_path / "link").symlink_to(tmp_path)  # which leads nowhere else
    place = drawing.output_path(tmp_path / "link/x.png", "m", tmp_path / "link", "_0_mask.png")
    assert place == Path("m/x.png_0_mask.png")


def test_a_narrow_picture_is_not_enlarged_beyond_memory():
    assert drawing.draw_faces(np.zeros((16, 9000, 3), np.uint8), []).size == (9000, 16)
    assert drawing.draw_faces(np.zeros((90, 100, 3), np.uint8), []).size == (400, 360)
    face = predict.Prediction(
        "Infant", np.eye(6)[0], None, None, None, (0, 0, 16, 16), None, None, False, None, None, (16, 9000, 3)
    )
    assert drawing.draw_faces(np.zeros((16, 9000, 3), np.uint8), [face]).size == (9000, 16)


def test_box_and_outline_lie_on_the_face():
    """In a photograph as it is, and in a small one that is enlarged twice."""
    mask, black = np.zeros((64, 64)), np.zeros((400, 800, 3), np.uint8)
    mask[16:48, 16:48] = 1
    warp = np.array([[1, 0, -500], [0, 1, -50]]) / 200
    infant = partial(predict.Prediction, "Infant", np.eye(6)[0], None, None, None)
    face = infant((500, 50, 200, 200), 0.9, None, False, mask, warp, black.shape)
    drawn = np.asarray(drawing.draw_faces(black, [face], ["1"]))
    edge = (drawn[96:106, 560:640] == drawing.COLORS["Infant"]).all(axis=2).any(axis=0)
    assert edge.mean() > 0.8
    face = infant((120, 50, 60, 100), 0.9, None, False, None, None, (200, 200, 3))
    drawn = np.asarray(drawing.draw_faces(black[:200, :200], [face], ["1"]))
    y, x = np.nonzero((drawn == drawing.COLORS["Infant"]).all(axis=2))
    assert drawn.shape == (400, 400, 3) and abs(x.max() - 360) < 4 and abs(y.max() - 300) < 4
    warp = np.array([[1, 0, -100], [0, 1, -50]]) / 100
    face = infant((100, 50, 100, 100), 0.9, None, False, mask, warp, (200, 200, 3))
    drawn = np.asarray(drawing.draw_faces(black[:200, :200], [face], ["1"]))
    edge = (drawn[146:156, 260:340] == drawing.COLORS["Infant"]).all(axis=2).any(axis=0)
    assert edge.mean() > 0.8


def test_a_text_can_be_read_wherever_a_face_lies():
    black, white = np.zeros((400, 800, 3), np.uint8), []
    infant = partial(predict.Prediction, "Infant", np.eye(6)[0], None, None, None)
    for x, y in ((300, 200), (0, 0), (740, 200), (0, 340)):
        face = infant((x, y, 60, 60), 0.9, None, False, None, None, black.shape)
        white.append((np.asarray(drawing.draw_faces(black, [face])) == 255).all(axis=2).sum())
    assert min(white) > 0.9 * max(white) > 0


def test_what_cannot_be_written_stops_nothing_else(model, tmp_path, cli):
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    (tmp_path / "o/a.png").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        face.save(tmp_path / name)
    (tmp_path / "full").symlink_to("/dev/full")
    flags = ["--checkpoint", model, *ALIGNED, "--csv", "full", "--json", "f.json", "--overlay", "o"]
    code, out, err = cli("predict", "a.png", "b.png", "./b.png", *flags, cwd=tmp_path)
    assert code == 1 and err.count("failed: ") == 2
    assert "failed: full cannot be written" in err and "failed: o/a.png cannot be written" in err
    assert "2 faces in 2 pictures" in out and "written: o, f.json" in out  # each once
    assert len(json.loads((tmp_path / "f.json").read_text())) == 2 and (tmp_path / "o/b.png").exists()


def test_links_pipes_pages_and_what_cannot_be_read(model, tmp_path, cli):
    """Links to folders are followed, a circle once; what cannot be read has a row; a pipe is a picture."""
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    (tmp_path / "in/@eaDir").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/a.png", "elsewhere/b.png", "in/@eaDir/a.png"):
        face.save(tmp_path / name)
    face.save(tmp_path / "in/pages.tif", save_all=True, append_images=[face, face])
    whole = (tmp_path / "in/pages.tif").read_bytes()
    (tmp_path / "in/pages.bmp").write_bytes(whole)  # a TIFF whatever it is called
    (tmp_path / "in/cut.tif").write_bytes(whole[: len(whole) * 2 // 3])  # its chain of pages leads nowhere
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe")
    sender = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "in/a.png").read_bytes())
    )
    sender.start()
    flags = ["--checkpoint", model, *ALIGNED, "--csv", "f.csv", "--overlay", "o"]
    code, out, err = cli("predict", "in", "pipe", *flags, cwd=tmp_path)
    sender.join()
    assert code == 0 and "6 faces in 6 pictures, 1 skipped" in out
    for name in ("in/pages.tif", "in/pages.bmp"):
        assert f"{name}: the first of 3 pages is read" in err
    assert "skipped in/gone.png: not a file that can be read" in err and err.count("\n") == 3
    found = [row["file"] for row in read(tmp_path / "f.csv") if not row["reason"]]
    names = ["a.png", "cut.tif", "linked/b.png", "pages.bmp", "pages.tif"]
    assert sorted(found) == [*(f"in/{name}" for name in names), "pipe"]
    assert (tmp_path / "o/pipe.png").exists()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_fault_in_scoring_is_no_drawing_that_failed(model, tmp_path, cli, monkeypatch, error):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    def broken(*_):
        raise error("no kernel")

    monkeypatch.setattr(predict, "score", broken)
    with pytest.raises(error, match="no kernel"):
        cli("predict", "a.png", "--checkpoint", model, *ALIGNED, "--overlay", "o", cwd=tmp_path)


def test_photographs_do_not_pile_up(model, tmp_path, cli, monkeypatch):
    """However many pictures there are, no more are decoded at a time than workers, and one to draw."""
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(predict, "CHUNK", 8)
    for i in range(24):
        face.save(tmp_path / f"in/{i:02}.png")
    live, most, lock, read = set(), [0], threading.Lock(), predict.read_picture

    def spy(*args, **options):
        image = read(*args, **options)
        with lock:
            live.add(id(image))
            most[0] = max(most[0], len(live))
        weakref.finalize(image, live.discard, id(image))
        return image

    monkeypatch.setattr(predict, "read_picture", spy)
    assert cli("predict", "in", "--checkpoint", model, *ALIGNED, "--overlay", "o", cwd=tmp_path)[0] == 0
    assert len(os.listdir(tmp_path / "o")) == 24 and 1 <= most[0] <= 2 * 2 + 1


def test_few_frames_of_videos_are_kept(model, tmp_path, refuse, monkeypatch):
    asked = Mock(side_effect=predict.UserError("stop"))
    monkeypatch.setattr(predict, "score_pictures", asked)
    for names, count in ((["a.png"], predict.CHUNK), (["a.png", "b.avi"], predict.FRAMES)):
        for name in names:
            (tmp_path / name).touch()
        refuse("predict", *names, "--checkpoint", model, *ALIGNED, words=["stop"], cwd=tmp_path)
        assert asked.call_args.args[-1] == count


# Whole photographs


def test_faces_in_photographs(model, detector, tmp_path, cli):
    """Two faces, from left to right, in the picture as it should be seen, whatever its EXIF says."""
    picture, crops = photograph(PLACES)
    Image.fromarray(picture).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.rot90(picture).copy()).save(tmp_path / "turned.png", exif=exif)
    flags = ["--checkpoint", model, "--detector", detector, *CPU, "--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "upright.png", "turned.png", *flags, "--masks", "m", cwd=tmp_path)
    assert code == 0 and err == "" and "4 faces in 2 pictures, 0 skipped" in out
    said, table = json.loads((tmp_path / "f.json").read_text()), read(tmp_path / "f.csv")
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    assert [(row["file"], row["face"]) for row in said] == [
        ("upright.png", 0), ("upright.png", 1), ("turned.png", 0), ("turned.png", 1),
    ]  # fmt: skip
    loaded = predict.load(model, aligned=True, device="cpu")
    for i, (crop, place) in enumerate(zip(crops, PLACES)):
        (alone,) = predict.predict(loaded, crop)
        for row, flat in ((said[i], table[i]), (said[i + 2], table[i + 2])):
            box = [place[0] - BOX // 2, place[1] - BOX // 2, BOX, BOX]
            assert row["box"] == box == [int(flat[key]) for key in ("x", "y", "width", "height")]
            assert list(row["landmarks"]) == ["right_eye", "left_eye", "nose", "right_mouth", "left_mouth"]
            assert np.allclose(list(row["landmarks"].values()), POINTS + place, atol=0.1)
            assert [float(flat["nose_x"]), float(flat["nose_y"])] == row["landmarks"]["nose"]
            assert row["score"] == pytest.approx(0.95, abs=1e-3) and float(flat["score"]) == row["score"]
            assert row["picture"] == [400, 304] == [int(flat[f"picture_{x}"]) for x in ("width", "height")]
            assert row["model"] == {"name": "model.pt", "sha256": digest} and flat["model_sha256"] == digest
            assert row["too_small"] is False and row["reason"] is None
            assert np.allclose(list(row["probabilities"].values()), alone.probabilities, atol=1e-4)
            assert row["predicted_age"] == alone.predicted_age
        mask = cv2.imread(str(tmp_path / f"m/turned.png_{i}_mask.png"), cv2.IMREAD_UNCHANGED) > 0
        left, top = place[0] - 48, place[1] - 48
        assert mask.shape == (304, 400)
        assert (mask[top : top + 96, left : left + 96] != alone.mask).mean() < 0.02
        assert mask.sum() == mask[top : top + 96, left : left + 96].sum()


def test_pictures_without_a_face_have_a_row_and_a_reason(model, detector, tmp_path, cli):
    """Also where nothing is found at all; an answer of an earlier run does not stay."""
    Image.fromarray(photograph(PLACES)[0]).save(tmp_path / "a.png")
    Image.new("RGB", (80, 60), (90, 90, 90)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_text("no picture")
    flags = ["--checkpoint", model, "--detector", detector, *CPU, "--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "a.png", "b.png", "c.jpg", *flags, cwd=tmp_path)
    assert code == 0 and err == "skipped b.png: no face found\nskipped c.jpg: unreadable image\n"
    assert "2 faces in 1 pictures, 2 skipped" in out
    reasons = [("a.png", ""), ("a.png", ""), ("b.png", "no face found"), ("c.jpg", "unreadable image")]
    assert [(row["file"], row["reason"]) for row in read(tmp_path / "f.csv")] == reasons
    code, out, err = cli("predict", "b.png", "c.jpg", *flags, cwd=tmp_path)
    assert code == 2 and "none of 2 pictures holds a face" in err and "--aligned" in err
    (tmp_path / "full").symlink_to("/dev/full")
    assert "failed: full cannot" in cli("predict", "b.png", *flags[:-4], "--csv", "full", cwd=tmp_path)[2]
    assert [(row["file"], row["reason"]) for row in read(tmp_path / "f.csv")] == reasons[2:]
    said = json.loads((tmp_path / "f.json").read_text())
    assert [row["reason"] for row in said] == ["no face found", "unreadable image"]
    assert said[0]["picture"] == [80, 60] and said[1]["picture"] is None


def test_small_faces_are_said_to_be(model, detector, tmp_path, cli, monkeypatch):
    picture, _ = photograph(PLACES)
    Image.fromarray(picture).save(tmp_path / "a.png")
    flags = ["predict", tmp_path / "a.png", "--checkpoint", model, "--detector", detector, *CPU]
    assert "too small" not in cli(*flags)[1]
    monkeypatch.setattr(predict, "READABLE", 81)
    code, out, _ = cli(*flags, "--csv", tmp_path / "f.csv", "--overlay", tmp_path / "o")
    assert code == 0 and out.count("too small") == 2
    assert [row["too_small"] for row in read(tmp_path / "f.csv")] == ["True", "True"]
    for flag, value in (("--min-face", 90), ("--detector-score", 0.99)):
        code, _, err = cli(*flags, flag, value)
        assert code == 2 and "no face found" in err
    assert cli(*flags, "--detector-score", 0.2)[0] == 2  # below what the detector is asked for
    look = faces.run_network
    for factor, code in ((0.84, 0), (0.76, 2)):  # of a score of 0.95
        factors = np.array([1] * 14 + [factor])
        monkeypatch.setattr(faces, "run_network", lambda *args, factors=factors: look(*args) * factors)
        assert cli(*flags)[0] == code


def test_what_an_earlier_run_has_found_does_not_stay(model, detector, tmp_path, cli):
    flags = ["--checkpoint", model, "--detector", detector, *CPU, "--masks", "m", "--overlay", "o"]
    for places in (PLACES, PLACES[:1], []):
        Image.fromarray(photograph(places)[0]).save(tmp_path / "a.png")
        cli("predict", "a.png", *flags, cwd=tmp_path)
        assert len(os.listdir(tmp_path / "m")) == len(places)
        assert len(os.listdir(tmp_path / "o")) == bool(places)


def test_a_table_on_standard_output_is_alone_there(model, tmp_path):
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "a.png")
    flags = ["a.png", "--checkpoint", model, *ALIGNED, "--csv", "/dev/stdout"]
    done = shell("predict", *flags, cwd=tmp_path)
    assert done.stdout.startswith("file,frame,") and done.stdout.count("\n") == 2, done.stderr
    with open(tmp_path / "all.csv", "w") as table:
        print("before", file=table, flush=True)
        command = [sys.executable, script_path("predict"), *map(str, flags)]
        assert subprocess.run(command, stdout=table, cwd=tmp_path).returncode == 2
    assert (tmp_path / "all.csv").read_text() == "before\n"


def test_a_colon_in_the_name_of_a_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with drawing.open_video(tmp_path / "2024-01-01T12:30.mp4", 10, (64, 64)) as append:
        for _ in range(3):
            append(Image.new("RGB", (64, 64)))
    found = predict.open_pictures([Path("2024-01-01T12:30.mp4")], 1)
    assert [(picture.frame, picture.reason) for picture in found] == [(0, None), (1, None), (2, None)]


def test_a_socket_among_the_pictures_is_skipped(model, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)  # absolute paths may be too long for sockets
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "a.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        code, out, err = cli("predict", "a.png", "s", "--checkpoint", model, *ALIGNED)
    assert code == 0 and "skipped s: " in err and "1 faces in 1 pictures, 1 skipped" in out


def test_videos(model, detector, tmp_path, cli, monkeypatch):
    """Every N-th frame is looked at; the overlay is a video of those, as fast as the first."""
    still = cv2.cvtColor(photograph(PLACES)[0], cv2.COLOR_RGB2BGR)
    empty = np.full_like(still, 90)
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (400, 304))
    for frame in range(25):
        writer.write(empty if frame < 10 else still)
    writer.release()
    flags = ["--checkpoint", model, "--detector", detector, *CPU, "--csv", "f.csv", "--every", 5]
    code, out, err = cli("predict", "clip.avi", *flags, "--overlay", "o", "--masks", "m", cwd=tmp_path)
    assert code == 0 and err == "" and "6 faces in 3 pictures, 2 skipped" in out and "clip.avi 2.00 s" in out
    rows = read(tmp_path / "f.csv")
    assert [(row["frame"], row["second"], row["face"]) for row in rows] == [
        ("0", "0.0", ""), ("5", "0.5", ""), ("10", "1.0", "0"), ("10", "1.0", "1"), ("15", "1.5", "0"),
        ("15", "1.5", "1"), ("20", "2.0", "0"), ("20", "2.0", "1"),
    ]  # fmt: skip
    assert (tmp_path / "m/clip.avi_000015_1_mask.png").exists()
    drawn = cv2.VideoCapture(str(tmp_path / "o/clip.avi.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 2 and drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    images = [drawn.read()[1] for _ in range(5)]
    assert (
        np.abs(images[0].astype(int) - images[1]).max() < 20 < np.abs(images[0].astype(int) - images[4]).max()
    )
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "o/clip.avi.mp4").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as on a full disk
    try:
        code, _, err = cli("predict", "clip.avi", *flags, "--overlay", "o", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "failed: o/clip.avi.mp4 cannot be written whole" in err
    assert (tmp_path / "o/clip.avi.mp4").read_bytes() == before and len(os.listdir(tmp_path / "o")) == 1
    for rate in (119.9433, 90_000, 0.0008):
        with drawing.open_video(tmp_path / "rate.mp4", rate, (64, 64)) as append:
            append(Image.new("RGB", (64, 64)))
    with drawing.open_video(tmp_path / "rate.mp4", 25 / 10, (64, 64)) as append:
        for _ in range(5):
            append(Image.new("RGB", (64, 64)))
    assert cv2.VideoCapture(str(tmp_path / "rate.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(2.5)
    (tmp_path / "full/clip.avi.mp4").mkdir(parents=True)  # in the way of the video
    code, out, err = cli("predict", "clip.avi", *flags, "--overlay", "full", cwd=tmp_path)
    assert code == 1 and err.count("failed: full/clip.avi.mp4 cannot be written") == 1 and "6 faces" in out
    with monkeypatch.context() as patch:
        closed = cv2.VideoWriter()  # as where OpenCV lacks the codec
        patch.setattr(cv2, "VideoWriter", lambda *_: closed)
        code, out, err = cli("predict", "clip.avi", *flags, "--overlay", "none", cwd=tmp_path)
    assert code == 1 and err.count("writes no mp4") == 1 and not (tmp_path / "none/clip.avi.mp4").exists()
    whole = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "none.mp4").write_bytes(whole[:100])
    code, out, err = cli("predict", "cut.avi", "none.mp4", *flags, "--overlay", "o", cwd=tmp_path)
    assert code == 0 and "skipped none.mp4: no video that can be read" in err
    assert "skipped cut.avi: breaks off after 1" in err and "of 25 frames" in err
    assert (tmp_path / "o/cut.avi.mp4").exists() and not (tmp_path / "o/none.mp4").exists()
    name = os.fsdecode(b"caf\xe9.avi")  # at which OpenCV would end the process
    shutil.copy(tmp_path / "clip.avi", tmp_path / name)
    code, out, err = cli("predict", name, "clip.avi", *flags, "--overlay", name[:-4], cwd=tmp_path)
    assert (
        code == 1 and r"skipped caf\udce9.avi: the path of a video must be UTF-8" in err and "6 faces" in out
    )
    assert "failed: the path of a video must be UTF-8" in err


def test_what_follows_a_video_is_drawn_as_well_and_in_its_colours(model, tmp_path, cli):
    red = np.full((64, 64, 3), (0, 0, 200), np.uint8)  # BGR
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(3):
        writer.write(red)
    writer.release()
    cv2.imwrite(str(tmp_path / "b.png"), red)
    flags = ["--checkpoint", model, *ALIGNED, "--overlay", "o", "--masks", "m", "--csv", "f.csv"]
    (tmp_path / "a.avi").rename(tmp_path / "a.AVI")  # as cameras name them
    assert cli("predict", "a.AVI", "b.png", *flags, cwd=tmp_path)[0] == 0
    assert sorted(os.listdir(tmp_path / "o")) == ["a.AVI.mp4", "b.png"]
    assert [row["frame"] for row in read(tmp_path / "f.csv")] == ["0", "1", "2", ""]
    masks = [f"a.AVI_00000{i}_0_mask.png" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "m")) == [*masks, "b.png_0_mask.png"]
    blue, _, red = cv2.VideoCapture(str(tmp_path / "o/a.AVI.mp4")).read()[1].mean(axis=(0, 1))
    assert red > blue + 50


def test_frames_of_uneven_length(monkeypatch):
    """Seconds are those at which frames are shown, and a whole video is not said to break off."""
    shown = [i / 30 for i in range(45)] + [1.5 + i / 15 for i in range(45)]

    class Video:
        frame, count, side, broken, fps = -1, 134, 32, 1000, 30  # as Matroska's length and rate have it

        def __init__(self, _):
            pass

        def get(self, what):
            now = 1000 * shown[max(self.frame, 0)]
            known = {cv2.CAP_PROP_FPS: self.fps, cv2.CAP_PROP_FRAME_COUNT: self.count}
            known[cv2.CAP_PROP_POS_MSEC] = now
            return known.get(what, self.side)

        def grab(self):
            self.frame += 1
            return self.frame < len(shown)

        def retrieve(self):
            whole = self.frame < self.broken
            return whole, np.zeros((32, 32, 3), np.uint8) if whole else None

    monkeypatch.setattr(cv2, "VideoCapture", Video)
    for suffix in (".mp4", ".m4v", ".mov", ".MOV", ".webm", ".mpg", ".mpeg"):
        assert next(predict.open_pictures([Path(f"a{suffix}")], 40)).frame == 0, suffix
    frames = list(predict.open_pictures([Path("a.mkv")], 40))
    assert [frame.second for frame in frames] == pytest.approx([0, 1.333, shown[80]], abs=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(Video, "fps", 0)  # of a container that tells none
        assert next(predict.open_pictures([Path("a.mkv")], 40)).second == 0
    monkeypatch.setattr(Video, "count", 200)
    assert list(predict.open_pictures([Path("a.mkv")], 40))[-1].reason == "breaks off after 90 of 200 frames"
    monkeypatch.setattr(Video, "broken", 30)
    assert list(predict.open_pictures([Path("a.mkv")], 40))[-1].reason == "breaks off after 40 of 200 frames"
    monkeypatch.setattr(Video, "side", 8000)
    [refused] = predict.open_pictures([Path("a.mkv")], 40)
    assert refused.reason == "frames above 50 million pixels"


def test_a_file_too_large_for_a_picture_does_not_stop_the_others(model, tmp_path, cli):
    """Without bytes on the disk, as a file of a virtual machine that bears a picture's name."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    with open(tmp_path / "b.png", "wb") as sparse:
        sparse.truncate(2**40)
    flags = ["--checkpoint", model, "--aligned", "--device", "cpu"]
    code, out, err = cli("predict", tmp_path / "a.png", tmp_path / "b.png", *flags)
    assert code == 0 and "1 faces in 1 pictures, 1 skipped" in out and "b.png: larger than 1 GiB" in err


def test_a_file_that_the_system_refuses_does_not_stop_the_others(model, tmp_path, cli, monkeypatch):
    read_bytes = Path.read_bytes

    def locked(path):
        if path.name == "a.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / name)
    flags = ["--checkpoint", model, "--aligned", "--device", "cpu", "--workers", 0]
    code, out, err = cli("predict", "a.png", "b.png", *flags, cwd=tmp_path)
    assert code == 0 and "skipped a.png: Permission denied" in err and "1 faces in 1 pictures" in out


def test_large_crops_are_scored_fewer_at_a_time(monkeypatch):
    found = []

    def outputs(_, images):
        found.append(len(images))
        return {"probabilities": torch.full((len(images), 6), 1 / 6)}

    monkeypatch.setattr(predict, "outputs", outputs)
    for side, counts in ((32, [32, 8]), (256, [8] * 5), (1024, [1] * 40)):
        found.clear()
        loaded = predict.Loaded(None, side, torch.device("cpu"), torch.float32, None)
        crop = predict.find_crops(np.zeros((side, side, 3), np.uint8))[0]
        assert len(predict.score(loaded, [crop] * 40)) == 40 and found == counts


@pytest.mark.skipif(not YUNET.exists(), reason="no YuNet here")
def test_the_real_detector(drawn, tmp_path, capfd):
    """OpenCV's own file has the hash that is asked for; what it warns of stays unsaid, in Python as well."""
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(YUNET, folder / "yunet.onnx")
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)
    try:
        loaded = predict.load(ROOT / predict.RELEASED, device="cpu")
        photos = sorted((YUNET.parents[1] / "photos").glob("*.jpg"))
        found = {path.stem: predict.predict(loaded, Image.open(path)) for path in photos}
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_WARNING
    finally:
        cv2.utils.logging.setLogLevel(before)
    assert capfd.readouterr().err == ""
    assert {stem: len(faces) for stem, faces in found.items()} == {"biden": 1, "obama": 1, "two_faces": 2}
    assert all(40 < face.predicted_age < 85 for faces in found.values() for face in faces)


# From Python, and exported


def test_from_python(drawn, model):
    loaded = predict.load(model, aligned=True, device="cpu")
    assert loaded.dtype == torch.float32
    image = np.random.default_rng(0).integers(0, 256, (120, 100, 3), np.uint8)
    (face,) = predict.predict(loaded, image)
    assert face.probabilities.shape == (6,) and face.probabilities.sum() == pytest.approx(1)
    assert face.group == GROUP_NAMES[face.probabilities.argmax()] and face.box == (0, 10, 100, 100)
    assert face.mask.shape == (120, 100) and face.mask.dtype == bool
    assert isinstance(face.predicted_age, float) and 0 <= face.predicted_age <= 100
    (without,) = predict.predict(loaded, image, masks=False)
    assert without.mask is None and np.array_equal(without.probabilities, face.probabilities)
    other = dataclasses.replace(loaded, process=1)  # as if another process had loaded it
    (again,) = predict.predict(pickle.loads(pickle.dumps(other)), image)
    assert np.array_equal(again.probabilities, face.probabilities)
    for wrong in (image[..., 0], image / 254, image[:0], image[:1, :1]):
        with pytest.raises(ValueError, match="uint8"):
            predict.predict(loaded, wrong)
    for wrong in (image / 255, (image > 99).astype(np.uint8)):
        with pytest.raises(ValueError, match="multiply a picture of values 0 to 1 by 255"):
            predict.predict(loaded, wrong)
    (black,) = predict.predict(loaded, np.zeros((80, 80, 3), np.uint8))  # as a film begins
    assert black.box == (0, 0, 80, 80)
    for wrong in (None, "face.jpg", [[1]]):
        with pytest.raises(ValueError, match="uint8"):
            predict.predict(loaded, wrong)
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode}"):
            predict.predict(loaded, Image.new(mode, (80, 80)))


def test_faces_beyond_a_batch(model, monkeypatch):
    loaded = predict.load(model, aligned=True, device="cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    crops = [faces.find_crops(picture)[0] for picture in pictures]
    whole = predict.score(loaded, crops)
    monkeypatch.setattr(predict, "BATCH", 2)
    for one, other in zip(predict.score(loaded, crops), whole, strict=True):
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert np.allclose(one.crop_mask, other.crop_mask, atol=1e-4)


def test_masks_are_probabilities(monkeypatch):
    said = torch.zeros(1, 6), None, torch.tensor([[[[-2.0, 0.2]]]])
    monkeypatch.setattr(predict, "infer", lambda *_: said)
    assert predict.outputs(None, None)["masks"].ravel().tolist() == pytest.approx([0.1192, 0.5498], abs=1e-4)


def test_a_face_is_small_by_its_longer_side(model):
    loaded = predict.load(model, aligned=True, device="cpu")
    (crop,) = faces.find_crops(np.full((64, 64, 3), 90, np.uint8))
    for height, score, small in ((30, 0.9, False), (20, 0.9, True), (20, None, False)):
        (face,) = predict.score(loaded, [crop._replace(box=(0, 0, 20, height), score=score)])
        assert face.too_small == small


def test_pil_images_are_turned_and_laid_on_grey(drawn, model):
    loaded = predict.load(model, aligned=True, device="cpu")
    upright = Image.open(a_face(drawn)).convert("RGB")
    (expected,) = predict.predict(loaded, np.asarray(upright))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    (face,) = predict.predict(loaded, turned)
    assert np.allclose(face.probabilities, expected.probabilities, atol=1e-6)
    on_grey, hole = np.asarray(upright).copy(), np.zeros((200, 200), bool)
    hole[:60] = True
    on_grey[hole] = 128
    (expected,) = predict.predict(loaded, on_grey)
    for under in (0, np.random.default_rng(0).integers(0, 256, (60 * 200, 3))):
        pixels = np.dstack([np.asarray(upright), np.where(hole, 0, 255)]).astype(np.uint8)
        pixels[hole, :3] = under
        (face,) = predict.predict(loaded, Image.fromarray(pixels))
        assert np.allclose(face.probabilities, expected.probabilities, atol=1e-6)


def test_import_changes_nothing_around_it_and_forks_do_not_hang(model, detector):
    """Where PyTorch has threads, which stay behind, a line says what to do; where it has one, all goes on."""
    code = f"""
import cv2, os, signal, numpy as np
from PIL import Image; import torch
def state(): return (Image.MAX_IMAGE_PIXELS, cv2.getNumThreads(), cv2.utils.logging.getLogLevel(),
    torch.get_num_threads(), signal.getsignal(signal.SIGTERM))
cv2.setNumThreads(3); torch.set_num_threads(2); before = state()
import predict; assert state() == before, (before, state())
loaded = predict.load({str(model)!r}, {str(detector)!r}, device="cpu")
image = np.load({str(model)!r} + ".npy")
there = predict.predict(loaded, image)
for threads in (2, 1):
    torch.set_num_threads(threads)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends it where it hangs
        try:
            faces = predict.predict(loaded, image)
            os._exit(10 + len(faces))
        except predict.UserError as error:
            os._exit(20 + ("load in the process that predicts" in str(error)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (21 if threads == 2 else 12)
"""
    np.save(f"{model}.npy", photograph(PLACES)[0])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_bad_input(model, tmp_path, cli, refuse, monkeypatch):
    noise_pairs(tmp_path, [30])
    picture = next(tmp_path.glob("*_image.png"))
    flags = ["--checkpoint", model, *CPU]
    refuse("predict", words=["nothing to do"])
    refuse("predict", tmp_path / "none.jpg", *flags, words=["none.jpg is not there"])
    refuse("predict", "a.jpg\n" * 60, *flags, words=["is not there"])  # as "$(ls)" gives it
    (tmp_path / "empty").mkdir()
    refuse("predict", tmp_path / "empty", *flags, words=["empty holds no picture"])
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "commonpath", Mock(side_effect=ValueError))  # as of C: and D:
        refuse("predict", picture, *flags, words=["several drives"])
    refuse("predict", picture, "--checkpoint", tmp_path / "no.pt", *ALIGNED, words=["no.pt is not there"])
    fp16 = ["--checkpoint", model, *ALIGNED, "--precision", "fp16"]
    refuse("predict", picture, *fp16, words=["--precision fp16"])
    refuse(
        "predict", picture, *flags, "--detector", tmp_path / "y.onnx", words=["--detector", "cannot be read"]
    )
    (tmp_path / "y.onnx").write_text("no network")
    files = ["--detector", tmp_path / "y.onnx", "--csv", tmp_path / "y.onnx"]
    refuse("predict", picture, *flags, *files, words=["--csv", "would replace"])
    refuse(
        "predict",
        picture,
        *flags,
        "--detector",
        tmp_path / "y.onnx",
        words=["y.onnx cannot be read as a face detector"],
    )
    refuse("predict", picture, *flags, "--aligned", "--detector", "y.onnx", words=["--detector", "--aligned"])
    (tmp_path / "aligned.yaml").write_text("aligned: true")
    flags_of_yaml = ["--config", tmp_path / "aligned.yaml", "--detector", "y.onnx"]
    refuse("predict", picture, *flags_of_yaml, words=["--detector", "--aligned"])
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "link"):
        for named in (picture, tmp_path / "link" / picture.name):
            refuse("predict", named, *flags, "--overlay", place, words=["--overlay", "replace the pictures"])
    refuse("predict", named, *flags, "--json", picture, words=["replace the pictures"])
    for frame in ("", "_000010"):
        mask = shutil.copy(picture, f"{picture}{frame}_0_mask.png")
        words = ["--masks", "replace the pictures"]
        refuse("predict", picture, mask, *flags, "--masks", tmp_path / "link", words=words)
        args = Namespace(csv=None, json=None, overlay=None, masks=str(tmp_path), detector=None)
        predict.check_outputs(args, model, [Path(mask)], tmp_path)  # a picture whose name only ends so
    for flag in ("--overlay", "--masks"):
        refuse("predict", picture, *flags, flag, picture / "x", words=[flag, "no folder that can be written"])
    (tmp_path / "sub").mkdir()  # whose overlay would lie where another photograph does
    Image.new("RGB", (32, 32)).save(tmp_path / "sub/b.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    words = ["would replace a picture that no run has drawn"]
    refuse("predict", "sub", *flags, "--overlay", ".", words=words, cwd=tmp_path)
    for flag in (["--min-face", 60], ["--detector-score", 0.9]):
        refuse("predict", picture, "--checkpoint", model, *ALIGNED, *flag, words=["--aligned", flag[0]])
    (tmp_path / "here").mkdir()
    shutil.copy(picture, tmp_path / "here")
    for inputs, folder, cwd in (
        ([f"../{picture.name}", picture.name], "..", tmp_path / "here"),
        ([picture.name, f"here/{picture.name}"], "here", tmp_path),
    ):
        refuse("predict", *inputs, *flags, "--overlay", folder, words=["replace the pictures"], cwd=cwd)
    refuse("predict", picture, *flags, "--csv", picture / "f.csv", words=["--csv"])
    same = ["--csv", "same.csv", "--json", tmp_path / "same.csv"]
    refuse("predict", picture, *flags, *same, words=["--json", "what --csv writes"], cwd=tmp_path)
    for flag, words in (("--json", "the pictures"), ("--csv", "model.pt")):
        place = picture if flag == "--json" else model
        refuse(
            "predict",
            picture,
            *flags,
            flag,
            place,
            words=[f"would replace {words}" if flag == "--json" else words],
        )
    face = Image.open(picture)
    face.save(tmp_path / "x.gif")
    face.save(tmp_path / "x.gif.png")
    two = [tmp_path / "x.gif", tmp_path / "x.gif.png"]
    refuse(
        "predict", *two, *flags, "--overlay", tmp_path / "o", words=["would replace what --overlay writes"]
    )
    (tmp_path / "broken.jpg").write_text("no picture")
    _, _, err = cli("predict", tmp_path / "broken.jpg", "--aligned", *flags)
    assert "skipped" in err and "none of 1 pictures holds a face" in err.splitlines()[-1]
