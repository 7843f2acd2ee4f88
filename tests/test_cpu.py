"""The C++ recurrence on a CPU in each instruction set this one runs, and on any number of threads."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lstm_fast import _C, LSTM
from lstm_fast.environment import cpuinfo
from lstm_fast.kernels import LayerInputs, cpu
from tests.cpu_case import SLOW_PAIRS, instruction_set, limit_to  # noqa: F401, a fixture

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
@pytest.mark.parametrize("inputs", [5, 6])
@pytest.mark.parametrize(
    ("hidden", "batch", "proj"),
    [
        *((1, 1, 0), (24, 9, 0), (33, 7, 0), (100, 17, 0), (257, 6, 0), (384, 90, 0), (256, 1, 0), (2, 1, 1)),
        *((33, 7, 5), (100, 17, 70)),
        *((160, 26, 0), (128, 41, 0), (128, 41, 32)),  # of the sizes that AMX takes in planes
    ],
)
@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_agrees_with_torch(
    dtype: torch.dtype, hidden: int, batch: int, proj: int, inputs: int, steps: int | None = None
) -> None:
    """One with weights that no second cache holds, and so wide a batch that x, where it is even, joins h.

    One of more steps than are few, of single rows that read W_hh as it lies.
    """
    torch.manual_seed(0)
    ours = LSTM(inputs, hidden, bidirectional=True, proj_size=proj, dtype=dtype, backend="cpu")
    oracle = nn.LSTM(inputs, hidden, bidirectional=True, proj_size=proj, dtype=torch.float64)
    oracle.load_state_dict(ours.state_dict())
    steps, features = steps or (6 if batch > 1 else 12), proj or hidden
    shapes = [(steps, batch, inputs), (2, batch, features), (2, batch, hidden)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    weights = [torch.randn(shape, dtype=dtype) for shape in [(steps, batch, 2 * features), *shapes[1:]]]
    got = outputs_and_gradients(ours, tensors, weights)
    want = outputs_and_gradients(oracle, [t.double() for t in tensors], [t.double() for t in weights])
    for ours_, exact in zip(got, want, strict=True):
        error = (ours_.double() - exact).abs().max() / exact.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("hidden", "inputs", "proj"),
    [(128, 64, 0), (128, 64, 32), (256, 256, 0), (352, 384, 0)],
    ids=["weights stay", "projected", "wide batch", "tile too large to join"],
)
@pytest.mark.usefixtures("instruction_set")
def test_wide_batches_agree_with_torch_in_planes(dtype: torch.dtype, hidden: int, inputs: int, proj: int) -> None:
    """Inputs of whole steps of 32, which in AMX as well are multiplied together with h, or for themselves."""
    test_every_instruction_set_agrees_with_torch(dtype, hidden, 70, proj, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("hidden", "batch", "inputs", "proj", "steps"),
    [(160, 64, 200, 0, 1), (160, 64, 192, 64, 1), (384, 20, 128, 0, 1), (384, 60, 100, 0, 1), (384, 7, 400, 0, 5)],
    ids=["by pieces", "projected", "large weights", "of many rows", "of several steps"],
)
@pytest.mark.usefixtures("instruction_set")
def test_weights_packed_by_pieces_agree_with_torch(
    dtype: torch.dtype, hidden: int, batch: int, inputs: int, proj: int, steps: int
) -> None:
    """Of more rows than a sum takes in one go, in calls whose tiles are each needed once, or whose dW are large."""
    test_every_instruction_set_agrees_with_torch(dtype, hidden, batch, proj, inputs, steps)


def layer(
    steps: list[int], directions: int, hidden: int, proj: int, dtype: torch.dtype, offset: int = 0, inputs: int = 70
) -> list[Tensor]:
    """Everything that both calls write, from seeded inputs, which begin ``offset`` elements into their memory."""
    torch.manual_seed(1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows, batch, features = sum(steps), steps[0], proj or hidden

    def placed(tensor: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        memory = torch.empty(offset + tensor.numel(), dtype=dtype)
        return memory[offset:].view(tensor.shape).copy_(tensor)

    x = placed(torch.randn(rows, inputs))
    h0, c0 = (placed(torch.randn(directions, batch, size)) for size in (features, hidden))
    shapes = ((4 * hidden, inputs), (4 * hidden, features), (4 * hidden,), (4 * hidden,), (proj, hidden))
    weights: list[Any] = [
        [placed(torch.randn(s) / hidden**0.5) if s[0] > 0 else None for s in shapes] for _ in range(directions)
    ]
    layer_inputs = LayerInputs(x, h0, c0, weights, steps)
    y, h_n, c_n, saved = cpu.layer_forward(layer_inputs, True)
    assert saved is not None
    y, saved = placed(y), (placed(saved[0]), placed(saved[1], acc))
    dy = placed(torch.randn(rows, directions * features))
    dh_n, dc_n = (placed(torch.randn(directions, batch, size)) for size in (features, hidden))
    gradients = cpu.layer_backward(layer_inputs, y, saved, (dy, dh_n, dc_n), [True] * (3 + 5 * directions))
    return [t for t in (y, h_n, c_n, *saved, *gradients) if t is not None]


@pytest.mark.parametrize(
    ("dtype", "directions", "proj"),
    [
        *((torch.float32, 1, 0), (torch.float32, 2, 0), (torch.float32, 2, 70), (torch.bfloat16, 1, 70)),
        *((torch.bfloat16, 2, 0), (torch.float64, 2, 70), (torch.float16, 2, 0)),
    ],
)
@pytest.mark.parametrize(
    ("hidden", "steps"),
    [
        *((450, [1] * 12), (450, [3] * 6), (450, [17, 16, 9, 9, 2, 1]), (450, [40]), (100, [40] * 6)),
        *((130, [1] * 16), (175, [13] * 40 + [7] * 20)),
    ],
    ids=["one sequence", "three", "packed", "one step", "many", "one of small weights", "several chunks"],
)
@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_any_number_of_threads_gives_the_same_bits(
    hidden: int, steps: list[int], directions: int, proj: int, dtype: torch.dtype, inputs: int = 70
) -> None:
    """Large enough for three threads, which share hidden units where there are many, and rows in the last two.

    The last one goes by several chunks of steps, in which rows of other threads lie elsewhere.
    """
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(layer(steps, directions, hidden, proj, dtype, inputs=inputs))
    assert all(bool(t.isfinite().all()) for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("proj", [0, 64])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("steps", [[40] * 6, [150], [33] * 20 + [8] * 5 + [1]], ids=["dense", "one step", "packed"])
@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_any_number_of_threads_gives_the_same_bits_in_planes(steps: list[int], directions: int, proj: int) -> None:
    """Of sizes whose floats AMX takes in planes of bf16."""
    test_any_number_of_threads_gives_the_same_bits(160, steps, directions, proj, torch.float32)


@pytest.mark.parametrize("proj", [0, 52])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("hidden", "steps"),
    [(200, [4] * 70), (220, [11] * 26), (220, [20] * 10 + [7] * 10 + [1] * 20)],
    ids=["units shared", "rows shared", "packed"],
)
@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_any_number_of_threads_gives_the_same_bits_in_planes_over_all_steps(
    hidden: int, steps: list[int], directions: int, proj: int
) -> None:
    """Of too few rows a step for planes, which AMX takes in the products over all steps alone."""
    test_any_number_of_threads_gives_the_same_bits(hidden, steps, directions, proj, torch.float32, 136)


@pytest.mark.parametrize("steps", [[90] * 3, [1] * 20, [1]], ids=["many rows", "one sequence", "one row"])
@pytest.mark.parametrize("proj", [0, 256])
@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_any_number_of_threads_gives_the_same_bits_of_large_weights(steps: list[int], proj: int) -> None:
    """Gradients of many rows don't stay in the second cache and are taken by pieces; one row reads W_hh as it lies."""
    test_any_number_of_threads_gives_the_same_bits(384, steps, 1, proj, torch.float32)


