"""Inputs on which grid_prediction is tested, what the formulas say about them, and how errors are judged."""

from __future__ import annotations

import functools
import math

import torch

from swim_kernels.grid_prediction import grid_prediction
from tests.kernels import budget
from tests.kernels.device import triton_on_device
from tests.kernels.test_grid_pairs import make_pairs

BACKENDS = ("eager", "torch")
FUSIONS = ("product", "mean", "none")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 2.0**-103  # finfo.tiny / finfo.eps of fp32

ROWS, COLUMNS = 5, 160
MIXED = make_pairs([(0, 0, 4, 5, 0), (0, 20, 4, 5, 0), (1, 3, 6, 7, 0), (2, 100, 7, 3, 0), (4, 17, 1, 1, 0),
                    (2, 50, 1, 9, 0), (3, 80, 9, 1, 0), (3, 20, 4, 5, 0)])  # fmt: skip
SHARED = make_pairs([(0, 0, 4, 5, 0), (0, 0, 4, 5, 1), (0, 7, 4, 5, 0), (2, 30, 7, 3, 0), (0, 3, 5, 4, 2),
                     (2, 49, 3, 4, 0)])  # fmt: skip


def softmaxes(generator, layers=3):
    return torch.randn(layers, ROWS, COLUMNS, generator=generator, dtype=torch.float64).mul_(1.5).softmax(-1)


def nearly_flat(generator):
    return 0.01 * (1 + 1e-4 * torch.randn(3, ROWS, COLUMNS, generator=generator, dtype=torch.float64))


def tied(generator):
    """Four values per layer, the same cells in each: several cells at every minimum and maximum."""
    values = torch.tensor([[0.5, 0.25, 0.375, 0.125], [0.25, 0.125, 0.1875, 0.0625], [1.0, 0.5, 0.75, 0.5]])
    which = torch.randint(0, 4, (ROWS, COLUMNS), generator=generator)
    return values.double()[:, which]


def with_zeros(generator):
    """Zeros, subnormal numbers and such below the floor, in some layers only and in all."""
    a = softmaxes(generator)
    kind = torch.randint(0, 12, a.shape, generator=generator)
    for number, value in enumerate((0.0, 1e-41, FLOOR / 3, FLOOR * 5)):
        a = torch.where(kind == number, value, a)
    a[:, :, ::13] = 0.0
    a[:, 0, :20] = 0.0  # all of a frame
    return a


def disagreeing(generator):
    """Every layer looks at a cell of its own, and all but ignores the others."""
    a = softmaxes(generator) * 1e-20
    for layer in range(len(a)):
        a[layer, :, layer::3] *= 1e19 ** (layer / 2)
    return a


def one_layer(generator):
    return softmaxes(generator, layers=1)


def partly_constant(generator):
    a = softmaxes(generator)
    a[:, 0, :20] = 0.03
    a[1:, 1] = 0.02
    return a


CASES = {
    "softmaxes": (softmaxes, MIXED),
    "shared columns": (softmaxes, SHARED),
    "nearly flat": (nearly_flat, MIXED),
    "ties": (tied, MIXED),
    "ties, shared columns": (tied, SHARED),
    "zeros": (with_zeros, MIXED),
    "disagreeing layers": (disagreeing, MIXED),
    "one layer": (one_layer, SHARED),
    "constant frames": (partly_constant, MIXED),
}


def strided(layer, number):
    """The same values [R, N] in other strides, another one for every number."""
    num_rows, num_columns = layer.shape
    if number % 4 == 0:
        return layer.contiguous()
    if number % 4 == 1:
        return layer.t().contiguous().t()
    buffer = layer.new_full((num_rows, 2, num_columns + 3), math.nan)
    view = buffer[:, 1, 2:-1] if number % 4 == 2 else buffer.transpose(1, 2).contiguous()[:, 2:-1, 1]
    return view.copy_(layer)


def make_inputs(case, fusion, dtype=torch.float64, seed=0):
    """layers, pairs, random gradient of p"""
    make, pairs = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    a = make(generator).to(dtype)
    grad = torch.randn(len(a) if fusion == "none" else 1, pairs.num_cells, generator=generator, dtype=torch.float64)
    return [strided(layer, seed + number) for number, layer in enumerate(a)], pairs, grad


min_max_prediction = functools.partial(grid_prediction, fusion="product", prediction="min_max")


@triton_on_device
def run(layers, pairs, grad, **options):
    """p, ∂a [layers, R, N]"""
    layers = [layer.detach().requires_grad_() for layer in layers]
    p = min_max_prediction(layers, pairs, **options)
    return p.detach(), torch.stack(torch.autograd.grad(p, layers, grad.to(p.dtype)))


# ---- the judge: one frame at a time, f itself and not its logarithm ----


