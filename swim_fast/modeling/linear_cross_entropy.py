"""Cross-entropy of a linear layer, summed over tokens, without a tensor of all logits.

For hidden states x [N, H], weight W [V, H] and bias b [V], with y_n the word that token n predicts:

    z = x Wᵀ + b,   lse_n = log Σ_v exp z[n,v],   loss = Σ_n lse_n − z[n, y_n]
    ∂z[n,v] = g · (exp(z[n,v] − lse_n) − [v = y_n]),   ∂x = ∂z W,   ∂W = ∂zᵀ x,   ∂b[v] = Σ_n ∂z[n,v]

Forward and backward go over blocks of the vocabulary. Only lse [N] is kept; backward recomputes the logits of a block.
Blocks are of words rather than tokens, so that each gives its rows of ∂W complete: one matrix product, rounded once,
and no second tensor of the weight's size to add them up.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_LOGITS = 2**25  # logits of a block: 128 MB in fp32


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, block_logits: int = BLOCK_LOGITS
) -> Tensor:
    """Return Σ over tokens of -log softmax(hidden @ weight.T + bias)[target].

    Under autocast the matrix products are those of its dtype, as in `torch.nn.functional.linear`.

    Args:
        hidden: `[N, H]` floating point; N = 0 is legal.
        weight: `[V, H]`, bias: `[V]` or None.
        targets: `[N]` int64, `0 ≤ target < V`; one outside gives NaN.
        block_logits: about how many logits are held at a time (at least one word's, N).

    Returns:
        Scalar, fp32 (fp64 of fp64). 0 with a graph if N = 0.

    Raises:
        ValueError: a weight without its two dimensions, as a ZeRO-3 partitioned one is outside its module's forward.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [V, H], is {list(weight.shape)}: is it partitioned, and not gathered here?")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    block = max(1, block_logits // max(len(hidden), 1))
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype, block)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, block):
        wide = torch.promote_types(dtype, torch.float32)
        lse = hidden.new_full(targets.shape, -torch.inf, dtype=wide)
        picked = hidden.new_full(targets.shape, torch.nan, dtype=wide)  # z[n, y_n]
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(dtype)
            for start in range(0, len(weight), block):
                logits = _logits(x, weight, bias, start, block)[0].to(wide)  # [N, block]
                lse = torch.logaddexp(lse, logits.logsumexp(1))
                column, inside = _columns(targets, start, logits.shape[1])
                picked = torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), picked)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.dtype, ctx.block = dtype, block
        return (lse - picked).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if for_hidden else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(ctx.dtype)
            for start in range(0, len(weight), ctx.block):
                logits, words = _logits(x, weight, bias, start, ctx.block)
                grad_logits = logits.to(lse.dtype).sub_(lse[:, None]).exp_()  # [N, block]
                column, inside = _columns(targets, start, grad_logits.shape[1])
                grad_logits.scatter_add_(1, column[:, None], -inside.to(lse.dtype)[:, None])
                grad_logits.mul_(grad)
                stop = start + len(words)
                if for_bias:
                    grad_bias[start:stop] = grad_logits.sum(0)
                grad_logits = grad_logits.to(ctx.dtype)
                if for_weight:
                    grad_weight[start:stop] = grad_logits.t() @ x
                if for_hidden:
                    grad_hidden += grad_logits @ words
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, block: int) -> tuple[Tensor, Tensor]:
    """Return logits `[N, block]` of the words from `start`, and their rows `[block, H]` of the weight, in x's dtype."""
    words = weight[start : start + block].to(x.dtype)
    if bias is None:
        return x @ words.t(), words
    return torch.addmm(bias[start : start + block].to(x.dtype), x, words.t()), words


def _columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the column `[N]` of each target in the block of words from `start`, and a mask of those inside."""
    column = targets - start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