@pytest.mark.parametrize("value", [float("inf"), 3.4e38], ids=["infinity", "what bf16 rounds to infinity"])
@pytest.mark.parametrize("where", ["x", "h0", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize(("steps", "batch", "inputs"), [(9, 16, 32), (40, 4, 128)], ids=["many rows a step", "few"])
@pytest.mark.usefixtures("instruction_set")
def test_infinity_is_no_nan(steps: int, batch: int, inputs: int, where: str, value: float) -> None:
    """What saturates gates does so in each instruction set, and gradients are finite where those of nn.LSTM are."""
    torch.manual_seed(0)
    ours, oracle = LSTM(inputs, 192, backend="cpu"), nn.LSTM(inputs, 192).double()
    states = {name: torch.randn(1, batch, 192) for name in ("h0", "c0")}
    tensors = {"x": torch.randn(steps, batch, inputs), **states}
    with torch.no_grad():
        {**tensors, **dict(ours.named_parameters())}[where].view(-1)[5] = value
    oracle.load_state_dict(ours.state_dict())
    weights = [torch.randn(steps, batch, 192), torch.randn(1, batch, 192), torch.randn(1, batch, 192)]
    got = outputs_and_gradients(ours, list(tensors.values()), weights)
    want = outputs_and_gradients(oracle, [t.double() for t in tensors.values()], [t.double() for t in weights])
    for a, exact in zip(got, want, strict=True):
        finite = exact.abs() < 3e38
        assert torch.equal(a.isfinite(), finite)
        assert (a.double() - exact)[finite].norm() <= 1e-4 * exact[finite].norm()


@pytest.mark.usefixtures("instruction_set")
def test_nan_stays_in_its_sequence_among_many() -> None:
    torch.manual_seed(0)
    ours = LSTM(40, 64, backend="cpu")
    x = torch.randn(9, 20, 40)
    with torch.no_grad():
        before = ours(x)[0]
        x[2, 3, 0] = float("nan")
        after = ours(x)[0]
    assert after[2:, 3].isnan().all()
    after[2:, 3] = before[2:, 3]
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [[2] * 2, [13] * 4], ids=["weights as they lie", "packed weights"])
@pytest.mark.parametrize(("hidden", "proj"), [(66, 0), (33, 5)])
@pytest.mark.usefixtures("instruction_set")
def test_tensors_may_begin_anywhere(hidden: int, proj: int, steps: list[int], dtype: torch.dtype) -> None:
    """At elements that no vector, and no pair of 16-bit values, is aligned to."""
    aligned, odd = (layer(steps, 2, hidden, proj, dtype, offset) for offset in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(aligned, odd, strict=True))


@pytest.mark.parametrize("directions", [1, 2])
def test_backward_without_dy_is_backward_with_zeros(directions: int) -> None:
    torch.manual_seed(2)
    ours = LSTM(6, 20, bidirectional=directions == 2, backend="cpu")
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 3, 6), [3, 2, 2])
    y, (h_n, c_n) = ours(x)
    loss = h_n.sin().sum() + c_n.sum()
    without = torch.autograd.grad(loss, ours.parameters(), retain_graph=True)
    zeros = torch.autograd.grad(loss + 0 * y.data.sum(), ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))
    assert any(bool(g.any()) for g in without)


