import csv
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from argparse import Namespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import predict
from common import GROUP_NAMES, make_model, save_checkpoint
from conftest import ROOT, noise_pairs

CPU = ["--device", "cpu", "--workers", 2]
SIZE = (256, 192)  # width and height of the photographs below


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A multitask model of years, views averaged, with random weights: what it says is of no matter here."""
    torch.manual_seed(0)
    settings = {"multitask": True, "age_sigma": 2.0, "flip_averaging": True, "crop_averaging": True}
    settings["image_size"] = 64
    network = make_model(settings)
    for module in network.modules():  # statistics other than those a fresh network has
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_checkpoint(
        path, "model", Namespace(**settings), weights=network.state_dict(), epoch=1, val={},
        train_hashes=torch.zeros(0, dtype=torch.int64), pretraining={},
    )  # fmt: skip
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_says_of_a_folder_what_evaluate_says(drawn, model, tmp_path, cli):
    data = drawn / "dataset/processed_split"
    assert cli("evaluate", model, "--data", data, "--out", tmp_path / "r", "--device", "cpu")[0] == 0
    shutil.copytree(data / "test", tmp_path / "in", ignore=shutil.ignore_patterns("*_mask.png"))
    (tmp_path / "in/deeper").mkdir()
    (tmp_path / "in/deeper/broken.jpg").write_text("no picture")
    files = ["--csv", "f.csv", "--json", "f.json", "--overlay", "drawn", "--masks", "masks"]
    code, out, err = cli("predict", "in", "--checkpoint", model, *files, *CPU, cwd=tmp_path)
    assert code == 0 and f"model: {model}" in out and "Middle-aged" in out
    assert err == "skipped in/deeper/broken.jpg: unreadable image\n"
    rows, expected = read(tmp_path / "f.csv"), read(tmp_path / "r/predictions.csv")
    assert [row["file"] for row in rows] == sorted(f"in/{row['file']}" for row in expected)
    found = {row["file"].removeprefix("in/"): row for row in rows}
    for row in expected:
        for group in range(6):
            assert float(found[row["file"]][f"p{group}"]) == pytest.approx(float(row[f"p{group}"]), abs=2e-5)
        assert found[row["file"]]["group"] == GROUP_NAMES[int(row["predicted"])]
    faces = json.loads((tmp_path / "f.json").read_text())
    assert list(faces[0]) == ["file", "face", "group", "box", "probabilities"]
    assert faces[0]["box"] == [0, 0, 200, 200] and list(faces[0]["probabilities"]) == GROUP_NAMES
    mask = cv2.imread(str(tmp_path / f"masks/{expected[0]['file']}_0_mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (200, 200) and set(np.unique(mask)) <= {0, 255}
    assert min(cv2.imread(str(tmp_path / "drawn" / expected[0]["file"])).shape[:2]) >= 360


def test_default_checkpoint(model, tmp_path, cli, refuse, monkeypatch):
    noise_pairs(tmp_path, [30])
    picture = next(tmp_path.glob("*_image.png"))
    monkeypatch.setattr(predict, "RELEASED", tmp_path / "weights/age_multitask.pt")
    refuse("predict", picture, *CPU, words=["age_multitask.pt is not there"], cwd=tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(model, tmp_path / "weights/age_multitask.pt")
    code, out, _ = cli("predict", picture, *CPU, cwd=tmp_path)
    assert code == 0 and f"model: {tmp_path / 'weights/age_multitask.pt'}" in out
    shutil.copy(model, tmp_path / "model.pt")
    assert "model: model.pt\n" in cli("predict", picture, *CPU, cwd=tmp_path)[1]


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
        mask = predict.place_mask(np.ones((64, 64), np.float32), warp, picture.shape)
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
    loaded = predict.load(model, device="cpu")
    for i, (points, crop) in enumerate(zip(landmarks, crops)):
        box = np.r_[points.min(axis=0), np.ptp(points, axis=0)]
        (alone,) = predict.predict(loaded, crop)
        for face in (faces[i], faces[i + 2]):
            assert np.abs(np.array(face["box"]) - box).max() <= 1
            assert np.abs(np.array(list(face["probabilities"].values())) - alone.probabilities).max() < 0.05
    assert cv2.imread(str(tmp_path / "o/upright.png")).shape == (384, 512, 3)
    nobody = stand_in_detector(tmp_path / "nobody.onnx", [])
    _, _, err = cli("predict", tmp_path / "upright.png", "--checkpoint", model, "--detector", nobody, *CPU)
    assert "upright.png: no face found" in err and "none of 1 pictures" in err


def test_a_photograph_without_detector_is_a_warning(model, tmp_path, cli):
    Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(tmp_path / "wide.png")
    code, _, err = cli(
        "predict", tmp_path / "wide.png", "--checkpoint", model, *CPU, "--csv", tmp_path / "f.csv"
    )
    assert code == 0 and "1 pictures are not square" in err and "--detector" in err
    row = read(tmp_path / "f.csv")[0]
    assert [row[key] for key in ("x", "y", "width", "height")] == ["50", "0", "100", "100"]


# From Python, and exported


def test_from_python(model):
    loaded = predict.load(model, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (120, 100, 3), np.uint8)
    (face,) = predict.predict(loaded, image)
    assert face.probabilities.shape == (6,) and face.probabilities.sum() == pytest.approx(1)
    assert face.group == GROUP_NAMES[face.probabilities.argmax()] and face.box == (0, 10, 100, 100)
    assert face.mask.shape == (120, 100) and face.mask.dtype == bool
    for wrong in (image[..., 0], image / 255, image[:0]):
        with pytest.raises(ValueError, match="uint8"):
            predict.predict(loaded, wrong)


def test_export_runs_elsewhere(drawn, model, tmp_path, cli):
    """OpenCV and onnxruntime give what PyTorch gives, for batches of any size, from one file."""
    runtime = pytest.importorskip("onnxruntime")
    flags = ["--checkpoint", model, *CPU]
    code, out, _ = cli("predict", a_face(drawn), "--export", tmp_path / "m.onnx", *flags)
    assert code == 0 and "m.onnx written" in out and "1 faces in 1 pictures" in out
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    properties = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert properties["groups"].split(",") == GROUP_NAMES
    loaded = predict.load(model, device="cpu")
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    network = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    for count in (1, 3):
        crops = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), np.uint8)
        expected = predict.score(loaded, crops)
        images = crops.transpose(0, 3, 1, 2).astype(np.float32)
        network.setInput(images, "images")
        for found in (
            session.run(["probabilities", "masks"], {"images": images}),
            network.forward(["probabilities", "masks"]),
        ):
            assert np.abs(found[0] - expected[0]).max() < 1e-4
            assert np.abs(found[1][:, 0] - expected[1]).max() < 1e-4


@pytest.fixture(scope="module")
def page(model, drawn):
    """The address of `predict.py --serve`, in a process of its own."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", ROOT / "predict.py", "--serve", "--port", port, "--checkpoint", model]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=model.parent)
    try:
        lines = iter(process.stdout.readline, "")
        assert any("Running on local URL" in line for line in lines)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def a_face(drawn):
    return str(next((drawn / "dataset/processed_split/test").glob("*_image.png")))


