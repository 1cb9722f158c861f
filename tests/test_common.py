import math
from itertools import pairwise

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import (
    CONTRASTIVE_VIEW,
    SUPERVISED_VIEW,
    FaceDataset,
    MultitaskResNet18,
    UserError,
    age_contrastive_loss,
    augment_batch,
    augmentation,
    build_param_groups,
    mask_loss,
    mask_overlap,
    nt_xent_loss,
    seed_augmentation,
    to_device,
    to_input,
    train_loader,
)
from conftest import noise_pairs, write_pair

CPU = torch.device("cpu")


# Model


@pytest.mark.parametrize("multitask", [True, False])
@pytest.mark.parametrize("height, width", [(64, 64), (96, 128)])
def test_model_shapes(multitask, height, width):
    model = MultitaskResNet18(num_groups=6, multitask=multitask)
    logits, mask_logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 6)
    assert mask_logits.shape == (2, 1, height, width) if multitask else mask_logits is None


def test_model_size():
    assert sum(parameter.numel() for parameter in MultitaskResNet18().parameters()) <= 12_300_000


def test_model_refuses_other_sides():
    with pytest.raises(ValueError, match="multiples of 32"):
        MultitaskResNet18()(torch.randn(1, 3, 64, 80))


def test_every_parameter_learns():
    model = MultitaskResNet18()
    logits, mask_logits = model(torch.randn(4, 3, 64, 64))
    mask = (torch.rand(4, 1, 64, 64) > 0.5).float()
    (F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])) + mask_loss(mask_logits, mask)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Losses


