"""Layers of unusual numbers, ours beside nn.LSTM, and in fp64 as the oracle; and processors of fewer instructions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lstm_fast import _C, LSTM

SLOW_PAIRS = "avx512_slow_bf16"  # where a call takes one of the two sets before it


def limit_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor ran no better instruction set than the one of that name."""
    best = _C.CPU_INSTRUCTION_SETS.index(name)
    monkeypatch.setattr(_C, "CPU_INSTRUCTION_SETS", _C.CPU_INSTRUCTION_SETS[: best + 1])


@pytest.fixture(params=[name for name in _C.CPU_INSTRUCTION_SETS if name != SLOW_PAIRS])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    limit_to(request.param, monkeypatch)
    return str(request.param)


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


def case(module: nn.LSTM, batch: int, steps: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, states and dy of random numbers."""
    directions, features = 1 + module.bidirectional, module.proj_size or module.hidden_size
    x = torch.randn(steps, batch, module.input_size)
    states = [torch.randn(directions, batch, size) for size in (features, module.hidden_size)]
    return x, states, torch.randn(steps, batch, directions * features)


def check_errors(modules: tuple[LSTM, nn.LSTM, nn.LSTM], *cases: tuple[Tensor, list[Tensor], Tensor]) -> None:
    """Ours against fp64 are at most twice those of nn.LSTM, by geometric means over ``cases`` of x, states and dy."""
    errors = []  # [cases, results, 2]
    for x, states, dy in cases:
        ours, theirs, right = (results(m, x, states, dy.to(m.weight_hh_l0)) for m in modules)
        both = zip(ours, theirs, right, strict=True)
        errors.append([[((t - exact).norm() / exact.norm()).item() for t in (a, b)] for a, b, exact in both])
    for mine, allowed in torch.tensor(errors).clamp(min=1e-30).log().mean(0).exp():
        assert mine <= 2 * allowed


def check_usual_errors(modules: tuple[LSTM, nn.LSTM, nn.LSTM], weights: str, batch: int, steps: int) -> None:
    """check_errors of random numbers, with these of WEIGHTS."""
    few = weights in ("all alike", "one far above")  # of few numbers: errors have so many signs too, and may cancel
    check_errors(modules, *(case(modules[0], batch, steps) for _ in range(8 if few else 1)))
