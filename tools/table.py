"""Compares models: a row a configuration, averaged over its seeds, and the differences between rows.

    python tools/table.py runs/*.pt --split val
    python tools/table.py                               # trains every row first; wants a GPU
    python tools/table.py --config configs/table_small.yaml --data dataset/study

Without names it trains each row and seed into --out, by pretrain.py and finetune.py as you would by hand; the
`pretrain:` and `finetune:` sections of --config are theirs. --weights view, age and rank are pretraining by
these positives; --seed is the bootstrap's. What is done is skipped, what was stopped goes on where it stood,
and a row that cannot be trained is reported. Writes table.md to --results, and beside it a folder for each
model with what evaluate.py writes, scored in fp32.
"""

import os
import re
import shlex
import subprocess
import sys
import zlib
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cli
from cli import UserError
from common import FaceDataset, load_checkpoint
from devices import choose_device
from evaluate import measure, score_model, write_results
from metrics import METRICS, interval
from utkface import list_pairs

PRETRAINED = ("view", "age", "rank")
WEIGHTS = ("random", "imagenet", *PRETRAINED)
TASKS = ("classification", "multitask")
LR_STRATEGIES = ("uniform", "differentiated")

COMPARED = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro")
COLUMNS = (*COMPARED, "precision_macro", "ap_macro", "within_one_group", "mae_years", "mask_iou")
UNLISTED = {"init", "lr_strategy", "multitask", "pretraining positives"}  # they have columns of their own
# These do not matter, or are in other words among the rest.
UNLISTED |= {"seed", "init_sha256", "pretraining seed", "pretraining init_sha256", "pretraining data"}
DIFFERENCES = """
Differences in points, with 95 % intervals: below three seeds a side paired over faces, for these models only;
from three on for other seeds (Student's t). One in twenty misses zero by chance alone.

"""


def call(script, *flags):
    """Runs a script in a process of its own; returns the last line of its errors, or None if it succeeded."""
    flags = [str(flag) for flag in flags]
    print(f"\n$ python {script}.py {shlex.join(flags)}", flush=True)
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode in (130, 143):  # stopped, so this script is, too
        raise KeyboardInterrupt
    if done.returncode == 0:
        return None
    if done.returncode < 0:  # it could not say why
        return f"{script}.py was killed by signal {-done.returncode}, as by 9 where memory is short"
    return done.stderr.strip().split("\n")[-1] or f"{script}.py ended with exit code {done.returncode}"


def train_rows(args):
    """Trains every row and seed that is asked for: the checkpoints, and a line on each that failed."""
    out, models, failed = Path(args.out), [], []
    training = ["--overwrite" if args.overwrite else "--resume"]
    training += ["--config", args.config] if args.config else []
    for name in ("data", "workers", "device", "precision"):  # else the sections of --config count
        if getattr(args, name) != get_parser().get_default(name):
            training += [f"--{name}", getattr(args, name)]
    for seed, weights in product(dict.fromkeys(args.seeds), dict.fromkeys(args.weights)):
        start, lost = weights, None
        if weights in PRETRAINED:
            start = out / f"contrastive-{weights}-seed{seed}.pt"
            lost = call("pretrain", *training, "--positives", weights, "--seed", seed, "--out", start)
        for task, strategy in product(dict.fromkeys(args.tasks), dict.fromkeys(args.lr_strategies)):
            path = out / f"{task}-{weights}-{strategy}-seed{seed}.pt"
            flags = ["--multitask" if task == "multitask" else "--no-multitask", "--lr-strategy", strategy]
            flags += ["--init", start, "--seed", seed, "--out", path]
            error = lost or call("finetune", *training, *flags)
            if error:
                failed.append(f"Not trained: {path.stem} ({error})")
            else:
                models.append(path)
    if not models:
        raise UserError(f"no row was trained. {failed[0]}")
    return models, failed


def describe(checkpoint):
    """What a model was made with, its seed apart: the table's first three columns, and all other settings.

    Faces and checkpoints count by what is in them, and what is false, zero or empty is off.
    """
    config, pretraining = checkpoint["config"], checkpoint["pretraining"]
    start = config.get("init", "")
    if "positives" in pretraining:
        start = f"contrastive ({pretraining['positives']})"
    elif pretraining:
        start = "fine-tuned"
    columns = {
        "LR strategy": config.get("lr_strategy", ""),
        "Task": "multitask" if config.get("multitask") else "classification",
        "Pretrained weights": "ImageNet" if start == "imagenet" else start,
    }
    settings = config | {f"pretraining {key}": value for key, value in pretraining.items()}
    if pretraining.get("init_sha256"):  # each seed has a file of its own, such as contrastive-rank-seed0.pt
        settings["pretraining init"] = re.sub(r"\d+", "#", pretraining["init"])
    seen = checkpoint["train_hashes"].numpy()
    settings["data"] = f"{len(seen)} faces ({zlib.crc32(seen):08x})"
    return columns, {key: str(value or "off") for key, value in settings.items() if key not in UNLISTED}


