"""Frozen bases in 4 or 8 bits, through bitsandbytes."""

import importlib.util
from typing import Any

import torch

from rankfit.configs.settings import Model
from rankfit.tasks.sources import ModelError


def quantization(model: Model, source: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for ``model.quantization``; {} = as the weights are.

    nf4 is 4-bit NormalFloat with double quantisation (QLoRA, arXiv:2305.14314); int8 is LLM.int8()
    (arXiv:2208.07339). What is computed is in ``model.precision``.

    Raises
    ------
    ModelError
        If bitsandbytes is not installed, or the source has no weights to quantise.
    """
    if model.quantization == "none":
        return {}
    if source not in ("folder", "hub"):
        raise ModelError(
            f"model.quantization {model.quantization!r}: {model.source!r} is not a folder or hub "
            "id with weights"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {model.quantization!r} needs bitsandbytes: pip install "
            "'rankfit[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    kind = torch.bfloat16 if model.precision == "bf16" else torch.float32
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
        )
        if model.quantization == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    # The current one: each process of a client with several GPUs has its own.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}
