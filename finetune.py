"""Trains the age-group classifier, with the face mask as an auxiliary task if asked.

    python finetune.py --multitask --lr-strategy differentiated --init contrastive.pt
    python finetune.py --config configs/published.yaml
    torchrun --nproc-per-node=8 finetune.py --multitask --batch-size 1024

Keeps the epoch that does best on val (accuracy, ties by loss) in --out, its weights in half precision; writes
beside it a history CSV, curves, and `.last.pt` for --resume.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cli
import common
import training
from devices import rank
from utkface import GROUP_NAMES, age_to_group, list_pairs, split_settings


def missing_groups(faces, by_year=True):
    """Names of the age groups that no face lies in.

    A face whose range of ages crosses groups lies in all that it touches `by_year`, and else in none.
    """
    ends = [(face.age - face.spread, face.age + face.spread) for face in faces if by_year or face.group >= 0]
    first, last = age_to_group(np.reshape(ends, (-1, 2))).T  # N each
    there = [((first <= group) & (group <= last)).any() for group in range(len(GROUP_NAMES))]
    return [name for name, found in zip(GROUP_NAMES, there) if not found]


def multitask_losses(model, batch, args):
    """Total, age and mask loss of a batch: (3,). Without a decoder the mask loss is 0.

    The age loss is the cross-entropy of years with soft labels or, with --age-sigma 0, of groups. The total
    adds to it those of the mask, of gender and of race, weighted.
    """
    age_logits, mask_logits, attribute_logits = model(batch["image"], heads=True)
    if args.age_sigma > 0:
        targets = common.soft_age_labels(batch["age"], args.age_sigma, batch["spread"])  # B×YEARS
        age_loss = F.cross_entropy(age_logits.float(), targets)
    else:
        age_loss = common.known_cross_entropy(age_logits, batch["group"])
    mask_loss = torch.zeros_like(age_loss)
    if mask_logits is not None:
        mask_loss = common.mask_loss(mask_logits, batch["mask"])
    total = age_loss + args.mask_weight * mask_loss
    if attribute_logits is not None:
        for name, logits in attribute_logits.items():
            total = total + args.attribute_weight * common.known_cross_entropy(logits, batch[name])
    return torch.stack([total, age_loss, mask_loss])


def validate(model, dataset, device):
    """Loss, accuracy and mask IoU (None without a mask) on a whole split, in float32."""
    logits, _, overlaps = common.score_dataset(model, dataset, device)
    groups = dataset.labels["group"]
    known = groups >= 0  # an age that is a range may lie in two groups
    return {
        "val_loss": common.known_cross_entropy(logits, groups).item(),
        "val_accuracy": (logits.argmax(dim=1) == groups)[known].double().mean().item(),
        "val_mask_iou": None if overlaps is None else overlaps[:, 0].mean().item(),
    }


def save_best(args, best, about):
    """Writes the best epoch in half precision, but for vectors: biases, scales and statistics."""
    weights = {key: value.half() if value.ndim > 1 else value for key, value in best["weights"].items()}
    figures = {"epoch": best["epoch"], "val": best["figures"]}
    common.save_checkpoint(args.out, "model", args, weights=weights, **figures, **about)


def get_parser():
    defaults = {"out": "model.pt", "init": "imagenet", "epochs": 30, "batch_size": 128}
    parser = training.training_parser("finetune", __doc__, **defaults)
    # fmt: off
    add, low_zero, switch = parser.add_argument, cli.number(float, low=0), argparse.BooleanOptionalAction
    add("--multitask", action=switch, default=False, help="also learn the face mask")
    add("--mask-weight", metavar="W", type=low_zero, default=0.5, help="of the mask loss beside the age loss")
    add("--attribute-weight", metavar="W", type=low_zero, default=0.3,
        help="of gender and race, learned from the file names beside the age, for training alone; 0 is off")
    add("--lr-strategy", choices=["uniform", "differentiated"], default="uniform",
        help="one rate for all, or a lower one for the backbone than for the heads")
    add("--backbone-lr-scale", metavar="S", type=cli.number(float, above=0), default=0.5,
        help="the backbone's share of --lr when differentiated")
    add("--age-sigma", metavar="YEARS", type=low_zero, default=2.0,
        help="learn the year, with soft labels this wide, and sum years into groups; 0 learns groups alone")
    add("--ema", metavar="DECAY", type=cli.number(float, low=0, high=0.99999), default=0.998,
        help="decay a step of the average of weights that is validated and kept; 0 is off")
    add("--flip-averaging", action=switch, default=True,
        help="the model averages over a face and its mirror image, from validation on")
    # fmt: on
    return parser


def main(args):
    training.join_processes(args)
    state = training.open_run(args, "model")
    about = {"split": split_settings(args.data)}
    train, val = Path(args.data) / "train", Path(args.data) / "val"
    folders = training.learned_folders(args)
    faces = [face for folder in folders for face in list_pairs(folder, need_masks=args.multitask)]
    training.check_batch_size(args.batch_size, len(faces))
    if not args.final and all(face.group < 0 for face in list_pairs(val, need_masks=args.multitask)):
        lack = "all ages are ranges that cross groups, so that no epoch can be chosen"
        raise cli.UserError(f"{val}: {lack}: add other faces, or give --final")
    about["missing_groups"] = missing_groups(faces, by_year=args.age_sigma > 0)
    if about["missing_groups"]:
        lack = f"{train} holds no face of {', '.join(about['missing_groups'])}"
        if not args.age_sigma:
            raise cli.UserError(f"{lack}: add some and run split.py again, or learn years (--age-sigma 2)")
        if not rank():
            print(f"warning: {lack}: the model will not know what they look like", file=sys.stderr)

    options = {"with_masks": args.multitask, "seed": args.seed, "workers": args.workers}
    dataset = common.FaceDataset(folders, args.image_size, common.supervised_augmentation, **options)
    val_dataset = None if args.final else common.FaceDataset(val, args.image_size, **options)
    torch.manual_seed(args.seed)
    model = common.make_model(vars(args), training=True)
    groups = common.build_param_groups(
        model, args.lr, args.lr_strategy, args.backbone_lr_scale, args.weight_decay
    )
    run = training.begin_training(args, "model", model, groups, dataset, state, val_dataset)
    about |= training.provenance(run)
    if val_dataset is not None:
        about["val_hashes"] = torch.cat([about["val_hashes"], val_dataset.hashes]).unique()
        known = torch.isin(val_dataset.hashes, run.provenance["train_hashes"]).sum()
        if known and not rank():
            counts = f"{known} of the {len(val_dataset)} faces of val"
            print(f"warning: --init has learned from {counts}, so val flatters", file=sys.stderr)

    while run.epoch < args.epochs:
        losses = training.train_one_epoch(run, partial(multitask_losses, args=args))  # steps×3
        _, age_loss, mask_loss = losses.mean(dim=0).tolist()
        trained = model if run.ema is None else run.ema.module
        figures, score = {}, None
        if val_dataset is not None:
            figures = validate(trained, val_dataset, run.device)
            score = (-figures["val_accuracy"], figures["val_loss"])
        is_best = score is None or run.best is None or score < run.best["score"]
        if is_best:
            weights = {
                key: value.detach().to("cpu", copy=True)
                for key, value in trained.state_dict().items()
                if not key.startswith("attributes.")
            }
            run.best = {"epoch": run.epoch + 1, "score": score, "figures": figures, "weights": weights}
        training.finish_epoch(run, {"train_loss": age_loss, "train_mask_loss": mask_loss, **figures})
        if is_best and not rank():
            save_best(args, run.best, about)

    if not rank():
        save_best(args, run.best, about)  # once more, lest the run was killed before it
        accuracy = run.best["figures"].get("val_accuracy")
        print(
            f"{args.out} written: epoch {run.best['epoch']} of {args.epochs} on {len(dataset)} faces at "
            f"{args.image_size} px" + (f", accuracy on val {accuracy:.2%}" if val_dataset else "")
        )
    # The loss on train is of years, that on val of groups.
    training.finish_run(run, ["train_loss", "val_loss", "val_accuracy", "val_mask_iou"])


if __name__ == "__main__":
    cli.run(main, get_parser())
