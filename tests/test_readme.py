"""Every command that README, scripts and configs name is one that its script takes."""

import importlib
import re
import shlex
import subprocess

import pytest

from common import SCRIPTS, UserError, parse_args
from conftest import ROOT, commands

PLACES = [
    ROOT / "README.md",
    *(ROOT / f"{name}.py" for name in SCRIPTS),
    *sorted(ROOT.glob("configs/*.yaml")),
]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_commands_are_taken(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there
    found = list(commands(path.read_text(encoding="utf-8")))
    assert found or path.suffix == ".yaml"
    for script, arguments in found:
        assert script in SCRIPTS, script
        try:
            parse_args(importlib.import_module(script).get_parser(), arguments)
        except UserError as error:
            pytest.fail(f"{path.name}: python {script}.py {shlex.join(arguments)}: {error}")


def test_a_command_that_no_script_takes_is_found():
    text = "`python split.py --input faces`, then torchrun --x finetune.py --nonsense 3 # why\n"
    assert list(commands(text)) == [("split", ["--input", "faces"]), ("finetune", ["--nonsense", "3"])]


def test_readme_names_every_script_config_and_target():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*(f"{name}.py" for name in SCRIPTS), *(p.name for p in ROOT.glob("configs/*.yaml"))]:
        assert name in text, name
    targets = set(re.findall(r"\bmake (\w+)", text))
    assert targets >= {"run", "test", "table", "soak"}
    for target in targets:
        command = ["make", "-n", target, "DATA=faces.tar.gz"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, target
        found = list(commands(done.stdout))
        assert found or target in ("test", "soak"), target
        for script, arguments in found:
            parse_args(importlib.import_module(script).get_parser(), arguments)
