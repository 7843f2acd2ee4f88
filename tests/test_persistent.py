"""The persistent kernels' own source on the host, forward and backward, against nn.LSTM in fp64."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

from lstm_fast import _C, autograd
from lstm_fast.autograd import layer
from lstm_fast.kernels import LayerInputs, persistent
from tests.persistent_case import Case, error, granted, precision
from tests.quick_case import needs_exchange_api

KINDS = ["bf16", "fp16", "tf32", "fp32"]
# nn.LSTM on a CPU has no TF32 to compare with: its 11 bits of operands, summed.
TF32_ERROR = 2.0**-10
NUMBERS = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}


@pytest.fixture(params=["clusters", "grid"])
def exchange(request):
    """How blocks exchange h: in clusters, or over a grid on a card that grants none."""
    with granted({2: 66, 4: 32, 8: 16, 16: 7}) if request.param == "clusters" else granted({}, grid=132):
        yield request.param


@pytest.fixture(params=["clusters", "grid"])
def crowded(request):
    """The same with blocks for one cluster, which all sequences share."""
    with granted({4: 1}) if request.param == "clusters" else granted({}, grid=2):
        yield


def check(case: Case, found: dict[str, torch.Tensor]) -> None:
    """At most twice the error of nn.LSTM in the same dtype, against nn.LSTM in fp64; everything written."""
    exact = case.exact()
    rival = None if case.kind == "tf32" else case.exact(case.x.dtype)
    for name, value in case.comparable(found).items():
        assert value.isfinite().all(), f"{name} has elements that nothing wrote"
        slack = torch.finfo(case.x.dtype).eps
        allowed = TF32_ERROR if rival is None else 2 * error(rival[name], exact[name]) + slack
        assert error(value, exact[name]) <= allowed, name


def uneven(batch: int, longest: int) -> list[int]:
    """Lengths from ``longest`` down to 1."""
    return [max(1, longest - b * longest // batch) for b in range(batch)]


@pytest.mark.parametrize(
    ("hidden", "batch"), [(1, 1), (1, 17), (7, 3), (7, 17), (33, 1), (33, 17), (64, 3), (64, 17), (100, 1), (100, 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_sizes(exchange, kind, hidden, batch):
    for directions, lengths in ((1, [5] * batch), (2, uneven(batch, 6))):
        case = Case(kind, hidden, lengths, directions)
        for backward in (False, True):
            plan = persistent._plan(NUMBERS[kind], backward, hidden, batch, directions, None)
            assert plan.grid == (exchange == "grid")
        check(case, case.both())


@pytest.mark.parametrize("clusters, grid", [({2: 2, 4: 2}, 0), ({}, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_of_several_tiles(kind, clusters, grid):
    """41 sequences, dense and packed: clusters take turns with their tiles, the shorter ones drop out."""
    with granted(clusters, grid):
        for directions, lengths in ((1, [4] * 41), (2, uneven(41, 6))):
            case = Case(kind, 40, lengths, directions)
            for backward in (False, True):
                plan = persistent._plan(NUMBERS[kind], backward, 40, 41, directions, None)
                assert plan.tiles >= 2, "tiles of a cluster"
            check(case, case.both())


@pytest.mark.parametrize(
    "kind, hidden, cluster, groups",
    [
        ("bf16", 512, 16, 4),  # all weights in registers
        ("fp16", 768, 16, 6),  # half of them in shared memory
        ("bf16", 512, 8, 8),  # where clusters of 16 aren't granted
        ("bf16", 300, 8, 5),  # an odd number of groups
        ("tf32", 512, 16, 4),
        ("fp32", 512, 16, 4),
        ("tf32", 384, 8, 6),
        ("fp32", 272, 16, 3),
        ("bf16", 48, 2, 3),
    ],
)
@pytest.mark.parametrize("batch", [3, 8])
def test_every_layout_of_the_weights(kind, hidden, cluster, groups, batch):
    with granted({cluster: 1}):
        case = Case(kind, hidden, [2] * batch)
        for backward in (False, True):
            plan = persistent._plan(NUMBERS[kind], backward, hidden, batch, 1, None)
            assert (plan.groups, plan.columns) == (groups, batch)
        check(case, case.both())


@pytest.mark.parametrize("columns", range(1, 9))
@pytest.mark.parametrize("hidden", [10, 40, 64])  # of a block 8 units, 24 and 32, in clusters
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_fewer_columns_than_a_product_has(exchange, kind, hidden, columns):
    """Threads without a cell, warps with some or without any; in one tile, and where there are two in each of two."""
    blocks = 1 if hidden == 10 else 2
    for batch, tiles in ((columns, 1), (2 * columns, 2)):
        if tiles == 2 and columns <= 4:  # one tile would hold them
            continue
        with granted({2: 1}) if exchange == "clusters" else granted({}, blocks):
            case = Case(kind, hidden, uneven(batch, 4))
            for backward in (False, True):
                plan = persistent._plan(NUMBERS[kind], backward, hidden, batch, 1, None)
                assert (plan.tiles, plan.columns) == (tiles, columns)
            check(case, case.both())


@pytest.mark.parametrize(
    "kind, hidden, blocks, forward, backward",  # G, splits and C of each walk
    [
        ("bf16", 512, 16, (4, 2, 16), (4, 2, 16)),  # all weights in registers
        ("fp16", 1024, 34, (4, 2, 32), (4, 2, 32)),  # half of them in shared memory
        ("bf16", 1024, 66, (2, 4, 64), (4, 2, 32)),
        ("tf32", 1024, 130, (1, 8, 128), (1, 2, 128)),
        ("tf32", 768, 96, (1, 8, 96), (3, 2, 32)),
        ("fp32", 768, 66, (2, 4, 48), (3, 2, 32)),
        ("fp32", 300, 25, (2, 2, 19), (2, 2, 19)),  # the last block has one unit of 12
    ],
)
def test_every_layout_of_a_grid(kind, hidden, blocks, forward, backward):
    with granted({}, blocks):
        case = Case(kind, hidden, [2] * 3)
        plans = [persistent._plan(NUMBERS[kind], walk, hidden, 3, 1, None) for walk in (False, True)]
        assert [(plan.groups, plan.splits, plan.cluster) for plan in plans] == [forward, backward]
        check(case, case.both())


@pytest.mark.parametrize("hidden, batch", [(512, 16), (512, 64), (768, 16), (1024, 16), (1024, 64)])
def test_the_docs_tell_the_plans_of_an_h200(hidden, batch):
    told = (Path(__file__).parents[1] / "docs" / "persistent.md").read_text()
    with granted({2: 66, 4: 30, 8: 15, 16: 7}, grid=132):  # benchmarks/results/gpu-nvidia-h200.json
        forward, backward = (persistent._plan(0, back, hidden, batch, 1, None) for back in (False, True))
    wanted = {(768, 16): [forward], (1024, 64): [backward]}.get((hidden, batch), [forward, backward])
    assert all(f"{plan.clocks:,}" in told for plan in wanted), wanted
    if (hidden, batch) == (512, 16):
        assert "six tiles of 3" in told and {(plan.tiles, plan.columns, plan.clusters) for plan in wanted} == {
            (1, 3, 6)
        }


def weights_of(case: Case) -> list:
    return [(*direction, None) for direction in case.theirs.all_weights]


@needs_exchange_api
@pytest.mark.parametrize("directions", [1, 2])
def test_states_that_nobody_gave_are_zeros(directions, monkeypatch):
    """Of a layer as modules call it, with its gradients; on the host, where no module would. None are made."""
    monkeypatch.delattr(autograd, "_zero_states")
    case = Case("bf16", 12, [3, 3], directions)
    x, zeros = case.x.view(3, 2, 12).requires_grad_(), torch.zeros(directions, 2, 12, dtype=torch.bfloat16)
    found = []
    for h0, c0 in ((12, 12), (zeros, zeros)):
        outputs = layer(x, h0, c0, weights_of(case), None, "persistent")
        grads = torch.autograd.grad([t.sum() for t in outputs], [x, *case.theirs.parameters()])
        found.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_that_states_would_not_fit_are_refused_without_states_too():
    case = Case("bf16", 12, [3, 3])
    x, weights = case.x.view(3, 2, 12), weights_of(case)
    with pytest.raises(RuntimeError, match="weight_ih of direction 1 of 2 should be given, got None"):
        layer(x, 12, 12, [*weights, (None,) * 5], None, "persistent")
    with pytest.raises(RuntimeError, match=r"weight_ih should have size \[52, 12\], got \[48, 12\]"):
        layer(x, 13, 13, weights, None, "persistent")
    empty = layer(case.x.new_empty(3, 0, 12), 12, 12, weights, None, "persistent")
    assert [t.shape for t in empty] == [(3, 0, 12), (1, 0, 12), (1, 0, 12)]


@pytest.mark.parametrize("directions", [1, 2])
def test_a_compiler_is_told_the_size_of_what_is_saved(directions):
    case = Case("bf16", 5, [2] * 3, directions)
    absent = [None] * (13 - 3 - 5 * directions)
    weights = [t for direction in weights_of(case) for t in direction]
    inputs = (case.x, case.h0, case.c0, *weights, *absent)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs]
        *_, gates, _ = torch.ops.lstm_fast.layer(*fakes, None, "persistent", True)
    assert gates.shape == case.forward()["gates"].shape


def test_directions_that_a_grid_holds_only_one_at_a_time():
    with granted({}, 3):
        case = Case("bf16", 40, uneven(19, 5), 2)
        plans = [persistent._plan(0, backward, 40, 19, 2, None) for backward in (False, True)]
        assert all(plan.directions == 1 for plan in plans), plans
        check(case, case.both())


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_walk(crowded, kind):
    case = Case(kind, 16, [200, 199, 7])
    check(case, case.both())


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates(crowded, kind):
    """Inputs of up to +-150: gates reach 0 and 1, and nothing overflows."""
    case = Case(kind, 24, [6] * 3, scale=200.0)
    found = case.both()
    assert all(t.isfinite().all() for t in found.values())
    check(case, found)


def test_nan_stays_in_its_sequence(crowded):
    assert persistent._plan(0, False, 40, 11, 1, None).columns == 6
    case = Case("bf16", 40, [4] * 11)
    clean = case.both()
    case.gates[3] = float("nan")  # step 0 of sequence 3
    y = case.forward()["y"].view(4, 11, 40)
    assert y[:, 3].isnan().all()
    others = [b for b in range(11) if b != 3]
    assert torch.equal(y[:, others], clean["y"].view(4, 11, 40)[:, others])


def test_inference_saves_nothing_and_gives_the_same(exchange):
    case = Case("bf16", 40, uneven(9, 5), 2)
    saved, bare = case.forward(), case.forward(save=False)
    assert all(torch.equal(saved[name], bare[name]) for name in ("y", "h_n", "c_n"))
    assert torch.equal(bare["gates"], case.gates)
    assert not torch.equal(saved["gates"], case.gates)


def test_no_gradient_of_y_is_a_gradient_of_zero(exchange):
    case = Case("fp32", 20, uneven(9, 5), 2)
    saved = case.forward()
    found = case.backward(saved, dy=False)
    case.dy.zero_()
    wanted = case.backward(saved)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    "kind, hidden, directions, clusters, grid",
    [
        ("bf16", 40, 2, {4: 2}, 0),
        ("tf32", 24, 1, {2: 2}, 0),
        ("fp32", 40, 1, {8: 1}, 0),
        ("fp16", 64, 1, {8: 16}, 0),
        ("bf16", 64, 1, {2: 7}, 0),  # tiles of 4 columns: cells for 4 of 8 warps
        ("bf16", 64, 1, {2: 1}, 0),  # three tiles of 8 in turns
        ("bf16", 40, 2, {}, 20),
        ("fp32", 24, 1, {}, 3),
        ("fp16", 64, 2, {}, 4),
        ("bf16", 64, 1, {}, 14),
    ],
)
def test_the_same_bits_under_every_schedule(kind, hidden, directions, clusters, grid):
    """Whoever runs ahead and whenever messages land: no result depends on it, and nobody waits for ever."""
    with granted(clusters, grid):
        case = Case(kind, hidden, uneven(24, 5), directions)
        wanted = case.both()
        for schedule in range(1, 25):
            found = case.both(schedule)
            for name, value in wanted.items():
                assert torch.equal(value, found[name]), f"{name} differs under schedule {schedule}"


def test_inputs_are_only_read(exchange):
    case = Case("fp16", 33, uneven(9, 4), 2)
    inputs = {"h0": case.h0, "c0": case.c0, "dy": case.dy, "w": case.w_hh[0], "w_reverse": case.w_hh[1]}
    before = {name: t.clone() for name, t in inputs.items()}
    saved = case.forward()
    kept = {name: t.clone() for name, t in saved.items()}
    case.backward(saved)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_what_it_refuses_and_why():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert "not on cpu" in persistent.refuses(cpu, torch.float32, 8)
    assert "not float64" in persistent.refuses(gpu, torch.float64, 8)


@pytest.fixture
def gpu(monkeypatch):
    """A card of compute capability 9.0 to ask about; none to run on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    host = persistent._granted
    monkeypatch.setattr(
        persistent, "_granted", lambda kind, backward, device, *asked: host(kind, backward, None, *asked)
    )
    persistent._plan.cache_clear()
    yield torch.device("cuda", 0)
    persistent._plan.cache_clear()


