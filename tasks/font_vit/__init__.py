"""A small pretrained ViT of our own: characters rendered from matplotlib's fonts, 8 by 8 pixels.

It makes the demo honest transfer learning without a model hub. ``weights.json`` holds the backbone,
``pretrain.py`` made it, ``README.md`` is its model card.
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

WEIGHTS = Path(__file__).with_name("weights.json")


class WeightsError(ValueError):
    """The stored weights are unreadable or not the bytes that their hash names."""


def load(path: Path = WEIGHTS) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the backbone and verify its hash.

    Parameters
    ----------
    path
        A file that :func:`store` wrote.

    Returns
    -------
    tuple
        Keyword arguments of ``ViTConfig``, and the float32 state dict with the names of
        ``ViTForImageClassification`` (``vit.…``; no classifier).

    Raises
    ------
    WeightsError
        If the file is missing, is not such a file, or its bytes do not match its hash.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        payload = base64.b64decode(document["safetensors"], validate=True)
        config, expected = dict(document["config"]), str(document["sha256"])
    except (OSError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise WeightsError(
            f"{path}: not a readable weights file ({error!r}); expected JSON with config, "
            "safetensors and sha256; restore it, or run python -m scripts.font_vit.pretrain"
        ) from error
    found = hashlib.sha256(payload).hexdigest()
    if found != expected:
        raise WeightsError(
            f"{path}: the weights have sha256 {found}, expected {expected}; the file was changed "
            "or cut short; restore it, or run python -m scripts.font_vit.pretrain"
        )
    return config, load_safetensors(payload)


def store(config: dict[str, Any], state: dict[str, Tensor], path: Path = WEIGHTS) -> str:
    """Write a backbone as JSON, so that Flower's app bundle, which drops .safetensors, keeps it.

    Returns
    -------
    str
        SHA-256 of the safetensors bytes, in hex.
    """
    payload = save_safetensors({name: state[name].contiguous() for name in sorted(state)})
    digest = hashlib.sha256(payload).hexdigest()
    document = {
        "config": config,
        "safetensors": base64.b64encode(payload).decode("ascii"),
        "sha256": digest,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return digest