def test_nt_xent_equals_the_textbook_loop():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 7, 16, dtype=torch.float64)
    z = torch.cat([z1, z2])
    total = 0.0
    for i in range(14):
        similarity = [math.exp(F.cosine_similarity(z[i], z[k], dim=0).item() / 0.3) for k in range(14)]
        total -= math.log(similarity[(i + 7) % 14] / (sum(similarity) - similarity[i]))
    assert nt_xent_loss(z1, z2, 0.3).item() == pytest.approx(total / 14, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_nt_xent_of_coinciding_embeddings(count):
    z = torch.randn(1, 8).expand(count, 8)
    assert nt_xent_loss(z, 3 * z, 0.07).item() == pytest.approx(math.log(2 * count - 1), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nt_xent_in_half_precision(dtype):
    z = (50 * torch.randn(2, 32, 64)).to(dtype).requires_grad_()
    loss = nt_xent_loss(z[0], z[1], 0.05)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_nt_xent_under_autocast_equals_float32():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent_loss(z1, z2, 0.05)
    assert inside.item() == pytest.approx(nt_xent_loss(z1, z2, 0.05).item(), abs=1e-6)


def test_age_contrastive_equals_its_definition():
    torch.manual_seed(1)
    z = torch.randn(9, 16, dtype=torch.float64)
    ages, tau, sigma = [3, 3, 20, 20, 20, 41, 77, 77, 90], 0.2, 0.5
    s = [[F.cosine_similarity(z[i], z[k], dim=0).item() for k in range(9)] for i in range(9)]
    terms = []
    for i in range(9):
        positives = [p for p in range(9) if p != i and ages[p] == ages[i]]
        negatives = sum(
            math.exp(abs(ages[i] - ages[k]) / (50 * sigma)) * math.exp(s[i][k] / tau)
            for k in range(9)
            if ages[k] != ages[i]
        )
        ratios = [math.exp(s[i][p] / tau) / (math.exp(s[i][p] / tau) + negatives) for p in positives]
        if positives:
            terms.append(-sum(map(math.log, ratios)) / len(positives))
    assert len(terms) == 7
    loss = age_contrastive_loss(z, torch.tensor(ages), tau, sigma)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


@pytest.mark.parametrize("ages", [[1, 2, 3, 4], [30, 30, 30, 30]])
def test_age_contrastive_without_positives_or_negatives(ages):
    z = torch.randn(4, 8, requires_grad=True)
    loss = age_contrastive_loss(z, torch.tensor(ages), 0.07, 0.5)
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()


def test_age_contrastive_in_half_precision():
    z = torch.randn(16, 8).half().requires_grad_()
    loss = age_contrastive_loss(z, torch.arange(16) // 2 * 10, 0.05, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 0 and z.grad.isfinite().all()


def test_mask_loss_has_a_gradient():
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    loss = mask_loss(logits, mask)
    # p = 1/2 everywhere: cross-entropy log 2; Dice (2·4 + 1) / (16 + 1)
    assert loss.item() == pytest.approx(math.log(2) + 1 - 9 / 17, abs=1e-6)
    loss.backward()
    assert (logits.grad[:, :, :2] < 0).all() and (logits.grad[:, :, 2:] > 0).all()


@pytest.mark.parametrize("rows", [0, 3, 8])
def test_mask_loss_vanishes_for_a_perfect_mask(rows):
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :rows] = 1
    assert mask_loss((2 * mask - 1) * 50, mask).item() == pytest.approx(0, abs=1e-6)
    assert mask_loss((1 - 2 * mask) * 50, mask).item() > 10


def test_mask_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        mask_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


def test_mask_overlap():
    predicted = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]).bool()
    truth = torch.tensor([[[1, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]).bool()
    iou, dice = mask_overlap(predicted, truth).T
    assert iou.tolist() == pytest.approx([1 / 3, 1, 0]) and dice.tolist() == pytest.approx([1 / 2, 1, 0])


# Optimisation


@pytest.mark.parametrize("strategy, backbone_lr", [("uniform", 0.01), ("differentiated", 0.002)])
def test_param_groups(strategy, backbone_lr):
    model = MultitaskResNet18()
    groups = build_param_groups(model, 0.01, strategy, backbone_lr_scale=0.2, weight_decay=0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(backbone_lr if name.startswith("backbone.") else 0.01)
        assert group["weight_decay"] == (0 if parameter.ndim == 1 else 0.05), name


def test_param_groups_refuse_another_strategy():
    with pytest.raises(ValueError, match="strategy"):
        build_param_groups(MultitaskResNet18(), 0.01, "layerwise")


def test_warmup_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = common.warmup_cosine(optimizer, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(a >= b for a, b in pairwise(rates[4:])) and rates[-1] < 0.01


# Data and augmentation


def half_face(folder, side=120):
    """A pair whose mask is the bright part of its image, off centre and off axis."""
    y, x = np.mgrid[:side, :side] / side
    mask = np.where(((x - 0.42) / 0.25) ** 2 + ((y - 0.55 + 0.3 * x) / 0.3) ** 2 < 1, 255, 0).astype(np.uint8)
    write_pair(folder, "30_0_0_20170000000000000", np.repeat(mask[..., None], 3, axis=2), mask)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("view", [CONTRASTIVE_VIEW, SUPERVISED_VIEW])
def test_image_and_mask_move_together(tmp_path, view, on_device):
    half_face(tmp_path)
    dataset = FaceDataset(tmp_path, 64, view, with_masks=True, on_device=on_device)
    batch = dataset.__getitems__([(epoch, 0) for epoch in range(200)])
    batch = to_device(batch, dataset, CPU, (0, 1, 0))
    assert batch["image"].shape == (200, 3, 64, 64) and batch["mask"].shape == (200, 1, 64, 64)
    masks = []
    for image, mask in zip(batch["image"].mean(dim=1).numpy(), batch["mask"][:, 0].numpy()):
        assert set(np.unique(mask)) <= {0, 1}
        mask = mask.astype(bool)
        threshold = (image.max() + image.min()) / 2  # light and contrast may have changed
        bright = image > threshold
        assert (bright & mask).sum() / (bright | mask).sum() > 0.93
        masks.append(mask)
    assert len({mask.tobytes() for mask in masks}) > 150  # they did move


def looks(images):
    """Per picture: mean channels, contrast, sharpness, saturation, left and upper share of the light."""
    x = images.astype(np.float64)  # B×H×W×3
    grey = x.mean(axis=3)
    figures = [*x.mean(axis=(1, 2)).T, grey.std(axis=(1, 2)), np.abs(np.diff(grey)).mean(axis=(1, 2))]
    figures.append((x.max(axis=3) - x.min(axis=3)).mean(axis=(1, 2)))
    figures += [grey[:, :, :32].mean(axis=(1, 2)) / grey.mean(axis=(1, 2))]
    figures += [grey[:, :32].mean(axis=(1, 2)) / grey.mean(axis=(1, 2))]
    return np.array(figures)


@pytest.mark.parametrize("view", [CONTRASTIVE_VIEW, SUPERVISED_VIEW])
def test_batches_on_a_device_look_like_the_albumentations_pipeline(drawn, view):
    faces = FaceDataset(drawn / "dataset/processed", 80)
    image, mask = faces.images[40].numpy(), 255 * faces.masks[40].numpy()
    count, pipeline = 1500, augmentation(view, 64)
    moved = []
    for index in range(count):
        seed_augmentation(pipeline, 0, 0, index)
        moved.append(pipeline(image=image, mask=mask))
    images, masks = augment_batch(
        torch.from_numpy(image).expand(count, -1, -1, -1), torch.from_numpy(mask).expand(count, -1, -1),
        view, 64, torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert images.shape == (count, 3, 64, 64) and images.min() >= 0 and images.max() < 255.01
    expected, found = looks(np.stack([m["image"] for m in moved])), looks(images.permute(0, 2, 3, 1).numpy())
    spread = expected.std(axis=1)
    assert (np.abs(found.mean(axis=1) - expected.mean(axis=1)) < 0.15 * spread).all()  # standard error: 0.04
    assert np.allclose(found.std(axis=1), spread, rtol=0.12)
    shares = np.stack([m["mask"] for m in moved]).mean(axis=(1, 2)) / 255
    assert masks.float().mean().item() == pytest.approx(shares.mean(), abs=0.15 * shares.std())
    grey = lambda x: (np.ptp(x, axis=3).max(axis=(1, 2)) < 1.5).mean()  # noqa: E731
    assert grey(images.permute(0, 2, 3, 1).numpy()) == pytest.approx(view["grey"], abs=0.035)


def test_batches_on_a_device_depend_on_their_generator_alone():
    images = torch.randint(256, (6, 40, 40, 3), dtype=torch.uint8)
    first, again, other = (
        augment_batch(images, None, CONTRASTIVE_VIEW, 32, torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("hue", [0.25, -0.4])
def test_shift_hue_equals_opencv(hue):
    image = np.random.default_rng(0).random((16, 16, 3), np.float32)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * hue) % 360
    x = torch.from_numpy(255 * image).permute(2, 0, 1)[None]
    found = common.shift_hue(x, torch.full((1, 1, 1), hue))[0].permute(1, 2, 0).numpy() / 255
    assert np.allclose(found, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), atol=1e-4)


def test_gaussian_blur_equals_opencv():
    image = np.random.default_rng(0).random((24, 24, 3), np.float32)
    x = torch.from_numpy(image).permute(2, 0, 1).expand(2, -1, -1, -1)
    found = (
        common.gaussian_blur(x, torch.tensor([0.4, 1.5]).view(2, 1, 1, 1), 1.5).permute(0, 2, 3, 1).numpy()
    )
    for blurred, sigma in zip(found, (0.4, 1.5)):
        assert np.allclose(blurred, cv2.GaussianBlur(image, (11, 11), sigma), atol=1e-5)


def test_augmentations_draw_independently():
    """Flipped and grey must not go together, as they do when every transform is given the same seed."""
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.ToGray(p=0.5)])
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = (200, 30, 30)
    seen = {}
    for index in range(400):
        seed_augmentation(pipeline, 0, 0, index)
        out = pipeline(image=image)["image"]
        key = (bool(out[0, 3].any()), bool((out[..., 0] == out[..., 1]).all()))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 4 and min(seen.values()) > 60  # 100 expected of each


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    noise_pairs(tmp_path, [1, 10, 20, 30, 50, 70, 80, 90])
    batches = {}
    for workers in (0, 2):
        dataset = FaceDataset(tmp_path, 32, CONTRASTIVE_VIEW, views=2, with_masks=True, seed=3)
        loader = train_loader(dataset, 4, 3, workers, CPU)
        loader.batch_sampler.epoch = 5
        batches[workers] = list(loader)
    for serial, parallel in zip(batches[0], batches[2]):
        assert serial["image"].shape == (8, 32, 32, 3) and serial["mask"].shape == (8, 32, 32)
        assert all(torch.equal(serial[key], parallel[key]) for key in serial)
    image = dataset[(5, 0)]["image"]
    assert not torch.equal(image[0], image[1])
    assert not torch.equal(image, dataset[(6, 0)]["image"])
    dataset[(9, 3)]
    assert torch.equal(image, dataset[(5, 0)]["image"])


def test_workers_that_are_not_forked_share_the_pictures(tmp_path, monkeypatch):
    noise_pairs(tmp_path, [1, 10, 20, 30])
    dataset = FaceDataset(
        tmp_path, 32, CONTRASTIVE_VIEW, on_device=True
    )  # hands out the pictures as they are
    monkeypatch.setattr(common.sys, "platform", "another")
    loader = train_loader(dataset, 4, 0, 1, CPU)
    loader.multiprocessing_context = "spawn"
    assert next(iter(loader))["image"].float().std() > 0
    dataset.images.fill_(7)  # the worker, which lives on, must see this
    assert (next(iter(loader))["image"] == 7).all()


def test_each_epoch_has_its_own_order_and_drops_only_the_rest():
    sampler = common.EpochBatches(10, 4, seed=0)
    epochs = []
    for sampler.epoch in range(3):
        keys = [key for batch in sampler for key in batch]
        assert len(keys) == 8 and {epoch for epoch, _ in keys} == {sampler.epoch}
        assert len({index for _, index in keys}) == 8
        epochs.append([index for _, index in keys])
    assert epochs[0] != epochs[1] != epochs[2]


def test_dataset_without_augmentation(tmp_path):
    half_face(tmp_path)
    dataset = FaceDataset(tmp_path, 64)
    sample = dataset[0]
    assert sample["image"].shape == (64, 64, 3) and sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (64, 64) and set(np.unique(sample["mask"])) == {0, 1}
    assert sample["age"] == 30 and sample["group"] == 3
    assert "mask" not in FaceDataset(tmp_path, 64, with_masks=False)[0]


def test_dataset_is_rgb(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 2] = 255  # red, as OpenCV writes it
    write_pair(tmp_path, "30_0_0_1", image)
    assert FaceDataset(tmp_path, 32)[0]["image"][0, 0].tolist() == [255, 0, 0]


def test_to_input():
    images = torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8)  # 1×1×1×3
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    out = to_input(images, CPU)
    assert out.shape == (1, 3, 1, 1) and out.flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda folder, stem: (folder / f"{stem}_mask.png").unlink(), "_mask.png"),
        (lambda folder, stem: (folder / f"{stem}_image.png").write_text("no image"), "readable"),
        (
            lambda folder, stem: write_pair(
                folder, stem, np.zeros((9, 9, 3), np.uint8), np.zeros((8, 8), np.uint8)
            ),
            "size",
        ),
    ],
)
def test_broken_pairs(tmp_path, break_it, word):
    stem = noise_pairs(tmp_path, [30])[0]
    break_it(tmp_path, stem)
    with pytest.raises(UserError, match=word):
        FaceDataset(tmp_path, 32)


