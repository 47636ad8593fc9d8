"""Pretrains a small ViT on some classes of an image set, as a frozen base for the other classes.

``python benchmarks/pretrain_vit.py --data FOLDER --to FOLDER`` reads ``cifar10_train`` and
``cifar10_test`` (parquet) and writes a folder that ``model.source`` takes. The usual recipe: random
crops and flips, AdamW, cosine schedule with a warm-up, label smoothing. The classes that are held
out are the last ones, so the federated run takes them with ``data.class-names``; their pictures are
never seen here. On a GPU where there is one.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

#: Mean and deviation that pixels are normalised with.
MEAN, DEVIATION = 0.5, 0.25


def read(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures (n, 32, 32, 3) and labels (n,) of a parquet file."""
    table = pq.read_table(file)
    pictures = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
        for image in table["image"].to_pylist()
    ]
    return np.stack(pictures), np.array(table["label"].to_pylist(), dtype=np.int64)


def pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """Normalised float pictures, (n, 3, h, w)."""
    values = torch.from_numpy(pictures.astype(np.float32) / 255).permute(0, 3, 1, 2)
    return ((values - MEAN) / DEVIATION).contiguous()


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to four pixels, and mirror half of them."""
    size = batch.shape[-1]
    padded = pad(batch, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (len(batch), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(batch), generator=generator) < 0.5).tolist()
    rows = []
    for picture, (top, left), mirror in zip(padded, shifts, mirrored, strict=True):
        cut = picture[:, top : top + size, left : left + size]
        rows.append(cut.flip(-1) if mirror else cut)
    return torch.stack(rows)


def main() -> None:
    """Train, measure on the test pictures of the classes seen, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--classes", type=int, default=6, help="classes that are trained on")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = {}
    for part in ("train", "test"):
        pictures, labels = read(options.data / f"cifar10_{part}.parquet")
        seen = labels < options.classes
        sets[part] = (pixels(pictures[seen]), torch.from_numpy(labels[seen]))
    config = ViTConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=2 * options.hidden,
        image_size=32,
        patch_size=options.patch,
        num_labels=options.classes,
    )
    model = ViTForImageClassification(config).to(device)
    images, labels = sets["train"]
    steps = options.epochs * (len(images) // options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=steps + 1, pct_start=0.1, anneal_strategy="cos"
    )
    began, step = time.monotonic(), 0
    for epoch in range(options.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(options.batch):
            if len(rows) < options.batch:
                continue
            batch = augment(images[rows], generator).to(device)
            logits = model(pixel_values=batch).logits
            loss = cross_entropy(logits, labels[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        accuracy = measure(model, *sets["test"], device)
        print(f"epoch {epoch + 1}: accuracy {accuracy:.4f}, {time.monotonic() - began:.0f} s")
    options.to.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(options.to)
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    ).save_pretrained(options.to)
    record = {"accuracy": accuracy, "classes": options.classes, "epochs": options.epochs}
    (options.to / "pretraining.json").write_text(json.dumps(record))


@torch.no_grad()
def measure(
    model: ViTForImageClassification, images: Tensor, labels: Tensor, device: torch.device
) -> float:
    """Accuracy."""
    model.eval()
    right = 0
    for rows in torch.arange(len(images)).split(256):
        logits = model(pixel_values=images[rows].to(device)).logits
        right += int((logits.argmax(-1).cpu() == labels[rows]).sum())
    return right / len(images)


if __name__ == "__main__":
    main()
