"""predict.py: which pictures it reads, where it finds faces, what it says and writes of them."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
import weakref
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

import predict
from cli import UserError
from common import FaceDataset, make_model, save_checkpoint, score_dataset
from conftest import ROOT, noise_pairs
from utkface import GROUP_NAMES, decode_image

YUNET = ROOT.parent / "shared/yunet/face_detection_yunet_2023mar.onnx"
CPU = ["--device", "cpu", "--workers", 2]
ALIGNED = ["--aligned", *CPU]
SIZE = (256, 192)  # width and height of the photographs below


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """An empty cache, and an address at which nobody answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(predict, "DETECTOR_URL", "http://127.0.0.1:9/yunet.onnx")


def write_model(path, **settings):
    """A checkpoint with random weights: what it says is of no matter here."""
    torch.manual_seed(0)
    settings = {"multitask": True, "age_sigma": 2.0, "flip_averaging": True, "image_size": 64} | settings
    network = make_model(settings)
    for module in network.modules():  # statistics other than those a fresh network has
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    save_checkpoint(
        path, "model", Namespace(**settings), weights=network.state_dict(), epoch=1, val={},
        train_hashes=torch.zeros(0, dtype=torch.int64), pretraining={},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.pt")


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
    expected = score_dataset(loaded.model, dataset, loaded.device)
    files = ["--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "in", "--checkpoint", model, *files, *ALIGNED, cwd=tmp_path)
    assert code == 0 and f"model: {model}" in out and "Middle-aged" in out
    assert err.count("\n") == 1 and f"0 files that are no pictures, {len(dataset)} face masks" in err
    rows = read(tmp_path / "f.csv")
    assert [row["file"] for row in rows] == [f"in/{face.stem}_image.png" for face in dataset.faces]
    columns = ["file", "face", "x", "y", "width", "height", "group", "predicted_age"]
    assert list(rows[0]) == columns + [f"p{group}" for group in range(6)]
    for row, logits, age in zip(rows, expected.logits, expected.ages):
        found = torch.tensor([float(row[f"p{group}"]) for group in range(6)])
        assert torch.allclose(found, logits.softmax(0), atol=2e-5)
        assert row["group"] == GROUP_NAMES[logits.argmax()]
        assert float(row["predicted_age"]) == pytest.approx(age.item(), abs=0.02)
    faces = json.loads((tmp_path / "f.json").read_text())
    assert list(faces[0]) == ["file", "face", "group", "predicted_age", "box", "probabilities"]
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
    refuse("predict", a_face(drawn), *flags, words=["--masks", "has learned no masks"])


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
    said = np.eye(6)[[0, 1, 2, 3, 4, 5]] * 0.7 + 0.05
    masks = np.full((6, 1, 64, 64), 0.3)
    masks[:, :, 16:48, 16:48] = 0.7  # half as sure as a careless threshold would ask for
    monkeypatch.setattr(
        predict, "score", lambda loaded, squares: list(zip(said, 10.0 * np.arange(6), masks))[: len(squares)]
    )
    faces = sorted((drawn / "dataset/processed_split/test").glob("*_image.png"))[:6]
    (tmp_path / "in").mkdir()
    for i, path in enumerate(faces):
        Image.open(path).save(tmp_path / f"in/{i}{['.png', '.jpg', '.gif'][i % 3]}")
    flags = ["--checkpoint", model, *ALIGNED, "--overlay", "o", "--masks", "m"]
    assert cli("predict", "in", *flags, cwd=tmp_path)[0] == 0
    assert texts == [f"{name} 75 %, about {10 * group}" for group, name in enumerate(GROUP_NAMES)]
    names = ["0.png", "1.jpg", "2.gif.png", "3.png", "4.jpg", "5.gif.png"]
    assert sorted(os.listdir(tmp_path / "o")) == names
    for group, name in enumerate(names):
        overlay = np.asarray(Image.open(tmp_path / "o" / name).convert("RGB")).astype(int)
        assert overlay.shape == (400, 400, 3)
        near = [(np.abs(overlay - color).sum(axis=2) < 40).sum() for color in predict.COLORS]
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
    assert lines[0] == (
        "passed over 2 files that are no pictures, 0 face masks: in/broken.heic, in/notes.txt"
    )
    assert {row["file"] for row in read(tmp_path / "f.csv")} == set(known)
    assert {".jpg", ".jpe", ".jfif", ".tiff", ".gif", ".webp", ".jp2"} <= {Path(x).suffix for x in known}


def test_names_that_are_no_text_or_too_long(model, tmp_path, cli):
    """They stop nothing: all else is written, what failed is named, and the exit code is 1."""
    (tmp_path / "in").mkdir()
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    for name in (b"caf\xe9.png", b"a.png", b"z.png", b"n" * 245 + b".png"):
        face.save(tmp_path / "in" / os.fsdecode(name))
    flags = ["--checkpoint", model, *ALIGNED, "--csv", "f.csv", "--json", "f.json"]
    code, out, err = cli("predict", "in", *flags, "--overlay", "o", "--masks", "m", cwd=tmp_path)
    failed = err.splitlines()
    assert code == 1 and failed and all(line.startswith("failed: ") and "nnnn" in line for line in failed)
    assert "4 faces in 4 pictures, 0 skipped" in out and r"in/caf\udce9.png" in out
    names = ["in/a.png", r"in/caf\udce9.png", f"in/{'n' * 245}.png", "in/z.png"]
    assert [row["file"] for row in read(tmp_path / "f.csv")] == names
    assert [face["file"] for face in json.loads((tmp_path / "f.json").read_text())] == names
    assert len(list((tmp_path / "m").iterdir())) == 3 and (tmp_path / "m/z.png_0_mask.png").exists()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "in" / ("n" * 245 + ".png")).unlink()
    flags[-3] = "full"
    code, out, err = cli("predict", "in/a.png", "in", "./in/z.png", *flags, cwd=tmp_path)
    assert code == 1 and "failed: full cannot be written" in err
    assert "3 faces in 3 pictures" in out and "written: f.json" in out  # each once
    assert len(json.loads((tmp_path / "f.json").read_text())) == 3


def test_photographs_do_not_pile_up(model, tmp_path, cli, monkeypatch):
    """However many pictures there are, no more are decoded at a time than workers, and one to draw."""
    face = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(predict, "CHUNK", 8)
    for i in range(24):
        face.save(tmp_path / f"in/{i:02}.png")
    live, most, lock, read = set(), [0], threading.Lock(), predict.read_picture

    def spy(source):
        image = read(source)
        with lock:
            live.add(id(image))
            most[0] = max(most[0], len(live))
        weakref.finalize(image, live.discard, id(image))
        return image

    monkeypatch.setattr(predict, "read_picture", spy)
    assert cli("predict", "in", "--checkpoint", model, *ALIGNED, "--overlay", "o", cwd=tmp_path)[0] == 0
    assert len(os.listdir(tmp_path / "o")) == 24 and 1 <= most[0] <= 2 * 2 + 1


# Whole photographs


def similar(scale, degrees, x, y):
    """The map (2, 3) that turns by `degrees`, enlarges by `scale` and then moves by (x, y)."""
    a = scale * np.exp(1j * np.radians(degrees))
    return np.array([[a.real, -a.imag, x], [a.imag, a.real, y]])


def apply(warp, points):
    return points @ warp[:, :2].T + warp[:, 2]


def photograph(drawn, places):
    """A picture (192, 256, 3) RGB with drawn faces at `places`, their landmarks (5, 2), and the crops."""
    files = sorted((drawn / "dataset/processed_split/test").glob("*_image.png"))
    picture, landmarks, crops = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8), [], []
    for path, place in zip(files, places):
        crop = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        warp = place @ np.diag([1 / 200, 1 / 200, 1])  # from the crop's pixels, as predict.to_pixels does
        warp[:, 2] += warp[:, :2].sum(axis=1) / 2 - 0.5
        inside = cv2.warpAffine(np.full(crop.shape, 255, np.uint8), warp, SIZE) > 127
        picture = np.where(inside, cv2.warpAffine(crop, warp, SIZE, flags=cv2.INTER_AREA), picture)
        landmarks.append(apply(place, predict.LANDMARKS))
        crops.append(crop)
    return picture, landmarks, crops


