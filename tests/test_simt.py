"""The host layer (csrc/host/simt.h) does what a GPU does, and says in words when a kernel could not have worked."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiled import CSRC, compiled

TESTS = Path(__file__).parent
SCHEDULES = range(60)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    sources = [TESTS / "simt_kernels.cpp", CSRC / "host" / "simt.cpp"]
    library = tmp_path_factory.mktemp("simt") / "kernels.so"
    loaded = ctypes.CDLL(str(compiled(library, "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *sources)))
    for name in (
        "product",
        "indices",
        "ring",
        "exchange",
        "early",
        "large",
        "launch",
        "wrong",
        "grid",
        "wrong_in_a_grid",
    ):
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


@pytest.mark.parametrize("kind, dtype", [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)])
def test_matrix_product(kernels, kind, dtype):
    """Fragments as PTX ISA draws them; fp32 operands are cut to TF32, not rounded."""
    torch.manual_seed(0)
    depth = 32 // dtype.itemsize
    a, b, d = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.full((16, 8), float("nan"))
    assert kernels.product(kind, pointer(a), pointer(b), pointer(d)) == b""
    if dtype == torch.float32:
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    start = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(8, 0).repeat(1, 4)
    exact = start.double() + a.double() @ b.double().t()
    torch.testing.assert_close(d.double(), exact, rtol=2**-23, atol=0.0)
    assert (d.double().abs() <= exact.abs()).all(), "rounded towards zero"


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
    for schedule in SCHEDULES:
        sums = torch.zeros(4, rounds, dtype=torch.int32)
        assert kernels.ring(ctypes.c_uint64(schedule), rounds, 2, pointer(sums)) == b""
        assert torch.equal(sums, wanted), schedule


def test_a_buffer_used_too_early_shows(kernels):
    """One buffer where two are needed: a block that runs ahead writes over what another has yet to read."""
    rounds, wrong = 9, 0
    for schedule in SCHEDULES:
        sums = torch.zeros(4, rounds, dtype=torch.int32)
        assert kernels.ring(ctypes.c_uint64(schedule), rounds, 1, pointer(sums)) == b""
        wrong += any(sums[:, r].ne(40 * r + 6).any() for r in range(rounds))
    assert wrong > 0


def test_warps_meet_at_the_blocks_barrier(kernels):
    """And where they don't, some schedule shows it."""
    thread, bad = torch.arange(128), []
    wanted = (4 * (thread ^ 32) + 6000).int()
    for schedule in SCHEDULES:
        for barriers in (1, 0):
            sums = torch.zeros(128, dtype=torch.int32)
            assert kernels.exchange(ctypes.c_uint64(schedule), barriers, pointer(sums)) == b""
            if not torch.equal(sums, wanted):
                bad.append(barriers)
    assert set(bad) == {0}


def test_a_phase_ends_with_its_last_arrival_however_early_its_bytes(kernels):
    for schedule in SCHEDULES:
        found = torch.zeros(32, dtype=torch.int32)
        assert kernels.early(ctypes.c_uint64(schedule), pointer(found)) == b""
        assert (found == 100 + 10 + 11).all(), schedule


def test_words_for_the_grid(kernels):
    """What is signalled has come; and each way of using it too early shows under some schedule."""
    rounds, blocks, bad = 5, 40, set()
    wanted = (torch.arange(rounds) * 20 * blocks + blocks * (blocks - 1)).int().expand(blocks, rounds)
    for schedule in SCHEDULES:
        for fault in range(5):
            sums = torch.zeros(blocks, rounds, dtype=torch.int32)
            assert kernels.grid(ctypes.c_uint64(schedule), rounds, fault, pointer(sums)) == b"" or fault > 0
            if not torch.equal(sums, wanted):
                bad.add(fault)
    assert bad == {1, 2, 3, 4}


NO_CLUSTER = "needs a cluster, and this launch has none (block 0 of cluster 0, warp 0, thread 0)"
WRONG_IN_A_GRID = [
    "words for the grid are outside of its global memory or not aligned (block 0 of cluster 0, warp 0, thread 0)",
    "words for the grid are outside of its global memory or not aligned (block 0 of cluster 0, warp 0, thread 0)",
    "deadlock: nobody can go on and nothing is on its way: 64 threads in await of signal 2",
    "sync_cluster " + NO_CLUSTER,
    "a message " + NO_CLUSTER,
]


