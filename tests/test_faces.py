"""faces.py: which faces it finds, which way up, and the crops and masks it cuts out and puts back."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import faces
from conftest import ROOT

YUNET = ROOT.parent / "shared/yunet/face_detection_yunet_2023mar.onnx"
BOX, SIDE = 80, 96  # pixels of a stand-in face's box, and of its crop
POINTS = faces.LANDMARKS * SIDE - SIDE / 2  # from its middle
PLACES = [(104, 80), (296, 176)]  # of faces in a photograph


def stand_in_detector(path):
    """An ONNX file like YuNet's: it sees a face 80 pixels wide between a red square above and a blue below.

    So it knows which way up a face is and in which order the channels come, at one size alone.
    """
    nodes, outputs, weights = [], [], []

    def add(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    def constant(name, values):
        weights.append(numpy_helper.from_array(np.array(values, np.float32), name))
        return name

    # Input is BGR. A cell of 8x8 pixels that is red, or blue, is 0.5, any other less or 0.
    add("AveragePool", ["input"], "cells", kernel_shape=[8, 8], strides=[8, 8])
    colors = np.array([[-1, -1, 1], [1, -1, -1]], np.float32)[..., None, None] / 255
    add("Conv", ["cells", constant("colors", colors), constant("half", [-0.5, -0.5])], "match")
    add("Relu", ["match"], "matched")
    both = np.zeros((1, 2, 7, 7), np.float32)
    both[0, 0, 0, 3] = both[0, 1, 6, 3] = 6  # red three cells above and blue three below
    add("Conv", ["matched", constant("both", both), constant("less", [-3.3])], "sum", pads=[3] * 4)
    add("Min", ["sum", constant("most", 0.95)], "most_of_it")
    add("Relu", ["most_of_it"], "score")
    weights.append(numpy_helper.from_array(np.array([1, -1, 1]), "rows_1"))
    values = {"bbox": [1, 1, np.log(BOX / 8), np.log(BOX / 8)], "kps": 1 + POINTS.ravel() / 8}
    for width, filler in ((4, values["bbox"]), (10, values["kps"])):
        weights.append(numpy_helper.from_array(np.array([1, -1, width]), f"rows_{width}"))
        constant(f"filler_{width}", filler)
    for stride in (8, 16, 32):
        kernel = [stride, stride]
        add("AveragePool", ["input"], f"pool_{stride}", kernel_shape=kernel, strides=kernel)
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            full = f"{name}_{stride}"
            if width == 1 and stride == 8:
                source = "score"
            else:
                nothing = constant(f"{full}_w", np.zeros((width, 3, 1, 1)))
                filler = constant(f"{full}_b", np.zeros(1) if width == 1 else values[name])
                add("Conv", [f"pool_{stride}", nothing, filler], f"{full}_map")
                source = f"{full}_map"
            add("Transpose", [source], f"{full}_last", perm=[0, 2, 3, 1])
            add("Reshape", [f"{full}_last", f"rows_{width}"], full)
            outputs.append(helper.make_tensor_value_info(full, TensorProto.FLOAT, [1, None, width]))
    shape = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, None, None])
    graph = helper.make_graph(nodes, "yunet", [shape], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def stand_in_face(seed=0):
    """A crop that the stand-in sees, uint8 RGB (96, 96, 3)."""
    coarse = np.random.default_rng(seed).integers(60, 160, (6, 6, 3), np.uint8)
    crop = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    crop[16:24, 40:48], crop[64:72, 40:48] = (255, 0, 0), (0, 0, 255)
    return crop


def photograph(places, size=(400, 304), zoom=1, crops=None):
    """A grey picture of `size` (width, height) with stand-in faces whose middles are at `places`, and those.

    zoom: how many times larger each is than the stand-in sees it; places are multiples of 8 times that.
    """
    picture = np.full((size[1], size[0], 3), 90, np.uint8)
    crops = crops or [stand_in_face(seed) for seed in range(len(places))]
    for crop, (x, y) in zip(crops, places):
        half = SIDE // 2 * zoom
        picture[y - half : y + half, x - half : x + half] = crop.repeat(zoom, 0).repeat(zoom, 1)
    return picture, crops


def similar(scale, degrees, x, y):
    """The map (2, 3) that turns by `degrees`, enlarges by `scale` and then moves by (x, y)."""
    a = scale * np.exp(1j * np.radians(degrees))
    return np.array([[a.real, -a.imag, x], [a.imag, a.real, y]])


def test_crops_are_those_that_were_put_into_the_picture(detector):
    """Pixel by pixel, whichever way up the picture is, with box, landmarks and score where they should be."""
    places = PLACES
    picture, crops = photograph(places)
    detect = pickle.loads(pickle.dumps(faces.open_detector(detector)))
    for quarters in range(4):
        turned = np.rot90(picture, quarters)
        found = faces.find_crops(turned, detect)
        back = faces.quarter_turn(quarters, turned.shape[1], turned.shape[0])
        found.sort(key=lambda crop: faces.apply(back, crop.landmarks)[2, 0])
        assert len(found) == 2
        for crop, pixels, place in zip(found, crops, places):
            assert np.array_equal(crop.pixels, pixels)
            assert np.allclose(faces.apply(back, crop.landmarks), POINTS + place, atol=0.01)
            assert np.allclose(faces.apply(crop.warp, crop.landmarks), faces.LANDMARKS, atol=1e-4)
            assert 0.9 < crop.score <= 1
            x, y, width, height = crop.box
            middle = faces.apply(back, np.array([[x + width / 2, y + height / 2]]))[0]
            assert np.allclose(middle, place) and (width, height) == (BOX, BOX)
    boxes = [crop.box[0] for crop in faces.find_crops(picture, detect)]
    assert boxes == sorted(boxes)


def test_each_face_of_a_large_picture_once(detector, monkeypatch):
    """Across the edges of tiles, in their overlaps, at the border, and at several scales."""
    places = [(1152, 400), (1216, 640), (1280, 880), (48, 48), (2304, 1232), (2400, 120)]
    picture, _ = photograph(places, (2600, 1600))
    large, _ = photograph([(512, 1024)], (2600, 1600), zoom=4)
    picture[800:1300, 256:768] = large[800:1300, 256:768]
    found = faces.find_crops(picture, faces.open_detector(detector))
    middles = {(round(c.box[0] + c.box[2] / 2), round(c.box[1] + c.box[3] / 2)): c for c in found}
    assert sorted(middles) == sorted([*places, (512, 1024)]) and len(found) == len(middles)
    assert middles[512, 1024].box[2] == 320 and len(middles[512, 1024].pixels) == 384
    close, _ = photograph([(512, 384)], (1000, 800), zoom=4)  # which fills half the picture
    (crop,) = faces.find_crops(close, faces.open_detector(detector))
    assert crop.box == (352, 224, 320, 320)
    monkeypatch.setattr(faces, "SEEN", 1000)  # so that smaller ones are seen, too
    (crop,) = faces.find_crops(picture, faces.open_detector(detector, min_face=81))
    assert crop.box[2] == 320
    assert faces.find_crops(picture, faces.open_detector(detector, min_score=0.99)) == []


def test_of_faces_seen_on_their_head_the_surest_way_up_counts(detector):
    """YuNet sees such a face as well, a little less surely, and takes its chin for its forehead."""
    picture, crops = photograph(PLACES)
    look = partial(faces.run_network, detector.read_bytes())

    def look_twice(image):
        size = image.shape[1::-1]
        on_head = faces.move(look(np.rot90(image, 2)), faces.quarter_turn(2, *size))
        on_head[:, 4:14] = np.tile(on_head[:, :2] + BOX / 2, 5) + POINTS.ravel()
        on_head[:, 14] *= 0.9
        return np.concatenate([look(image), on_head])

    for quarters in (0, 2):
        detect = partial(faces.detect, look_twice, 0.5, 20)
        found = faces.find_crops(np.rot90(picture, quarters), detect)
        wanted = crops if quarters == 0 else crops[::-1]
        assert all(np.array_equal(crop.pixels, pixels) for crop, pixels in zip(found, wanted, strict=True))


def test_of_boxes_that_overlap_the_surest_stays():
    rows = np.zeros((3, 15))
    rows[:, :4] = [(100, 0, 50, 50), (104, 2, 50, 50), (0, 9, 50, 50)]
    rows[:, 14] = (0.85, 0.9, 0.8)
    assert faces.each_once(rows)[:, 0].tolist() == [0, 104]  # from left to right
    assert faces.each_once(rows[:0]).shape == (0, 15)


def test_faces_side_by_side_are_two(detector):
    """Each sees the other when it is looked at closely."""
    picture, _ = photograph([(104, 80), (160, 80), (160, 176)])
    found = faces.find_crops(picture, faces.open_detector(detector))
    assert [crop.box[:2] for crop in found] == [(64, 40), (120, 40), (120, 136)]
    for crop in found:  # its own eyes, not its neighbour's
        assert np.allclose(crop.landmarks, POINTS + crop.box[:2] + BOX / 2, atol=8)


def test_landmarks_are_those_of_the_face_upright(monkeypatch):
    face, straight = np.full((2, 1, 15), 10.0)
    face[0, 4:14], straight[0, 4:14] = (faces.LANDMARKS * 9).ravel(), (faces.LANDMARKS * 10).ravel()
    looks = iter([face, face[:0], face[:0], face[:0], straight])
    monkeypatch.setattr(faces, "look_through", lambda *_: next(looks))
    best, quarters = faces.look_closely(None, None, face[0])
    assert quarters == 0 and np.array_equal(best[4:14], straight[0, 4:14])


def test_boxes_lie_in_the_picture(detector):
    picture, _ = photograph([(104, 80)])
    (crop,) = faces.find_crops(picture[:, 72:], faces.open_detector(detector))
    assert crop.box == (0, 40, 72, 80)
    assert crop_at(faces.LANDMARKS * 40, picture[:100, :50], (-10.4, -3, 30, 20)).box == (0, 0, 20, 17)
    assert crop_at(faces.LANDMARKS * 40, picture[:100, :50], (40, 90, 30, 20)).box == (40, 90, 10, 10)


def crop_at(landmarks, picture, box=(0, 0, 1, 1)):
    """The crop of a face with these landmarks, (5, 2), and this box."""
    (crop,) = faces.find_crops(picture, lambda _: np.array([[*box, *landmarks.ravel(), 1]]))
    return crop


def test_what_lies_beyond_the_edge_is_as_the_edge():
    picture = np.full((100, 100, 3), 90, np.uint8)
    assert (crop_at(faces.LANDMARKS * 60 - 20, picture).pixels == 90).all()


@pytest.mark.parametrize("scale, degrees, x, y", [(90, 20, 40, 12), (110, -15, 120, 50), (64, 0, 30, 30)])
def test_alignment_and_masks_undo_each_other(scale, degrees, x, y):
    """A face that lies askew comes out as it was put in, and its mask lies where it was."""
    place, crop = similar(scale, degrees, x, y), stand_in_face()
    there = faces.to_pixels(cv2.invertAffineTransform(place), SIDE)
    picture = cv2.warpAffine(crop, there, (256, 192), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    points = faces.apply(place, faces.LANDMARKS)
    found = crop_at(points, picture)
    pixels, warp = found.pixels, found.warp
    assert abs(len(pixels) - scale) <= 1  # at the face's own size
    assert np.allclose(faces.apply(warp, points), faces.LANDMARKS)
    small = cv2.resize(crop, pixels.shape[:2], interpolation=cv2.INTER_AREA)
    inner = (slice(8, -8),) * 2
    assert np.abs(pixels[inner].astype(int) - small[inner]).mean() < 5
    mask = faces.place_mask(np.ones((64, 64), np.float32), warp, picture.shape)
    corners = faces.apply(place, np.array([(0, 0), (1, 0), (1, 1), (0, 1)]))
    expected = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.rint(corners - 0.5).astype(int)], 1) > 0
    assert mask.dtype == bool and (mask & expected).sum() / (mask | expected).sum() > 0.96


def test_half_a_mask_is_placed_to_the_pixel():
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 0.9
    warp = np.array([[1, 0, -40], [0, 1, -20]]) / 128
    placed = faces.place_mask(mask, warp, (200, 300))
    assert placed[20:148, 104:168].all() and placed.sum() == 128 * 64


def test_large_faces_are_averaged_down():
    """A face three times the largest crop is the average over its pixels, not every third of them."""
    fine = np.random.default_rng(0).integers(0, 256, (1536, 1536, 3), np.uint8)
    picture = np.full((1700, 1800, 3), 90, np.uint8)
    picture[100:1636, 200:1736] = fine
    pixels = crop_at(faces.LANDMARKS * 1536 + (200, 100), picture).pixels
    assert np.array_equal(pixels, cv2.resize(fine, (512, 512), interpolation=cv2.INTER_AREA))


def test_crops_without_a_detector_are_central_squares():
    picture = np.random.default_rng(0).integers(0, 256, (120, 100, 3), np.uint8)
    (crop,) = faces.find_crops(picture)
    assert np.array_equal(crop.pixels, picture[10:110]) and crop.box == (0, 10, 100, 100)
    assert crop.score is None and crop.landmarks is None
    assert np.allclose(faces.apply(crop.warp, np.array([(0, 10), (100, 110)])), [(0, 0), (1, 1)])


def test_import_needs_no_torch():
    code = "import sys; import faces; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# YuNet's file


def test_the_detector_comes_from_where_github_serves_large_files():
    """Its host for raw files gives the pointer of Git LFS instead."""
    assert faces.DETECTOR_URL.startswith("https://media.githubusercontent.com/media/opencv/opencv_zoo/")


def test_faces_less_sure_than_most_are_found(detector, monkeypatch):
    look = faces.run_network
    for factor, count in ((0.84, 2), (0.76, 0)):  # of the score: 0.8, and 0.72
        factors = np.array([1] * 14 + [factor])
        monkeypatch.setattr(faces, "run_network", lambda *args, factors=factors: look(*args) * factors)
        assert len(faces.open_detector(detector)(photograph(PLACES)[0])) == count


def test_faces_hardly_noticed_are_found_where_they_are_asked_for(detector):
    crop = stand_in_face()
    crop[16:24, 40:48], crop[64:72, 40:48] = (208, 0, 0), (0, 0, 208)  # duller
    picture, _ = photograph(PLACES[:1], crops=[crop])
    (found,) = faces.find_crops(picture, faces.open_detector(detector, min_score=0.4))
    assert 0.4 < found.score < 0.6
    assert faces.find_crops(picture, faces.open_detector(detector)) == []


def test_a_face_is_as_large_as_the_second_look_sees_it(monkeypatch):
    first, second = np.zeros((1, 15)), np.zeros((1, 15))
    first[0, :4], second[0, :4], second[0, 14] = (50, 50, 100, 100), (85, 85, 30, 30), 0.9
    second[0, 4:14] = (faces.LANDMARKS * 30 + 85).ravel()
    monkeypatch.setattr(faces, "search", lambda *_: first)
    monkeypatch.setattr(faces, "look_closely", lambda *_: (second[0], 0))
    for least, count in ((50, 0), (30, 1)):
        assert len(faces.detect(None, 0.5, least, np.zeros((200, 200, 3), np.uint8))) == count


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A server with files by path, the paths that it was asked for, and an empty cache."""
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
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(faces, "DETECTOR_URL", f"http://127.0.0.1:{server.server_port}/zoo/yunet.onnx")
    yield files, asked
    server.shutdown()
    server.server_close()