def test_hidden_sizes_that_a_card_does_not_hold(monkeypatch, gpu):
    assert persistent.refuses(gpu, torch.bfloat16, 1024) is None
    assert persistent.refuses(gpu, torch.bfloat16, 2100) == (
        "this GPU does not hold the 8400 x 2100 weights of 2100 hidden units on chip"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0, and the GPU has 7.5" in persistent.refuses(gpu, torch.bfloat16, 64)


def test_a_card_without_clusters_serves_over_the_grid(gpu):
    with persistent.over_the_grid():
        assert persistent.refuses(gpu, torch.float32, 256) is None
        assert persistent._plan(0, False, 256, 1, 1, 0).grid == 1
    assert persistent._plan(0, False, 256, 1, 1, 0).grid == 0


def test_plans_of_many_batches_ask_a_card_each_thing_once(monkeypatch):
    asked = []

    def granted(**what):
        asked.append(tuple(what.values()))
        return persistent._granted(0, False, None, *asked[-1][3:])

    monkeypatch.setattr(persistent._C, "persistent_granted", granted)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    persistent._granted_by_driver.cache_clear()
    plans = [persistent._plan.__wrapped__(0, False, 512, batch, 1, 0) for batch in range(1, 65)]
    persistent._granted_by_driver.cache_clear()
    assert len({plan[:5] for plan in plans}) > 5
    assert 5 < len(asked) == len(set(asked))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_whose_arithmetic_outweighs_the_launches_are_left_to_torch(gpu, dtype):
    for hidden in (256, 512, 1024):
        assert persistent.outweighed(gpu, dtype, hidden, 16, plain=True) is None
        why_not = persistent.outweighed(gpu, dtype, hidden, 20000, plain=True)
        assert f"a step of 20000 x {hidden} units is expected to take" in why_not


@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
@pytest.mark.parametrize("lengths", [[3, 3], [1, 1], [5, 3, 3, 1]], ids=["dense", "one step", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_whole_layer(exchange, directions, lengths, states):
    """All gradients, of states that are given or of none, which stand for zeros, against nn.LSTM in fp64."""
    case = Case("fp32", 24, lengths, directions)
    batch_sizes = torch.tensor(case.steps)
    weights = [(*(w.detach() for w in direction), None) for direction in case.theirs.all_weights]
    inputs = LayerInputs(case.x, *((case.h0, case.c0) if states else (None, None)), weights, case.steps)
    needs = [True, states, states] + [True] * 4 + [False] + [True] * 4 + [False]
    grads = (case.dy, None, case.dc_n)
    with precision("fp32"):
        y, h_n, c_n, saved = persistent.layer_forward(inputs, True)
        found = persistent.layer_backward(inputs, y, saved, grads, needs)

    twin = copy.deepcopy(case.theirs).double()
    leaves = [case.x.double().requires_grad_(), *(t.double().requires_grad_() for t in (case.h0, case.c0))]
    hx = (leaves[1], leaves[2]) if states else None
    packed, (h, c) = twin(PackedSequence(leaves[0], batch_sizes), hx)
    wanted = leaves[: 3 if states else 1] + [w for direction in twin.all_weights for w in direction]
    exact = torch.autograd.grad([packed.data, c], wanted, [case.dy.double(), case.dc_n.double()])
    assert all(t is None for t, need in zip(found, needs, strict=False) if not need)
    results = [y, h_n, c_n, *(t for t in found if t is not None)]
    for value, right in zip(results, [packed.data, h, c, *exact], strict=True):
        assert (value.double() - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("hidden", [40, 100, 250])
def test_an_infinite_state_saturates_gates(exchange, kind, hidden):
    """No zero that stands for a unit past H, nor for what a warp has no weights for, is multiplied by it, and of fp32's
    three products only one."""
    case = Case(kind, hidden, [3, 2])
    case.h0[0, 0, hidden - 1] = float("inf")
    exact, found = case.exact(), case.forward(save=False)
    allowed = {"tf32": 2.0**-11, "fp32": 2.0**-20}.get(kind, torch.finfo(case.x.dtype).eps / 2)
    for name in ("y", "h_n", "c_n"):
        assert exact[name].isfinite().all() and error(found[name], exact[name]) <= allowed, name


def test_fp16_goes_to_torch_where_its_own_persistent_kernel_is_expected_to_be_faster(gpu):
    for hidden in (256, 512):
        assert persistent.outweighed(gpu, torch.float16, hidden, 16, plain=True) is None
    assert "a step of 16 x 1024 units" in persistent.outweighed(gpu, torch.float16, 1024, 16, plain=True)
    for what in ({"hidden": 1024, "batch": 12}, {"hidden": 960, "batch": 16}, {"hidden": 1024, "batch": 16}):
        plain = what != {"hidden": 1024, "batch": 16}  # cuDNN's kernel takes neither
        assert persistent.outweighed(gpu, torch.float16, **what, plain=plain) is None
    assert persistent.outweighed(gpu, torch.bfloat16, 1024, 16, plain=True) is None


def test_clusters_that_would_share_multiprocessors_are_no_bargain():
    """Of 16 blocks as many run at once as of 8, but only half of them on multiprocessors of their own."""

    def planned(shared_by: int) -> int:
        def granted(grid: bool, cluster: int, threads: int, shared: int) -> int:
            alone = {8: 16, 16: 8}.get(cluster, 0)
            return 0 if grid else alone * (1 if shared > 100_000 else shared_by)

        found = _C.persistent_plan(kind=0, backward=False, hidden=256, batch=128, directions=1, granted=granted)
        assert found is not None
        return found[0]

    assert planned(1) == planned(2) == 8


def test_batches_that_no_plan_holds_are_left_to_torch(gpu):
    assert persistent.crowded(gpu, torch.bfloat16, 1024, 20000) is None
    why_not = persistent.crowded(gpu, torch.bfloat16, 1856, 65536)
    assert why_not == "this GPU does not hold 65536 sequences of 1856 hidden units on chip"


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize("grid", [False, True])
def test_what_is_no_answer_of_a_card_is_an_error(grid):
    """Else a card that is lost would seem to hold no weights, and what runs there be skipped."""
    if not (grid or _C.build_info()["clusters"]):
        pytest.skip("built without clusters")
    with pytest.raises(RuntimeError, match="asking what the GPU can hold: "):
        _C.persistent_granted(kind=0, backward=False, device=99, grid=grid, cluster=8, threads=128, shared=1024)
