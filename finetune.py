"""Trains the age-group classifier, with the face mask as an auxiliary task if asked.

    python finetune.py --multitask --lr-strategy differentiated --init contrastive.pt
    python finetune.py --config configs/published.yaml
    torchrun --nproc-per-node=8 finetune.py --multitask --batch-size 1024

Keeps the epoch that does best on val (accuracy, ties by loss) in --out, its weights in half precision; writes
beside it a history CSV, curves, and `.last.pt` for --resume.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from cli import UserError, beside, number, run, write_csv
from common import (
    FaceDataset,
    build_param_groups,
    init_backbone,
    known_cross_entropy,
    make_model,
    mask_loss,
    save_checkpoint,
    score_dataset,
    soft_age_labels,
    supervised_augmentation,
)
from devices import rank, set_seed
from training import (
    begin_training,
    check_batch_size,
    finish_epoch,
    join_processes,
    leave_processes,
    open_run,
    plot_history,
    provenance,
    train_one_epoch,
    training_parser,
)
from utkface import GROUP_NAMES, age_to_group, list_pairs, split_settings


def multitask_losses(model, batch, args):
    """Total, age and mask loss of a batch: (3,). Without a decoder the mask loss is 0.

    The age loss is the cross-entropy of years with soft labels or, with --age-sigma 0, of groups. The total
    adds to it those of the mask, of gender and of race, weighted.
    """
    heads = model(batch["image"], heads=True)
    if args.age_sigma > 0:
        targets = soft_age_labels(batch["age"], args.age_sigma, batch["spread"])  # B×YEARS
        age_loss = F.cross_entropy(heads.age_logits.float(), targets)
    else:
        age_loss = known_cross_entropy(heads.age_logits, batch["group"])
    face_loss = torch.zeros_like(age_loss)
    if heads.mask_logits is not None:
        face_loss = mask_loss(heads.mask_logits, batch["mask"])
    total = age_loss + args.mask_weight * face_loss
    if heads.attribute_logits is not None:
        for name, logits in heads.attribute_logits.items():
            total = total + args.attribute_weight * known_cross_entropy(logits, batch[name])
    return torch.stack([total, age_loss, face_loss])


def validate(model, dataset, device):
    """Loss, accuracy and mask IoU (None without a mask) on a whole split, in float32."""
    scores = score_dataset(model, dataset, device)
    groups = dataset.labels["group"]
    known = groups >= 0  # an age that is a range may lie in two groups
    return {
        "val_loss": known_cross_entropy(scores.logits, groups).item(),
        "val_accuracy": (scores.logits.argmax(dim=1) == groups)[known].double().mean().item(),
        "val_mask_iou": None if scores.mask_iou is None else scores.mask_iou.mean().item(),
    }


def to_half(weights):
    """Weights in half precision; biases, scales and statistics, which are vectors, stay as they are."""
    return {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}


def get_parser():
    parser = training_parser("finetune", __doc__, out="model.pt", init="imagenet", epochs=30, batch_size=128)
    # fmt: off
    add, low_zero, switch = parser.add_argument, number(float, low=0), argparse.BooleanOptionalAction
    add("--multitask", action=switch, default=False, help="also learn the face mask")
    add("--mask-weight", metavar="W", type=low_zero, default=0.5, help="of the mask loss beside the age loss")
    add("--attribute-weight", metavar="W", type=low_zero, default=0.3,
        help="of gender and race, learned from the file names beside the age, for training alone; 0 is off")
    add("--lr-strategy", choices=["uniform", "differentiated"], default="uniform",
        help="one rate for all, or a lower one for the backbone than for the heads")
    add("--backbone-lr-scale", metavar="S", type=number(float, above=0), default=0.5,
        help="the backbone's share of --lr when differentiated")
    add("--age-sigma", metavar="YEARS", type=low_zero, default=2.0,
        help="learn the year, with soft labels this wide, and sum years into groups; 0 learns groups alone")
    add("--ema", metavar="DECAY", type=number(float, low=0, high=0.99999), default=0.998,
        help="decay a step of the average of weights that is validated and kept; 0 is off")
    add("--flip-averaging", action=switch, default=True,
        help="the model averages over a face and its mirror image, from validation on")
    # fmt: on
    return parser


def main(args):
    device, dtype = join_processes(args.device, args.precision)
    state = open_run(args, "model")
    split = split_settings(args.data)
    train, val = Path(args.data) / "train", Path(args.data) / "val"
    folders = [train, val] if args.final else [train]
    faces = [face for folder in folders for face in list_pairs(folder, need_masks=args.multitask)]
    check_batch_size(args.batch_size, len(faces))
    ends = [age for face in faces for age in (face.age - face.spread, face.age + face.spread)]
    there = set(age_to_group(ends).tolist())
    missing = [name for group, name in enumerate(GROUP_NAMES) if group not in there]
    if missing:
        lack = f"{train} holds no face of {', '.join(missing)}"
        if not args.age_sigma:
            raise UserError(f"{lack}: add some and run split.py again, or learn years (--age-sigma 2)")
        print(f"warning: {lack}: the model will not know what they look like", file=sys.stderr)

    options = {"with_masks": args.multitask, "seed": args.seed, "workers": args.workers}
    dataset = FaceDataset(folders, args.image_size, supervised_augmentation, **options)
    val_dataset = None if args.final else FaceDataset(val, args.image_size, **options)
    set_seed(args.seed)
    model = make_model(vars(args), training=True)
    start = None if state else init_backbone(model.backbone, args.init)
    groups = build_param_groups(model, args.lr, args.lr_strategy, args.backbone_lr_scale, args.weight_decay)
    training = begin_training(args, "model", model, groups, dataset, device, dtype, state, start)
    if val_dataset and not rank():
        known = torch.isin(val_dataset.hashes, training.provenance["train_hashes"]).sum()
        if known:
            counts = f"{known} of the {len(val_dataset)} faces of val"
            print(f"warning: --init has learned from {counts}, so val flatters", file=sys.stderr)

    for epoch in range(training.epoch, args.epochs):
        start = time.perf_counter()
        losses = train_one_epoch(training, partial(multitask_losses, args=args))
        seconds = time.perf_counter() - start
        kept = model if training.ema is None else training.ema.module
        figures = {} if args.final else validate(kept, val_dataset, device)
        score = None if args.final else (-figures["val_accuracy"], figures["val_loss"])
        if args.final or training.best is None or score < tuple(training.best["score"]):
            weights = {
                key: value.detach().to("cpu", copy=True)
                for key, value in kept.state_dict().items()
                if not key.startswith("attributes.")
            }
            training.best = {"epoch": epoch + 1, "score": score, "figures": figures, "weights": weights}
        _, age_loss, face_loss = losses.mean(dim=0).tolist()
        row = {"epoch": epoch + 1, "train_loss": age_loss, "train_mask_loss": face_loss, **figures}
        row |= {"lr": training.scheduler.get_last_lr()[-1], "seconds": round(seconds, 1)}
        finish_epoch(training, row)
        if not rank() and training.best["epoch"] == epoch + 1:
            save_best(training, val_dataset, split=split, missing_groups=missing)
        print(
            f"epoch {epoch + 1}/{args.epochs}: train loss {age_loss:.4f}, "
            + "".join(f"{name.replace('_', ' ')} {value:.4f}, " for name, value in figures.items() if value)
            + f"{seconds:.0f} s, {len(losses) * args.batch_size / seconds:.0f} faces/s"
        )

    if not rank():
        save_best(training, val_dataset, split=split, missing_groups=missing)
        write_csv(beside(args.out, ".csv"), training.history)
        panels = {"train loss": ["train_loss"]}  # of years, val's of groups
        if not args.final:
            panels |= {"val loss": ["val_loss"], "val accuracy": ["val_accuracy"]}
            panels |= {"val mask IoU": ["val_mask_iou"]} if args.multitask else {}
        plot_history(beside(args.out, ".png"), training.history, panels)
        best, accuracy = training.best, training.best["figures"].get("val_accuracy")
        print(
            f"{args.out} written: epoch {best['epoch']} of {args.epochs} on {len(dataset)} faces at "
            f"{args.image_size} px" + (f", accuracy on val {accuracy:.2%}" if val_dataset else "")
        )
    leave_processes()


def save_best(training, val_dataset, **about_data):
    """Writes the best epoch so far as the checkpoint that evaluate.py reads."""
    best, history = training.best, provenance(training)
    if val_dataset is not None:
        history["val_hashes"] = torch.cat([history["val_hashes"], val_dataset.hashes]).unique()
    save_checkpoint(
        training.args.out, "model", training.args,
        weights=to_half(best["weights"]), epoch=best["epoch"], val=best["figures"], **about_data, **history,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, get_parser())
