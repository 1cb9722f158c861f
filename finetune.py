"""Trains the age-group classifier, with the face mask as an auxiliary task if asked.

    python finetune.py --multitask --lr-strategy differentiated --init contrastive.pt
    python finetune.py --config configs/classification.yaml
    torchrun --nproc-per-node=8 finetune.py --multitask --batch-size 1024

Keeps the epoch that does best on val (accuracy, ties by loss) in --out; writes beside it a history CSV,
curves, and `.last.pt` for --resume.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    GROUP_NAMES,
    SUPERVISED_VIEW,
    FaceDataset,
    UserError,
    add_training_flags,
    age_to_group,
    build_param_groups,
    check_batch_size,
    choose_device,
    choose_precision,
    finish_epoch,
    init_backbone,
    join_processes,
    list_pairs,
    make_model,
    mask_loss,
    number,
    open_run,
    plot_history,
    predict_dataset,
    rank,
    run,
    save_checkpoint,
    script_parser,
    set_seed,
    soft_age_labels,
    split_settings,
    start_training,
    train_one_epoch,
    write_csv,
)


def multitask_losses(model, batch, args):
    """Total, age and mask loss of a batch: (3,). Without a decoder the mask loss is 0.

    The age loss is the cross-entropy of groups or, with --age-sigma, of years with soft labels. With --mixup
    all of it is learned on blends of two faces (Zhang et al. 2018).
    """
    images, masks = batch["image"], batch.get("mask")
    if args.age_sigma:
        targets = soft_age_labels(batch["age"], args.age_sigma)  # B×YEARS
    else:
        targets = F.one_hot(batch["group"], len(GROUP_NAMES)).float()  # B×6
    if args.mixup:
        share = torch.distributions.Beta(args.mixup, args.mixup).sample().item()
        images, targets, masks = (
            None if part is None else share * part + (1 - share) * part.flip(0)
            for part in (images, targets, masks)
        )
    logits, mask_logits = model(images, years=bool(args.age_sigma))  # B×6 or B×YEARS, B×1×H×W
    age_loss = F.cross_entropy(logits.float(), targets)
    face_loss = torch.zeros_like(age_loss) if mask_logits is None else mask_loss(mask_logits, masks)
    return torch.stack([age_loss + args.mask_weight * face_loss, age_loss, face_loss])


def fit_temperature(logits, groups):
    """The temperature, 0.05 to 20, by which to divide logits (N, 6) for the lowest cross-entropy.

    groups: int64 (N,). Temperature scaling, Guo et al. 2017, section 4.2; predicted groups stay the same.
    """
    logits, inverse = logits.double(), torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * inverse, groups)  # convex in the inverse
        loss.backward()
        return loss

    optimizer.step(closure)
    return 1 / inverse.detach().nan_to_num(1).clamp(1 / 20, 20).item()


def validate(model, dataset, args, device, dtype):
    """Loss, accuracy, mask IoU (None without a mask) and best temperature on a whole split."""
    logits, overlap = predict_dataset(model, dataset, device, dtype)
    groups = torch.from_numpy(dataset.groups)
    return {
        "val_loss": F.cross_entropy(logits, groups).item(),
        "val_accuracy": (logits.argmax(dim=1) == groups).double().mean().item(),
        "val_mask_iou": None if overlap is None else overlap["iou"].mean().item(),
        "val_temperature": fit_temperature(logits, groups),
    }


def save_best(training):
    """Writes the best epoch so far as the checkpoint that evaluate.py reads."""
    args, best = training.args, training.best
    halves = args.half_weights
    weights = {k: v.half() if halves and v.is_floating_point() else v for k, v in best["weights"].items()}
    save_checkpoint(
        args.out, "model", args,
        weights=weights, epoch=best["epoch"], val=best["figures"], train_hashes=training.seen,
        pretraining=training.pretraining, split=training.split,
    )  # fmt: skip


def get_parser():
    parser = script_parser("finetune", __doc__)
    add_training_flags(parser, "model.pt", "imagenet", epochs=30, batch_size=128, lr=1e-3, image_size=128)
    parser.add_argument(
        "--multitask", action=argparse.BooleanOptionalAction, default=False, help="also learn the face mask"
    )
    parser.add_argument(
        "--mask-weight",
        type=number(float, low=0),
        default=0.5,
        help="weight of the mask loss beside the group loss",
    )
    parser.add_argument(
        "--lr-strategy",
        choices=["uniform", "differentiated"],
        default="uniform",
        help="one rate for all, or a lower one for the backbone than for the heads",
    )
    parser.add_argument(
        "--backbone-lr-scale",
        type=number(float, above=0),
        default=0.3,
        help="the backbone's share of --lr when differentiated",
    )
    parser.add_argument(
        "--age-sigma",
        type=number(float, low=0),
        default=0,
        help="learn the year, with soft labels of this standard deviation in years, and sum years into "
        "groups; 0 learns groups alone",
    )
    parser.add_argument(
        "--mixup",
        type=number(float, low=0),
        default=0,
        help="alpha of the Beta distribution by which two faces are blended; 0 is off",
    )
    parser.add_argument(
        "--ema",
        type=number(float, low=0, high=0.99999),
        default=0,
        help="decay a step of the moving average of weights that is validated and kept; 0 is off",
    )
    parser.add_argument(
        "--flip-averaging",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the model averages over a face and its mirror image, from validation on",
    )
    parser.add_argument(
        "--crop-averaging",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="likewise over a face and its middle, 7/8 of the sides; takes twice the time",
    )
    parser.add_argument(
        "--half-weights",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write the weights of --out in half precision, for release",
    )
    return parser


def main(args):
    device = join_processes(choose_device(args.device))
    dtype = choose_precision(args.precision, device)
    state = open_run(args, "model")
    split = split_settings(args.data)
    faces = list_pairs(Path(args.data) / "train", need_masks=args.multitask)
    check_batch_size(args.batch_size, len(faces))
    missing = np.setdiff1d(np.arange(len(GROUP_NAMES)), age_to_group([face.age for face in faces]))
    if len(missing):
        names = ", ".join(GROUP_NAMES[group] for group in missing)
        raise UserError(f"{args.data}/train holds no face of {names}: add some and run split.py again")

    set_seed(args.seed)
    model = make_model(vars(args))
    start = None if state else init_backbone(model.backbone, args.init)
    train, val = (
        FaceDataset(
            Path(args.data) / split, args.image_size, view, with_masks=args.multitask, seed=args.seed,
            workers=args.workers, on_device=device.type == "cuda",
        )
        for split, view in (("train", SUPERVISED_VIEW), ("val", None))
    )  # fmt: skip
    groups = build_param_groups(model, args.lr, args.lr_strategy, args.backbone_lr_scale, args.weight_decay)
    training = start_training(args, "model", model, groups, train, device, state, start)
    training.split = split

    for epoch in range(training.epoch, args.epochs):
        began, begun = time.perf_counter(), training.step
        losses = train_one_epoch(training, partial(multitask_losses, args=args))
        _, age_loss, face_loss = losses.mean(dim=0).tolist()
        seconds = time.perf_counter() - began
        kept = model if training.average is None else training.average.module
        figures = validate(kept, val, args, device, dtype)
        score = (-figures["val_accuracy"], figures["val_loss"])
        better = training.best is None or score < tuple(training.best["score"])
        if better:
            weights = {key: value.detach().to("cpu", copy=True) for key, value in kept.state_dict().items()}
            training.best = {"epoch": epoch + 1, "score": score, "figures": figures, "weights": weights}
        print(
            f"epoch {epoch + 1}/{args.epochs}: train loss {age_loss:.4f}, "
            f"val loss {figures['val_loss']:.4f}, val accuracy {figures['val_accuracy']:.2%}"
            + (f", val mask IoU {figures['val_mask_iou']:.3f}" if args.multitask else "")
            + f", {seconds:.0f} s, {(len(losses) - begun) * args.batch_size / seconds:.0f} faces/s"
        )
        row = {"epoch": epoch + 1, "train_loss": age_loss, "train_mask_loss": face_loss, **figures}
        row |= {"lr": training.schedule.get_last_lr()[-1], "seconds": round(seconds, 1)}
        finish_epoch(training, row)
        if better and not rank():
            save_best(training)

    if rank():
        return
    save_best(training)
    write_csv(Path(args.out).with_suffix(".csv"), training.history)
    panels = {"loss": ["train_loss", "val_loss"], "val accuracy": ["val_accuracy"]}
    panels |= {"val mask IoU": ["val_mask_iou"]} if args.multitask else {}
    plot_history(Path(args.out).with_suffix(".png"), training.history, panels)
    print(
        f"{args.out} written: epoch {training.best['epoch']} of {args.epochs} on {len(train)} faces "
        f"at {args.image_size} px, val accuracy {training.best['figures']['val_accuracy']:.2%} on {len(val)}"
    )


if __name__ == "__main__":
    run(main, get_parser())
