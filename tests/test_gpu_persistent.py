"""The persistent kernels on a card: sizes, repeats, launches side by side, graphs, precision, memory, fallback."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fast
from lstm_fast.kernels import persistent

pytestmark = pytest.mark.gpu


TF32_EPS = 2**-10


GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _needs_a_card(monkeypatch):
    """fp32 is strict unless a test allows TF32: which sizes cuDNN takes TF32 for is its own affair."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    missing = persistent.unavailable() or persistent.refuses(GPU, torch.bfloat16, 8)
    if missing is not None:
        pytest.skip(f"persistent: {missing}")


@pytest.fixture(params=["clusters", "grid"])
def exchange(request):
    """How blocks exchange h: as the card would have it, in clusters, or over the grid."""
    if request.param == "grid":
        with persistent.over_the_grid():
            yield
    elif torch.cuda.get_device_capability(GPU) < (9, 0):
        pytest.skip("the GPU has no clusters")
    else:
        plans = persistent.plans(GPU, torch.bfloat16, 64, 1, 1)
        assert not any(plan.grid for plan in plans), plans  # else clusters would go untested
        yield


def pair(features: int, hidden: int, dtype: torch.dtype, **options) -> tuple[lstm_fast.LSTM, nn.LSTM]:
    torch.manual_seed(hidden)
    theirs = nn.LSTM(features, hidden, **options, device="cuda", dtype=dtype)
    ours = lstm_fast.LSTM(features, hidden, **options, device="cuda", dtype=dtype, backend="persistent")
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(module: nn.Module, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Output, states and all gradients of a random weighting of them."""
    module.zero_grad()
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    sequence = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (h_n, c_n) = module(sequence)
    y = y if lengths is None else y.data
    torch.manual_seed(1)
    outputs = [y, h_n, c_n]
    torch.autograd.backward(outputs, [torch.randn(t.shape, device="cuda").to(t.dtype) for t in outputs])
    return [t.detach() for t in (*outputs, x.grad, *(p.grad for p in module.parameters()))]


def check(
    ours: nn.Module, theirs: nn.LSTM, x: Tensor, lengths: Tensor | None = None, eps: float | None = None, draws: int = 1
) -> list[float]:
    """Our errors against nn.LSTM in fp64, each at most twice nn.LSTM's own; ``eps`` is the dtype's if None.

    Over several ``draws`` of x where one has so few numbers that a lucky one of nn.LSTM's would decide.
    """
    double = copy.deepcopy(theirs).double()
    square: list[Tensor] = []  # of a draw: by result |ours - exact|^2, |theirs - exact|^2, |exact|^2
    for draw in range(draws):
        inputs = x if draw == 0 else torch.randn_like(x)
        sides = (results(module, inputs, lengths) for module in (ours, theirs, double))
        each = [
            [(a.double() - e).square().sum(), (b.double() - e).square().sum(), e.square().sum()]
            for a, b, e in zip(*sides, strict=True)
        ]
        square.append(torch.tensor(each))
    off, allowed, size = torch.stack(square).sum(0).sqrt().unbind(1)
    least = torch.finfo(x.dtype).eps if eps is None else eps
    errors: list[float] = (off / size).tolist()
    for place, (error, rival) in enumerate(zip(errors, (allowed / size).tolist(), strict=True)):
        assert error <= 2 * rival + least, f"result {place}: {error:.2e}, nn.LSTM's {rival:.2e}"
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden, batch", [(1, 3), (7, 130), (257, 17), (300, 64), (384, 33), (512, 128), (512, 1)])
def test_sizes(exchange, dtype, hidden, batch):
    ours, theirs = pair(20, hidden, dtype)
    draws = 8 if hidden * batch < 1000 else 1
    check(ours, theirs, torch.randn(30, batch, 20, device="cuda", dtype=dtype), draws=draws)


@pytest.mark.parametrize(
    "dtype, hidden", [(torch.bfloat16, 768), (torch.float16, 768), (torch.bfloat16, 1536), (torch.float32, 1024)]
)
def test_the_widest(dtype, hidden):
    why_not = persistent.refuses(GPU, dtype, hidden)
    if why_not is not None:
        pytest.skip(why_not)
    ours, theirs = pair(64, hidden, dtype)
    check(ours, theirs, torch.randn(30, 40, 64, device="cuda", dtype=dtype))


def test_both_directions_of_a_layer_whose_weights_fill_the_card():
    """Over the grid one direction after the other."""
    if persistent.refuses(GPU, torch.bfloat16, 1600) is not None:
        pytest.skip("the GPU holds no 1600 units")
    assert [plan.directions for plan in persistent.plans(GPU, torch.bfloat16, 1600, 9, 2)] == [1, 1]
    ours, theirs = pair(64, 1600, torch.bfloat16, bidirectional=True)
    check(ours, theirs, torch.randn(20, 9, 64, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_both_directions_two_layers(exchange, dtype):
    ours, theirs = pair(33, 100, dtype, num_layers=2, bidirectional=True)
    lengths = torch.randint(1, 41, (70,))
    check(ours, theirs, torch.randn(int(lengths.max()), 70, 33, device="cuda", dtype=dtype), lengths)


@pytest.mark.parametrize("dtype, hidden", [(torch.bfloat16, 512), (torch.bfloat16, 200), (torch.float32, 256)])
def test_tiles_of_every_width(exchange, dtype, hidden):
    """Of 1 to 8 sequences, as batches grow beyond what is resident at once."""
    batches = {}
    for batch in range(1, 300):
        for plan in persistent.plans(GPU, dtype, hidden, batch, 1):
            batches.setdefault(plan.columns, batch)
    assert sorted(batches) == list(range(1, 9))
    ours, theirs = pair(20, hidden, dtype)
    for batch in batches.values():
        draws = 8 if hidden * batch < 1000 else 1
        check(ours, theirs, torch.randn(30, batch, 20, device="cuda", dtype=dtype), draws=draws)


def test_more_clusters_than_the_card_holds(exchange):
    ours, theirs = pair(8, 256, torch.bfloat16)
    check(ours, theirs, torch.randn(5, 4000, 8, device="cuda", dtype=torch.bfloat16))


def test_a_long_walk_of_a_wide_layer(exchange):
    ours, theirs = pair(8, 512, torch.bfloat16)
    check(ours, theirs, torch.randn(4096, 16, 8, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("hidden", [64, 512, 768, 1024])
def test_the_same_bits_ten_times(exchange, hidden):
    ours, _ = pair(16, hidden, torch.bfloat16, bidirectional=True)
    x = torch.randn(200, 50, 16, device="cuda", dtype=torch.bfloat16)
    wanted = results(ours, x)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(results(ours, x), wanted, strict=True))


def test_two_launches_side_by_side(exchange):
    """On two streams at once, queued behind a wait: neither needs blocks that the other keeps out."""
    modules = [pair(16, hidden, torch.bfloat16)[0] for hidden in (256, 512)]
    inputs = [torch.randn(300, 64, 16, device="cuda", dtype=torch.bfloat16) for _ in modules]
    wanted = [results(module, x) for module, x in zip(modules, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in modules]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for module, x, stream in zip(modules, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                found.append(results(module, x))
        torch.cuda.synchronize()
        for a, b in zip(found, wanted, strict=True):
            assert all(torch.equal(t, u) for t, u in zip(a, b, strict=True))


def test_a_graph_captures_a_packed_call(exchange):
    """The starts of the steps travel as kernel arguments: the graph holds no pointer to memory of the host."""
    ours, _ = pair(16, 64, torch.bfloat16)
    lengths = torch.randint(1, 2000, (9,))
    x = torch.randn(int(lengths.max()), 9, 16, device="cuda", dtype=torch.bfloat16)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            ours(packed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = ours(packed)[0].data
    packed.data.copy_(torch.randn_like(packed.data))
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(captured, ours(packed)[0].data)


@pytest.mark.parametrize("hidden", [33, 128, 512])
def test_fp32_uses_tf32_only_where_torch_allows_it(monkeypatch, hidden):
    ours, theirs = pair(32, hidden, torch.float32)
    x = torch.randn(50, 16, 32, device="cuda")
    strict = check(ours, theirs, x)[0]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = check(ours, theirs, x, eps=TF32_EPS)[0]
    assert strict < 2e-6 < 2e-5 < allowed < 2e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [16, 128])
def test_no_more_memory_than_nn_lstm(exchange, batch, packed):
    ours, theirs = pair(512, 512, torch.bfloat16)
    x = torch.randn(256, batch, 512, device="cuda", dtype=torch.bfloat16)
    lengths = torch.randint(1, 257, (batch,)) if packed else None
    peaks = []
    for module in (ours, theirs):
        results(module, x, lengths)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        results(module, x, lengths)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
    assert peaks[0] <= peaks[1]  # of what was asked for: a block from torch's cache may be 1 MiB larger


def test_what_does_not_fit_goes_to_torch_and_says_so():
    module = lstm_fast.LSTM(8, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, 2, 8, device="cuda", dtype=torch.bfloat16)
    told = lstm_fast.explain(module, x)
    assert told.startswith("torch: persistent: this GPU does not hold") and "4096 hidden units" in told
    assert module(x)[0].shape == (3, 2, 4096)
    small = lstm_fast.LSTM(8, 64, device="cuda", dtype=torch.bfloat16)
    assert lstm_fast.explain(small, x).startswith("persistent: the whole recurrence in one launch")
