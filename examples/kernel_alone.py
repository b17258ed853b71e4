"""The kernel by itself: attention maps of a few rows, and their gradients, without the attention matrix.

    python examples/kernel_alone.py                              # torch on a CPU, Triton on a GPU
    TRITON_INTERPRET=1 python examples/kernel_alone.py triton    # the Triton kernels in their interpreter

Each backend is compared with the readable reference, `eager`, in float64.
"""

import sys

import torch

from swim_kernels import NounQueries, noun_attention

BATCH, HEADS, KEY_HEADS, LENGTH, HEAD_SIZE = 2, 8, 2, 320, 64


def make_queries() -> NounQueries:
    """Three noun tokens after 240 visual tokens; the softmax is causal, the maps are read at the visual tokens."""
    sequence = torch.tensor([0, 0, 1])
    position = torch.tensor([250, 300, 319])
    return NounQueries(
        sequence=sequence,
        position=position,
        key_start=torch.zeros_like(position),
        key_end=position + 1,
        key_set=torch.zeros_like(position),  # all rows share the only set of keys
        key_sets=torch.arange(5, 245)[None],
    )


def maps_and_gradients(query, key, upstream, backend):
    """Maps [rows, visual tokens] and the gradients in query and key of their product with `upstream`."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    maps = noun_attention(query, key, make_queries().to(query.device), backend=backend)
    (maps * upstream).sum().backward()
    return maps.detach(), query.grad, key.grad


def main(backend: str = "auto") -> dict[str, float]:
    """Print and return the largest error of the maps and of each gradient, over the largest value."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(BATCH, HEADS, LENGTH, HEAD_SIZE, device=device)
    key = torch.randn(BATCH, KEY_HEADS, LENGTH, HEAD_SIZE, device=device)
    upstream = torch.randn(3, 240, device=device)

    exact = maps_and_gradients(query.double(), key.double(), upstream, "eager")
    found = maps_and_gradients(query, key, upstream, backend)
    errors = {}
    for name, one, other in zip(("maps", "gradient in query", "gradient in key"), found, exact, strict=True):
        errors[name] = float((one - other).abs().max() / other.abs().max())
        print(f"{name:<18} {str(list(one.shape)):<18} error {errors[name]:.1e}")
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:])
