"""MONAI's U-Net, trained on cases that a JSON file lists, for as long as it says.

python benchmarks/monai_side.py TASK.json

It loads no jaxseg; `versus_monai.py` writes the file and scores what is written. The recipe is that
of MONAI's tutorials: cached cases, random patches around every class, small changes of place and
intensity, Dice and cross-entropy, AdamW whose rate falls as a cosine over the time there is, and a
sliding window with overlapping tiles.
"""

import json
import math
import pathlib
import sys
import time

import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    RandAffined,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
    ToTensord,
)
from monai.utils import set_determinism
from scipy import ndimage

CHANNELS = (16, 32, 64, 128, 256)
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 4, 2e-3, 1e-2
# Of the time that is left: what scoring and starting take besides.
RESERVE_S = 15.0


def main(path):
    begun = time.monotonic()
    task = json.loads(pathlib.Path(path).read_text())
    set_determinism(task["seed"])
    torch.set_num_threads(2)
    rank, num_classes = len(task["patch_size"]), task["num_classes"]
    network = UNet(rank, 1, num_classes, CHANNELS, (2,) * (len(CHANNELS) - 1), num_res_units=2)
    dataset = CacheDataset(examples(task), augmentation(task), progress=False)
    loader = DataLoader(
        dataset,
        num_workers=1,
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        persistent_workers=True,
    )
    first = load(task["val"][0], task, labelled=False)
    start = time.monotonic()
    segment(network, first, task)
    evaluation_s = (time.monotonic() - start) * len(task["val"]) + RESERVE_S
    seconds = 60 * task["minutes"] - (time.monotonic() - begun) - evaluation_s
    steps = train(network, loader, seconds)
    network.eval()
    for case in task["val"]:
        label = segment(network, load(case, task, labelled=False), task)
        image = nibabel.load(case["image"])
        out = pathlib.Path(task["out"], case["id"] + ".nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, image.affine, image.header), out)
    print(json.dumps({"steps": steps, "minutes": (time.monotonic() - begun) / 60}))


def load(case, task, labelled=True):
    """Image [1, X, Y, Z] on the task's grid, normalised; with its label where that is wanted."""
    read = nibabel.load(case["image"])
    image = read.get_fdata(dtype=np.float32)
    zoom = zooms(read, task)
    image = np.clip(image, *np.percentile(image, [0.5, 99.5]))
    image = ndimage.zoom((image - image.mean()) / (image.std() + 1e-8), zoom, order=1)
    loaded = {"image": image[None].astype(np.float32), "shape": read.shape}
    if labelled:
        label = np.asarray(nibabel.load(case["label"]).dataobj).astype(np.uint8)
        loaded["label"] = ndimage.zoom(label, zoom, order=0)[None]
    return loaded


def zooms(image, task):
    """Factors by which a volume is resampled; an axis of the task's grid that is 0 is left."""
    wanted = zip(image.header.get_zooms()[:3], task["spacing_mm"], strict=True)
    return [own / grid if grid else 1.0 for own, grid in wanted]


def examples(task):
    """Training cases, or their slices where patches are flat."""
    cases = [load(case, task) for case in task["train"]]
    if len(task["patch_size"]) == 3:
        return [{name: case[name] for name in ("image", "label")} for case in cases]
    return [
        {name: case[name][..., z] for name in ("image", "label")}
        for case in cases
        for z in range(case["image"].shape[-1])
        if case["label"][..., z].any()
    ]


def augmentation(task):
    both, patch_size = ["image", "label"], task["patch_size"]
    return Compose(
        [
            SpatialPadd(both, patch_size),
            RandCropByLabelClassesd(
                both, "label", patch_size, num_classes=task["num_classes"], num_samples=1
            ),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=(0.5,) * (3 if len(patch_size) == 3 else 1),
                scale_range=(0.2,) * len(patch_size),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianNoised("image", prob=0.1, std=0.1),
            RandScaleIntensityd("image", 0.25, prob=0.3),
            RandShiftIntensityd("image", 0.2, prob=0.3),
            ToTensord(both),
        ]
    )


def train(network, loader, seconds):
    """Trains for some seconds; returns how many steps that were."""
    loss_fn = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    start, steps = time.monotonic(), 0
    network.train()
    while True:
        for batch in loader:
            part = (time.monotonic() - start) / seconds
            if part >= 1:
                return steps
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * part)) / 2
            optimizer.zero_grad()
            loss = loss_fn(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            steps += 1


@torch.inference_mode()
def segment(network, case, task):
    """Label [X, Y, Z] uint8 of a loaded case on its own grid."""
    image = torch.as_tensor(case["image"])
    flat = len(task["patch_size"]) == 2
    batch = image.permute(3, 0, 1, 2) if flat else image[None]  # of slices
    logits = sliding_window_inference(
        batch, task["patch_size"], BATCH_SIZE, network, overlap=0.5, mode="gaussian"
    )
    logits = logits.permute(1, 2, 3, 0)[None] if flat else logits
    logits = torch.nn.functional.interpolate(
        logits, case["shape"], mode="trilinear", align_corners=False
    )
    return logits[0].argmax(0).numpy().astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1])
