"""Every command that the docs, scripts and configs name is one that its script takes."""

import importlib
import os
import re
import shlex
import shutil
import subprocess

import pytest

from cli import STAGES, TOOLS, UserError, parse_args
from conftest import ROOT, commands, script_path

SCRIPTS = STAGES + TOOLS
PLACES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *map(script_path, SCRIPTS),
    *sorted(ROOT.glob("configs/*.yaml")),
]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_commands_are_taken(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there
    found = list(commands(path.read_text(encoding="utf-8")))
    assert found or path.suffix in (".yaml", ".md")
    for script, arguments in found:
        assert script in SCRIPTS, script
        try:
            parse_args(importlib.import_module(script).get_parser(), arguments)
        except UserError as error:
            pytest.fail(f"{path.name}: python {script}.py {shlex.join(arguments)}: {error}")


def test_a_command_that_no_script_takes_is_found():
    text = "`python split.py --input faces`, then torchrun --x finetune.py --nonsense 3 # why\n"
    text += "python tools/table.py runs/*.pt\n"
    assert list(commands(text)) == [
        ("split", ["--input", "faces"]), ("finetune", ["--nonsense", "3"]), ("table", ["runs/*.pt"])
    ]  # fmt: skip


def test_yardsticks_are_called_as_they_say_themselves():
    """They are no scripts, and have no parsers."""
    text = "".join(path.read_text(encoding="utf-8") for path in PLACES)
    found = re.findall(r"python (tests/\w+\.py)([\w ./-]*)", text)
    assert len(found) >= 3
    for script, arguments in found:
        assert f"    python {script}{arguments.rstrip(' .')}" in (ROOT / script).read_text("utf-8"), arguments


def test_the_docs_name_every_script_config_and_target():
    text = "".join(path.read_text(encoding="utf-8") for path in PLACES if path.suffix == ".md")
    for name in [*(f"{name}.py" for name in SCRIPTS), *(p.name for p in ROOT.glob("configs/*.yaml"))]:
        assert name in text, name
    targets = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    assert targets >= {"run", "best", "test", "table", "soak"}
    for target in targets:
        command = ["make", "-n", target, "DATA=faces.tar.gz", "FLAGS=--precision bf16"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, target
        found = list(commands(done.stdout))
        assert found or target in ("test", "soak"), target
        assert ("--precision bf16" in done.stdout) == (target in ("best", "table"))
        for script, arguments in found:
            parse_args(importlib.import_module(script).get_parser(), arguments)


def test_make_table_has_the_defaults_of_the_scripts():
    done = subprocess.run(["make", "-n", "table", "DATA=a.tar.gz"], cwd=ROOT, capture_output=True, text=True)
    assert [given for script, given in commands(done.stdout) if script == "table"] == [[]]


def test_the_published_recipe_has_none_of_ours():
    flags = ["--config", str(ROOT / "configs/published.yaml")]
    args = parse_args(importlib.import_module("finetune").get_parser(), flags)
    assert (args.age_sigma, args.attribute_weight, args.ema, args.flip_averaging) == (0, 0, 0, False)
    assert parse_args(importlib.import_module("pretrain").get_parser(), flags).positives == "view"


def test_make_best_starts_again_where_it_is_told_to():
    """--overwrite and --resume contradict each other."""
    for flags, resumes in (("--final --overwrite", 0), ("--final", 2)):
        command = ["make", "-n", "best", "DATA=a.tar.gz", f"FLAGS={flags}"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        assert printed.count("--resume") == resumes and printed.count(flags) == 2


@pytest.mark.parametrize("fails", ["-c", "-m"])  # the check of the version, and the venv of a bare Debian
def test_an_environment_that_could_not_be_made_is_none(tmp_path, fails):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    python = '#!/bin/sh\n[ "$1" = -m ] && mkdir -p .venv/bin && touch .venv/bin/python\n'
    (tmp_path / "python").write_text(python + f'[ "$1" != {fails} ]\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["make", "run", "PYTHON=./python"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and not (tmp_path / ".venv").exists(), done.stdout


@pytest.mark.parametrize("data", ["my data/x.tar.gz", "/my data/x.tar.gz"])
def test_make_runs_where_folders_have_spaces(tmp_path, data):
    """A stand-in for the interpreter writes down what it is asked to run, and where."""
    clone = tmp_path / "my clone"
    (clone / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    (clone / ".venv/bin/python").write_text('#!/bin/sh\nfor part in "$PWD" "$@"; do echo "$part"; done\n')
    (clone / ".venv/bin/python").chmod(0o755)
    (clone / ".venv/run-installed").touch()
    done = subprocess.run(["make", "-s", "data", f"DATA={data}"], cwd=clone, capture_output=True, text=True)
    printed = done.stdout.splitlines()
    assert done.returncode == 0 and printed[0] == str(clone / "runs/utkface"), done.stderr
    given = printed[printed.index("--input") + 1]
    assert os.path.normpath(clone / "runs/utkface" / given) == os.path.normpath(clone / data)
    assert "../../masks.py" in printed and "../../split.py" in printed


def test_the_readme_is_read_to_the_end():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    for path in PLACES:
        if path.suffix == ".md":
            for line in path.read_text(encoding="utf-8").splitlines():
                assert len(line) <= 110 or line.startswith(("|", "python")), (path.name, line)
            for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
                assert (path.parent / link).exists(), (path.name, link)
