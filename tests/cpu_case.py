"""Layers of unusual numbers, ours beside nn.LSTM, and in fp64 as the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lstm_fast import LSTM


def uneven(w: Tensor) -> Tensor:
    """A weight of every third row far above the others."""
    w[::3, 5] *= 200
    return w


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are made": lambda w: w,
    "normal": lambda w: torch.randn_like(w) / w.size(1) ** 0.5,
    "rows of all magnitudes": lambda w: w * 10 ** torch.linspace(-40, 1, w.size(0)).unsqueeze(1),
    "nine in ten pruned": lambda w: w * (torch.rand_like(w) < 0.1),
    "rows and columns of zeros": lambda w: (
        w * (torch.arange(w.size(0)) % 7 > 0).unsqueeze(1) * (torch.arange(w.size(1)) % 5 > 0)
    ),
    "all alike": lambda w: torch.full_like(w, 2 / w.size(1)),
    "one far above": uneven,
}


def three(
    inputs: int, hidden: int, weights: Callable[[Tensor], Tensor], which: str = "weight_hh", **sizes: Any
) -> tuple[LSTM, nn.LSTM, nn.LSTM]:
    """Ours, nn.LSTM, and nn.LSTM in fp64, of the same weights; those that are named ``which`` changed."""
    torch.manual_seed(0)
    ours = LSTM(inputs, hidden, backend="cpu", **sizes)
    theirs, oracle = (nn.LSTM(inputs, hidden, **sizes) for _ in range(2))
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if which in name:
                weight.copy_(weights(weight.clone()))
    theirs.load_state_dict(ours.state_dict())
    oracle.double().load_state_dict(ours.state_dict())
    return ours, theirs, oracle


def results(module: nn.Module, x: Tensor, states: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, the last states, and all gradients."""
    x, h0, c0 = (t.clone().to(dy).requires_grad_() for t in (x, *states))
    y, (h_n, c_n) = module(x, (h0, c0))
    loss = (y * dy).sum() + h_n.sum() + c_n.sum()
    return [y, h_n, c_n, *torch.autograd.grad(loss, [x, h0, c0, *module.parameters()])]


def check_errors(
    modules: tuple[LSTM, nn.LSTM, nn.LSTM], x: Tensor, states: list[Tensor], dy: Tensor, gradients: bool = True
) -> None:
    """Ours are at most twice those of nn.LSTM, against fp64."""
    ours, theirs, oracle = modules
    count = None if gradients else 3
    exact = results(oracle, x, states, dy.double())[:count]
    got, others = (results(module, x, states, dy)[:count] for module in (ours, theirs))
    for a, b, right in zip(got, others, exact, strict=True):
        mine, allowed = ((t.double() - right).norm() / right.norm() for t in (a, b))
        assert mine <= 2 * allowed
