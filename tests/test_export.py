"""tools/export.py: the ONNX file says what PyTorch says, tells how to use it, and gives nothing away."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
import predict
from cli import run
from common import load_checkpoint, to_input
from conftest import ROOT, shell, write_model
from small_model import small_backbone
from utkface import AGE_GROUPS, GROUP_NAMES

NAMES = ["probabilities", "predicted_age", "age_low", "age_high", "masks"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with model.pt, of the small backbone, and m.onnx; that backbone stays for the module."""
    folder = tmp_path_factory.mktemp("export")
    files = [str(folder / name) for name in ("model.pt", "m.onnx")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.resnet18", small_backbone)
        write_model(files[0])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            run(export.main, export.get_parser(), ["--checkpoint", files[0], "--out", files[1]])
        assert out.getvalue().count("\n") == 2 and f"{files[1]} written: 64 px, Infant" in out.getvalue()
        assert err.getvalue() == ""
        yield folder


def test_it_runs_elsewhere(exported):
    """OpenCV and onnxruntime give what PyTorch gives, for batches of any size, from one file."""
    loaded = predict.load(exported / "model.pt", aligned=True, device="cpu")
    session = onnxruntime.InferenceSession(exported / "m.onnx")
    assert [output.name for output in session.get_outputs()] == NAMES
    network = cv2.dnn.readNetFromONNX(str(exported / "m.onnx"))
    for count in (1, 3):
        crops = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), np.uint8)
        with torch.inference_mode():
            expected = predict.outputs(loaded.model, to_input(torch.from_numpy(crops), loaded.device))
        images = crops.transpose(0, 3, 1, 2).astype(np.float32)
        network.setInput(images, "images")
        for found in (session.run(NAMES, {"images": images}), network.forward(NAMES)):
            for name, part in zip(NAMES, found):
                wanted = expected[name].numpy()
                assert np.abs(part.reshape(wanted.shape) - wanted).max() < 1e-3, name


def test_metadata_say_how_to_use_it(exported):
    said = {prop.key: prop.value for prop in onnx.load(exported / "m.onnx").metadata_props}
    assert said["groups"].split(",") == GROUP_NAMES
    assert {name: tuple(years) for name, years in json.loads(said["group_years"]).items()} == AGE_GROUPS
    landmarks = json.loads(said["landmarks"])
    assert landmarks == {
        "right_eye": [0.3, 0.3], "left_eye": [0.686, 0.302], "nose": [0.491, 0.547],
        "right_mouth": [0.326, 0.69], "left_mouth": [0.66, 0.69],
    }  # fmt: skip # as the released model has learned from them
    assert "RGB" in said["input"] and "not 0 to 1" in said["input"] and "64 x 64" in said["input"]
    assert (
        said["mask_threshold"] == "0.5"
        and "years" in said["age_unit"]
        and said["licence"].startswith("if trained on UTKFace")
    )


def test_no_path_of_this_machine_is_in_it(exported):
    data = (exported / "m.onnx").read_bytes()
    for words in (b".py", b"site-packages", str(ROOT).encode(), str(exported).encode()):
        assert words not in data


def test_a_model_of_groups_alone(tmp_path):
    path = write_model(tmp_path / "plain.pt", multitask=False, age_sigma=0)
    plain = predict.load(path, aligned=True, device="cpu").model
    assert len(export.ExportedModel(plain).eval()(torch.zeros(1, 3, 64, 64))) == 1
    assert not {"mask_threshold", "age_unit"} & set(export.metadata(plain, 64))
    masked = predict.load(write_model(path, age_sigma=0), aligned=True, device="cpu").model
    about = export.metadata(masked, 64)
    assert about["mask_threshold"] == "0.5" and "age_unit" not in about


def test_what_stands_in_the_way_is_one_line(exported, tmp_path, refuse, monkeypatch):
    flags = ["--checkpoint", exported / "model.pt", "--out", tmp_path / "m.onnx"]
    done = shell("export", "--out", ".", cwd=tmp_path)  # as a user runs it
    assert done.returncode == 2 and "--out . is a folder" in done.stderr
    refuse("export", "--checkpoint", tmp_path / "no.pt", words=["no.pt is not there"])
    path = exported / "model.pt"
    refuse("export", "--checkpoint", path, "--out", path, words=["would replace the checkpoint"])

    def broken(*_, **__):
        raise AttributeError("module 'onnxscript' has no attribute 'x'\nand more")

    monkeypatch.setattr(export.torch.onnx, "export", broken)
    refuse("export", *flags, words=["AttributeError", "onnxscript 0.", "pip install -U torch onnxscript"])
    other = f"{path.parent}/../{path.parent.name}/model.pt"
    refuse("export", "--checkpoint", path, "--out", other, words=["would replace the checkpoint"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuse("export", *flags, words=["onnxscript", "pip install onnx onnxscript"])
    assert not list(tmp_path.iterdir())


def test_the_example_in_python_runs(exported, tmp_path):
    """docs/onnx.md, on a drawn face; it needs neither PyTorch nor this project."""
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/onnx.md").read_text(encoding="utf-8"), re.DOTALL
    )
    shutil.copy(exported / "m.onnx", tmp_path / "model.onnx")
    shutil.copy(next((ROOT / "docs").glob("25_*.jpg")), tmp_path / "face.jpg")
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (face,) = predict.predict(
        predict.load(exported / "model.pt", aligned=True, device="cpu"),
        cv2.cvtColor(cv2.imread(str(tmp_path / "face.jpg")), cv2.COLOR_BGR2RGB),
    )
    assert face.group in done.stdout and f"about {face.predicted_age:.0f}" in done.stdout


@pytest.mark.skipif(not shutil.which("node"), reason="no Node.js here")
def test_the_example_in_javascript_can_be_read(tmp_path):
    [code] = re.findall(r"```js\n(.*?)```", (ROOT / "docs/onnx.md").read_text(encoding="utf-8"), re.DOTALL)
    [groups], [size] = re.findall(r"const groups = (.*?);", code), re.findall(r"const size = (\d+);", code)
    released = load_checkpoint(ROOT / "weights/age_multitask.pt", "model")["preprocessing"]
    assert json.loads(groups) == GROUP_NAMES and int(size) == released["image_size"]
    (tmp_path / "run.mjs").write_text(code)
    subprocess.run(["node", "--check", "run.mjs"], cwd=tmp_path, check=True)
