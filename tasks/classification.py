"""Classification of texts and images, by the model's own tokenizer or processor."""

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
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from rankfit.configs.settings import Model, split_list
from rankfit.tasks.config import read_config
from rankfit.tasks.data import Encode, Examples
from rankfit.tasks.model_sources import ModelError, resolve_source
from rankfit.tasks.records import DataError, Reading
from rankfit.tasks.task import Split, Task, TensorSpec
from rankfit.tasks.tokenizer import check_text, load_tokenizer


@dataclass(frozen=True)
class TextTask(Task):
    """Texts, or pairs, cut at ``data.max-length`` tokens and padded to the longest of a batch."""

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.settings.model)
        check_text(self.settings, tokenizer)
        return tokenizer

    def _encoding(self) -> Encode:
        """See the base class; a text of no tokens is refused, since most models cannot read it."""
        tokenizer, max_length = self._tokenizer, self.settings.data.max_length

        def tokens(inputs: Sequence[Any], reading: Reading | None) -> None:
            parts = zip(*inputs, strict=True) if isinstance(inputs[0], tuple) else [inputs]
            own = [tokenizer(list(p), add_special_tokens=False)["input_ids"] for p in parts]
            if not all(any(ids) for ids in zip(*own, strict=True)):
                raise DataError(f"holds {inputs[0]!r}, which has no tokens; expected text")
            encode(tokenizer, inputs, max_length)

        return tokens

    def _split(self, examples: Examples) -> Split:
        return TextSplit(examples, self._tokenizer, self.settings.data.max_length)

    def _example_inputs(self, batch_size: int) -> Mapping[str, TensorSpec]:
        shape = (batch_size, self.settings.data.max_length)
        pair = len(split_list(self.settings.data.input_column)) > 1
        encoded = self._tokenizer(["a"], ["a"]) if pair else self._tokenizer(["a"])
        return {name: TensorSpec(shape, torch.int64) for name in encoded}


class TextSplit(Split):
    """Texts, tokenized batch by batch."""

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int) -> None:
        super().__init__(examples)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def alike(self, rows: Sequence[int]) -> Sequence[int]:
        """Longest first: a batch is as long as its longest text, the rest of it is padding."""
        return sorted(rows, key=lambda row: -self._characters(row))

    def _characters(self, row: int) -> int:
        text = self.examples.inputs[row]
        return sum(map(len, text)) if isinstance(text, tuple) else len(text)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """See the base class."""
        if not rows:
            return []
        inputs = [self.examples.inputs[row] for row in rows]
        mask = encode(self._tokenizer, inputs, self._max_length)["attention_mask"]  # (b, longest)
        return [int(length) for length in mask.sum(dim=1)]

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        inputs = [self.examples.inputs[row] for row in rows]
        return encode(self._tokenizer, inputs, self._max_length)


def encode(tokenizer: Any, inputs: Sequence[Any], max_length: int) -> dict[str, Tensor]:
    """Tokens of texts or pairs of texts, each tensor of shape (b, longest)."""
    # A pair shares one sequence; the longer of the two is cut first.
    pairs = list(zip(*inputs, strict=True)) if isinstance(inputs[0], tuple) else [inputs]
    encoded = tokenizer(
        *(list(texts) for texts in pairs),
        padding="longest",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    return dict(encoded)


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
        # Imported here: with it come all of transformers' models.
        from transformers import AutoImageProcessor

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
        return load_processor(self.settings.model, read_config(self.settings.model))

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one encoded image."""
        return tuple(self._processor(Image.new("RGB", (64, 48))).shape)

    def _encoding(self) -> Encode:
        """See the base class."""
        processor, shape = self._processor, self._shape

        def pixels(inputs: Sequence[Any], reading: Reading | None) -> None:
            for image in inputs:
                pixels_of(image, processor, shape)

        return pixels

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
            return pixels_of(self.examples.inputs[row], self._processor, self._shape)
        except (DataError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"image {row}: {error}", row=row) from error


def pixels_of(image: Any, processor: Processor, shape: tuple[int, ...]) -> Tensor:
    """Encode one picture.

    Raises
    ------
    DataError
        If it has another shape than others, or values that are no numbers.
    """
    pixels = processor(image)
    if tuple(pixels.shape) != shape:
        raise DataError(
            f"is encoded as {tuple(pixels.shape)}, others as {shape}; the model's image processor "
            "must give one size"
        )
    if not bool(pixels.isfinite().all()):
        raise DataError("has pixels that are no finite numbers")
    return pixels
