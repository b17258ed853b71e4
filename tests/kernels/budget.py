"""How large an error may be."""

from __future__ import annotations

import torch


def rms(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).square().mean().sqrt().item()


def assert_within_budget(samples, names=("maps", "∂query", "∂key")) -> None:
    """Error against float64 ≤ 2 × the error of eager in the same precision + one rounding; root mean squares.

    samples: [(actual, eager, exact)], each one tensor for every name. Several, as eager is lucky on some small inputs.
    """
    for i, name in enumerate(names):
        actual, eager, exact = ([values[i] for values in column] for column in zip(*samples, strict=True))
        assert all(a.dtype == e.dtype and a.shape == e.shape for a, e in zip(actual, eager, strict=True))
        error = rms([a.double() - x for a, x in zip(actual, exact, strict=True)])
        allowed = rms([e.double() - x for e, x in zip(eager, exact, strict=True)])
        budget = 2 * allowed + torch.finfo(actual[0].dtype).eps * rms(exact)
        assert error <= budget, f"{name}: error {error:.3e} above the budget {budget:.3e}"
