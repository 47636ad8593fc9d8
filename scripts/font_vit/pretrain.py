"""Make ``weights.json``: pretrain the ViT on rendered characters, on one CPU thread.

Run as ``python -m scripts.font_vit.pretrain``. The real handwriting of scikit-learn's digits
is never trained on; it is looked at once, at the end, for the report.
"""

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from rankfit.tasks.font_vit import WEIGHTS, store
from scripts.font_vit.glyphs import CHARACTERS, MAXIMUM, Glyphs, draw_glyphs, render

logger = logging.getLogger(__name__)

#: Recipe. Every epoch renders anew, so no image is seen twice.
SEED = 0
EPOCHS = 40
IMAGES_PER_EPOCH = 20_000
VALIDATION_IMAGES = 10_000
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 2e-3
WARMUP_FRACTION = 0.05
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_GRAD_NORM = 1.0

#: All that is needed to rebuild the backbone with ``ViTConfig(**CONFIG)``.
CONFIG: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def build_model(labels: int) -> ViTForImageClassification:
    """Build the ViT with random weights and a head of that many classes."""
    return ViTForImageClassification(ViTConfig(**CONFIG, num_labels=labels))


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017), from 0 to 1."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of images (n, 1, 8, 8), in [0, 1], whose largest logit is the label's.

    Only as many classes compete as the labels span: with digits, the first ten.
    """
    classes = int(labels.max()) + 1
    model.eval()
    with torch.no_grad():
        found = [model(pixel_values=part).logits[:, :classes] for part in torch.split(images, 512)]
    return float((torch.cat(found).argmax(1) == labels).float().mean())


def train_epoch(
    model: ViTForImageClassification,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Train over images (n, 1, 8, 8), in [0, 1], once, in their order; return the mean loss."""
    model.train()
    total = 0.0
    batches = zip(torch.split(images, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True)
    for batch, target in batches:
        logits = model(pixel_values=batch).logits  # (batch, characters)
        loss = functional.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        total += loss.item() * len(target)
    return total / len(labels)


def pretrain(seed: int, epochs: int, glyphs: Glyphs) -> tuple[ViTForImageClassification, float]:
    """Pretrain on rendered characters.

    Returns
    -------
    tuple
        The model with its head over :data:`CHARACTERS`, and its accuracy on fresh renderings.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.Generator().manual_seed(seed + 1)
    validation_images, validation_labels = render(glyphs, VALIDATION_IMAGES, held_out)
    model = build_model(len(CHARACTERS))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    steps = epochs * math.ceil(IMAGES_PER_EPOCH / BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    validation = 0.0
    for epoch in range(1, epochs + 1):
        images, labels = render(glyphs, IMAGES_PER_EPOCH, generator)
        loss = train_epoch(model, images / MAXIMUM, labels, optimizer, scheduler)
        validation = accuracy(model, validation_images / MAXIMUM, validation_labels)
        logger.info("epoch %d/%d: loss %.3f, accuracy %.3f", epoch, epochs, loss, validation)
    return model, validation


def handwriting() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits: images (n, 1, 8, 8) in [0, 1], labels (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / MAXIMUM
    return images, torch.tensor(digits.target)


def backbone_state(model: ViTForImageClassification) -> dict[str, Tensor]:
    """Every weight but the head's, by name."""
    return {name: value for name, value in model.state_dict().items() if name.startswith("vit.")}


def main() -> None:
    """Pretrain, report and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])

    torch.set_num_threads(1)  # sums in one order: the same seed gives the same bytes
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model, validation = pretrain(options.seed, options.epochs, draw_glyphs())
    seconds = time.perf_counter() - started
    digest = store(CONFIG, backbone_state(model), options.output)

    table = Table("figure", "value", title="font-vit")
    table.columns[1].overflow = "fold"
    table.add_row("rendered characters, accuracy over 62 classes", f"{validation:.3f}")
    table.add_row("real handwriting, untouched", f"{accuracy(model, *handwriting()):.3f}")
    table.add_row("parameters", f"{sum(p.numel() for p in model.vit.parameters())}")
    table.add_row("seed", str(options.seed))
    table.add_row("seconds", f"{seconds:.0f}")
    table.add_row("sha256", digest)
    table.add_row("bytes", str(options.output.stat().st_size))
    Console().print(table)


if __name__ == "__main__":
    main()
