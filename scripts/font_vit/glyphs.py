"""Characters rendered from matplotlib's text fonts the way scikit-learn's digits were made.

A glyph is drawn large, distorted, binarised at 32 by 32 and counted in blocks of 4 by 4: images of
8 by 8 with values 0 to 16 (Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits").
"""

import math
import string
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as functional
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase

#: Text fonts that matplotlib ships; what may be added to their strokes, in pixels at FONT_SIZE.
REGULAR_STROKES, BOLD_STROKES = (0, 3, 6, 9), (0, 3)
REGULAR_FONTS = (
    "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic",
    "cmr10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip
BOLD_FONTS = (
    "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneralBol", "STIXGeneralBolIta", "cmb10",
)  # fmt: skip

FONT_SIZE = 160  # pixels per em of the drawing
GLYPH = 64  # side of a stored glyph
BITMAP = 32  # side of the binarised bitmap
BLOCK = 4  # side of a block whose pixels are counted
SIDE = BITMAP // BLOCK  # side of an image
MAXIMUM = BLOCK * BLOCK  # largest value of a pixel

#: Half-widths of the uniform distributions of one rendering.
ROTATION = math.radians(15.0)
SHEAR = 0.40
TRANSLATION = 0.08  # of half the bitmap
HEIGHT = (0.85, 1.05)  # of the bitmap
WIDTH = (0.60, 1.20)  # of the height that the font gives
#: Standard deviation of the smooth displacement, of half the bitmap, on a grid of 4 by 4 knots.
WARP, KNOTS = 0.12, 4
#: Range of the ink level at which a pixel turns black.
THRESHOLD = (0.35, 0.65)


@dataclass(frozen=True)
class Glyphs:
    """Every drawing of every character, undistorted: fonts times strokes per character."""

    images: Tensor  # (characters, drawings, GLYPH, GLYPH) float32, ink 0 to 1


def draw_glyphs(characters: str = CHARACTERS) -> Glyphs:
    """Draw every character in every font and stroke; the longer side fills the frame."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawings = [(name, stroke) for name in REGULAR_FONTS for stroke in REGULAR_STROKES]
    drawings += [(name, stroke) for name in BOLD_FONTS for stroke in BOLD_STROKES]
    fonts = {name: ImageFont.truetype(folder / f"{name}.ttf", FONT_SIZE) for name, _ in drawings}
    rows = [
        torch.stack([_draw(character, fonts[name], stroke) for name, stroke in drawings])
        for character in characters
    ]
    return Glyphs(torch.stack(rows))  # (characters, drawings, GLYPH, GLYPH)


def _draw(character: str, font: ImageFont.FreeTypeFont, stroke: int) -> Tensor:
    canvas = Image.new("L", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text(
        (FONT_SIZE // 2, FONT_SIZE // 4), character, fill=255, font=font, stroke_width=stroke
    )
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"font {font.getname()} draws nothing for {character!r}; drop that font")
    glyph = canvas.crop(box)
    scale = GLYPH / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    frame = Image.new("L", (GLYPH, GLYPH))
    frame.paste(
        glyph.resize((width, height), Image.Resampling.BOX),
        ((GLYPH - width) // 2, (GLYPH - height) // 2),
    )
    return torch.tensor(list(frame.tobytes()), dtype=torch.float32).view(GLYPH, GLYPH) / 255.0


def render(glyphs: Glyphs, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Render random characters in random fonts, distorted at random.

    Parameters
    ----------
    glyphs
        The drawings to take from.
    count
        Number of images.
    generator
        The only source of randomness.

    Returns
    -------
    tuple of Tensor
        Images (count, 1, 8, 8) in whole float32 values 0 to 16, and labels (count,) int64 that
        index the characters.
    """
    characters, drawings = glyphs.images.shape[:2]
    labels = torch.randint(characters, (count,), generator=generator)
    chosen = torch.randint(drawings, (count,), generator=generator)
    ink = functional.grid_sample(
        glyphs.images[labels, chosen].unsqueeze(1),  # (count, 1, GLYPH, GLYPH)
        _sampling_grid(count, generator),
        align_corners=False,
    )  # (count, 1, BITMAP, BITMAP)
    threshold = _uniform(count, *THRESHOLD, generator).view(-1, 1, 1, 1)
    return count_blocks((ink > threshold).float()), labels


def count_blocks(bitmaps: Tensor) -> Tensor:
    """Count the black pixels of each block of 4 by 4: (n, 1, 32, 32) to (n, 1, 8, 8)."""
    return functional.avg_pool2d(bitmaps, BLOCK) * MAXIMUM


def _sampling_grid(count: int, generator: torch.Generator) -> Tensor:
    """Where in the glyph each pixel of the bitmap reads: affine, then a smooth displacement."""
    angle = _uniform(count, -ROTATION, ROTATION, generator)
    shear = _uniform(count, -SHEAR, SHEAR, generator)
    height = _uniform(count, *HEIGHT, generator)
    width = _uniform(count, *WIDTH, generator) * height
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * TRANSLATION
    cosine, sine = angle.cos(), angle.sin()
    # Inverse of rotation · shear · scale, row by row: from bitmap to glyph coordinates.
    row_x = torch.stack([cosine - shear * sine, sine + shear * cosine], 1) / width.unsqueeze(1)
    row_y = torch.stack([-sine, cosine], 1) / height.unsqueeze(1)
    affine = torch.stack([row_x, row_y], 1)  # (count, 2, 2)
    theta = torch.cat([affine, affine @ shift.unsqueeze(2)], 2)  # (count, 2, 3)
    grid = functional.affine_grid(theta, [count, 1, BITMAP, BITMAP], align_corners=False)
    knots = WARP * torch.randn(count, 2, KNOTS, KNOTS, generator=generator)
    warp = functional.interpolate(
        knots, size=(BITMAP, BITMAP), mode="bicubic", align_corners=True
    )  # (count, 2, BITMAP, BITMAP)
    return grid + warp.permute(0, 2, 3, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