def group_by_configuration(many):
    """Sorts scored models by configuration: [(the table's first columns, runs)], and what all share."""
    described = [describe(scored.checkpoint) for scored in many]
    keys = sorted(set().union(*(settings for _, settings in described)))
    for scored, (_, settings) in zip(many, described):
        for key in keys:  # those that a run did not know yet are off
            if scored.checkpoint["pretraining"] or not key.startswith("pretraining "):
                settings.setdefault(key, "off")
    values = {key: {settings[key] for _, settings in described if key in settings} for key in keys}
    shared = {key: found.pop() for key, found in values.items() if len(found) == 1}
    groups = {}
    for scored, (columns, settings) in zip(many, described):
        own = [key for key in keys if key in settings and key not in shared]
        if len(shared) < len(keys):
            columns["Other settings"] = ", ".join(f"{key.replace('_', '-')} {settings[key]}" for key in own)
        groups.setdefault(tuple(columns.items()), []).append(scored)
    return [(dict(columns), sorted(runs, key=seed_of)) for columns, runs in groups.items()], shared


def seed_of(scored):
    return scored.checkpoint["config"].get("seed", 0)


def independent(runs):
    """How many runs of one configuration share neither a seed nor the checkpoint that they started from."""
    starts = {scored.checkpoint["config"].get("init_sha256") for scored in runs}
    seeds = len({seed_of(scored) for scored in runs})
    return min(seeds, len(starts)) if runs[0].checkpoint["pretraining"] else seeds


def compare(first, second, few=False):
    """How much higher a metric is under `first`, its 95 % interval, and whether that holds for other seeds.

    Each side is a list over S seeds of (value, bootstrap draws (R,)), on the same faces and resamples. Below
    three seeds a side, or where `few` of them are independent, the interval is the paired bootstrap's over
    faces, for these trained models only. Else it is Student's t by Welch and Satterthwaite, with the variance
    of two crossed factors (Cameron et al. 2011): over seeds, plus over faces, less what faces add to the
    former; at least that over faces.
    """
    values = [np.array([value for value, _ in runs], float) for runs in (first, second)]  # None is NaN
    draws = [np.stack([drawn for _, drawn in runs]) for runs in (first, second)]  # S×R each
    difference = float(values[0].mean() - values[1].mean())
    drawn = draws[0].mean(axis=0) - draws[1].mean(axis=0)  # R
    if few or min(len(first), len(second)) < 3 or np.isnan(difference):
        return difference, interval(drawn), False
    over_seeds, in_both, spread, over_faces = 0, 0, 0, np.nanvar(drawn)
    for value, draw in zip(values, draws):  # S, S×R
        variance = value.var(ddof=1) / len(value)
        over_seeds += variance
        spread += variance**2 / (len(value) - 1)
        in_both += np.nanmean((draw - value[:, None]).var(axis=0, ddof=1)) / len(value)
    variance = max(over_seeds + over_faces - in_both, over_faces)
    degrees = variance**2 / max(spread, 1e-300)
    half = stats.t.ppf(0.975, degrees) * variance**0.5 if variance else 0.0
    return difference, [difference - half, difference + half], True


def format_metric(runs, name):
    """A cell of the table, in percent or years: mean ± standard deviation over seeds, or value [interval]."""
    scale = 1 if name == "mae_years" else 100
    found = [scored.summary.get(name, {"value": None}) for scored in runs]
    values = [metric["value"] for metric in found]
    if None in values:
        return "–"
    if len(runs) > 1:
        return f"{scale * np.mean(values):.1f} ± {scale * np.std(values, ddof=1):.1f}"
    low, high = found[0]["ci95"]
    return f"{scale * values[0]:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def format_difference(difference, ends):
    """A cell in percentage points, with two decimals where one would round an end of the interval to zero."""
    if np.isnan(difference):
        return "–"
    digits = 2 if any(0 < abs(end) < 0.0005 for end in ends) else 1
    rounded = [round(100 * value, digits) + 0.0 for value in (difference, *ends)]  # -0.0 becomes 0.0
    difference, low, high = (f"{value:+.{digits}f}" for value in rounded)
    return f"{difference} [{low}, {high}]"