def test_page_answers_as_predict_does(page, model, drawn):
    from gradio_client import Client, handle_file

    overlay, chances = Client(page, verbose=False).predict(handle_file(a_face(drawn)), api_name="/predict")
    image = cv2.cvtColor(cv2.imread(a_face(drawn)), cv2.COLOR_BGR2RGB)
    (face,) = predict.predict(predict.load(model, device="cpu"), image)
    found = {row["label"]: row["confidence"] for row in chances["confidences"]}
    assert chances["label"] == face.group and set(found) == set(GROUP_NAMES)
    expected = dict(zip(GROUP_NAMES, face.probabilities))
    assert all(found[name] == pytest.approx(expected[name], abs=1e-4) for name in GROUP_NAMES)
    assert Image.open(overlay).size == (400, 400)


def test_page_refuses_large_files(page):
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + bytes(21 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    content = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{page}/gradio_api/upload", body, content)
    with pytest.raises(OSError) as refused:  # HTTP status 413, or the connection is closed on us
        urllib.request.urlopen(request)
    assert getattr(refused.value, "code", 413) == 413


def test_page_in_a_browser(page, drawn):
    browsers = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium")
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, requests = browser.new_page(), []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page)
        tab.wait_for_selector("input[type=file]", state="attached")
        tab.set_input_files("input[type=file]", a_face(drawn))
        tab.wait_for_function("() => /\\d+%/.test(document.body.innerText)")
        text = tab.inner_text("body")
        browser.close()
    assert all(name in text for name in GROUP_NAMES)
    assert all(url.startswith((page, "data:", "blob:")) for url in requests)  # nothing from the network


def test_bad_input(model, tmp_path, cli, refuse):
    noise_pairs(tmp_path, [30])
    picture = next(tmp_path.glob("*_image.png"))
    flags = ["--checkpoint", model, *CPU]
    refuse("predict", words=["nothing to do"])
    refuse("predict", tmp_path / "none.jpg", *flags, words=["none.jpg is not there"])
    (tmp_path / "empty").mkdir()
    refuse("predict", tmp_path / "empty", *flags, words=["empty holds no picture"])
    refuse("predict", picture, "--checkpoint", tmp_path / "no.pt", *CPU, words=["no.pt is not there"])
    refuse(
        "predict", picture, *flags, "--detector", tmp_path / "y.onnx", words=["--detector", "is not there"]
    )
    (tmp_path / "y.onnx").write_text("no network")
    refuse(
        "predict", picture, *flags, "--detector", tmp_path / "y.onnx", words=["y.onnx is no face detector"]
    )
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
    _, _, err = cli("predict", tmp_path / "broken.jpg", *flags)
    assert "skipped" in err and "none of 1 pictures holds a face" in err.splitlines()[-1]