def test_missing_and_empty_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(folder)):
            FaceDataset(folder, 32)


# Checkpoints


class Malice:
    def __reduce__(self):
        return print, ("code from a checkpoint",)


def test_checkpoints_that_are_refused(tmp_path, capsys):
    path = tmp_path / "a.pt"
    for content in (
        {"kind": "model", "x": Malice()},
        [1, 2],
        {"kind": "other"},
        {"kind": "model", "format_version": 99},
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"a\.pt"):
            common.load_checkpoint(path, "model")
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read"):
        common.load_checkpoint(path, "model")
    assert "code from a checkpoint" not in capsys.readouterr().out


def test_imagenet_without_network_names_the_other_choices(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="--init random"):
        common.init_backbone(MultitaskResNet18().backbone, "imagenet")


def test_years_sum_into_groups():
    probabilities = torch.rand(5, common.YEARS).softmax(dim=1)
    groups = common.group_logits(probabilities.log()).softmax(dim=1)
    for group, (first, last) in enumerate(common.AGE_GROUPS.values()):
        assert torch.allclose(groups[:, group], probabilities[:, first : last + 1].sum(dim=1))
    assert sum(common.GROUP_SIZES) == common.YEARS


def test_soft_age_labels_by_hand():
    labels = common.soft_age_labels(torch.tensor([0, 30, 116]), 2.0)
    assert labels.shape == (3, 101) and torch.allclose(labels.sum(dim=1), torch.ones(3))
    assert labels.argmax(dim=1).tolist() == [0, 30, 100]
    assert labels[1, 32] / labels[1, 30] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert labels[1, 28] == pytest.approx(labels[1, 32].item())


