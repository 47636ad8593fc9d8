"""Image classification: the model's own processor, or a plain scaling where it has none."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.utils import cached_file

from rankfit.configs.settings import Model
from rankfit.tasks.data import DataError, Examples
from rankfit.tasks.models import load_config
from rankfit.tasks.sources import ModelError, resolve_source
from rankfit.tasks.task import Split, Task, TensorSpec

logger = logging.getLogger(__name__)

_PROCESSOR_FILE = "preprocessor_config.json"
#: Encoded images are kept up to this size of the whole set.
_KEPT_BYTES = 2**30


class Processor(Protocol):
    """Turns an image into a float32 tensor of shape (channels, height, width)."""

    def __call__(self, image: Any) -> Tensor:
        """Encode a PIL image or a float array of shape (h, w) in [0, 1]."""
        ...


@dataclass(frozen=True)
class PlainProcessor:
    """Scales pixels to [0, 1] and resizes; no normalisation."""

    channels: int
    height: int
    width: int

    def __call__(self, image: Any) -> Tensor:
        """Encode a PIL image or a float array of shape (h, w) in [0, 1]."""
        if isinstance(image, Image.Image):
            mode = _in_mode(image, self.channels)
            pixels = torch.from_numpy(np.array(mode, dtype=np.float32) / 255.0)
        else:
            pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)  # (c, h, w)
        size = (self.height, self.width)
        if pixels.shape[1:] != size:
            pixels = interpolate(
                pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False
            )[0]
        return pixels.expand(self.channels, *size).contiguous()


@dataclass(frozen=True)
class ModelProcessor:
    """The processor saved with a model; on PIL, so that it is the same on every machine."""

    processor: Any
    channels: int

    def __call__(self, image: Any) -> Tensor:
        """Encode a PIL image or a float array of shape (h, w) in [0, 1]."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
        image = _in_mode(image, self.channels)
        encoded = self.processor(images=[image], return_tensors="pt")
        return torch.as_tensor(encoded["pixel_values"][0], dtype=torch.float32)


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture of any mode to grey or RGB.

    Transparent pixels become white. Pillow would clip 16-bit grey at 255: it is scaled instead.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.array(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        top = 255.0 if image.mode in ("I", "F") and 1 < values.max(initial=0) <= 255 else top
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return image.convert("L" if channels == 1 else "RGB")


def load_processor(model: Model, config: PreTrainedConfig) -> Processor:
    """Load the image processor of a model source; a source without one gets the plain scaling.

    Raises
    ------
    ModelError
        If the processor is there but cannot be loaded.
    """
    source = resolve_source(model.source)
    channels = int(config.to_dict().get("num_channels", 3))
    if source.kind in ("folder", "hub"):
        try:
            found = cached_file(
                source.location,
                _PROCESSOR_FILE,
                revision=model.revision,
                _raise_exceptions_for_missing_entries=False,
            )
            if found is not None:
                processor = AutoImageProcessor.from_pretrained(
                    source.location,
                    revision=model.revision,
                    trust_remote_code=model.trust_remote_code,
                    backend="pil",
                )
                return ModelProcessor(processor, channels)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"model.source {model.source!r}: its image processor cannot be loaded: {error}"
            ) from error
        logger.warning("%s has no %s: pixels are only scaled", model.source, _PROCESSOR_FILE)
    height, width = _image_size(model, config)
    return PlainProcessor(channels, height, width)


def _image_size(model: Model, config: PreTrainedConfig) -> tuple[int, int]:
    size = config.to_dict().get("image_size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ModelError(
        f"model.source {model.source!r}: neither a {_PROCESSOR_FILE} nor an image_size in its "
        f"config ({size!r}); save the model with its image processor"
    )


@dataclass(frozen=True)
class ImageTask(Task):
    """Images as the model wants them: ``pixel_values`` of shape (b, channels, height, width)."""

    @cached_property
    def _processor(self) -> Processor:
        config = load_config(self.settings.model, labels=2)
        return load_processor(self.settings.model, config)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one encoded image."""
        return tuple(self._processor(Image.new("RGB", (64, 48))).shape)

    def _split(self, examples: Examples) -> Split:
        return ImageSplit(examples, self._processor, self._shape)

    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        return {"pixel_values": TensorSpec((batch_size, *self._shape), torch.float32)}


class ImageSplit(Split):
    """Images, encoded when first asked for and kept while the set is small."""

    def __init__(self, examples: Examples, processor: Processor, shape: tuple[int, ...]) -> None:
        super().__init__(examples)
        self._processor = processor
        self._shape = shape
        fits = len(examples) * int(np.prod(shape)) * 4 <= _KEPT_BYTES
        # Pages of an empty tensor are only taken as they are written.
        self._kept = torch.empty(len(examples), *shape) if fits else None  # (n, c, h, w)
        self._done = np.zeros(len(examples), dtype=bool)

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        if self._kept is None:
            return {"pixel_values": torch.stack([self._pixels(row) for row in rows])}
        for row in rows:
            if not self._done[row]:
                self._kept[row] = self._pixels(row)
                self._done[row] = True
        return {"pixel_values": self._kept[list(rows)]}  # (b, c, h, w), a copy

    def _pixels(self, row: int) -> Tensor:
        try:
            image = self.examples.inputs[row]
        except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
            raise DataError(
                f"image {row} cannot be read: {error} (data.bad-records=skip leaves such images "
                "out)"
            ) from error
        if image is None:
            raise DataError(f"image {row} is missing (data.bad-records=skip leaves such rows out)")
        pixels = self._processor(image)
        if tuple(pixels.shape) != self._shape:
            raise DataError(
                f"image {row} is encoded as {tuple(pixels.shape)}, others as {self._shape}; the "
                "model's image processor must give one size"
            )
        return pixels