@pytest.mark.parametrize("which", range(len(WRONG_IN_A_GRID)))
def test_what_could_not_work_in_a_grid_is_said(kernels, which):
    assert WRONG_IN_A_GRID[which] in kernels.wrong_in_a_grid(which).decode()


@pytest.mark.parametrize("schedule", [0, 1, 3, 5])
def test_large_clusters(kernels, schedule):
    """16 blocks of 256 threads; the next cluster finds fresh memory."""
    sums, fresh = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    assert kernels.large(ctypes.c_uint64(schedule), pointer(sums), pointer(fresh)) == b""
    assert sums.tolist() == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16
    assert fresh.all()


def test_two_threads_run_launches_at_once(kernels):
    def run(schedule: int) -> tuple[bytes, Tensor]:
        sums = torch.zeros(4, 9, dtype=torch.int32)
        return kernels.ring(ctypes.c_uint64(schedule), 9, 2, pointer(sums)), sums

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, SCHEDULES))
    assert all(error == b"" and torch.equal(sums, found[0][1]) for error, sums in found)


def test_a_schedule_runs_the_same_way_again(kernels):
    def run(schedule: int) -> list[int]:
        sums = torch.zeros(4, 9, dtype=torch.int32)
        kernels.ring(ctypes.c_uint64(schedule), 9, 1, pointer(sums))  # wrong in a way of the schedule's own
        return sums.flatten().tolist()

    ways = [run(schedule) for schedule in SCHEDULES]
    assert ways == [run(schedule) for schedule in SCHEDULES]
    assert len(set(map(tuple, ways))) > 2


@pytest.mark.parametrize(
    "blocks, threads, cluster, shared",
    [(3, 32, 2, 0), (2, 0, 1, 0), (0, 32, 1, 0), (2, 1025, 1, 0), (2, 32, 0, 0), (32, 32, 32, 0), (2, 32, 1, 232449)],
)
def test_launches_that_no_card_takes(kernels, blocks, threads, cluster, shared):
    assert kernels.launch(blocks, threads, cluster, shared).startswith(b"a launch has blocks of 1 to 1024 threads")


FIRST = "(block 0 of cluster 0, warp 0, thread 0)"
STUCK = "deadlock: nobody can go on and nothing is on its way: "
WRONG = [
    STUCK + f"128 threads in wait at byte 0 for parity 0 {FIRST.replace('(', '(first ')}; 0 threads have ended",
    f"a barrier is used before init {FIRST}",
    f"a barrier is made twice {FIRST}",
    f"more arrivals at a barrier than it was made for {FIRST}",
    "lanes of one warp are in different operations: shuffle and mma<float> (block 0 of cluster 0, warp 0, thread 16)",
    STUCK + "63 threads in sync_threads (first block 0 of cluster 0, warp 0, thread 1); 65 threads have ended",
    f"a message goes to a rank that the cluster does not have {FIRST}",
    f"a message needs a cluster of two blocks or more {FIRST}",
    f"a message's target is outside of shared memory or not aligned {FIRST}",
    f"a message's target is outside of shared memory or not aligned {FIRST}",
    "a message lands in a block whose threads have all ended (block 1 of cluster 0, byte 128)",
    STUCK + f"64 threads in sync_threads {FIRST.replace('(', '(first ')}; 64 threads have ended",
    "a message was still on its way when the cluster had ended",
    "a message lands in a block whose threads have all ended (block 0 of cluster 0, byte 128)",
    f"a message's target is outside of shared memory or not aligned {FIRST}",
    "lanes of one warp are in different operations: mma<BFloat16> and mma<Float16> (block 0 of cluster 0, warp 0, ",
    f"a barrier is made for 1 to 4095 arrivals {FIRST}",
    f"a barrier is outside of shared memory or not aligned {FIRST}",
    "a message is counted at a barrier before its init (block 1 of cluster 0, byte 128)",
    STUCK + "126 threads in wait at byte 0 for parity 0 (first block 0 of cluster 0, warp 0, thread 0); 2 threads",
    STUCK + f"124 threads in sync_warp {FIRST.replace('(', '(first ')}; 4 threads have ended",
]


@pytest.mark.parametrize("which", range(len(WRONG)))
def test_what_could_not_work_is_said(kernels, which):
    assert WRONG[which] in kernels.wrong(which).decode()
    assert kernels.ring(ctypes.c_uint64(1), 2, 2, pointer(torch.zeros(4, 2, dtype=torch.int32))) == b"", "the next runs"