def test_the_detector_is_downloaded_once_and_checked(detector, tmp_path, zoo, monkeypatch, capsys):
    files, asked = zoo
    good = detector.read_bytes()
    monkeypatch.setattr(faces, "DETECTOR_SHA256", hashlib.sha256(good).hexdigest())
    opened, create = [], cv2.FaceDetectorYN.create
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *args: opened.append(1) or create(*args))
    folder = tmp_path / "torch/hub/checkpoints"

    def refused(*words):
        with pytest.raises(faces.UserError) as error:
            faces.open_detector()
        assert all(word in str(error.value) for word in words), error.value
        assert not opened

    told = [faces.DETECTOR_URL, str(folder), "--detector"]
    refused(*told, "404")  # it is not there
    files["/zoo/yunet.onnx"] = good[:-1] + b"x"
    refused(*told, "hash")  # it is another one
    assert not list(folder.iterdir())
    files["/zoo/yunet.onnx"] = good
    assert len(faces.open_detector()(photograph([(104, 80)])[0])) == 1
    assert f"face detector downloaded to {folder}/yunet.onnx" in capsys.readouterr().out
    assert os.listdir(folder) == ["yunet.onnx"] and len(asked) == 3
    faces.open_detector()
    assert "downloaded" not in capsys.readouterr().out and len(asked) == 3
    opened.clear()
    (folder / "yunet.onnx").write_bytes(good + b"x")
    refused(f"{folder}/yunet.onnx", "SHA-256", "delete it")
    assert len(asked) == 3
    shutil.rmtree(folder.parents[1])
    (tmp_path / "torch").write_text("in the way")
    refused(*told)


