"""The compiled Triton kernels at sizes of real models, against float64 and three times bit for bit: `--device cuda`."""

from __future__ import annotations

import pytest
import torch

from swim_kernels import mask_bce
from swim_kernels.grid_prediction import grid_prediction
from tests.kernels.budget import assert_within_budget
from tests.kernels.mask_bce_cases import make_masks
from tests.kernels.noun_attention_cases import make_queries, run
from tests.kernels.test_grid_pairs import make_pairs

pytestmark = pytest.mark.cuda
LENGTH, COLUMNS = 1500, 600
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# dtype, key heads, group, head_dim, rows, softmax: every pair of dtype, group, head_dim and rows is there
SIZES = [
    (BF16, 4, 7, 128, 8, "causal"),
    (BF16, 4, 7, 128, 64, "set"),
    (BF16, 2, 1, 64, 1, "window"),
    (BF16, 1, 16, 80, 512, "packed"),
    (BF16, 2, 4, 256, 64, "repeated"),
    (BF16, 1, 16, 256, 3, "set"),
    (BF16, 8, 4, 64, 512, "causal"),
    (BF16, 2, 7, 80, 1, "repeated"),
    (FP16, 4, 7, 128, 512, "packed"),
    (FP16, 4, 1, 80, 8, "set"),
    (FP16, 1, 16, 64, 64, "causal"),
    (FP16, 2, 4, 128, 1, "window"),
    (FP16, 1, 7, 256, 8, "repeated"),
    (FP16, 2, 1, 256, 512, "set"),
    (FP32, 2, 7, 64, 8, "window"),
    (FP32, 2, 4, 80, 64, "packed"),
    (FP32, 1, 16, 128, 1, "set"),
    (FP32, 4, 1, 128, 64, "repeated"),
    (FP32, 1, 7, 256, 512, "causal"),
    (FP32, 1, 16, 256, 8, "causal"),
]


def make_rows(num_rows, softmax, seed):
    """Rows over three thirds of a sequence, each third with a key set of its own."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit):
        return int(torch.randint(limit, (), generator=generator))

    third, rows = LENGTH // 3, []
    for _ in range(num_rows):
        segment = below(3)
        position = segment * third + third // 2 + below(third // 2)
        start = {"window": max(0, position - 299), "packed": segment * third}.get(softmax, 0)
        rows.append((0, position, start, position + 1, segment))
    sets = [segment * third + torch.randperm(third, generator=generator)[: third // 2] for segment in range(3)]
    if softmax == "repeated":
        sets = [torch.cat([keys, keys[: COLUMNS - len(keys)]]) for keys in sets]
    return make_queries(rows, [keys.tolist() for keys in sets], over="set" if softmax == "set" else "range")


@pytest.mark.parametrize("dtype, key_heads, group, head_dim, num_rows, softmax", SIZES, ids=str)
def test_noun_attention(dtype, key_heads, group, head_dim, num_rows, softmax, device):
    samples = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        queries = make_rows(num_rows, softmax, seed).to(device)
        query, key = (
            torch.randn(1, LENGTH, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
            for heads in (key_heads * group, key_heads)
        )
        grad = torch.randn(num_rows, queries.key_sets.shape[1], generator=generator).to(device)
        exact = run(query.double(), key.double(), queries, grad, backend="eager")
        eager, *actual = (run(query, key, queries, grad, backend=name) for name in ("eager", *["triton"] * 3))
        for again in actual[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, actual[0], strict=True))
        samples.append((actual[0], eager, exact))
    assert_within_budget(samples)


@pytest.mark.parametrize("fusion, prediction", [("mean", "probability"), ("product", "min_max"), ("none", "min_max")])
def test_prediction_and_loss(fusion, prediction, device):
    """8 rows × 16 patches of 20 × 36 cells against masks of 720p."""
    pairs = make_pairs([(row, 720 * patch, 20, 36, row % 2) for row in range(8) for patch in range(16)]).to(device)
    masks = make_masks([(720, 1280), (540, 960)]).to(device)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 8, 16 * 720, generator=generator).unflatten(-1, (16, 720)).softmax(-1).flatten(-2).to(device)

    def losses(dtype, backend):
        layers = [layer.to(dtype).requires_grad_() for layer in maps]
        p = grid_prediction(layers, pairs, fusion=fusion, prediction=prediction, backend=backend)
        loss = mask_bce(p, pairs, masks, backend=backend)
        gradients = torch.autograd.grad(loss.sum(), [p, *layers])
        return p.detach(), loss.detach(), gradients[0], torch.stack(gradients[1:])

    exact = losses(torch.float64, "torch")
    eager, *actual = (losses(torch.float32, name) for name in ("torch", *["triton"] * 3))
    for again in actual[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, actual[0], strict=True))
    if prediction == "probability":  # min-max has slopes without bound at its ends, see the tests of each op
        assert_within_budget([(actual[0], eager, exact)], names=("p", "losses", "∂p", "∂maps"))
    else:
        assert_within_budget([(actual[0][:2], eager[:2], exact[:2])], names=("p", "losses"))
