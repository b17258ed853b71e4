"""One forward of a prompt to the fused attention map of each of its nouns."""

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


@torch.no_grad()
def compute_noun_maps(model, processor, encoding: Encoding, loss: AttentionLoss) -> np.ndarray:
    """Return the fused map of each noun of a prompt on each temporal patch, averaged over the noun's tokens.

    The map is the p of the mask loss (SWIM, arXiv 2605.18018) in stable numerics, under the model's own causal softmax.
    Afterwards the model is as it was.

    Args:
        model: stock, not attached.
        encoding: the prompt, with at least one noun.
        loss: names the layers, their fusion (for "none" the product is shown) and the rows, the noun's own or those
            that predict it. Its other choices do not matter here.

    Returns:
        fp32 [nouns, patches, h, w], from 0 to 1 in each patch of each token.

    Raises:
        UnsupportedModelError: a model family without adapter.
        ValueError: a layer that the model does not have.
        DataError: a noun without a token.
    """
    earlier = 1 if loss.query_position == "predictor" else 0
    tokens = [encoding.noun_tokens(index) for index in range(len(encoding.nouns))]
    positions = [token - earlier for noun in tokens for token in noun]
    rows = [Row(position, 0, position + 1, 0) for position in positions]
    batch = Collator(processor)([Sample("", encoding.inputs, rows=rows, key_sets=[encoding.visual()])])
    inputs, queries = model_inputs(batch, model.device), batch["noun_queries"].to(model.device)
    attach_noun_attention(model, loss.layers)
    logger.info("attention of layers %s", ", ".join(map(str, get_attached_layers(model))))
    try:  # the maps need no logits
        maps = model(**inputs, noun_queries=queries, use_cache=False, logits_to_keep=1).attentions
    finally:
        detach_noun_attention(model)
    height, width = encoding.patch_grid
    num_rows, num_patches = len(rows), len(encoding.visual()) // (height * width)
    row = torch.arange(num_rows).repeat_interleave(num_patches)
    start = torch.arange(num_patches).repeat(num_rows) * height * width
    pairs = GridPairs.from_rows(row, start, [(height, width)] * len(row), torch.zeros_like(row))
    fusion = "mean" if loss.fusion == "mean" else "product"
    cells = grid_prediction(maps, pairs.to(maps[0].device), fusion=fusion)
    by_row = cells.view(num_rows, num_patches, height, width).cpu()
    return torch.stack([part.mean(0) for part in by_row.split([len(noun) for noun in tokens])]).numpy()