@pytest.mark.parametrize("needed", range(7))
def test_each_gradient_alone_is_what_it_is_with_the_others(needed: int) -> None:
    """Nothing that is not asked for is computed, and nothing else changes."""
    torch.manual_seed(0)
    ours = LSTM(6, 20, backend="cpu")
    tensors = [torch.randn(5, 3, 6), torch.randn(1, 3, 20), torch.randn(1, 3, 20), *ours.parameters()]
    everything = []
    for wanted in (range(7), [needed]):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index in wanted)
        y, (h_n, c_n) = ours(tensors[0], (tensors[1], tensors[2]))
        loss = y.sin().sum() + h_n.sum() + c_n.sum()
        everything.append(torch.autograd.grad(loss, [tensors[i] for i in wanted]))
    assert torch.equal(everything[0][needed], everything[1][0])


@pytest.mark.parametrize(
    ("hidden", "inputs", "lengths"),
    [
        *((130, 7, [400] * 6), (130, 7, [400, 330, 330, 12, 2, 1]), (128, 7, [50] * 25)),
        *((128, 7, [80] * 27 + [40, 3]), (100, 7, [40] * 33)),
        *((200, 136, [150] * 4), (192, 128, [200, 180, 130, 60, 20, 2])),
    ],
    ids=["dense", "packed", "planes", "planes, packed", "padded planes", "planes over steps", "the same, packed"],
)
@pytest.mark.parametrize(
    ("dtype", "directions", "projected"),
    [
        *((torch.float32, 1, False), (torch.float32, 2, False), (torch.float32, 2, True)),
        *((torch.bfloat16, 2, False), (torch.bfloat16, 1, True)),
    ],
)
def test_many_chunks_of_steps_are_one_walk(
    dtype: torch.dtype,
    projected: bool,
    directions: int,
    hidden: int,
    inputs: int,
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long enough that both walks go by chunks, against nn.LSTM in fp64; errors stay within twice those of nn.LSTM."""
    torch.manual_seed(0)
    proj, steps, batch = (hidden // 2 + hidden % 32 // 2) * projected, max(lengths), len(lengths)
    sizes: dict[str, Any] = {
        "input_size": inputs,
        "hidden_size": hidden,
        "bidirectional": directions == 2,
        "proj_size": proj,
    }
    ours, theirs, oracle = (make(**sizes).to(dtype) for make in (LSTM, nn.LSTM, nn.LSTM))
    ours.backend = "cpu"
    theirs.load_state_dict(ours.state_dict())
    oracle.double().load_state_dict(ours.state_dict())
    data = torch.randn(steps, batch, inputs).to(dtype)
    dy = torch.randn(sum(lengths), directions * (proj or hidden)).to(dtype)

    def results(module: nn.Module, dtype: torch.dtype = dtype) -> list[Tensor]:
        x = nn.utils.rnn.pack_padded_sequence(data.to(dtype).requires_grad_(), lengths)
        y, (h_n, c_n) = module(x)
        loss = (y.data * dy).sum() + h_n.sum() + c_n.sum()
        return [y.data, h_n, c_n, *torch.autograd.grad(loss, [x.data, *module.parameters()])]

    right, others = results(oracle, torch.float64), results(theirs)
    for name in _C.CPU_INSTRUCTION_SETS:
        with monkeypatch.context() as patch:
            limit_to(name, patch)
            got = results(ours)
        for a, b, exact in zip(got, others, right, strict=True):
            mine, allowed = ((t.double() - exact).norm() / exact.norm() for t in (a, b))
            assert mine <= 2 * allowed, name


def test_intels_pairs_are_slow_and_others_are_fast() -> None:
    if "avx512_bf16" not in cpuinfo():
        pytest.skip("this processor has no pairs of bf16")
    assert (SLOW_PAIRS in _C.CPU_INSTRUCTION_SETS) == ("GenuineIntel" in cpuinfo())


@pytest.mark.skipif(
    SLOW_PAIRS not in _C.CPU_INSTRUCTION_SETS, reason="this processor's pairs of bf16 are fast, or none"
)
@pytest.mark.parametrize(
    ("hidden", "steps", "batch", "taken"),
    [
        *((64, 30, 1, "avx512_bf16"), (64, 30, 2, "avx512"), (64, 12, 2, "avx512_bf16")),
        *((300, 9, 3, "avx512_bf16"), (300, 9, 4, "avx512"), (520, 5, 5, "avx512_bf16"), (520, 5, 6, "avx512")),
    ],
)
def test_pairs_that_are_slow_become_floats_in_calls_of_many_rows(
    hidden: int, steps: int, batch: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of bf16 are those of the one or the other, which differ: products in pairs have sums of their own."""
    torch.manual_seed(0)
    layer = LSTM(40, hidden, dtype=torch.bfloat16, backend="cpu")
    x = torch.randn(steps, batch, 40, dtype=torch.bfloat16)

    def results(name: str) -> list[Tensor]:
        with monkeypatch.context() as patch:
            limit_to(name, patch)
            y = layer(x)[0]
            return [y, *torch.autograd.grad(y.sum(), layer.parameters())]

    got, others = results(SLOW_PAIRS), {name: results(name) for name in ("avx512", "avx512_bf16")}
    same = {name: all(a.equal(b) for a, b in zip(got, each, strict=True)) for name, each in others.items()}
    assert same == {name: name == taken for name in others}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [35, 64, 100])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("proj", [0, 33])
