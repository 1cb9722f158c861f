"""Compares models: a row a configuration, averaged over its seeds, and the differences between rows.

    python tools/table.py runs/*.pt --split val
    python tools/table.py                               # trains every row first; wants a GPU
    python tools/table.py --config configs/table_small.yaml --data dataset/study
    python tools/table.py --weights random view --tasks multitask --seeds 0 1 2

Without names it trains each row and seed into --out, by pretrain.py and finetune.py as you would by hand; the
`pretrain:` and `finetune:` sections of --config are theirs, but --data, --workers, --device and --precision
are those given here. What is done is skipped, what was stopped goes on where it stood, and a row that cannot
be trained is reported. Writes table.md to --results, and beside it a folder for each model with what
evaluate.py writes, scored in fp32.
"""

import json
import os
import shlex
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import (
    ROOT,
    UserError,
    add_device_flags,
    atomic_path,
    check_writable,
    number,
    progress,
    run,
    script_parser,
)
from common import load_checkpoint
from devices import choose_device
from evaluate import interval, measure, result_folders, score_model, write_results
from utkface import list_pairs

WEIGHTS = ("random", "imagenet", "view", "age", "rank")
PRETRAINED = ("view", "age", "rank")
TASKS = ("classification", "multitask")
LR_STRATEGIES = ("uniform", "differentiated")
ORDER = [*LR_STRATEGIES, *TASKS, "random", "ImageNet", *(f"contrastive ({name})" for name in PRETRAINED)]

COLUMNS = {  # of the table
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc_macro_ovr": "AUC",
    "f1_macro": "F1 (macro)",
    "precision_macro": "Precision (macro)",
    "ap_macro": "AP",
    "within_one_group": "Within one group",
    "mae_years": "Years off (mean)",
    "mask_iou": "Mask IoU",
}
COMPARED = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro")

# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def call(script, *flags):
    """Runs a script in a process of its own; returns the last line of its errors, or None if it succeeded."""
    flags = [str(flag) for flag in flags]
    print(f"\n$ python {script}.py {shlex.join(flags)}", flush=True)
    command, last = [sys.executable, ROOT / f"{script}.py", *flags], ""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
    except BaseException:  # this script is stopped, so the other must be
        process.terminate()
        process.wait()
        raise
    if code in (130, 143):
        raise KeyboardInterrupt
    return (last or f"{script}.py ended with exit code {code}") if code else None


def train_rows(args):
    """Trains every row and seed that is asked for: the checkpoints, and {error: names of what it ended}."""
    out, models, failed = Path(args.out), [], {}
    training = ["--data", args.data, "--workers", args.workers]
    training += ["--device", args.device, "--precision", args.precision]
    training += ["--config", args.config] if args.config else []
    training += ["--overwrite" if args.overwrite else "--resume"]
    for seed in args.seeds:
        starts, lost = {}, {}
        for weights in dict.fromkeys(args.weights):
            starts[weights] = weights
            if weights in PRETRAINED:
                starts[weights] = out / f"contrastive-{weights}-seed{seed}.pt"
                flags = ["--positives", weights, "--seed", seed, "--out", starts[weights]]
                lost[weights] = call("pretrain", *training, *flags)
        rows = product(starts, dict.fromkeys(args.tasks), dict.fromkeys(args.lr_strategies))
        for weights, task, strategy in rows:
            path = out / f"{task}-{weights}-{strategy}-seed{seed}.pt"
            flags = ["--multitask" if task == "multitask" else "--no-multitask", "--lr-strategy", strategy]
            flags += ["--init", starts[weights], "--seed", seed, "--out", path]
            error = lost.get(weights) or call("finetune", *training, *flags)
            if error:
                failed.setdefault(error, []).append(path.stem)
            else:
                models.append(path)
    if not models:
        raise UserError(f"no row was trained: {next(iter(failed))}")
    return models, failed


# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------


def describe(checkpoint):
    """What a model was made with, its seed apart: the table's first three columns, and all other settings.

    A path counts by where it leads, and what a checkpoint lacks is off.
    """
    config, pretraining = dict(checkpoint["config"]), dict(checkpoint["pretraining"])
    start = config.pop("init", "")
    if "positives" in pretraining:
        start = f"contrastive ({pretraining.pop('positives')})"
        if pretraining.get("init") == "imagenet":
            start = f"ImageNet, then {start}"
        if pretraining.get("init") in ("random", "imagenet"):
            del pretraining["init"]
    elif pretraining:
        start = "fine-tuned"
    row = {
        "LR strategy": config.pop("lr_strategy", ""),
        "Task": "multitask" if config.pop("multitask", False) else "classification",
        "Pretrained weights": "ImageNet" if start == "imagenet" else start,
    }
    settings = {}
    for prefix, part in (("", config), ("pretraining ", pretraining)):
        for key, value in part.items():
            if key == "data" or (key == "init" and value not in ("random", "imagenet")):
                value = os.path.relpath(os.path.realpath(str(value)))
            if key not in ("seed", "init_sha256"):
                settings[prefix + key] = value or "off"
    return row, settings