def without(settings, others):
    """Those of `settings` that are not among `others`, as one text."""
    return ", ".join(setting for setting in settings if setting not in others)


def markdown(rows):
    """A Markdown table of dicts with the same keys."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make_table(many, folder):
    """Markdown: the table over configurations, and the differences of those that differ in one respect."""
    configurations, shared = group_by_configuration(many)
    rows, pairs = [], []
    for columns, runs in configurations:
        seeds = [seed_of(scored) for scored in runs]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(str(scored.path) for scored in runs)
            print(f"warning: seeds of one configuration, two of them alike: {names}", file=sys.stderr)
        cells = {METRICS[name]: format_metric(runs, name) for name in COLUMNS}
        rows.append(columns | cells | {"Seeds": ", ".join(map(str, seeds))})
    for (first, runs), (second, others) in combinations(configurations, 2):
        differ = [key for key in first if first[key] != second[key]]
        if len(differ) > 1 and len(configurations) > 2:
            continue
        told, others_told = (", ".join(side.values()).split(", ") for side in (first, second))
        row = {
            "Difference": f"{without(others_told, told)} − {without(told, others_told)}",
            "Where": ", ".join(setting for setting in told if setting in others_told),
        }
        few = min(independent(runs), independent(others)) < 3
        for name in COMPARED:
            sides = ([(s.summary[name]["value"], s.draws[name]) for s in side] for side in (others, runs))
            difference, ends, general = compare(*sides, few)
            row[METRICS[name]] = format_difference(difference, ends)
        pairs.append(row | {"Holds for": "other seeds" if general else "these trained models only"})
    text = f"In percent, on {len(many[0].faces)} faces of {folder}: mean ± standard deviation over seeds, "
    text += "or for one seed [95 % interval over faces].\n"
    text += f"All: {', '.join(f'{key} {value}' for key, value in shared.items())}.\n\n" + markdown(rows)
    return text + DIFFERENCES + markdown(pairs) if pairs else text


def get_parser():
    parser = cli.script_parser("table", __doc__)
    add = parser.add_argument
    add("model", nargs="*", help="models written by finetune.py; without any, every row is trained")
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--split", choices=["train", "val", "test"], default="test", help="part to score")
    add("--results", default="results", help="folder for the table and the scores")
    add("--out", default="table", help="folder for the checkpoints that are trained")
    add("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS, help="where backbones start")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="with the mask or without")
    add("--lr-strategies", nargs="+", choices=LR_STRATEGIES, default=LR_STRATEGIES, help="learning rates")
    add("--seeds", nargs="+", type=cli.number(int, 0), default=[0, 1, 2], help="seeds of both trainings")
    cli.add_device_flags(parser, precision="auto")  # of the training
    return parser


def main(args):
    device, results, folder = choose_device(args.device), Path(args.results), Path(args.data) / args.split
    cli.check_writable("--results", results)
    failed = []
    # What ails the faces is said once, and before any training.
    list_pairs(folder, need_masks=not args.model and "multitask" in args.tasks)
    if args.model:
        models = list({os.path.realpath(path): Path(path) for path in args.model}.values())
    else:
        cli.check_writable("--out", args.out)
        models, failed = train_rows(args)
    top = os.path.commonpath([os.path.abspath(path.parent) for path in models])
    read = cache(FaceDataset)  # once for all models
    many, skipped, known = [], [], []
    for path in cli.progress(models, "models", unit="model"):
        try:
            unfinished = path.name.endswith(".last.pt")
            if unfinished or load_checkpoint(path, "model", "contrastive")["kind"] != "model":
                skipped.append(path.name)
                continue
            scored = score_model(path, folder, device, torch.float32, args.workers, read=read)
        except UserError as error:
            print(f"table.py: error: {error}", file=sys.stderr)
            failed.append(f"Not scored: {path.name} ({error})")
            continue
        measure(scored, args.seed)
        write_results(scored, results / os.path.relpath(path, top).removesuffix(".pt"))
        many.append(scored)
        seen = sum(scored.summary.get(key, 0) for key in ("seen_in_training", "chose_the_epoch"))
        if seen:
            known.append(f"Flattered: {path.name} knows {seen} of these faces")
    if not many:
        raise UserError(f"none of the {len(models)} files is a model that can be scored")
    text = make_table(many, folder) + "".join(f"\n{line}\n" for line in known + failed)
    with cli.atomic_path(results / "table.md", sync=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print("\n" + text)
    if skipped:
        print(f"skipped, being no finished models: {', '.join(skipped)}")
    print(f"{results} written: table.md, and a folder for each of {len(many)} models; {len(failed)} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, get_parser())
