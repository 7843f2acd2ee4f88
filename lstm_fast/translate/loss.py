"""Cross-entropy of a linear layer's outputs, a few rows at a time, so that the logits never exist as a whole.

For a vocabulary of thousands the logits are by far the largest tensor of a step, and torch writes them to memory
several times over. Here a chunk of them stays in the cache from the product to its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_fast.measured import place

_CHUNK = 128  # rows; at 8,000 subwords 4 MB of logits


def linear_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy of ``features @ weight.T + bias``, summed over rows.

    It is ``torch.nn.functional.cross_entropy(..., label_smoothing=smoothing, reduction="sum")`` of those logits, once
    differentiable. Products are in ``product_dtype``, all else in ``weight``'s dtype.

    Args:
        features: [N, W].
        weight, bias: [V, W] and [V].
        targets: class indices [N].
        smoothing: probability spread evenly over all V classes.
    """
    function: Any = _LinearCrossEntropy
    loss: Tensor = function.apply(features, weight, bias, targets, smoothing, torch.is_grad_enabled())
    return loss


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the products: bf16 for fp32 weights where it is several times faster, else that of ``weight``."""
    if weight.dtype != torch.float32:
        return weight.dtype
    if weight.is_cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = place(weight.device) in ("cpu avx512_bf16", "cpu amx")
    return torch.bfloat16 if fast else torch.float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float, grad: bool
    ) -> Tensor:
        dtype, spread = product_dtype(weight), smoothing / len(weight)
        x, w = features.to(dtype), weight.to(dtype)
        dx, dw, db = (torch.zeros_like(t) for t in (features, weight, bias))
        loss = weight.new_zeros(())
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            target = targets[part].unsqueeze(1)  # [n, 1]
            log_p = torch.mm(x[part], w.t()).to(weight.dtype).add_(bias).log_softmax(1)  # [n, V]
            loss -= (1 - smoothing) * log_p.gather(1, target).sum() + spread * log_p.sum()
            if grad:
                dz = log_p.exp_().sub_(spread)
                dz.scatter_add_(1, target, dz.new_full((), smoothing - 1).expand_as(target))
                db += dz.sum(0)
                dz = dz.to(dtype)
                dx[part] = torch.mm(dz, w)
                dw += torch.mm(dz.t(), x[part])
        ctx.save_for_backward(dx, dw, db)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        return dx * grad, dw * grad, db * grad, None, None, None
