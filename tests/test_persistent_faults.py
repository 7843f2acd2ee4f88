"""The host layer finds what it is for: the persistent kernels broken in one place each, and every fault shows.

A fault counts as caught when some schedule ends in an error or in other bits than the whole kernel's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.compiled import CSRC
from tests.persistent_case import Case, granted
from tests.persistent_library import Library, build, host_layer

SCHEDULES = range(24)
FORWARD, BACKWARD, COMMON = "persistent_fwd.h", "persistent_bwd.h", "persistent_common.h"


@dataclass
class Fault:
    file: str
    whole: str
    broken: str
    caught_as: str  # part of the error, or "bits"
    grid: bool = False


FAULTS = {
    "forward: no wait for h": Fault(FORWARD, "simt::wait(full(now.slot, buffer), parity_of(now.i - 1));", "", "bits"),
    "forward: h in one buffer": Fault(
        FORWARD, "(kGrid ? 0 : 2 * slot + buffer) * p.layout.of_h", "(kGrid ? 0 : 2 * slot) * p.layout.of_h", "bits"
    ),
    "forward: halves of K not awaited": Fault(
        FORWARD, "simt::sync_threads();  // all parts of K lie there", "", "bits"
    ),
    "forward: halves of K in one buffer": Fault(FORWARD, "taken += other;", "laid -= other;", "bits"),
    "forward: the next fill not expected": Fault(
        FORWARD, "simt::arrive_expecting(full(now.slot, before), fill_bytes());", "", "deadlock"
    ),
    "forward: a fill of too few bytes": Fault(
        FORWARD,
        "return p.plan.columns * column_bytes();",
        "return (p.plan.columns - 1) * column_bytes();",
        "",
    ),
    "forward: messages of columns that a tile doesn't have": Fault(
        FORWARD, "if (first >= plan.columns * own) return -1;", "", ""
    ),
    "forward: threads past a tile's columns take the next tile's sequences": Fault(
        COMMON,
        "return cell.here ? first_sequence(slot) + cell.column : p.sizes.batch;",
        "return first_sequence(slot) + cell.column;",
        "bits",
    ),
    "forward: messages before the cluster is ready": Fault(
        FORWARD,
        "        if constexpr (!kGrid) simt::sync_cluster();\n    }\n",
        "    }\n",
        "",
    ),
    "forward: padding of K not zeroed": Fault(FORWARD, "[j] = Words{0, 0, 0, 0};", "[j].x += 0;", "bits"),
    "backward: no wait for dh": Fault(
        BACKWARD, "if constexpr (!kGrid) simt::wait(full(slot, fill % 2), parity_of(fill));", "", "bits"
    ),
    "backward: gates' gradients not awaited": Fault(
        BACKWARD, "simt::sync_threads();  // all gradients of the block's cells lie in b", "", "bits"
    ),
    # The kernel's first draft did this: a block's own warps don't all send to their own block.
    "backward: gates' gradients in one buffer": Fault(
        BACKWARD, "+ turn * kColumns * kBlock * p.layout.blocks;", ";", "bits"
    ),
    "backward: dh in one buffer": Fault(
        BACKWARD, "(2 * slot + buffer) * p.plan.cluster", "(2 * slot) * p.plan.cluster", "bits"
    ),
    "backward: messages of columns that a tile doesn't have": Fault(
        BACKWARD, "at.lane % 4 * 2 < walk.plan.columns ?", "true ?", ""
    ),
    "backward: the wrong parity": Fault(BACKWARD, "parity_of(fill))", "parity_of(fill + 2))", ""),
    "backward: sent to the wrong block": Fault(
        BACKWARD, "of_message, owner, ", "of_message, (owner + 1) % p.plan.cluster, ", "bits"
    ),
    "forward, grid: no wait for h": Fault(FORWARD, "global().await(now.slot, now.i);", "", "bits", grid=True),
    "forward, grid: copies not awaited": Fault(
        FORWARD, "h(now.slot, buffer));\n            simt::sync_threads();", "h(now.slot, buffer));", "bits", grid=True
    ),
    "forward, grid: h0 not published": Fault(
        FORWARD, "                global().signal(slot);\n", "", "deadlock", grid=True
    ),
    "forward, grid: a signal before all is published": Fault(
        COMMON,
        "simt::sync_threads();\n        if (threadIdx.x == 0) simt::signal",
        "if (threadIdx.x == 0) simt::signal",
        "bits",
        grid=True,
    ),
    "forward, grid: only some threads wait": Fault(
        COMMON,
        "static_cast<unsigned>(fill + 1));\n        }\n        simt::sync_threads();",
        "static_cast<unsigned>(fill + 1));\n        }",
        "bits",
        grid=True,
    ),
    "forward, grid: a signal too early": Fault(COMMON, "static_cast<unsigned>(fill + 1)", "fill", "bits", True),
    "forward, grid: the flag of one block": Fault(COMMON, "flags(slot) + rank,", "flags(slot),", "bits", True),
    "forward, grid: no wait for what is collected": Fault(FORWARD, "simt::collected();", "", "bits", grid=True),
    "forward, grid: one buffer": Fault(COMMON, "(2 * tile(slot) + buffer)", "(2 * tile(slot))", "bits", grid=True),
    "backward, grid: no wait for dh": Fault(
        BACKWARD, "if (kGrid && now.i > 0) global().await(now.slot, now.i - 1);", "", "bits", grid=True
    ),
    "backward, grid: one buffer": Fault(
        BACKWARD, "global().buffer(slot, buffer)", "global().buffer(slot, 0)", "bits", True
    ),
    "backward, grid: no signal": Fault(
        BACKWARD, "if constexpr (kGrid) global().signal(now.slot);", "", "deadlock", grid=True
    ),
    "backward, grid: steps read before they are known": Fault(
        BACKWARD, "simt::sync_threads();  // all know the steps", "", "", grid=True
    ),
}


@pytest.fixture(scope="module")
def layer(tmp_path_factory) -> Path:
    return host_layer(tmp_path_factory.mktemp("host"))


def built(folder: Path, csrc: Path, layer: Path, fault: Fault) -> Library:
    """The walk that the fault is in."""
    return Library(build(folder / f"{fault.file}.so", csrc, layer, fault.file == BACKWARD, fault.grid))


def caught(library: Library, case: Case, fault: Fault) -> set[str]:
    """How the fault shows: "bits", or the words of errors."""
    whole = case.forward()
    gradients = case.backward(whole)
    shown = set()
    for schedule in SCHEDULES:
        if fault.file != BACKWARD:
            (error, found), wanted = library.forward(case, schedule), whole
        else:
            (error, found), wanted = library.backward(case, whole, schedule), gradients
        if error:
            shown.add(error)
        elif not all(torch.equal(found[name], wanted[name]) for name in found):
            shown.add("bits")
        if any(fault.caught_as in how for how in shown):
            break
    return shown


@contextlib.contextmanager
def exchanging(grid: bool) -> Iterator[Case]:
    """Clusters of 8 blocks, with two tiles of 5 columns each, or a grid of 10, K padded, units past H."""
    with granted({}, 10) if grid else granted({8: 3}):
        yield Case("bf16", 76, [5] * 8 + [4] * 5 + [3] * 4 + [2] * 3 + [1] * 7)


@pytest.mark.parametrize("grid", [False, True])
def test_the_whole_kernel_shows_nothing(tmp_path, layer, grid):
    with exchanging(grid) as case:
        for file in (FORWARD, BACKWARD):
            none = Fault(file, "", "", "", grid)
            assert caught(built(tmp_path, CSRC, layer, none), case, none) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(tmp_path, layer, name):
    fault = FAULTS[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / fault.file
    text = source.read_text()
    assert text.count(fault.whole) == 1, f"{fault.file} should have one {fault.whole!r}"
    source.write_text(text.replace(fault.whole, fault.broken))
    library = built(tmp_path, tmp_path / "csrc", layer, fault)
    with exchanging(fault.grid) as case:
        shown = caught(library, case, fault)
    assert any(fault.caught_as in how for how in shown), f"{name}: {shown or 'nothing showed'}"
