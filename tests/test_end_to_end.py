"""The whole chain as a user runs it: a process a stage, in an empty folder, defaults handing files on."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tarfile

import cv2
import pytest

from cli import STAGES, TOOLS, parse_args
from conftest import ROOT, commands, section, shell


def test_the_readme_from_drawn_faces_to_predictions(tmp_path, cli):
    """The README's own commands, word for word, made small by flags at their end."""
    training = ["--image-size", 32, "--batch-size", 32, "--device", "cpu", "--workers", 0, "--epochs"]
    small = {"pretrain": [*training, 1], "finetune": [*training, 3]}
    assert shell("synthesize", "--count", 180, cwd=tmp_path).returncode == 0
    with tarfile.open(tmp_path / "UTKFace.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "dataset/raw", "UTKFace")
    chain = list(commands(section("The five stages")))[:5]
    assert [script for script, _ in chain] == ["masks", "split", "pretrain", "finetune", "evaluate"]
    for script, arguments in chain:
        done = shell(script, *arguments, *small.get(script, []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and len(done.stdout.splitlines()) >= 1, done.stderr
    code, out, err = cli("predict", "dataset/raw", "--aligned", "--csv", "faces.csv", cwd=tmp_path)
    assert code == 0 and err == "" and out.startswith("model: model.pt\n"), err
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())
    assert metrics["n"] >= 30 and metrics["seen_in_training"] == 0
    assert metrics["mask_iou"]["value"] > 0.5  # of what masks.py found; an untrained decoder gives 0.3
    assert len((tmp_path / "faces.csv").read_text().splitlines()) == 181
    for name in ("results/confusion_matrix.png", "dataset/processed/preview.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_readme_in_python(drawn, cli):
    """Its lines of Python, word for word, give what the command line gives."""
    face = min((drawn / "dataset/raw").iterdir())
    code, out, err = cli("predict", face, "--aligned", "--checkpoint", ROOT / "weights/age_multitask.pt")
    assert code == 0, err
    [snippet] = re.findall(r"```python\n(.*?)```", section("Python"), re.DOTALL)
    image = cv2.cvtColor(cv2.imread(str(face)), cv2.COLOR_BGR2RGB)
    names = {"image": image}
    exec(snippet, names)
    [found] = names["faces"]
    assert found.group in out and found.mask.shape == image.shape[:2] and 0 < found.predicted_age < 100


@pytest.mark.parametrize("script", STAGES + TOOLS)
def test_help_explains_every_flag(cli, script):
    code, printed, _ = cli(script, "-h")
    assert code == 0 and re.search(rf"python (tools/)?{script}\.py", printed)
    for action in importlib.import_module(script).get_parser()._actions:
        assert action.help and all(option in printed for option in action.option_strings)
    assert "default:" in printed


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = shell("split", "--input", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_arrows_run_downwards_only():
    """A room uses the rooms below it, and what PyTorch is not for does without."""
    floors = [
        ["cli"], ["utkface"], ["faces", "inputs", "metrics"], ["drawing", "devices"], ["common"],
        ["training"], STAGES, TOOLS,
    ]  # fmt: skip
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        used |= {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}
        for name in used & level.keys():
            assert level[name] < level[path.stem], f"{path.stem} imports {name}"
    code = "import sys, masks, split, tools.synthesize, drawing, metrics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_configs_that_ship_are_valid():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for script in STAGES + TOOLS:
            parser = importlib.import_module(script).get_parser()
            assert parse_args(parser, ["--config", str(path)]).config == str(path)
