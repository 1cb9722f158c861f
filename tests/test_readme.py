"""Every command that the docs, scripts and configs name is one that its script takes."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cli import STAGES, TOOLS, UserError, parse_args
from conftest import ROOT, commands, script_path, section
from utkface import AGE_GROUPS, GROUP_NAMES

SCRIPTS = STAGES + TOOLS
PLACES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *map(script_path, SCRIPTS),
    *sorted(ROOT.glob("configs/*.yaml")),
]


def printed_by_make(*arguments):
    """What make would run."""
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def arguments_of(script, *flags):
    """What a script makes of its flags."""
    return parse_args(importlib.import_module(script).get_parser(), list(flags))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_commands_are_taken(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there
    found = list(commands(path.read_text(encoding="utf-8")))
    assert found or path.suffix in (".yaml", ".md")
    for script, arguments in found:
        assert script in SCRIPTS, script
        try:
            arguments_of(script, *arguments)
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
        printed = printed_by_make(target, "DATA=faces.tar.gz", "FLAGS=--precision bf16")
        found = list(commands(printed))
        assert found or target in ("test", "soak"), target
        assert ("--precision bf16" in printed) == (target in ("best", "table"))
        for script, arguments in found:
            arguments_of(script, *arguments)


def test_make_table_has_the_defaults_of_the_scripts():
    printed = printed_by_make("table", "DATA=a.tar.gz")
    assert [given for script, given in commands(printed) if script == "table"] == [[]]


def test_defaults_that_no_config_repeats():
    args, made = arguments_of("finetune"), arguments_of("pretrain")
    assert (args.init, args.epochs, args.batch_size, args.image_size) == ("imagenet", 30, 128, 128)
    assert (made.init, made.epochs, made.batch_size, made.image_size) == ("random", 100, 256, 128)
    assert args.lr_strategy == "uniform" and not args.multitask


def test_the_published_recipe_has_none_of_ours():
    flags = ["--config", str(ROOT / "configs/published.yaml")]
    args, made = arguments_of("finetune", *flags), arguments_of("pretrain", *flags)
    assert (args.age_sigma, args.attribute_weight, args.ema, args.flip_averaging) == (0, 0, 0, False)
    assert (args.init, args.multitask, args.lr_strategy) == (made.out, True, "differentiated")
    assert (args.lr, args.backbone_lr_scale, made.lr, made.positives) == (0.001, 0.3, 0.001, "view")


def test_the_study_is_what_the_docs_say():
    flags = ["--config", str(ROOT / "configs/table_small.yaml")]
    args = arguments_of("table", *flags)
    assert (args.weights, args.seeds) == (["random", "age", "rank"], [0, 1])
    for script in ("pretrain", "finetune"):
        args = arguments_of(script, *flags)
        assert (args.epochs, args.image_size, args.lr, args.final) == (30, 64, 0.001, True)
    assert args.attribute_weight == 0 and not args.multitask


def test_make_run_draws_faces_where_none_are_given_and_goes_on_where_it_stopped():
    stages = ["masks", "split", "pretrain", "finetune", "evaluate"]
    for given, folder, first in (([], "synthetic", ["synthesize"]), (["DATA=a.zip"], "utkface", [])):
        printed = printed_by_make("run", *given)
        assert [script for script, _ in commands(printed)] == first + stages
        assert printed.count("--resume") == 2
        assert printed.count(f"cd runs/{folder} && ") == len(first + stages) == printed.count("cd runs/")
    flags = ["--config", str(ROOT / "configs/quickstart.yaml")]
    args = arguments_of("finetune", *flags)
    assert args.init == arguments_of("pretrain", *flags).out and args.multitask


def test_make_best_has_a_folder_for_each_size():
    assert "`runs/best-cpu`" in (ROOT / "README.md").read_text(encoding="utf-8")
    for given, size in (([], "cpu"), (["SIZE=gpu"], "gpu")):
        printed = printed_by_make("best", "DATA=a.zip", *given)
        assert printed.count(f"cd runs/best-{size} && ") == 5 == printed.count("cd runs/")
        assert printed.count(f"--config configs/{size}.yaml") == 4


def test_make_best_starts_again_where_it_is_told_to():
    """--overwrite and --resume contradict each other."""
    for flags, resumes in (("--final --overwrite", 0), ("--final", 2)):
        printed = printed_by_make("best", "DATA=a.tar.gz", f"FLAGS={flags}")
        assert printed.count("--resume") == resumes and printed.count(flags) == 2


def test_requirements_name_all_that_the_stages_import():
    """The tests' own packages bring some of them along."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split("[<>=]", line)[0].lower() for line in lines if not line.startswith("#")}
    packages = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}
    for path in ROOT.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        used |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        for module in {name.split(".")[0] for name in used}:
            known = module in sys.stdlib_module_names or (ROOT / f"{module}.py").exists()
            assert known or packages.get(module, module) in names, (path.name, module)


def test_figures_that_stand_twice_agree():
    card = (ROOT / "docs/model_card.md").read_text(encoding="utf-8")
    figures = re.compile(r"^\| ([\w ,-]*\w)[^|]* \| (\d+\.\d+) (\[[\d., ]+\]) \|", re.MULTILINE)
    tables = (figures.findall(text) for text in (section("Results"), card))
    ours, theirs = ({name: rest for name, *rest in table} for table in tables)
    both = ours.keys() & theirs.keys()
    assert len(both) == len(ours) == 7 and all(ours[name] == theirs[name] for name in both)
    rows = [re.search(rf"^\| {name} \| (\d+) \| ([\d.]+)", card, re.MULTILINE) for name in GROUP_NAMES]
    counts, right = np.array([row.groups() for row in rows], dtype=float).T  # 6 each
    for name, value in (("accuracy", right @ counts / counts.sum()), ("balanced accuracy", right.mean())):
        assert abs(float(ours[name][0]) - value) < 0.1
    for name, (first, last) in AGE_GROUPS.items():
        years = f"{name} {first}–{last}" if last < 999 else f"{name} {first} and above"
        assert all(years in " ".join(text.split()) for text in (card, section("The five stages")))


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