def group_by_configuration(many):
    """Sorts scored models into configurations: a list of (columns, runs), and the settings all share.

    columns: the table's first ones, among them "Other settings" where the rest does not agree.
    """
    described = [(*describe(scored.checkpoint), scored) for scored in many]
    keys = {key for _, settings, _ in described for key in settings}
    for _, settings, scored in described:
        pretrained = bool(scored.checkpoint["pretraining"])
        mine = {key for key in keys if pretrained or not key.startswith("pretraining ")}
        settings |= dict.fromkeys(mine - settings.keys(), "off")
    shared, differing = {}, []
    for key in sorted(keys):
        values = {json.dumps(settings[key]) for _, settings, _ in described if key in settings}
        if len(values) == 1:
            shared[key] = next(iter(values)).strip('"')
        else:
            differing.append(key)
    found = {}
    for columns, settings, scored in described:
        if differing:
            columns["Other settings"] = ", ".join(
                f"{key.replace('_', '-')} {settings[key]}" for key in differing if key in settings
            )
        found.setdefault(tuple(columns.items()), []).append(scored)
    rows = [(dict(columns), sorted(runs, key=seed_of)) for columns, runs in found.items()]

    def position(row):
        return [(ORDER.index(v) if v in ORDER else len(ORDER), v) for v in row[0].values()]

    return sorted(rows, key=position), shared


def seed_of(scored):
    return scored.checkpoint["config"].get("seed", 0)


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def compare(first, second):
    """How much higher a metric is under `first`, its 95 % interval, and whether that holds for other seeds.

    Each side is a list over S seeds of (value, bootstrap draws (R,)), on the same faces and resamples. With
    fewer than three seeds a side the interval is the paired bootstrap's over faces, for these trained models
    only. With three or more it is Student's t, for other seeds and other faces. The variance of two crossed
    factors (Cameron et al. 2011): s²/S over the seeds of each side, plus the bootstrap's over faces, less
    what is in both, the part of the faces' variance that seeds do not share; never below the
    faces' own. Degrees of freedom after Welch and Satterthwaite, the faces' part taken as known.
    """
    values = [np.array([value for value, _ in runs]) for runs in (first, second)]
    draws = [np.stack([drawn for _, drawn in runs]) for runs in (first, second)]  # S×R each
    difference = float(values[0].mean() - values[1].mean())
    drawn = draws[0].mean(axis=0) - draws[1].mean(axis=0)  # R
    if min(map(len, values)) < 3 or np.isnan(difference):
        return difference, interval(drawn), False
    over_seeds, over_faces = [v.var(ddof=1) / len(v) for v in values], np.nanvar(drawn)
    in_both = sum(np.nanmean((d - v[:, None]).var(axis=0, ddof=1)) / len(v) for v, d in zip(values, draws))
    variance = max(sum(over_seeds) + over_faces - in_both, over_faces)
    spread = sum(part**2 / (len(v) - 1) for part, v in zip(over_seeds, values))
    half = stats.t.ppf(0.975, variance**2 / max(spread, 1e-300)) * variance**0.5 if variance else 0.0
    return difference, [difference - half, difference + half], True