def formulas(layers, pairs, grad, fusion, floor=0.0):
    """p and ∂a in float64; what arrives at a frame's extremes is cut. floor: what the precision under test has."""
    a = torch.stack([layer.detach().double() for layer in layers]).requires_grad_()
    p, upstream = [], grad.double().clone()
    for row, start, h, w, first, *_ in pairs.table.tolist():
        frame = a[:, row, start : start + h * w]
        if fusion == "mean":
            frame = frame.mean(0, keepdim=True)
        frame = frame.clamp_min(floor)
        frame = frame / frame.detach().amax(1, keepdim=True)  # or a product of floors leaves float64's range
        f = frame.prod(0, keepdim=True) if fusion == "product" else frame
        low, high = f.amin(1, keepdim=True), f.amax(1, keepdim=True)
        upstream[:, first : first + h * w].masked_fill_((f == low) | (f == high), 0.0)
        p.append((f - low) / torch.where(high == low, 1, high - low))
    p = torch.cat(p, dim=1)
    return p.detach(), torch.autograd.grad(p, a, upstream)[0]


def probability_formulas(layers, pairs, grad, fusion):
    """p and ∂a of prediction "probability" in float64, cell by cell."""
    a = torch.stack([layer.detach().double() for layer in layers])
    p, grad_a = [], torch.zeros_like(a)
    for row, start, h, w, first, *_ in pairs.table.tolist():
        for cell in range(h * w):
            values, upstream = a[:, row, start + cell].tolist(), grad[:, first + cell].tolist()
            total, f = math.fsum(values), math.prod(values)
            if fusion == "none":
                p.append(values)
            else:
                p.append([{"mean": total / len(values), "add": min(total, 1.0), "product": f}[fusion]])
            for layer in range(len(values)):
                slope = {
                    "mean": 1 / len(values),
                    "add": float(total <= 1),
                    "product": math.prod(values[:layer] + values[layer + 1 :]),
                    "none": 1.0,
                }[fusion]
                grad_a[layer, row, start + cell] += slope * upstream[layer if fusion == "none" else 0]
    return torch.tensor(p, dtype=torch.float64).T, grad_a


def check_probability(backend, case, fusion, dtype, seed):
    """Compare a backend with the formulas, values and gradients."""
    make, pairs = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    a = make(generator)
    if fusion == "add":  # sums around the bound, none at it
        a = a * 40
    layers = [strided(layer.to(dtype), seed + index) for index, layer in enumerate(a)]
    grad = torch.randn(len(a) if fusion == "none" else 1, pairs.num_cells, generator=generator, dtype=torch.float64)
    grad = grad.to(torch.promote_types(dtype, torch.float32))
    p, grad_a = run(layers, pairs, grad, fusion=fusion, prediction="probability", backend=backend)
    expected = probability_formulas(layers, pairs, grad, fusion)
    if fusion == "add" and case == "softmaxes":
        assert (expected[0] == 1).any() and (expected[0] < 1).any()
    # a sum over pairs that share columns is rounded to the maps' own dtype
    rtol = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.double(), expected[0], rtol=20 * torch.finfo(grad.dtype).eps, atol=1e-40)
    torch.testing.assert_close(grad_a.double(), expected[1], rtol=rtol, atol=rtol)
    assert torch.equal(grad_a == 0, expected[1] == 0) or fusion == "product"


def measures(result, layers):
    """p, ∂a and a·∂a, the gradient of log a: it weighs cells of little attention like the others."""
    p, grad = result
    return p, grad, grad.double() * torch.stack(layers).double()


assert_within_budget = functools.partial(budget.assert_within_budget, names=("p", "∂a", "a·∂a"))


def sample(backend, case, fusion, dtype, seed):
    """(actual, eager, exact)"""
    layers, pairs, grad = make_inputs(case, fusion, dtype, seed)
    exact = formulas(layers, pairs, grad.float(), fusion, FLOOR)
    results = [run(layers, pairs, grad.float(), fusion=fusion, backend=name) for name in (backend, "eager")]
    return [measures(result, layers) for result in (*results, exact)]


def hardly_any_spread():
    """Two frames: one is flat but for 1e-5, one has all but its minimum within 1e-5 of its maximum. Divided by the
    maximum, 1, a layer loses no digit in fp32.

    layers, pairs, gradient of p
    """
    steps = torch.tensor([[3.0, 0, 9, 4, 7, 1, 5, 2], [2, 0, 9, 1, 8, 1, 3, 5]])
    flat = 1 - steps * 2.0**-20
    layers = list(torch.stack([flat, torch.where(steps == 9, 0.3, flat)], dim=1))
    pairs = make_pairs([(0, 0, 2, 4, 0), (1, 0, 4, 2, 0)])
    return layers, pairs, torch.randn(1, 16, generator=torch.Generator().manual_seed(4))
