"""A loss of one's own on the attention of tagged nouns: GUI-AIMA's weighting of heads with a KL divergence.

    python examples/own_loss.py

A loss is a function of attention maps, here of those of each head, which `noun_attention` gives with `heads="each"`;
`noun_mass` sums attention over sets of keys without a map, which is cheaper for many rows. This loss weighs the heads
by how much their rows look at the video at all, as GUI-AIMA (arXiv 2511.00810) prefers heads whose queries look at the
image, and compares the weighted map with the mask.
"""

import torch
from torch import Tensor

from swim_kernels import NounQueries, noun_attention


def weighted_kl(query: Tensor, key: Tensor, rows: NounQueries, share: Tensor) -> Tensor:
    """Return KL(mask ‖ map) of rows whose heads count by their attention to the cells.

    Args:
        query, key: of one layer [B, Hq, L, D] and [B, Hkv, L, D].
        rows: R rows with a causal softmax, read out on the tokens of the grid's N cells.
        share: [R, N], each cell's share of the row's mask; sums to one.
    """
    maps = noun_attention(query, key, rows, heads="each")  # [R, Hq, N]
    seen = maps.sum(-1)  # attention of a head to the whole video
    weights = (seen / seen.sum(1, keepdim=True)).detach()
    weighted = torch.einsum("rh,rhn->rn", weights, maps / seen[..., None])
    return (share * (share.clamp_min(1e-9) / weighted).log()).sum(1).mean()


def main() -> list[float]:
    torch.manual_seed(0)
    query, key = torch.randn(1, 8, 64, 32, requires_grad=True), torch.randn(1, 2, 64, 32, requires_grad=True)
    cells, position = torch.arange(4, 44), torch.tensor([50, 55])
    zero = torch.zeros_like(position)
    rows = NounQueries(zero, position, zero, position + 1, zero, cells[None])
    share = torch.zeros(2, 40)
    share[0, :8] = share[1, 20:28] = 1 / 8
    optimizer, losses = torch.optim.Adam([query, key], lr=0.05), []
    for _ in range(20):
        loss = weighted_kl(query, key, rows, share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
