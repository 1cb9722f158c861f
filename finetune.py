"""Trains the age-group classifier, with the face mask as an auxiliary task if asked.

    python finetune.py --multitask --lr-strategy differentiated --init contrastive.pt
    python finetune.py --config configs/classification.yaml

Keeps the epoch that does best on val (accuracy, ties by loss) in --out; writes beside it a history CSV,
curves, and `.last.pt` for --resume.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    GROUP_NAMES,
    FaceDataset,
    MultitaskResNet18,
    UserError,
    add_training_flags,
    autocast,
    build_param_groups,
    check_same_faces,
    choose_device,
    choose_precision,
    init_backbone,
    last_path,
    mask_loss,
    number,
    open_run,
    plot_history,
    predict_dataset,
    progress,
    restore_training,
    run,
    save_checkpoint,
    script_parser,
    set_seed,
    supervised_augmentation,
    to_input,
    train_loader,
    training_state,
    warmup_cosine,
    write_csv,
)


def train_one_epoch(model, loader, optimizer, schedule, scaler, args, device, dtype, epoch):
    """One pass over the train split; returns the mean group loss and mask loss (0 without --multitask)."""
    model.train()
    loader.batch_sampler.epoch = epoch
    losses = []
    for batch in progress(loader, f"epoch {epoch + 1}/{args.epochs}", unit="step"):
        images = to_input(batch["image"], device)  # B×H×W×3 → B×3×H×W
        with autocast(device, dtype):
            logits, mask_logits = model(images)  # B×6, B×1×H×W
        group_loss = F.cross_entropy(logits.float(), batch["group"].to(device))
        face_loss = torch.zeros_like(group_loss)
        if args.multitask:
            face_loss = mask_loss(mask_logits, batch["mask"].to(device).unsqueeze(1))
        scaler.scale(group_loss + args.mask_weight * face_loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        losses.append(torch.stack([group_loss, face_loss]).detach())  # read at the end: no wait a step
    return torch.stack(losses).mean(dim=0).tolist()


def validate(model, dataset, args, device, dtype):
    """Loss, accuracy and mask IoU (None without a mask) on a whole split."""
    logits, overlap = predict_dataset(model, dataset, device, dtype)
    groups = torch.from_numpy(dataset.groups)
    return {
        "val_loss": F.cross_entropy(logits, groups).item(),
        "val_accuracy": (logits.argmax(dim=1) == groups).double().mean().item(),
        "val_mask_iou": None if overlap is None else overlap["iou"].mean().item(),
    }


def save_model(args, best, seen):
    """Writes the best epoch so far as the checkpoint that evaluate.py reads."""
    save_checkpoint(
        args.out,
        "model",
        args,
        weights=best["weights"],
        epoch=best["epoch"],
        val=best["figures"],
        train_hashes=seen,
    )


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
    return parser


def main(args):
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    state = open_run(args, "model")

    set_seed(args.seed)
    model = MultitaskResNet18(len(GROUP_NAMES), args.multitask)
    if state is None:
        line, seen = init_backbone(model.backbone, args.init)
        print(line)
    train, val = (
        FaceDataset(
            Path(args.data) / split, args.image_size, augment, with_masks=args.multitask, seed=args.seed,
            workers=args.workers,
        )
        for split, augment in (("train", supervised_augmentation), ("val", None))
    )  # fmt: skip
    missing = np.setdiff1d(np.arange(len(GROUP_NAMES)), train.groups)
    if len(missing):
        names = ", ".join(GROUP_NAMES[group] for group in missing)
        raise UserError(f"{args.data}/train holds no face of {names}: add some and run split.py again")
    hashes = torch.from_numpy(train.hashes)
    loader = train_loader(train, args.batch_size, args.seed, args.workers, device)

    model.to(device, memory_format=torch.channels_last)
    groups = build_param_groups(model, args.lr, args.lr_strategy, args.backbone_lr_scale, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = warmup_cosine(optimizer, args.epochs * len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state is None:
        start, history, best, seen = 0, [], None, torch.cat([seen, hashes]).unique()
    else:
        check_same_faces(state, hashes, args)
        restore_training(state, model, optimizer, schedule, scaler)
        start, history, best, seen = state["epoch"], state["history"], state["best"], state["train_hashes"]

    for epoch in range(start, args.epochs):
        began = time.perf_counter()
        group_loss, face_loss = train_one_epoch(
            model, loader, optimizer, schedule, scaler, args, device, dtype, epoch
        )
        if not math.isfinite(group_loss + face_loss):
            raise UserError(f"the loss became {group_loss + face_loss} in epoch {epoch + 1}: lower --lr")
        seconds = time.perf_counter() - began
        figures = validate(model, val, args, device, dtype)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": group_loss,
                "train_mask_loss": face_loss,
                **figures,
                "lr": schedule.get_last_lr()[-1],
                "seconds": round(seconds, 1),
            }
        )
        rank = (-figures["val_accuracy"], figures["val_loss"])
        if best is None or rank < tuple(best["rank"]):
            weights = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "rank": rank, "figures": figures, "weights": weights}
        print(
            f"epoch {epoch + 1}/{args.epochs}: train loss {group_loss:.4f}, "
            f"val loss {figures['val_loss']:.4f}, val accuracy {figures['val_accuracy']:.2%}"
            + (f", val mask IoU {figures['val_mask_iou']:.3f}" if args.multitask else "")
            + f", {seconds:.0f} s, {len(loader) * args.batch_size / seconds:.0f} faces/s"
        )
        state = training_state(model, optimizer, schedule, scaler)
        save_checkpoint(
            last_path(args.out),
            "model.last",
            args,
            **state,
            epoch=epoch + 1,
            history=history,
            best=best,
            hashes=hashes,
            train_hashes=seen,
        )
        write_csv(Path(args.out).with_suffix(".csv"), history)
        if best["epoch"] == epoch + 1:
            save_model(args, best, seen)

    save_model(args, best, seen)
    write_csv(Path(args.out).with_suffix(".csv"), history)
    panels = {"loss": ["train_loss", "val_loss"], "val accuracy": ["val_accuracy"]}
    panels |= {"val mask IoU": ["val_mask_iou"]} if args.multitask else {}
    plot_history(Path(args.out).with_suffix(".png"), history, panels)
    print(
        f"{args.out} written: epoch {best['epoch']} of {args.epochs} on {len(train)} faces "
        f"at {args.image_size} px, val accuracy {best['figures']['val_accuracy']:.2%} on {len(val)}"
    )


if __name__ == "__main__":
    run(main, get_parser())
