"""Input forms, errors, dropout, dtypes, autocast and numerics: what torch.nn.LSTM does on any of its paths."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lstm_fast

F64 = {"dtype": torch.float64}
BACKENDS = ["reference", "cpu"]
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pair(*args, backend="auto", **config):
    """torch's module and ours with the same weights."""
    torch.manual_seed(0)
    theirs = nn.LSTM(*args, **config)
    ours = lstm_fast.LSTM(*args, **config, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def same(ours, theirs, **tolerance):
    (y, (h, c)), (y_, (h_, c_)) = ours, theirs
    for a, b in ((y, y_), (h, h_), (c, c_)):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.stride() == b.stride()


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("states", [None, tuple, list])
@pytest.mark.parametrize("proj", [0, 2])
def test_every_dense_form(backend, batched, batch_first, states, proj):
    if proj and backend == "cpu":
        backend = "auto"
    theirs, ours = pair(3, 5, 2, batch_first=batch_first, bidirectional=True, proj_size=proj, backend=backend, **F64)
    x = torch.randn(*((2, 6) if batched and batch_first else (6, 2) if batched else (6,)), 3, **F64)
    hx = None
    if states is not None:
        batch = (2,) if batched else ()
        hx = states([torch.randn(4, *batch, proj or 5, **F64), torch.randn(4, *batch, 5, **F64)])
    result = ours(input=x, hx=hx)
    same(result, theirs(x, None if hx is None else tuple(hx)), rtol=0, atol=1e-12)
    assert type(result) is tuple and type(result[1]) is tuple


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_right_and_nothing_is_written(backend):
    theirs, ours = pair(3, 5, backend=backend, **F64)
    for x in (torch.randn(3, 2, 6, **F64).permute(2, 1, 0), torch.randn(1, 2, 3, **F64).expand(6, 2, 3)):
        state = torch.randn(5, 2, 1, **F64).permute(2, 1, 0)
        kept = x.clone(), state.clone()
        result = ours(x, (state, state))
        same(result, theirs(x, (state, state)), rtol=0, atol=1e-12)
        assert torch.equal(x, kept[0]) and torch.equal(state, kept[1])
        storages = {t.untyped_storage().data_ptr() for t in (x, state, result[0], *result[1])}
        assert len(storages) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    theirs, ours = pair(3, 5, 2, bidirectional=True, backend=backend)
    x = torch.zeros(4, 0, 3, requires_grad=True)
    y, (h, c) = ours(x)
    assert y.shape == (4, 0, 10) and h.shape == c.shape == (4, 0, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    assert theirs(torch.zeros(4, 0, 3))[0].shape == y.shape


def states(*shapes, **kind):
    return tuple(torch.zeros(*shape, **kind) for shape in shapes)


@pytest.mark.parametrize(
    "x, hx",
    [
        (torch.zeros(1, 2, 3, 3), None),
        (torch.zeros(3), None),
        (torch.zeros(4, 2, 3), states((2, 5), (2, 5))),
        (torch.zeros(4, 3), states((1, 2, 5), (1, 2, 5))),
        (torch.zeros(4, 2, 3, dtype=torch.float64), None),
        (torch.zeros(4, 2, 4), None),
        (torch.zeros(4, 2, 4), states((2, 5), (2, 5))),
        (torch.zeros(4, 2, 3), states((2, 2, 5), (1, 2, 5))),
        (torch.zeros(4, 2, 3), states((1, 2, 5), (1, 2, 4))),
        (torch.zeros(4, 3), states((2, 5), (1, 5))),
        (torch.zeros(0, 2, 3), None),
        (torch.zeros(0, 3), None),
        (torch.zeros(4, 2, 3), states((1, 2, 5))),
        (None, None),
        ([1.0], None),
        # two faults: the first that torch looks for
        (torch.zeros(4, 2, 4, dtype=torch.float64), states((2, 5), (2, 5))),
        (torch.zeros(4, 2, 4, dtype=torch.float64), None),
        (torch.zeros(4, 2, 4), states((2, 2, 5), (1, 2, 4))),
        (torch.zeros(0, 2, 4), None),
        (torch.zeros(4, 2, 3), (None, None)),
    ],
)
def test_errors_are_torchs(x, hx):
    theirs, ours = pair(3, 5)
    (kind, text), (kind_, text_) = raised(lambda: ours(x, hx)), raised(lambda: theirs(x, hx))
    assert kind is kind_
    assert text == text_ or torch.__version__ < "2.11"  # of which one text was another


@pytest.mark.parametrize(
    "hx, kind, text",
    [
        (states(*[(1, 2, 5)] * 3), RuntimeError, "two hidden states"),
        (torch.zeros(2, 1, 2, 5), TypeError, "hx should be a tuple"),
        (states((1, 2, 5), (1, 2, 5), dtype=torch.float64), RuntimeError, "dtype"),
        (states((1, 2, 5), (1, 2, 5), device="meta"), RuntimeError, "not at the same device"),
    ],
)
def test_errors_in_our_own_words(hx, kind, text):
    _, ours = pair(3, 5)
    with pytest.raises(kind, match=text):
        ours(torch.zeros(4, 2, 3), hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_takes_torchs_masks_and_leaves_torchs_random_state(backend, batch_first, p):
    theirs, ours = pair(3, 5, 3, dropout=p, bidirectional=True, batch_first=batch_first, backend=backend)
    x = torch.randn(4, 2, 3)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        found.append((module(x), module(x), torch.rand(1)))
    same(found[1][0], found[0][0])
    same(found[1][1], found[0][1])
    assert torch.equal(found[0][2], found[1][2])
    assert p == 1 or not torch.equal(found[1][0][0], found[1][1][0])  # a fresh mask each call
    ours.eval()
    torch.manual_seed(1)
    assert torch.equal(ours(x)[0], ours(x)[0])
    first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(1))  # eval took nothing from the generator


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_the_mask(reentrant):
    _, ours = pair(3, 5, 2, dropout=0.5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    torch.manual_seed(2)
    (plain,) = torch.autograd.grad(ours(x)[0].sum(), x)
    torch.manual_seed(2)
    checkpoint(lambda v: ours(v)[0], x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_parameters_dtype(dtype):
    module = lstm_fast.LSTM(3, 5, 2, dtype=dtype)
    y, (h, c) = module(torch.randn(4, 2, 3, dtype=dtype))
    (y.sum() + c.sum()).backward()
    assert {y.dtype, h.dtype, c.dtype} == {dtype} == {p.grad.dtype for p in module.parameters()}


def test_batch_first_dropout_and_training_are_read_at_every_call():
    theirs, ours = pair(3, 5, 2)
    x = torch.randn(4, 6, 3)
    for module in (theirs, ours):
        module(x)
        module.batch_first, module.dropout = True, 0.5
    found = []
    for module in (theirs, ours, theirs.eval(), ours.eval()):
        module.train(len(found) < 2)
        torch.manual_seed(3)
        found.append(module(x))
    same(found[1], found[0])
    same(found[3], found[2])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_autocast_gives_torchs_dtypes(proj, packed, weights):
    if weights == torch.float32 and not (proj or packed or BF16):
        pytest.skip("torch's own dtypes are others on a CPU where oneDNN has no bf16")
    theirs, ours = pair(3, 5, proj_size=proj, dtype=weights)
    x = torch.randn(4, 2, 3, dtype=weights)
    x = nn.utils.rnn.pack_padded_sequence(x, [4, 2]) if packed else x
    with torch.autocast("cpu", torch.bfloat16):
        (y, ours_states), (y_, theirs_states) = ours(x), theirs(x)
    (y.data if packed else y).float().sum().backward()
    assert y.data.dtype == y_.data.dtype
    assert [s.dtype for s in ours_states] == [s.dtype for s in theirs_states]
    assert ours.weight_hh_l0.grad.dtype == weights
    torch.testing.assert_close(y.data.float(), y_.data.float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [True, False])
def test_autocast_of_packed_input_keeps_to_the_dtype_of_the_states(low, weights, state):
    theirs, ours = pair(3, 5, 2, dtype=weights)
    x = torch.randn(4, 2, 3).to(torch.bfloat16 if low else torch.float32)
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2])
    hx = None if state is None else (torch.randn(2, 2, 5).to(state), torch.randn(2, 2, 5).to(state))
    with torch.autocast("cpu", torch.bfloat16):
        (y, ours_states), (y_, theirs_states) = ours(packed, hx), theirs(packed, hx)
    for a, b in zip((y.data, *ours_states), (y_.data, *theirs_states), strict=True):
        assert a.dtype == b.dtype == (state or x.dtype)
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_takes_input_of_either_precision(low):
    _, ours = pair(3, 5)
    with torch.autocast("cpu", low):
        assert {ours(torch.randn(4, 2, 3, dtype=dtype))[0].dtype for dtype in (low, torch.float32)} == {low}


def test_complex_weights_run_as_in_torch():
    theirs, ours = pair(3, 5, dtype=torch.complex64)
    x = torch.randn(4, 2, 3, dtype=torch.complex64)
    same(ours(x), theirs(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_rows_and_chunks(backend):
    theirs, ours = pair(8, 16, backend=backend)
    x = torch.randn(200, 3, 8)
    exact = nn.LSTM(8, 16, **F64)
    exact.load_state_dict(theirs.state_dict())
    wanted = exact(x.double())[0]
    error, allowed = ((m(x)[0] - wanted).norm().item() for m in (ours, theirs))
    assert error <= 2 * allowed
    whole, last = ours(x)
    for b in range(3):
        torch.testing.assert_close(ours(x[:, b : b + 1])[0], whole[:, b : b + 1])
    state, pieces = None, []
    for chunk in x.split(64):
        y, state = ours(chunk, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, float("inf"), float("-inf")])
def test_extreme_values_follow_the_formula(backend, scale):
    """No clipping of c; what is NaN in fp64 torch, and only that, is NaN here."""
    theirs, ours = pair(3, 5, backend=backend)
    exact = nn.LSTM(3, 5, **F64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3)
    x[1, 0, 0] = scale
    hx = (torch.zeros(1, 2, 5), torch.full((1, 2, 5), 1e3))
    with torch.no_grad():
        y, (h, c) = ours(x, hx)
        y_, (h_, c_) = exact(x.double(), tuple(s.double() for s in hx))
    for a, b in ((y, y_), (h, h_), (c, c_)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_threads_may_call_at_once():
    _, ours = pair(8, 16, 2)
    xs = [torch.randn(20, 3, 8) for _ in range(4)]
    with torch.no_grad():
        wanted = [ours(x)[0] for x in xs]
    found: dict[int, torch.Tensor] = {}

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                found[i] = ours(xs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(4))