@pytest.mark.usefixtures("instruction_set")
def test_few_rows_read_weights_as_they_lie(
    proj: int, rows: int, hidden: int, dtype: torch.dtype, inputs: int = 70, steps: int = 1
) -> None:
    """On both sides of the number of rows from which on weights are packed."""
    torch.manual_seed(0)
    ours, oracle = LSTM(inputs, hidden, proj_size=proj, dtype=dtype), nn.LSTM(inputs, hidden, proj_size=proj).double()
    oracle.load_state_dict(ours.state_dict())
    features = proj or hidden
    x = torch.randn(steps, rows, inputs, dtype=dtype)
    h, c = (torch.randn(1, rows, size, dtype=dtype) for size in (features, hidden))
    weights = [torch.randn(t, rows, size, dtype=dtype) for t, size in ((steps, features), (1, features), (1, hidden))]
    got = outputs_and_gradients(ours, [x, h, c], weights)
    want = outputs_and_gradients(oracle, [t.double() for t in (x, h, c)], [t.double() for t in weights])
    for a, exact in zip(got, want, strict=True):
        assert (a.double() - exact).abs().max() / exact.abs().max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [200, 250])
@pytest.mark.parametrize("rows", [3, 4, 6, 8, 9])
@pytest.mark.parametrize("proj", [0, 195])
@pytest.mark.usefixtures("instruction_set")
def test_few_rows_of_large_weights_take_turns(proj: int, rows: int, hidden: int, dtype: torch.dtype) -> None:
    """9 to 27 rows over three steps: up to 24 read weights as they lie, in blocks of 4 and what is left."""
    test_few_rows_read_weights_as_they_lie(proj, rows, hidden, dtype, inputs=210, steps=3)


