"""Agreement of the methods: the condition for measuring them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_loss.inputs import Geometry, Step, make_step
from benchmarks.attention_loss.methods import (
    CAUSAL,
    GATHERED,
    METHODS,
    OURS,
    PUBLISHED,
    RECOMPUTED,
    forward_gathered_rows,
    forward_recomputed,
    run_step,
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
# The gathered rows that a method must agree with.
PLAIN = {
    OURS: forward_gathered_rows,
    CAUSAL: partial(forward_gathered_rows, softmax="causal", prediction="min_max"),
    RECOMPUTED: forward_gathered_rows,
    PUBLISHED: partial(forward_gathered_rows, softmax="full", prediction="released"),
}
FORWARD = {name: method.forward for name, method in METHODS.items()} | {
    RECOMPUTED: partial(forward_recomputed, tie=True)
}
FP32 = {RECOMPUTED: 2e-4}  # what is made again is rounded again; 1e-5 for the others


def assert_methods_agree(length: int = 271, num_rows: int = 5) -> None:
    """Compare maps, loss and gradients of query, key and value on layers that differ.

    Errors are relative to the largest element. The gradient of the mask loss is compared alone, which would be lost
    beside that of the attention output, and then both together.

    - float64: every method agrees with the gathered rows that have its softmax and prediction.
    - fp32: within 1e-5 of float64; the gathered rows themselves within 2e-3. In plain operations the slopes of
      "min_max" at the minimum and the maximum, where p is 0 and 1, are large and have to cancel.
    - bf16, the precision that is measured: swim_fast is no further from float64 than twice what gathered rows are.

    Raises:
        AssertionError: naming method, precision and quantity.
    """
    both = make_step(length, num_rows, SMALL, dtype=torch.float64, distinct=SMALL.num_layers)
    for step in (replace(both, grad_output=torch.zeros_like(both.grad_output)), both):
        for dtype in (torch.float64, torch.float32):
            given = step.cast(dtype)
            for name, plain in PLAIN.items():
                single = dtype == torch.float32
                reference = given.cast(torch.float64) if single and name != PUBLISHED else given
                bound = FP32.get(name, 1e-5) if single else 1e-10
                exact = compute_results(reference, plain)
                layers = SMALL.num_layers if METHODS[name].every_layer else None
                _assert_close(f"{name}, {dtype}", compute_results(given, FORWARD[name], layers), exact, bound)
                if reference is not given:
                    _assert_close(f"{GATHERED}, {dtype}", compute_results(given, plain), exact, 2e-3)
        given = step.cast(torch.bfloat16)
        for name in (OURS, CAUSAL):
            exact = compute_results(given.cast(torch.float64), PLAIN[name])
            ours, plain = (_errors(compute_results(given, way), exact) for way in (FORWARD[name], PLAIN[name]))
            for quantity, error in ours.items():
                allowed = 2 * plain[quantity] + torch.finfo(torch.bfloat16).eps
                assert error <= allowed, f"{name}, bfloat16: {quantity} off by {error:.1e}, allowed {allowed:.1e}"


def compute_results(step: Step, forward, num_layers: int | None = None) -> dict[str, Tensor]:
    """Return maps, loss and gradients by name, those of all supervised layers stacked."""
    result, gradients = run_step(step.fresh(), forward, num_layers or step.geometry.supervised, keep=True)
    by_input = (torch.stack(tensors) for tensors in zip(*gradients, strict=True))
    named = dict(zip(("∂query", "∂key", "∂value"), by_input, strict=True))
    return {"maps": torch.stack(list(result.maps)).detach(), "loss": result.loss.detach()} | named


def _errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest deviation relative to the largest element; where all are 0, the deviation itself."""
    found = {}
    for name, value in expected.items():
        largest = value.abs().max().item() or 1.0
        found[name] = (actual[name].double() - value.double()).abs().max().item() / largest
    return found


def _assert_close(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, error in _errors(actual, expected).items():
        assert error <= bound, f"{what}: {name} off by {error:.1e}, allowed {bound:.0e}"
