"""One forward of a prompt to the attention map of each of its words, fused and of each layer."""

from __future__ import annotations

import logging

import numpy as np
import torch

from swim_fast.data.batch.collation import Collator, model_inputs
from swim_fast.data.sample.builder import Row, Sample
from swim_fast.data.sample.encoding import Encoding
from swim_fast.modeling.noun_attention import attach_noun_attention, detach_noun_attention, get_attached_layers
from swim_fast.options import AttentionLoss
from swim_kernels import GridPairs, grid_prediction

logger = logging.getLogger(__name__)


def compute_noun_maps(model, processor, encoding: Encoding, loss: AttentionLoss) -> np.ndarray:
    """Return the fused map of each noun: fp32 [nouns, patches, h, w]; all else as for `compute_layer_maps`."""
    return compute_layer_maps(model, processor, encoding, loss)["fused"]


@torch.no_grad()
def compute_layer_maps(model, processor, encoding: Encoding, loss: AttentionLoss) -> dict[str, np.ndarray]:
    """Return the maps of each noun of a prompt on each temporal patch, averaged over the noun's tokens.

    The map is that of the mask loss (SWIM, arXiv 2605.18018), scaled to 0 … 1 in each patch. Afterwards the model is as
    it was.

    Args:
        model: stock, not attached.
        encoding: the prompt, with at least one noun; any words may be its nouns.
        loss: names the layers, their fusion (for "none" the product is shown), the rows, the noun's own or those that
            predict it, and their softmax. Its other choices do not matter here.

    Returns:
        "fused" and "layer 0", … of the chosen layers, in this order: fp32 [nouns, patches, h, w], from 0 to 1 in each
        patch of each token.

    Raises:
        UnsupportedModelError: a model family without adapter.
        ValueError: a layer that the model does not have.
        DataError: a noun without a token.
    """
    earlier = 1 if loss.query_position == "predictor" else 0
    tokens = [encoding.noun_tokens(index) for index in range(len(encoding.nouns))]
    positions = [token - earlier for noun in tokens for token in noun]
    num_patches, height, width = encoding.cells.shape
    num_rows, cells = len(positions), height * width
    row = torch.arange(num_rows * num_patches)
    start = torch.zeros_like(row)
    if loss.softmax == "frame":
        key_sets = list(encoding.cells.flatten(1))
        rows = [Row(position, 0, 0, patch) for position in positions for patch in range(num_patches)]
    else:
        key_sets, row, start = [encoding.cells.flatten()], row // num_patches, row % num_patches * cells
        ends = [len(encoding) if loss.softmax == "full" else position + 1 for position in positions]
        rows = [Row(position, 0, end, 0) for position, end in zip(positions, ends, strict=True)]
    batch = Collator(processor, frames=True)(
        [Sample("", encoding.inputs, rows=rows, key_sets=key_sets, over=loss.over)]
    )
    inputs, queries = model_inputs(batch, model.device, model.dtype), batch["noun_queries"].to(model.device)
    attach_noun_attention(model, loss.layers)
    layers = get_attached_layers(model)
    logger.info("attention of layers %s", ", ".join(map(str, layers)))
    try:  # the maps need no logits
        maps = model(**inputs, noun_queries=queries, use_cache=False, logits_to_keep=1).attentions
    finally:
        detach_noun_attention(model)
    pairs = GridPairs.from_rows(row, start, [(height, width)] * len(row), torch.zeros_like(row))
    pairs = pairs.to(maps[0].device)

    def predict(chosen) -> np.ndarray:
        p = grid_prediction(chosen, pairs, fusion=loss.shown_fusion, prediction="min_max")
        by_row = p.view(num_rows, num_patches, height, width).cpu()
        return torch.stack([part.mean(0) for part in by_row.split([len(noun) for noun in tokens])]).numpy()

    by_layer = {f"layer {layer}": predict([of_layer]) for layer, of_layer in zip(layers, maps, strict=True)}
    return {"fused": predict(maps), **by_layer}