def test_calls_side_by_side_have_their_own_memory() -> None:
    """Threads of Python run the C++ calls at the same time, each in a block of its own."""
    torch.manual_seed(0)
    modules = [LSTM(40, hidden, backend="cpu") for hidden in (30, 60, 90, 120)]
    x = torch.randn(50, 4, 40)

    def run(module: LSTM) -> Tensor:
        with torch.no_grad():
            result: Tensor = module(x)[0]
        return result

    alone = [run(module) for module in modules]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, modules * 50))
    assert all(torch.equal(a, b) for a, b in zip(alone * 50, together, strict=True))


def advised(address: int) -> bool:
    """Whether huge pages were asked for where ``address`` lies (proc(5), VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


def test_large_results_lie_in_huge_pages_where_the_second_cache_holds_one() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists() or shutil.which("getconf") is None:
        pytest.skip("this system has no huge pages to ask for, or doesn't tell the size of caches")
    told = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], capture_output=True, text=True).stdout.strip()
    page = 2 << 20
    with torch.no_grad():
        y, _ = LSTM(8, 256, backend="cpu")(torch.zeros(20, 2048, 8))  # 40 MiB, of which malloc keeps none
    assert advised((y.data_ptr() + page - 1) // page * page) == (told.isdigit() and int(told) >= page)
