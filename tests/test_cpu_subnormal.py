"""Numbers below the smallest normal one: 0 in the CPU kernel's gradients, exact in its states, elsewhere left alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lstm_fast import LSTM
from tests.cpu_case import instruction_set  # noqa: F401, a fixture


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def subnormal(t: Tensor) -> Tensor:
    return (t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)


def gradients(module: nn.LSTM | LSTM, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of a loss of the last step alone."""
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(module(x)[0], [x, *module.parameters()], dy))


def fading(dtype: torch.dtype, steps: int, batch: int) -> tuple[LSTM, nn.LSTM, Tensor, Tensor]:
    """Ours and nn.LSTM, x, and gradients of y that reach subnormal numbers some steps before the last."""
    torch.manual_seed(0)
    ours, theirs = LSTM(70, 70, dtype=dtype, backend="cpu"), nn.LSTM(70, 70, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    dy = torch.zeros(steps, batch, 70, dtype=dtype)
    dy[-1] = torch.randn(batch, 70, dtype=dtype) * torch.finfo(dtype).tiny * 1e6
    return ours, theirs, torch.randn(steps, batch, 70, dtype=dtype), dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("steps", "batch"), [(60, 2), (60, 40)], ids=["few rows", "many"])
@pytest.mark.usefixtures("instruction_set")
def test_gradients_that_fade_end_in_zeros(threads: int, steps: int, batch: int, dtype: torch.dtype) -> None:
    ours, theirs, x, dy = fading(dtype, steps, batch)
    dx, *_ = got = gradients(ours, x, dy)
    want = gradients(theirs, x, dy)
    assert subnormal(want[0]).any()
    assert not dx[:10].any()
    assert not any(subnormal(g).any() for g in got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e3 * torch.finfo(dtype).tiny)


@pytest.mark.parametrize("flushed", [False, True])
def test_what_the_caller_set_stays(threads: int, flushed: bool) -> None:
    """In each of torch's threads, which are the kernel's too."""
    small = torch.full((1 << 20,), 1e-40)
    torch.set_flush_denormal(flushed)
    try:
        before = (small * 1).count_nonzero()
        ours, _, x, dy = fading(torch.float32, 60, 40)
        gradients(ours, x, dy)
        assert (small * 1).count_nonzero() == before
        if not flushed:
            assert before == small.numel()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.usefixtures("instruction_set")
def test_subnormal_states_are_exact(threads: int) -> None:
    ours, theirs, x, _ = fading(torch.float32, 5, 3)
    states = torch.zeros(1, 3, 70), torch.full((1, 3, 70), 1e-40)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
        theirs.load_state_dict(ours.state_dict())
        got, want = (module(x, states)[1][1] for module in (ours, theirs))
    assert subnormal(want).all()
    assert torch.equal(got, want)


@pytest.mark.usefixtures("instruction_set")
def test_small_gradients_of_fp16_stay(threads: int) -> None:
    """What is subnormal in fp16 is a normal float."""
    torch.manual_seed(0)
    x, dy = torch.randn(8, 40, 70), torch.zeros(8, 40, 70)
    dy[-1] = torch.randn(40, 70) * 1e-3
    half = LSTM(70, 70, dtype=torch.float16, backend="cpu")
    oracle = nn.LSTM(70, 70, dtype=torch.float64)
    oracle.load_state_dict(half.state_dict())
    got, want = gradients(half, x.half(), dy.half()), gradients(oracle, x.half().double(), dy.half().double())
    assert subnormal(want[0].half()).float().mean() > 0.2
    torch.testing.assert_close(got[0].double(), want[0], rtol=0.02, atol=2.0**-22)