def stand_in_detector(path, landmarks):
    """An ONNX file with YuNet's outputs that finds the faces given, whatever the picture."""
    rng = np.random.default_rng(0)
    nodes, outputs, weights = [], [], []
    values = {}
    for stride in (8, 16, 32):
        cells = (SIZE[0] // stride) * (SIZE[1] // stride)
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            values[name, stride] = np.zeros((1, cells, width), np.float32)
    for points in landmarks:
        column, row = (points.mean(axis=0) // 8).astype(int)
        cell = row * (SIZE[0] // 8) + column
        low, high = points.min(axis=0), points.max(axis=0)
        values["cls", 8][0, cell] = values["obj", 8][0, cell] = 0.9 + 0.05 * rng.random()
        values["bbox", 8][0, cell, :2] = (low + high) / 16 - (column, row)
        values["bbox", 8][0, cell, 2:] = np.log((high - low) / 8)
        values["kps", 8][0, cell] = (points / 8 - (column, row)).ravel()
    shape = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, None, None])
    nodes.append(helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0))
    weights.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for (name, stride), array in values.items():
        weights.append(numpy_helper.from_array(array, f"{name}_{stride}_values"))
        nodes.append(helper.make_node("Add", [f"{name}_{stride}_values", "nothing"], [f"{name}_{stride}"]))
        outputs.append(helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, array.shape))
    graph = helper.make_graph(nodes, "yunet", [shape], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


PLACES = [similar(90, 20, 40, 12), similar(110, -15, 120, 50)]


def test_aligned_crops_are_those_that_were_put_into_the_photograph(drawn):
    picture, landmarks, crops = photograph(drawn, PLACES)
    for points, place, crop in zip(landmarks, PLACES, crops):
        pixels, warp = predict.align(picture, points)
        assert abs(len(pixels) - np.hypot(*place[:, 0])) <= 1  # at the face's own size
        assert np.allclose(apply(warp, points), predict.LANDMARKS)
        small = cv2.resize(crop, pixels.shape[:2], interpolation=cv2.INTER_AREA)
        inner = (slice(8, -8),) * 2
        assert np.abs(pixels[inner].astype(int) - small[inner]).mean() < 8
        mask = predict.place_mask(np.ones((1, 64, 64)), warp, picture.shape)
        corners = apply(place, np.array([(0, 0), (1, 0), (1, 1), (0, 1)]))
        expected = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.rint(corners).astype(int)], 1) > 0
        assert (mask & expected).sum() / (mask | expected).sum() > 0.96


