"""The whole chain as a user runs it: a process a stage, in an empty folder, defaults handing files on."""

import csv
import importlib
import json
import re
import tarfile

import cv2
import pytest

from common import SCRIPTS, parse_args
from conftest import ROOT, commands, section, shell


def test_the_readme_from_drawn_faces_to_predictions(tmp_path, cli):
    """The README's own commands, word for word, made small by flags at their end."""
    training = ["--image-size", 64, "--batch-size", 32, "--device", "cpu", "--epochs"]
    small = {"pretrain": [*training, 1], "finetune": [*training, 4]}
    assert shell("synthesize", "--count", 240, cwd=tmp_path).returncode == 0
    with tarfile.open(tmp_path / "UTKFace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "dataset/raw", "UTKFace")
    face = min((tmp_path / "dataset/raw").iterdir())
    (tmp_path / "folder").symlink_to("dataset/raw")
    (tmp_path / "face.jpg").symlink_to(face)
    chain = list(commands(section("The five stages")))
    assert [script for script, _ in chain] == ["masks", "split", "pretrain", "finetune", "evaluate"]
    for script, arguments in chain:
        done = shell(script, *arguments, *small.get(script, []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and len(done.stdout.splitlines()) >= 1, done.stderr
    on_pictures = [c for c in commands(section("Your own pictures")) if {"--csv", "--export"} & set(c[1])]
    assert len(on_pictures) == 2
    for script, arguments in on_pictures:
        code, out, err = cli(script, *arguments, cwd=tmp_path)
        assert code == 0 and err == "" and out.startswith("model: model.pt\n"), err
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["n"] >= 45
    assert metrics["balanced_accuracy"]["ci95"][0] > 1 / 6  # chance
    assert metrics["mask_iou"]["value"] > 0.6
    assert metrics["seen_in_training"] == 0
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 242
    assert len(list((tmp_path / "drawn").rglob("*.jpg"))) == 241
    for name in ("results/confusion_matrix.png", "dataset/processed/preview.png", "model.onnx"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_readme_on_the_released_model(drawn, tmp_path, cli):
    """Its command and its lines of Python, word for word, give the same."""
    face = min((drawn / "dataset/raw").iterdir())
    (tmp_path / "face.jpg").symlink_to(face)
    [(script, arguments)] = commands(section("Use the released model").split("```")[1])
    code, out, err = cli(script, *arguments, "--csv", "faces.csv", cwd=tmp_path)
    assert code == 0, err
    [snippet] = re.findall(r"```python\n(.*?)```", section("Your own pictures"), re.DOTALL)
    names = {"image": cv2.cvtColor(cv2.imread(str(face)), cv2.COLOR_BGR2RGB)}
    exec(snippet, names)
    [found] = names["faces"]
    with open(tmp_path / "faces.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert found.group == row["group"] and found.group in out
    assert found.mask.shape == names["image"].shape[:2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(cli, script):
    code, printed, _ = cli(script, "-h")
    assert code == 0 and f"python {script}.py" in printed
    for action in importlib.import_module(script).get_parser()._actions:
        assert action.help and all(option in printed for option in action.option_strings)
    assert "default:" in printed


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = shell("split", "--input", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_the_configs_that_ship_are_valid():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for script in SCRIPTS:
            parser = importlib.import_module(script).get_parser()
            assert parse_args(parser, ["--config", str(path)]).config == str(path)