def format_metric(runs, name):
    """A cell of the table, in percent or years: mean ± standard deviation over seeds, or value [interval]."""
    scale = 1 if name == "mae_years" else 100
    values = [scale * scored.metrics.get(name, np.nan) for scored in runs]
    if np.isnan(values).any():
        return "–"
    if len(runs) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    low, high = runs[0].intervals[name]
    return f"{values[0]:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def markdown(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def make_table(many, folder):
    """Markdown: the table over configurations, and the differences of those that differ in one respect."""
    configurations, shared = group_by_configuration(many)
    for _, runs in configurations:
        if len({seed_of(scored) for scored in runs}) < len(runs):
            names = ", ".join(str(scored.path) for scored in runs)
            print(f"warning: seeds of one configuration, two of them alike: {names}", file=sys.stderr)
    rows = [
        [
            *columns.values(),
            *(format_metric(runs, name) for name in COLUMNS),
            ", ".join(str(seed_of(scored)) for scored in runs),
        ]
        for columns, runs in configurations
    ]
    text = f"In percent, on {len(many[0].faces)} faces of {folder}: mean ± standard deviation over seeds, "
    text += "or for one seed [95 % interval over faces].\n"
    text += f"All: {', '.join(f'{key} {value}' for key, value in shared.items())}.\n\n"
    text += markdown([*configurations[0][0], *COLUMNS.values(), "Seeds"], rows)
    pairs = []
    for (first, runs), (second, others) in combinations(configurations, 2):
        differ = [key for key in first if first[key] != second[key]]
        if len(differ) == 1 or len(configurations) == 2:
            cells = []
            for name in COMPARED:
                sides = ([(s.metrics[name], s.draws[name]) for s in side] for side in (others, runs))
                difference, (low, high), general = compare(*sides)
                cell = f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                cells.append("–" if np.isnan(difference) else cell)
            what = " − ".join(", ".join(side[key] for key in differ) for side in (second, first))
            where = ", ".join(value for key, value in first.items() if key not in differ)
            holds = "other seeds" if general else "these trained models only"
            pairs.append([what, where, *cells, holds])
    if pairs:
        text += (
            "\nDifferences in points, with 95 % intervals: below three seeds a side paired over faces, for "
        )
        text += (
            "these trained models only;\nfrom three on for other seeds (Student's t). One in twenty misses "
        )
        text += "zero by chance alone.\n\n"
        text += markdown(["Difference", "Where", *(COLUMNS[name] for name in COMPARED), "Holds for"], pairs)
    return text


def choose_models(paths):
    """The finished models among checkpoints, and how many cannot be read; others are skipped with a line."""
    models, skipped, unreadable = [], [], 0
    for path in map(Path, paths):
        try:
            last = path.name.endswith(".last.pt")
            kind = "last" if last else load_checkpoint(path, ("contrastive", "model"))["kind"]
            (models if kind == "model" else skipped).append(path)
        except UserError as error:
            print(f"table.py: error: {error}", file=sys.stderr)
            unreadable += 1
    if skipped:
        print(f"skipped, being no finished models: {', '.join(path.name for path in skipped)}")
    if not models:
        raise UserError(f"none of the {len(paths)} files is a model: run finetune.py first")
    return models, unreadable


def get_parser():
    parser = script_parser("table", __doc__)
    # fmt: off
    add = parser.add_argument
    add("model", nargs="*", help="models written by finetune.py; without any, every row is trained")
    add("--data", default="dataset/processed_split", help="folder written by split.py")
    add("--split", choices=["train", "val", "test"], default="test", help="part to score")
    add("--results", default="results", help="folder for the table and the scores")
    add("--out", default="table", help="folder for the checkpoints that are trained")
    add("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS,
        help="where backbones start; view, age and rank are contrastive pretraining by these positives")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="with the mask or without")
    add("--lr-strategies", nargs="+", choices=LR_STRATEGIES, default=LR_STRATEGIES, help="learning rates")
    add("--seeds", nargs="+", type=number(int, low=0), default=[0, 1, 2],
        help="seeds of both kinds of training; --seed is that of the bootstrap")
    # fmt: on
    add_device_flags(parser, precision="auto")  # of the training
    return parser


def main(args):
    device, results = choose_device(args.device), Path(args.results)
    folder = Path(args.data) / args.split
    check_writable("--results", results)
    failed, unreadable = {}, 0
    if args.model:
        list_pairs(folder, need_masks=False)  # what ails the faces is said once, not for each model
        models, unreadable = choose_models(args.model)
    else:
        check_writable("--out", args.out)
        models, failed = train_rows(args)
    many, datasets = [], {}
    for path, place in progress(result_folders(models, results).items(), "models", unit="model"):
        try:
            scored = score_model(path, folder, device, torch.float32, datasets, args.workers)
        except UserError as error:
            print(f"table.py: error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        measure(scored, args.seed)
        write_results(scored, place, folder)
        many.append(scored)
    if not many:
        raise UserError("no model could be scored")
    text = make_table(many, folder)
    for error, names in failed.items():
        text += f"\nNot trained: {', '.join(names)} ({error})\n"
    with atomic_path(results / "table.md", sync=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print("\n" + text)
    missing = f", {sum(map(len, failed.values()))} not trained" * bool(failed)
    missing += f", {unreadable} not scored" * bool(unreadable)
    print(f"{results} written: table.md, and a folder for each of {len(many)} models{missing}")
    if unreadable or failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, get_parser())