def test_faces_in_photographs_through_opencv(drawn, model, tmp_path, cli):
    """Two faces, from left to right, in the picture as it should be seen, whatever its EXIF says."""
    picture, landmarks, crops = photograph(drawn, PLACES)
    detector = stand_in_detector(tmp_path / "yunet.onnx", landmarks[::-1])
    Image.fromarray(picture).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.rot90(picture).copy()).save(tmp_path / "turned.jpg", exif=exif, quality=98)
    flags = ["--checkpoint", model, "--detector", detector, *CPU]
    code, out, err = cli(
        "predict", "upright.png", "turned.jpg", *flags, "--json", "f.json", "--overlay", "o", cwd=tmp_path
    )
    assert code == 0 and err == "" and "4 faces in 2 pictures, 0 skipped" in out
    faces = json.loads((tmp_path / "f.json").read_text())
    assert [(face["file"], face["face"]) for face in faces] == [
        ("upright.png", 0), ("upright.png", 1), ("turned.jpg", 0), ("turned.jpg", 1),
    ]  # fmt: skip
    loaded = predict.load(model, aligned=True, device="cpu")
    for i, (points, crop) in enumerate(zip(landmarks, crops)):
        box = np.r_[points.min(axis=0), np.ptp(points, axis=0)]
        (alone,) = predict.predict(loaded, crop)
        for face in (faces[i], faces[i + 2]):
            assert np.abs(np.array(face["box"]) - box).max() <= 1
            assert np.abs(np.array(list(face["probabilities"].values())) - alone.probabilities).max() < 0.05
    assert cv2.imread(str(tmp_path / "o/upright.png")).shape == (384, 512, 3)
    nobody = stand_in_detector(tmp_path / "nobody.onnx", [])
    _, _, err = cli("predict", tmp_path / "upright.png", "--checkpoint", model, "--detector", nobody, *CPU)
    assert "upright.png: no face found" in err and "none of 1 pictures" in err and "--aligned" in err


