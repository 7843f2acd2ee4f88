"""The host layer (csrc/host/simt.h) does what a GPU does, and says in words when a kernel could not have worked."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    library = tmp_path_factory.mktemp("simt") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    sources = [str(TESTS / "simt_kernels.cpp"), str(CSRC / "host" / "simt.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("product", "indices", "ring", "wrong"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.round_tf32.restype = ctypes.c_float
    loaded.round_tf32.argtypes = [ctypes.c_float]
    return loaded


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def tf32(x: Tensor) -> Tensor:
    """11 bits of significand, ties away from zero, by fp64 arithmetic."""
    significand, exponent = torch.frexp(x.double())
    scaled = significand * 2**11
    return torch.ldexp(torch.sign(scaled) * torch.floor(scaled.abs() + 0.5) / 2**11, exponent)


@pytest.mark.parametrize("kind, dtype", enumerate([torch.bfloat16, torch.float16, torch.float32]))
def test_matrix_product(kernels, kind, dtype):
    """Fragments as PTX ISA draws them; fp32 operands are cut to TF32, not rounded."""
    torch.manual_seed(0)
    depth = 32 // dtype.itemsize
    a, b, d = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.full((16, 8), float("nan"))
    assert kernels.product(kind, pointer(a), pointer(b), pointer(d)) == b""
    if dtype == torch.float32:
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    start = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(8, 0).repeat(1, 4)
    torch.testing.assert_close(d.double(), start.double() + a.double() @ b.double().t(), rtol=1e-6, atol=1e-6)


def test_rounding_to_tf32(kernels):
    torch.manual_seed(0)
    ties = torch.tensor([1 + 2.0**-11, -(1 + 2.0**-11), 1 + 3 * 2.0**-11, 2.0 - 2.0**-11, 0.0, -0.0])
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), ties])
    found = torch.tensor([kernels.round_tf32(v) for v in x.tolist()])
    assert torch.equal(found.double(), tf32(x))
    assert kernels.round_tf32(float("inf")) == float("inf") and np.isnan(kernels.round_tf32(float("nan")))


def test_indices_and_shuffles(kernels):
    out = torch.full((12, 4, 8, 6), -1, dtype=torch.int32)
    assert kernels.indices(pointer(out)) == b""
    for block in range(12):
        for y in range(4):
            for x in range(8):
                rank = block % 2  # clusters of two blocks, side by side along x
                assert out[block, y, x].tolist() == [block % 4, block // 4, x, y, rank, 31 - (y * 8 + x)]


def test_messages_and_phases_are_the_same_under_every_schedule(kernels):
    rounds = 9
    wanted = torch.tensor([[40 * r + 6 for r in range(rounds)]] * 4, dtype=torch.int32)
    for schedule in range(60):
        sums = torch.zeros(4, rounds, dtype=torch.int32)
        assert kernels.ring(ctypes.c_uint64(schedule), rounds, 2, pointer(sums)) == b""
        assert torch.equal(sums, wanted), schedule


def test_a_buffer_used_too_early_shows(kernels):
    """One buffer where two are needed: a block that runs ahead writes over what another has yet to read."""
    rounds, wrong = 9, 0
    for schedule in range(60):
        sums = torch.zeros(4, rounds, dtype=torch.int32)
        assert kernels.ring(ctypes.c_uint64(schedule), rounds, 1, pointer(sums)) == b""
        wrong += any(sums[:, r].ne(40 * r + 6).any() for r in range(rounds))
    assert wrong > 0


@pytest.mark.parametrize(
    "which, words",
    enumerate(
        [
            "deadlock: nobody can go on and nothing is on its way: 128 threads in wait;",
            "a barrier is used before init (block",
            "a barrier is made twice (block 0 of the cluster, thread 0)",
            "more arrivals at a barrier than it was made for",
            "lanes of one warp are in different operations: ",
            "deadlock: nobody can go on and nothing is on its way: 63 threads in sync;",
            "a message goes to a rank that the cluster does not have",
            "a message needs a cluster of two blocks or more",
            "a message's target is outside of shared memory or not aligned",
            "a message's target is outside of shared memory or not aligned",
            "a message lands in a block whose threads have all ended",
            "deadlock: nobody can go on and nothing is on its way: 64 threads in sync;",
            "a block has barriers 0 to 15, of whole warps",
        ]
    ),
)
def test_what_could_not_work_is_said(kernels, which, words):
    assert words in kernels.wrong(which).decode()
    assert kernels.ring(ctypes.c_uint64(1), 2, 2, pointer(torch.zeros(4, 2, dtype=torch.int32))) == b"", "the next runs"
