"""That the methods of `attention_loss_cases` compute the same thing: the condition for measuring them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_loss.cases import (
    Geometry,
    Method,
    Step,
    all_text_rows,
    gathered_rows,
    make_step,
    run_step,
    this_project,
)

# Small, but with groups of heads, an unsupervised layer below the supervised ones, and a mask shared by rows.
SMALL = Geometry(
    num_heads=6,
    num_key_heads=2,
    head_dim=16,
    num_layers=5,
    supervised=3,
    patches=4,
    text=20,
    mask_size=(45, 80),
    rows_per_object=2,
)
PAPER = partial(gathered_rows, softmax="full", numerics="paper")


def assert_methods_agree(length: int = 271, num_rows: int = 5) -> None:
    """Maps, loss and gradients of query, key and value, on layers that differ, relative to the largest element.

    Once with the gradient of the mask loss alone, which would be lost in that of the attention output, once with both.
    In float64 this project agrees with the gathered rows, and all text rows do with gathered rows that have paper
    numerics and a softmax over all tokens. In fp32 this project is within 1e-5 of float64 (the gathered rows within
    2e-3: in plain operations the slopes at the minimum and the maximum, where p is 0 and 1, are large and have to
    cancel). In bf16, the precision that is measured, this project is no
    further from float64 than twice what the gathered rows are.

    Raises:
        AssertionError: naming method, precision and quantity.
    """
    both = make_step(length, num_rows, SMALL, dtype=torch.float64, distinct=SMALL.num_layers)
    for step in (replace(both, grad_output=torch.zeros_like(both.grad_output)), both):
        for dtype, bounds in ((torch.float64, (1e-10, 1e-10)), (torch.float32, (1e-5, 2e-3))):
            given = cast(step, dtype)
            exact = results(cast(given, torch.float64), gathered_rows)
            for method, bound in zip((this_project, gathered_rows), bounds, strict=True):
                assert_close(f"{method.__name__}, {dtype}", results(given, method), exact, bound)
            paper = results(given, all_text_rows, SMALL.num_layers)
            assert_close(f"all_text_rows, {dtype}", paper, results(given, PAPER), bounds[0])
        given = cast(step, torch.bfloat16)
        exact = results(cast(given, torch.float64), gathered_rows)
        plain, ours = (errors(results(given, method), exact) for method in (gathered_rows, this_project))
        for name, error in ours.items():
            allowed = 2 * plain[name] + torch.finfo(torch.bfloat16).eps
            assert error <= allowed, f"this_project, bfloat16: {name} off by {error:.1e}, allowed {allowed:.1e}"


def cast(step: Step, dtype: torch.dtype) -> Step:
    layers = [tuple(tensor.to(dtype) for tensor in layer) for layer in step.layers]
    return replace(step, layers=layers, grad_output=step.grad_output.to(dtype))


def results(step: Step, method: Method, num_layers: int | None = None) -> dict[str, Tensor]:
    """Maps, loss and gradients by name, those of all supervised layers stacked."""
    forward, gradients = run_step(step.fresh(), method, num_layers or step.geometry.supervised, keep=True)
    by_input = (torch.stack(tensors) for tensors in zip(*gradients, strict=True))
    named = dict(zip(("∂query", "∂key", "∂value"), by_input, strict=True))
    return {"maps": torch.stack(list(forward.maps)).detach(), "loss": forward.loss.detach()} | named


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation relative to the largest element; where all are 0, the deviation itself."""
    found = {}
    for name, value in expected.items():
        largest = value.abs().max().item() or 1.0
        found[name] = (actual[name].double() - value.double()).abs().max().item() / largest
    return found


def assert_close(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, error in errors(actual, expected).items():
        assert error <= bound, f"{what}: {name} off by {error:.1e}, allowed {bound:.0e}"