def test_another_file_is_no_detector(tmp_path):
    for content in (None, b"no network"):
        if content:
            (tmp_path / "y.onnx").write_bytes(content)
        with pytest.raises(faces.UserError, match=r"--detector .*y.onnx cannot be read as a face detector"):
            faces.open_detector(tmp_path / "y.onnx")


@pytest.mark.skipif(not YUNET.exists(), reason="no YuNet here")
def test_the_real_detector(capfd):
    """It finds each face of a photograph once, at every size and each way up; its warnings stay unsaid."""
    assert hashlib.sha256(YUNET.read_bytes()).hexdigest() == faces.DETECTOR_SHA256
    log = cv2.utils.logging
    before = log.setLogLevel(log.LOG_LEVEL_WARNING)
    try:
        detect = faces.open_detector(YUNET)
        assert log.getLogLevel() == log.LOG_LEVEL_WARNING
    finally:
        log.setLogLevel(before)
    assert capfd.readouterr().err == ""
    picture = cv2.imread(str(YUNET.parents[1] / "photos/two_faces.jpg"))[:, :, ::-1]
    upright = detect(picture)
    assert len(upright) == 2
    for quarters, side in ((1, 992), (2, 500), (0, 1984)):
        scale = side / 992
        turned = np.rot90(cv2.resize(picture, None, fx=scale, fy=scale), quarters)
        found = detect(turned)
        back = faces.quarter_turn(quarters, turned.shape[1], turned.shape[0])
        found = faces.move(found, back) / np.array([*[scale] * 14, 1])
        found = found[found[:, 0].argsort()]
        assert np.abs(found - upright)[:, 4:14].max() < 12  # of faces 110 and 170 wide
