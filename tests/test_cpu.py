"""The C++ recurrence on a CPU in each instruction set this one runs, and on any number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lstm_fast import _C, LSTM, autograd
from lstm_fast.kernels import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.CPU_INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    best = _C.CPU_INSTRUCTION_SETS.index(request.param)
    monkeypatch.setattr(_C, "CPU_INSTRUCTION_SETS", _C.CPU_INSTRUCTION_SETS[: best + 1])
    return str(request.param)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def outputs_and_gradients(layer: nn.Module, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    x, h0, c0 = (t.clone().requires_grad_() for t in tensors)
    y, (h_n, c_n) = layer(x, (h0, c0))
    outputs = [y, h_n, c_n]
    loss = sum(((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(loss, [x, h0, c0, *layer.parameters()])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "batch"), [(1, 1), (33, 7), (100, 17), (257, 6)])
@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_agrees_with_torch(dtype: torch.dtype, hidden: int, batch: int) -> None:
    torch.manual_seed(0)
    ours = LSTM(5, hidden, bidirectional=True, dtype=dtype, backend="cpu")
    oracle = nn.LSTM(5, hidden, bidirectional=True, dtype=torch.float64)
    oracle.load_state_dict(ours.state_dict())
    steps = 6
    shapes = [(steps, batch, 5), (2, batch, hidden), (2, batch, hidden)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    weights = [torch.randn(shape, dtype=dtype) for shape in [(steps, batch, 2 * hidden), *shapes[1:]]]
    got = outputs_and_gradients(ours, tensors, weights)
    want = outputs_and_gradients(oracle, [t.double() for t in tensors], [t.double() for t in weights])
    for ours_, exact in zip(got, want, strict=True):
        error = (ours_.double() - exact).abs().max() / exact.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def recurrence(steps: list[int], directions: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Everything that both calls write, from seeded inputs, into memory full of NaN."""
    torch.manual_seed(1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows, batch, features = sum(steps), steps[0], directions * hidden
    gates = torch.randn(directions, rows, 4 * hidden).to(dtype)
    h0, c0 = (torch.randn(directions, batch, hidden).to(dtype) for _ in range(2))
    w_hh = [(torch.randn(4 * hidden, hidden) / hidden**0.5).to(dtype) for _ in range(directions)]
    dy = torch.randn(rows, features).to(dtype)
    dh, dc = (torch.randn(directions, batch, hidden, dtype=acc) for _ in range(2))
    y, h_n, c_n = torch.empty(rows, features, dtype=dtype), torch.empty_like(h0), torch.empty_like(c0)
    cells, dgates = torch.empty(directions, rows, hidden, dtype=acc), torch.empty_like(gates)
    written = [y, h_n, c_n, cells, dgates]
    for tensor in written:
        tensor.fill_(torch.nan)
    cpu.recurrence_forward(gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)
    cpu.recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh, dc, dgates)
    return [*written, gates, dh, dc]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("steps", [[1] * 12, [3] * 6, [40] * 2, [17, 16, 9, 9, 2, 1]], ids=str)
@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_any_number_of_threads_gives_the_same_bits(steps: list[int], directions: int, dtype: torch.dtype) -> None:
    """Large enough that threads share hidden units in the first two, rows in the others."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(recurrence(steps, directions, 450, dtype))
    assert all(bool(t.isfinite().all()) for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("directions", [1, 2])
def test_backward_without_dy_is_backward_with_zeros(directions: int) -> None:
    torch.manual_seed(2)
    steps, hidden = [3, 3, 1], 20
    shape = (directions, sum(steps))
    gates, cells = torch.rand(*shape, 4 * hidden), torch.randn(*shape, hidden)
    c0 = torch.randn(directions, 3, hidden)
    w_hh = [torch.randn(4 * hidden, hidden) for _ in range(directions)]
    state = torch.randn(2, directions, 3, hidden)
    results = []
    for dy in (None, torch.zeros(sum(steps), directions * hidden)):
        dh, dc, dgates = state[0].clone(), state[1].clone(), torch.full_like(gates, torch.nan)
        cpu.recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh, dc, dgates)
        results.append((dh, dc, dgates))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], state[0])


@pytest.mark.parametrize("lengths", [[40] * 6, [40, 33, 33, 12, 2, 1]])
@pytest.mark.parametrize("chunk", [1, 5_000, 20_000])
def test_inference_in_chunks_of_steps_is_the_whole_walk(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], chunk: int
) -> None:
    """The gates of some steps at a time, against nn.LSTM in fp64: outputs and last states, of short sequences too."""
    torch.manual_seed(0)
    ours, theirs = LSTM(7, 19), nn.LSTM(7, 19).double()
    theirs.load_state_dict(ours.state_dict())
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(40, 6, 7), lengths)
    hx = torch.randn(1, 6, 19), torch.randn(1, 6, 19)
    calls: list[int] = []
    whole = cpu.recurrence_forward
    monkeypatch.setattr(cpu, "recurrence_forward", lambda *args: (calls.append(len(args[4])), whole(*args)))
    monkeypatch.setattr(autograd, "_CHUNK", chunk)
    with torch.no_grad():
        y, (h_n, c_n) = ours(x, hx)
        exact, (h_exact, c_exact) = theirs(x.to(torch.float64), tuple(t.double() for t in hx))
    assert len(calls) > 1 and sum(calls) == 40
    for found, wanted in ((y.data, exact.data), (h_n, h_exact), (c_n, c_exact)):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
