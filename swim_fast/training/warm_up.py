"""Compilation of a run's Triton kernels while its first batch is being read."""

import threading

import torch

from swim_fast.families import get_head_dim
from swim_fast.options import AttentionLoss
from swim_kernels import compile_in_background


def start_warm_up(model, loss: AttentionLoss | None, args) -> threading.Thread | None:
    """Start to compile what a run on a GPU will launch; return the thread, None where there is nothing to compile.

    Args:
        model: to be trained.
        loss: with its layers by index.
        args: the trainer's, for device and precision.
    """
    if loss is None or args.device.type != "cuda" or loss.backend not in ("auto", "triton"):
        return None
    text = model.config.get_text_config()
    prediction = None if loss.prediction == "released" else loss.prediction  # that one is made by torch's operators
    return compile_in_background(
        args.device,
        num_heads=text.num_attention_heads,
        num_key_heads=text.num_key_value_heads,
        head_dim=get_head_dim(text),
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype,
        fused=loss.fused and text._attn_implementation != "eager",
        over=loss.over,
        num_layers=len(loss.layers),
        fusion=loss.fusion,
        prediction=prediction,
        with_sets=loss.asks_questions,
        with_masks=loss.criterion == "bce" and loss.resolution == "mask" and prediction is not None,
        backend=loss.backend,
    )
