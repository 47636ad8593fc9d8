"""Frozen bases in 4 or 8 bits, through bitsandbytes."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from rankfit.configs.settings import Model
from rankfit.tasks.sources import ModelError


def check_quantizable(model: Model, source: str) -> None:
    """Refuse to quantise a base whose source has no weights to read: ``builtin:``, ``config:``.

    Raises
    ------
    ModelError
        If it has none.
    """
    if model.quantization != "none" and source not in ("folder", "hub"):
        raise ModelError(
            f"model.quantization {model.quantization!r}: {model.source!r} is not a folder or hub "
            "id with weights"
        )


def quantization(model: Model, source: str, kept: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for ``model.quantization``; {} = as the weights are.

    nf4 is 4-bit NormalFloat with double quantisation (QLoRA, arXiv:2305.14314), nf4-single without;
    int8 is LLM.int8() (arXiv:2208.07339). What is computed is in ``model.precision``. Modules named
    in ``kept`` stay as they are.

    Raises
    ------
    ModelError
        If bitsandbytes is not installed, or the source has no weights to quantise.
    """
    if model.quantization == "none":
        return {}
    check_quantizable(model, source)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {model.quantization!r} needs bitsandbytes: pip install "
            "'rankfit[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[model.precision]
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=model.quantization == "nf4",
            bnb_4bit_compute_dtype=kind,
            llm_int8_skip_modules=list(kept),
        )
        if model.quantization != "int8"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    )
    # The current one: each process of a client with several GPUs has its own.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}
