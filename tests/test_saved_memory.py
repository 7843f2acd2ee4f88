"""Memory of what a training step on the CPU saves: large tensors come again where the last step's lay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lstm_fast

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


def test_a_step_takes_memory_of_its_size_up_to_twice_as_large():
    module = module_of()
    large, small = forward(module, 2500), forward(module, 1300)
    places = gates_of(large).data_ptr(), gates_of(small).data_ptr()
    del large, small
    small = forward(module, 1300)
    assert gates_of(small).data_ptr() == places[1], "the smaller of two that serve"
    large = forward(module, 1300)
    assert gates_of(large).data_ptr() == places[0]
    del large, small
    small = forward(module, 1300)
    assert gates_of(small).data_ptr() == places[1]
    another = forward(module, 1100)
    assert gates_of(another).data_ptr() != places[0], "more than twice as large as needed"


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self tells of memory")


def mapped_mib() -> float:
    found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


@needs_proc
def test_what_does_not_serve_is_freed_first():
    module, sizes = module_of(), []
    for rows in (4000, 1800) * 3:  # 125 and 56 MiB of gates; cells of 31 and 14 MiB are torch's own
        forward(module, rows)
        sizes.append(mapped_mib())
    assert 50 < sizes[-2] - sizes[-1] < 90


@needs_proc
def test_a_gib_is_the_most_that_is_kept():
    module = module_of()
    steps = [forward(module, 4000) for _ in range(9)]  # 125 MiB each
    places = [gates_of(y).data_ptr() for y in steps]
    assert all(map(is_mapped, places))
    del steps
    assert sum(map(is_mapped, places)) == 8


def test_small_tensors_are_torchs_own():
    module = module_of()
    assert gates_of(forward(module, 1000)).untyped_storage().resizable()
    assert not gates_of(forward(module, 1100)).untyped_storage().resizable()
