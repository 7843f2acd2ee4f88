"""What only a GPU can show: streams, graphs, synchronisation, long walks, large grids, a second device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lstm_fast
from lstm_fast import reference
from lstm_fast.kernels import cuda, rows
from tests.test_autocast_weights import H, loop, saved_weights

pytestmark = pytest.mark.gpu
BACKENDS = ["persistent", "cuda", "triton"]


def build(backend: str, dtype: torch.dtype = torch.float32, device: str = "cuda", hidden: int = 33):
    status = lstm_fast.backends()[backend]
    if not status.available:
        pytest.skip(f"{backend}: {status.detail}")
    torch.manual_seed(0)
    module = lstm_fast.LSTM(5, hidden, bidirectional=True, device=device, dtype=dtype, backend=backend)
    return module, torch.randn(7, 4, 5, device=device, dtype=dtype, requires_grad=True)


def train(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of its sum of squares."""
    y, (_, c_n) = module(x)
    loss = y.square().sum() + c_n.square().sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_callers_stream(backend, dtype):
    """Behind a long wait on its own stream, a kernel on any other would read what isn't there yet."""
    module, x = build(backend, dtype)
    wanted = train(module, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found = train(module, x)
    stream.synchronize()
    assert same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_synchronises(backend, dtype):
    module, x = build(backend, dtype)
    wanted = train(module, x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train(module, x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_captures_training(backend, dtype):
    module, x = build(backend, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            train(module, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(module, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, train(module, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_holds_the_kernel(backend):
    module, x = build(backend)
    held = []

    def keep(graph, _):
        held.extend(n.args[-2] for n in graph.graph.nodes if n.target is torch.ops.lstm_fast.layer)
        return graph.forward

    wanted = train(module, x)
    torch._dynamo.reset()
    found = train(torch.compile(module, fullgraph=True, backend=keep), x)
    assert held == [backend]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_changed_in_place(backend):
    module, x = build(backend)
    wanted = torch.autograd.grad(module(x)[0].relu().square().sum(), [x, *module.parameters()])
    found = torch.autograd.grad(module(x)[0].relu_().square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_walk(backend, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # where cuDNN takes TF32 is its own affair
    module, _ = build(backend, dtype)
    x = torch.randn(4096, 3, 5, device="cuda", dtype=dtype)
    theirs = nn.LSTM(5, 33, bidirectional=True, device="cuda", dtype=dtype)
    theirs.load_state_dict(module.state_dict())
    with torch.no_grad():
        ours, rival = module(x)[0].double(), theirs(x)[0].double()
        exact = theirs.double()(x.double())[0]
    error, allowed = ((y - exact).norm() / exact.norm() for y in (ours, rival))
    assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_device_that_is_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    module, x = build(backend, device="cuda:1")
    with torch.cuda.device(0):
        found = train(module, x)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert same_bits(found, train(module, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_what_packed_rows_had_a_step_before(dtype, reverse, hidden):
    """As the reference gathers it, of both directions' columns of y."""
    if cuda.unavailable() is not None:
        pytest.skip(f"cuda: {cuda.unavailable()}")
    torch.manual_seed(hidden)
    for lengths in ([1], [5, 5, 4, 1], torch.randint(1, 90, (130,)).sort(descending=True).values.tolist()):
        steps = [sum(n > t for n in lengths) for t in range(lengths[0])]
        y = torch.randn(sum(steps), 2 * hidden, device="cuda", dtype=dtype)
        columns, initial = y[:, reverse * hidden :][:, :hidden], torch.randn(len(lengths), hidden).to(y)
        found = rows.previous(columns, initial, steps, reverse)
        assert torch.equal(found, reference.previous(columns, initial, steps, reverse))


def test_more_rows_than_the_grid_has_blocks():
    """One unit a sequence makes blocks of 128 rows; gridDim.y ends at 65535, and the kernel loops over the rest."""
    if cuda.unavailable() is not None:
        pytest.skip(f"cuda: {cuda.unavailable()}")
    rows = 65535 * 128 + 77
    gates, product = torch.randn(1, rows, 4, device="cuda"), torch.randn(rows, 4, device="cuda")
    i, f, g, o = (gates[0] + product).double().unbind(1)
    c0 = torch.randn(1, rows, 1, device="cuda")
    c = f.sigmoid() * c0.flatten() + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    state, h_n, y = c0.clone(), torch.full_like(c0, float("nan")), torch.full((rows, 1), float("nan"), device="cuda")
    cuda.bind_forward(gates, product, state, h_n, y, None)(0, 0, rows)
    torch.testing.assert_close(state.flatten().double(), c, rtol=0, atol=1e-5)
    torch.testing.assert_close(y.flatten().double(), h, rtol=0, atol=1e-5)
    assert torch.equal(y.flatten(), h_n.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [4, 7, 28, 2048])
@pytest.mark.parametrize("count", [1, 5, 1000])
def test_sums_of_rows(dtype, width, count):
    """Exact but for rounding, where torch would add 16-bit numbers, and the same in both places."""
    if cuda.unavailable() is not None:
        pytest.skip(f"cuda: {cuda.unavailable()}")
    values = torch.randn(count, width, device="cuda", dtype=dtype)
    for of in (values, values.flatten()[1 : -width + 1].view(-1, width) if count > 1 else values):  # and unaligned
        exact = of.double().sum(0)
        allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * of.double().abs().sum(0)
        first, second = rows.sums(of, True, True)
        alone, none = rows.sums(of, False, True)[::-1]
        assert ((first.double() - exact).abs() <= allowed).all()
        assert torch.equal(first, second) and torch.equal(first, alone) and none is None


@pytest.mark.parametrize("kind", [lstm_fast.LSTMCell, lstm_fast.LSTM])
def test_a_loop_under_autocast_saves_each_weight_once(kind):
    module = kind(H, H).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert saved_weights(lambda: loop(module, 7)) == 2  # W_ih and W_hh


def test_a_graph_captured_under_autocast_outlives_it():
    """What was cast before in the same context is freed with it."""
    torch.manual_seed(0)
    module, x = lstm_fast.LSTM(H, H).cuda(), torch.randn(7, 4, H, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            want = module(x)[0].clone()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            y = module(x)[0]
    torch.cuda.empty_cache()
    others = torch.full((64, 4 * H, H), 7.0, device="cuda", dtype=torch.bfloat16)  # where the copies may have been
    graph.replay()
    assert torch.equal(y, want)
    assert bool((others == 7).all())


def test_a_state_on_another_device_is_refused():
    module = lstm_fast.LSTM(4, 8, device="cuda")
    x, state = torch.randn(3, 2, 4, device="cuda"), torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match="found input tensor at cuda:0 and hidden tensor at cpu"):
        module(x, (state, state))