@pytest.fixture
def zoo(monkeypatch):
    """A server with files by path, and the paths that it was asked for."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(predict, "DETECTOR_URL", f"http://127.0.0.1:{server.server_port}/zoo/yunet.onnx")
    yield files, asked
    server.shutdown()
    server.server_close()


def test_the_detector_is_downloaded_once_and_checked(drawn, model, tmp_path, cli, refuse, zoo, monkeypatch):
    files, asked = zoo
    picture, landmarks, _ = photograph(drawn, PLACES)
    Image.fromarray(picture).save(tmp_path / "p.png")
    good = stand_in_detector(tmp_path / "yunet.onnx", landmarks).read_bytes()
    monkeypatch.setattr(predict, "DETECTOR_SHA256", hashlib.sha256(good).hexdigest())
    opened, create = [], cv2.FaceDetectorYN.create
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *args: opened.append(1) or create(*args))
    folder = tmp_path / "torch/hub/checkpoints"
    command = ["predict", tmp_path / "p.png", "--checkpoint", model, *CPU]
    told = [predict.DETECTOR_URL, str(folder), "--aligned"]
    refuse(*command, words=[*told, "404"])  # it is not there
    files["/zoo/yunet.onnx"] = good[:-1] + b"x"
    refuse(*command, words=[*told, "hash"])  # it is another one
    assert not opened and not list(folder.iterdir())
    files["/zoo/yunet.onnx"] = good
    code, out, err = cli(*command)
    assert code == 0 and err == "" and "2 faces" in out
    assert out.count("face detector downloaded") == 1 and f"{folder}/yunet.onnx" in out
    assert os.listdir(folder) == ["yunet.onnx"] and len(asked) == 3
    code, out, _ = cli(*command)
    assert code == 0 and "downloaded" not in out and len(asked) == 3
    opened.clear()
    (folder / "yunet.onnx").write_bytes(good + b"x")
    refuse(*command, words=[f"{folder}/yunet.onnx", "SHA-256", "delete it"])
    assert not opened and len(asked) == 3
    shutil.rmtree(folder.parents[1])
    (tmp_path / "torch").write_text("in the way")
    refuse(*command, words=[*told])


def test_no_detector_is_needed_for_crops(drawn, model, cli):
    """`no_network` would refuse it."""
    assert cli("predict", a_face(drawn), "--checkpoint", model, *ALIGNED)[0] == 0
    predict.load(model, aligned=True, device="cpu")
    with pytest.raises(UserError, match="no face detector"):
        predict.load(model, device="cpu")


@pytest.mark.skipif(not YUNET.exists(), reason="no YuNet here")
def test_the_real_detector_finds_a_drawn_face(drawn, tmp_path, capfd):
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
    for wrong in (image[..., 0], image / 255, image[:0], image[:1, :1]):
        with pytest.raises(ValueError, match="uint8"):
            predict.predict(loaded, wrong)
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode {mode}"):
            predict.predict(loaded, Image.new(mode, (80, 80)))


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


def test_import_changes_nothing_around_it():
    code = (
        "import cv2, signal; from PIL import Image; import torch\n"
        "def state(): return (Image.MAX_IMAGE_PIXELS, cv2.getNumThreads(), cv2.utils.logging.getLogLevel(),\n"
        "    torch.get_num_threads(), signal.getsignal(signal.SIGTERM))\n"
        "cv2.setNumThreads(3); before = state(); import predict; assert state() == before, (before, state())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_export_runs_elsewhere(model, plain, tmp_path, cli):
    """OpenCV and onnxruntime give what PyTorch gives, for batches of any size, from one file."""
    runtime = pytest.importorskip("onnxruntime")
    code, out, _ = cli("predict", "--export", tmp_path / "m.onnx", "--checkpoint", model, *CPU)
    assert code == 0 and "m.onnx written" in out
    assert os.listdir(tmp_path) == ["m.onnx"]
    properties = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert properties["groups"].split(",") == GROUP_NAMES
    names = ["probabilities", "predicted_age", "masks"]
    loaded = predict.load(model, aligned=True, device="cpu")
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == names
    network = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    for count in (1, 3):
        crops = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), np.uint8)
        expected = [np.array(part) for part in zip(*predict.score(loaded, list(crops)))]
        images = crops.transpose(0, 3, 1, 2).astype(np.float32)
        network.setInput(images, "images")
        for found in (session.run(names, {"images": images}), network.forward(names)):
            for part, wanted in zip(found, expected):
                assert np.abs(part.reshape(wanted.shape) - wanted).max() < 1e-3
    less = predict.load(plain, aligned=True, device="cpu").model
    assert len(predict.ExportedModel(less).eval()(torch.zeros(1, 3, 64, 64))) == 1  # no age, no mask


# The page


@pytest.fixture(scope="module")
def page(model, drawn, tmp_path_factory):
    """The address of `predict.py --serve`, in a process of its own, and the folder where uploads lie."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    detector = stand_in_detector(folder / "yunet.onnx", photograph(drawn, PLACES)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", ROOT / "predict.py", "--serve", "--port", port, "--checkpoint", model]
    command += ["--detector", detector]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "TORCH_HOME": str(folder)}
    process = subprocess.Popen(list(map(str, command)), env=environment, **options)
    try:
        lines = iter(process.stdout.readline, "")
        assert any("Running on local URL" in line for line in lines)
        yield f"http://127.0.0.1:{port}", folder / "uploads"
    finally:
        process.terminate()
        said = process.communicate()[0]
    assert "Traceback" not in said
    assert uploads(folder / "uploads") == []  # the last are deleted with the page


