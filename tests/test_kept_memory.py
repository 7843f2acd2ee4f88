"""Memory of what a training step on the CPU saves, and of gradients of weights: large tensors lie where the last step's
did."""

from __future__ import annotations

import copy
import ctypes
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lstm_fast
from tests.compiled import CSRC, compiled

pytestmark = pytest.mark.skipif(not lstm_fast.backends()["cpu"].available, reason="the extension isn't built")

H, P = 2048, 3  # 32 KiB of gates a row in fp32, and little to multiply
ROWS = {torch.float32: 1050, torch.bfloat16: 2050, torch.float64: 550}  # 32 MiB of gates or a little more


def module_of(dtype: torch.dtype = torch.float32) -> lstm_fast.LSTM:
    torch.manual_seed(0)
    return lstm_fast.LSTM(2, H, proj_size=P, dtype=dtype, backend="cpu")


def forward(module: lstm_fast.LSTM, rows: int) -> Tensor:
    torch.manual_seed(1)
    y: Tensor = module(torch.randn(rows // 50, 50, 2, dtype=module.weight_ih_l0.dtype))[0]
    return y


def gates_of(y: Tensor) -> Tensor:
    assert y.grad_fn is not None
    gates: Tensor = y.grad_fn.saved_tensors[-2]
    assert gates.shape == (1, y.shape[:-1].numel(), 4 * H) and gates.dtype == y.dtype and gates.is_contiguous()
    return gates


@pytest.mark.parametrize("dtype", ROWS, ids=str)
def test_the_next_step_saves_where_the_last_did(dtype):
    module, rows = module_of(dtype), ROWS[dtype]
    y = forward(module, rows)
    first = gates_of(y).data_ptr()
    want = torch.autograd.grad(y.sum(), list(module.parameters()))
    del y
    in_between = torch.empty(ROWS[dtype], 4 * H, dtype=dtype)  # takes the place of what was given back to the system
    y = forward(module, rows)
    assert gates_of(y).data_ptr() == first != in_between.data_ptr()
    got = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_lives_is_nobody_elses():
    module = module_of()
    one, other = forward(module, 1100), forward(module, 1100)
    ours, theirs = gates_of(one), gates_of(other)
    assert ours.data_ptr() != theirs.data_ptr() and torch.equal(ours, theirs)
    kept = ours.clone()
    del one, other, theirs  # whoever holds the tensor holds its memory
    third = forward(module, 1150)
    assert gates_of(third).data_ptr() != ours.data_ptr() and torch.equal(ours, kept)


def test_small_tensors_are_torchs_own():
    module = module_of()
    assert gates_of(forward(module, 1000)).untyped_storage().resizable()
    assert not gates_of(forward(module, 1100)).untyped_storage().resizable()


STEPS = {
    "layer": lambda dtype: (lstm_fast.LSTM(256, 256, dtype=dtype, backend="cpu"), (2, 3, 256)),
    "projected": lambda dtype: (lstm_fast.LSTM(300, 1024, proj_size=256, dtype=dtype, backend="cpu"), (2, 3, 300)),
    "cell": lambda dtype: (lstm_fast.LSTMCell(256, 256, dtype=dtype, backend="cpu"), (3, 256)),
}


def gradients_of(module: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    """Of the matrices, where a step leaves them."""
    torch.manual_seed(1)
    module(torch.randn(shape, dtype=next(module.parameters()).dtype))[0].sum().backward()
    return [parameter.grad for parameter in module.parameters() if parameter.dim() == 2 and parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_gradients_of_weights_lie_where_the_last_steps_did(kind, dtype):
    torch.manual_seed(0)
    module, shape = STEPS[kind](dtype)
    grads = gradients_of(module, shape)
    assert len(grads) == (3 if kind == "projected" else 2)
    places, want = [grad.data_ptr() for grad in grads], [grad.clone() for grad in grads]
    del grads
    module.zero_grad()
    in_between = [torch.empty_like(w) for w in want for _ in range(2)]  # these take the place of what malloc got back
    got = gradients_of(module, shape)
    assert {grad.data_ptr() for grad in got} == set(places)
    assert not {other.data_ptr() for other in in_between} & set(places)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_that_someone_holds_stay_as_they_are():
    module, shape = STEPS["layer"](torch.float32)
    held = gradients_of(module, shape)
    want = [grad.clone() for grad in held]
    module.zero_grad()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    others = gradients_of(module, shape)
    assert not any(torch.equal(a, b) for a, b in zip(held, others, strict=True))
    del module, others
    assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


def test_kept_gradients_are_copied_and_shared_as_others_are():
    module, shape = STEPS["layer"](torch.float32)
    grad = gradients_of(module, shape)[0]
    want = grad.clone()
    assert torch.equal(copy.deepcopy(grad), want) and torch.equal(pickle.loads(pickle.dumps(grad)), want)
    module.share_memory()
    assert grad.is_shared() and torch.equal(grad, want)


def test_small_gradients_are_torchs_own():
    module, shape = STEPS["layer"](torch.bfloat16)  # half a MiB
    assert all(grad.untyped_storage().resizable() for grad in gradients_of(module, shape))


POOL = """
#include "cpu/kept.h"

using namespace lstm::cpu;

extern "C" Block* take(std::int64_t bytes) { return take_block(bytes).release(); }
extern "C" void give(Block* block) { Keep()(block); }
extern "C" void* place_of(const Block* block) { return block->data; }
"""


class Pool:
    """The pool on its own, in a library of its own: no other test has left anything in it. Sizes are in MiB."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.give, self.place_of = library.give, library.place_of
        self._take = library.take
        self._take.argtypes = [ctypes.c_int64]
        self._take.restype = self.place_of.restype = ctypes.c_void_p
        self.give.argtypes = self.place_of.argtypes = [ctypes.c_void_p]

    def take(self, *sizes: int) -> list[int]:
        return [self._take(size << 20) for size in sizes]

    def keep(self, *blocks: int) -> list[int]:
        """Gives the blocks back, in that order; returns where they lie."""
        places = [self.place_of(block) for block in blocks]
        for block in blocks:
            self.give(block)
        return places

    def take_at(self, *sizes: int) -> list[int]:
        """Where blocks of those sizes lie, which go back at once: the first is given back last."""
        return self.keep(*reversed(self.take(*sizes)))[::-1]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "pool.cpp").write_text(POOL)
    sources = [folder / "pool.cpp", CSRC / "cpu" / "kept.cpp", CSRC / "cpu" / "block.cpp"]
    return compiled(folder / "pool.so", "-O1", f"-I{CSRC}", *sources)


@pytest.fixture
def pool(library: Path, tmp_path: Path) -> Pool:
    return Pool(ctypes.CDLL(shutil.copy(library, tmp_path)))  # a file that was not loaded before: an empty pool


def test_a_block_serves_requests_of_up_to_half_its_size(pool):
    small, large = pool.keep(*pool.take(42, 80))
    for _ in range(2):  # in that order, then in the other
        assert pool.take_at(40, 40) == [small, large], "the smaller of those that serve comes first"
    assert pool.take_at(80) == [large]
    assert pool.take_at(38) == [small]
    assert pool.take_at(38, 38)[1] != large, "more than twice as large as needed"


def test_of_blocks_that_serve_alike_the_last_comes_first(pool):
    first, last = pool.keep(*pool.take(40, 40))
    assert pool.take_at(40) == [last]
    assert pool.take_at(40, 40) == [last, first]
    assert pool.take_at(40) == [last]


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self tells of memory")


def test_where_none_serves_as_much_is_freed_of_what_was_kept_the_longest(pool):
    places = pool.keep(*pool.take(*[100] * 6))
    pool.take(40, 250)  # which take the place of one and of three
    assert pool.take_at(100, 100) == places[:-3:-1]
    third = pool.take_at(100, 100, 100)[2]
    assert third not in places[-2:]


@needs_proc
def test_a_gib_is_the_most_that_is_kept(pool):
    places = pool.keep(*pool.take(*[128] * 9))
    assert list(map(is_mapped, places)) == [True] * 8 + [False]


def of_mappings(field: str, address: int, size: int) -> list[str]:
    """What /proc/self/smaps says in that field of the mappings that lie within so many bytes from an address on."""
    found, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            first, end = (int(each, 16) for each in name.split("-"))
            inside = address <= first and end <= address + size
        elif inside and name == f"{field}:":
            found.append(" ".join(values))
    return found


@needs_proc
def test_pages_beyond_128_mib_are_the_systems_to_take(pool):
    blocks = pool.take(*[60] * 3)
    for block in blocks:
        ctypes.memset(pool.place_of(block), 1, 60 << 20)
    lazy = [of_mappings("LazyFree", place, 60 << 20) for place in pool.keep(*blocks)]
    assert all(lazy), "blocks lie in mappings of their own"
    assert [sum(int(size.split()[0]) for size in sizes) > 50 << 10 for sizes in lazy] == [False, False, True]


@needs_proc
@pytest.mark.parametrize(("size", "huge"), [(1, 2), (2, 2), (3, 4), (5, 6)])
def test_a_last_page_that_is_half_used_is_a_large_one(pool, size, huge):
    (block,) = pool.take(size)
    asked = [flags.split() for flags in of_mappings("VmFlags", pool.place_of(block), huge << 20)]
    assert asked and all("hg" in flags for flags in asked)


@needs_proc
def test_a_last_page_that_is_hardly_used_is_not(pool):
    place = pool.place_of(pool._take((4 << 20) + 4096))
    assert all("hg" in flags.split() for flags in of_mappings("VmFlags", place, 4 << 20))
    tail = of_mappings("VmFlags", place + (4 << 20), 2 << 20)
    assert tail and not any("hg" in flags.split() for flags in tail)


OUT_OF_MEMORY = """
import resource
import torch
from torch import nn
import lstm_fast

torch.set_num_threads(1)
x = torch.zeros(50, 1000, 4)
modules = [kind(4, 1024, layers) for kind in (nn.LSTM, lstm_fast.LSTM) for layers in (1, 2)]
modules[2](x[:2, :2])[0].sum().backward()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (320 << 20)  # y's 205 MB fit, 820 MB of gates, or y of another layer, don't
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for module in modules:
    try:
        with torch.set_grad_enabled(module.num_layers == 1):
            module(x)
    except RuntimeError as error:
        print("DefaultCPUAllocator: can't allocate memory" in str(error))
y, _ = modules[2](x[:2, :2])
print(y.isfinite().all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory_is_torchs_error() -> None:
    """The one that searches for a batch size catch; and the next call that fits is served."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 5, done.stderr