def test_flip_averaging_is_blind_to_mirroring():
    torch.manual_seed(0)
    model = common.make_model({"multitask": True, "age_sigma": 2, "flip_averaging": True})
    images = torch.randn(2, 3, 64, 64)
    assert model(images)[0].shape == (2, 6) and model(images, years=True)[0].shape == (2, 101)  # in training
    model.eval()
    (logits, masks), (mirrored, mirrored_masks) = model(images), model(images.flip(-1))
    assert logits.shape == (2, 6) and torch.allclose(logits, mirrored, atol=1e-5)
    assert torch.allclose(masks, mirrored_masks.flip(-1), atol=1e-5)
    model.flip_averaging = False
    mean = (model(images)[0].softmax(dim=1) + model(images.flip(-1))[0].softmax(dim=1)) / 2
    assert torch.allclose(logits.softmax(dim=1), mean, atol=1e-6)


def test_crop_averaging_adds_the_middle_but_not_its_mask():
    torch.manual_seed(0)
    model = common.make_model({"multitask": True, "flip_averaging": True}).eval()
    images = torch.randn(2, 3, 64, 96)
    middle = F.interpolate(images[:, :, 4:60, 6:90], size=(64, 96), mode="bilinear")
    (logits, masks), (closer, _) = model(images), model(middle)
    model.crop_averaging = True
    both, same_masks = model(images)
    mean = (logits.softmax(dim=1) + closer.softmax(dim=1)) / 2
    assert torch.allclose(both.softmax(dim=1), mean, atol=1e-6) and not torch.allclose(
        both, logits, atol=1e-3
    )
    assert torch.equal(masks, same_masks)
    model.flip_averaging = False
    assert not torch.allclose(model(images)[0], both, atol=1e-5)


def test_imagenet_weights_are_loaded(monkeypatch, capsys):
    """A stand-in of the download's form: everything but ImageNet's own head must arrive."""
    weights = common.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    backbone = MultitaskResNet18().backbone
    seen, pretraining = common.init_backbone(backbone, "imagenet")
    line = capsys.readouterr().out
    assert torch.equal(backbone.conv1.weight, weights["conv1.weight"])
    assert "120 of 120" in line and "not loaded: fc" in line and len(seen) == 0 and pretraining == {}