def uploads(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_page_labels_every_face_and_keeps_no_copies(page, drawn, model, tmp_path):
    from gradio_client import Client, handle_file

    address, folder = page
    picture, landmarks, _ = photograph(drawn, PLACES)
    detector = stand_in_detector(tmp_path / "yunet.onnx", landmarks)
    faces = predict.predict(predict.load(model, detector, device="cpu"), picture)
    client = Client(address, verbose=False)
    forms = {"p.png": picture, "a.png": np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])}
    forms["g.gif"] = picture
    for name, pixels in forms.items():
        Image.fromarray(pixels).save(tmp_path / name)
        shown, table, again = client.predict(handle_file(str(tmp_path / name)), api_name="/predict")
        assert again is None and len(table["data"]) == 2
        drawn_in = Image.open(io.BytesIO(base64_of(shown)))
        assert drawn_in.size == (512, 384)
        if name != "g.gif":  # of 256 colours
            for row, face in zip(table["data"], faces):
                assert row[0] == predict.label(face.probabilities, face.predicted_age)
                assert row[1:] == [f"{chance:.1%}" for chance in face.probabilities]
    left = {path.read_bytes() for path in uploads(folder)}
    assert left <= {(tmp_path / name).read_bytes() for name in forms}  # nothing re-encoded


def base64_of(shown):
    return base64.b64decode(re.search('src="data:image/jpeg;base64,([^"]*)"', shown)[1])


def test_the_page_says_why_it_refuses(page, tmp_path):
    from gradio_client import Client, handle_file

    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    Image.new("RGB", (1, 1)).save(tmp_path / "small.png")
    client = Client(page[0], verbose=False)
    for name, reason in (
        ("huge.png", "above 50 million"),
        ("empty.jpg", "unreadable image"),
        ("text.txt", "unreadable image"),
        ("photo.heic", "unreadable image"),
        ("small.png", "1x1 pixels"),
    ):
        shown, table, _ = client.predict(handle_file(str(tmp_path / name)), api_name="/predict")
        assert "This picture cannot be used" in shown and reason in shown and "<img" not in shown
        assert table["data"] in ([], [[""] * 7])


def test_page_refuses_large_files(page):
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + bytes(21 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    content = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{page[0]}/gradio_api/upload", body, content)
    with pytest.raises(OSError) as refused:  # HTTP status 413, or the connection is closed on us
        urllib.request.urlopen(request)
    assert getattr(refused.value, "code", 413) == 413


def test_bad_input(model, tmp_path, cli, refuse):
    noise_pairs(tmp_path, [30])
    picture = next(tmp_path.glob("*_image.png"))
    flags = ["--checkpoint", model, *CPU]
    refuse("predict", words=["nothing to do"])
    refuse("predict", tmp_path / "none.jpg", *flags, words=["none.jpg is not there"])
    (tmp_path / "empty").mkdir()
    refuse("predict", tmp_path / "empty", *flags, words=["empty holds no picture"])
    refuse("predict", picture, "--checkpoint", tmp_path / "no.pt", *ALIGNED, words=["no.pt is not there"])
    refuse(
        "predict", picture, *flags, "--detector", tmp_path / "y.onnx", words=["--detector", "cannot be read"]
    )
    (tmp_path / "y.onnx").write_text("no network")
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
    refuse("predict", picture, *flags, "--overlay", tmp_path, words=["--overlay", "replace the pictures"])
    (tmp_path / "here").mkdir()
    shutil.copy(picture, tmp_path / "here")
    for inputs, folder, cwd in (
        ([f"../{picture.name}", picture.name], "..", tmp_path / "here"),
        ([picture.name, f"here/{picture.name}"], "here", tmp_path),
    ):
        refuse("predict", *inputs, *flags, "--overlay", folder, words=["replace the pictures"], cwd=cwd)
    refuse("predict", picture, *flags, "--csv", picture / "f.csv", words=["--csv"])
    (tmp_path / "broken.jpg").write_text("no picture")
    _, _, err = cli("predict", tmp_path / "broken.jpg", "--aligned", *flags)
    assert "skipped" in err and "none of 1 pictures holds a face" in err.splitlines()[-1]
