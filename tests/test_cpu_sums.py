"""Sums on a CPU are as exact as nn.LSTM's where they were not: against fp64, in each instruction set."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lstm_fast
from lstm_fast import LSTM
from tests.cpu_case import instruction_set, three  # noqa: F401, a fixture

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def errors(
    kind: Callable[[LSTM | nn.LSTM, Tensor], Tensor], x: Tensor, modules: tuple[LSTM, nn.LSTM, nn.LSTM]
) -> list[float]:
    """Ours and nn.LSTM's of what ``kind`` makes of a module and its input, by norm, against fp64's."""
    *found, right = (kind(module, x.to(module.weight_ih_l0.dtype)) for module in modules)
    return [float((each - right).norm() / right.norm()) for each in found]


def mean_ratio(found: list[list[float]]) -> float:
    ours, theirs = map(sum, zip(*found, strict=True))
    return ours / theirs


@pytest.mark.parametrize(("inputs", "hidden"), [(4, 128), (8, 180)])
@pytest.mark.usefixtures("instruction_set")
def test_few_large_inputs_leave_the_sums_of_states_exact(inputs: int, hidden: int) -> None:
    def last_cells(module: LSTM | nn.LSTM, x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)[1][1]

    found = []
    for seed in range(4):
        modules = three(inputs, hidden, lambda w: w, bias=False)
        torch.manual_seed(seed)
        found.append(errors(last_cells, torch.randn(30, 16, inputs), modules))
    assert mean_ratio(found) < 1.6


@pytest.mark.parametrize("which", ["weight_ih_l0_reverse", "weight_hh_l0_reverse"])
@pytest.mark.usefixtures("instruction_set")
def test_gradients_that_fade_from_the_first_step_on_are_exact(which: str) -> None:
    """Of the reverse direction's last state, which is that of step 0."""

    def gradient(module: LSTM | nn.LSTM, x: Tensor) -> Tensor:
        return torch.autograd.grad(module(x)[1][0][1].sum(), getattr(module, which))[0]

    found = []
    for seed in range(4):
        modules = three(64, 128, lambda w: w, bidirectional=True)
        torch.manual_seed(seed)
        found.append(errors(gradient, torch.randn(48, 4, 64), modules))
    assert mean_ratio(found) < 2


@pytest.mark.parametrize(("batch", "hidden"), [(9, 144), (30, 256)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_a_cell_without_inputs_ends(dtype: torch.dtype, batch: int, hidden: int) -> None:
    torch.manual_seed(0)
    ours, theirs = (kind(0, hidden, dtype=dtype) for kind in (lstm_fast.LSTMCell, nn.LSTMCell))
    theirs.load_state_dict(ours.state_dict())
    x, h, c = torch.empty(batch, 0, dtype=dtype), *torch.randn(2, batch, hidden, dtype=dtype)
    for got, want in zip(ours(x, (h, c)), theirs(x, (h, c)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES[dtype])


def test_a_shut_forget_gate_is_no_nan() -> None:
    """Its derivative is 0, whatever the cell state and the gradient that reaches it make together."""
    ours = LSTM(1, 1, backend="cpu")
    with torch.no_grad():
        ours.bias_ih_l0[1] = -200
    x, states = torch.ones(1, 1, 1, requires_grad=True), (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e20))
    y, (_, c_n) = ours(x, states)
    grads = torch.autograd.grad([y, c_n], [x, *ours.parameters()], [torch.zeros_like(y), torch.full_like(c_n, 1e20)])
    assert not any(grad.isnan().any() for grad in grads)
