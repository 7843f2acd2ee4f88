"""``auto`` leaves to torch what torch was measured to do faster, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lstm_fast
from lstm_fast import measured
from lstm_fast._C import CPU_INSTRUCTION_SETS
from lstm_fast.bench.cases import Case

CPU = f"a CPU with {CPU_INSTRUCTION_SETS[-1]}"
ABOUT = {"date": "2026-01-01", "commit": "abc", "cpu": CPU, "torch": "2.13.0", "threads": 1, "device": "cpu"}


def row(
    case: Case, mode: str, low: float, high: float, choice: str = "cpu: as asked", ms: float = 1e9
) -> dict[str, Any]:
    return {
        **case._asdict(),
        "mode": mode,
        "choice": choice,
        "rounds": 6,
        "rivals": {"torch": {"ms": ms, "ratio_low": low, "ratio_high": high}},
    }


users_table = measured.users_table  # which tests stay away from


def test_a_users_table_lies_in_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert users_table() == Path("/elsewhere/lstm_fast/measured.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert users_table() == Path("/home/someone/.cache/lstm_fast/measured.json")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes runs' rows as the user's table."""
    monkeypatch.setattr(measured, "users_table", lambda: tmp_path / "new" / "measured.json")
    caches = (
        measured.place,
        measured._rows,
        measured.matters,
        measured.covers,
        measured.torch_is_faster,
    )

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()

    def write(*runs: list[dict[str, Any]]) -> None:
        path = measured.users_table()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured.table_from([{**ABOUT, "rows": rows} for rows in runs])))
        forget()

    forget()
    yield write
    forget()


CELL = Case(1, 4, 16, cell=True)


def call(case: Case, trains: bool = False, kind: str = "cell") -> measured.Call:
    return measured.Call(measured.place(torch.device("cpu")), case.dtype, kind, trains, case.T, case.B, case.H)


def test_torch_takes_a_call_that_it_was_faster_in(tables: Any) -> None:
    tables([row(CELL, "inference", 0.6, 0.7), row(CELL, "forward+backward", 1.1, 1.2)])
    cell, x = lstm_fast.LSTMCell(16, 16), torch.randn(4, 16)
    with torch.no_grad():
        assert lstm_fast.explain(cell, x).startswith("torch: cpu: torch's own took 0.70 of this kernel's time")
        theirs = torch.nn.LSTMCell.forward(cell, x)
        assert all(torch.equal(a, b) for a, b in zip(cell(x), theirs, strict=True))
    assert lstm_fast.explain(cell, x).startswith("cpu:")
    assert lstm_fast.explain(lstm_fast.LSTM(16, 16), x).startswith("cpu:")
    named = lstm_fast.LSTMCell(16, 16, backend="cpu")
    with torch.no_grad():
        assert lstm_fast.explain(named, x) == "cpu: asked for"


def test_a_table_of_another_device_leaves_the_shipped_one(tables: Any) -> None:
    shipped = measured.Call("cpu avx512_bf16", "float32", "cell", True, 1, 1, 128)
    tables([])
    assert measured.torch_is_faster(shipped) is not None
    table = measured.table_from(
        [{**ABOUT, "device": "cuda", "capability": "9.0", "rows": [row(CELL, "inference", 0.5, 0.6)]}]
    )
    measured.users_table().write_text(json.dumps(table))
    measured._rows.cache_clear()
    assert measured._rows()["cuda 9.0", "float32", "cell", False] and measured.torch_is_faster(shipped)
    for cpu, remains in (("a CPU with another set", True), ("a CPU with avx512_bf16", False), ("a CPU", False)):
        table = measured.table_from([{**ABOUT, "cpu": cpu, "rows": [row(CELL, "inference", 0.5, 0.6)]}])
        measured.users_table().write_text(json.dumps(table))
        measured._rows.cache_clear()
        measured.torch_is_faster.cache_clear()
        assert (measured.torch_is_faster(shipped) is not None) == remains


def test_the_nearest_shape_decides_within_reach(tables: Any) -> None:
    tables([row(CELL, "inference", 0.6, 0.7), row(CELL._replace(B=64), "inference", 1.1, 1.2)])
    assert measured.torch_is_faster(call(CELL._replace(B=8))) is not None
    assert measured.torch_is_faster(call(CELL._replace(B=32))) is None
    assert measured.torch_is_faster(call(CELL._replace(B=1, H=8))) is None  # three factors of two away
    assert measured.torch_is_faster(call(CELL._replace(B=0))) is None
    assert measured.torch_is_faster(call(CELL, kind="layer")) is None
    assert measured.covers(call(CELL._replace(B=32))) and measured.covers(call(CELL._replace(B=256)))
    assert not measured.covers(call(CELL._replace(B=1, H=8))) and not measured.covers(call(CELL._replace(B=0)))


def test_every_run_and_the_whole_interval_have_to_agree(tables: Any) -> None:
    tables([row(CELL, "inference", 0.6, 0.7)], [row(CELL, "inference", 0.9, 1.1)])
    assert measured.torch_is_faster(call(CELL)) is None
    tables([row(CELL, "inference", 0.6, 0.7)], [row(CELL, "inference", 0.8, 0.9)])
    assert "took 0.90" in str(measured.torch_is_faster(call(CELL)))


def test_what_handing_over_takes_counts(tables: Any) -> None:
    """A call of microseconds is over before torch has begun."""
    tables([row(CELL, "inference", 0.6, 0.7, ms=0.015), row(CELL, "forward+backward", 0.6, 0.7, ms=0.15)])
    assert measured.torch_is_faster(call(CELL)) is None
    assert measured.torch_is_faster(call(CELL, trains=True)) is not None


def test_rows_that_say_nothing_of_the_kernel_are_left_out(tables: Any) -> None:
    """Those where torch ran already, those of a kind that no call is looked up by, and those that others disturbed or
    that have too few rounds for an interval."""
    rows = [
        row(CELL, "inference", 0.5, 0.5, "torch: it was faster"),
        row(CELL, "forward", 0.5, 0.5),
        row(Case(8, 4, 16, layers=2), "inference", 0.5, 0.5),
        row(Case(8, 4, 16, bidirectional=True), "inference", 0.5, 0.5),
        row(Case(8, 4, 16, last=True), "forward+backward", 0.5, 0.5),
        row(Case(8, 4, 16, 1), "inference", 0.5, 0.5),
        {**row(CELL, "inference", 0.5, 0.5), "disturbed": True},
        {**row(CELL, "inference", 0.5, 0.5), "rounds": 5},
    ]
    assert measured.table_from([{**ABOUT, "rows": rows}])["rows"] == []
    calm = {**row(CELL, "inference", 0.5, 0.5), "disturbed": False}
    square = row(Case(8, 4, 16, 16), "inference", 0.5, 0.5)
    assert len(measured.table_from([{**ABOUT, "rows": [calm, square]}])["rows"]) == 2


HERE = [f"cpu {CPU_INSTRUCTION_SETS[-1]}", "float32", "layer", True]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"rows": [[1]]}'),
        *(json.dumps({"rows": [[*HERE, *row]]}) for row in (["3", 4, 16, 0.5, 0.5], [3, 4, 0, 0.5, 0.5])),
        *(json.dumps({"rows": [[*HERE, 3, 4, 16, 0.5, high]]}) for high in ("0.5", None, [0.5], float("nan"))),
    ],
)
def test_a_broken_table_of_the_users_is_passed_over(text: str, tables: Any) -> None:
    tables([])
    measured.users_table().write_text(text)
    assert lstm_fast.explain(lstm_fast.LSTM(16, 16), torch.randn(3, 4, 16)).startswith("cpu:")


def test_shapes_of_every_form_are_found(tables: Any) -> None:
    slower = [row(Case(6, 4, 16), "inference", 0.5, 0.6), row(Case(6, 4, 16, packed=True), "inference", 0.5, 0.6)]
    tables(slower)
    x = torch.randn(6, 4, 16)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [6, 4, 4, 1])
    first = lstm_fast.LSTM(16, 16, batch_first=True)
    with torch.no_grad():
        assert "T=6 B=4 H=16" in lstm_fast.explain(lstm_fast.LSTM(16, 16), x)
        assert "T=6 B=4 H=16" in lstm_fast.explain(first, x.transpose(0, 1))
        assert "T=6 B=4 H=16" in lstm_fast.explain(lstm_fast.LSTM(16, 16), packed)
        assert lstm_fast.explain(lstm_fast.LSTM(16, 16), x[:, 0]).startswith("torch:")  # B = 1 is two factors away
        assert lstm_fast.explain(lstm_fast.LSTM(16, 16), x[:2, 0]).startswith("cpu:")
        assert lstm_fast.explain(lstm_fast.LSTM(16, 16, proj_size=8), x).startswith("cpu:")


def test_the_shipped_table_is_what_the_recorded_runs_say() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    names = [
        f"{grid}-{n}t-{place}.json"
        for place in ("avx512", "avx2", "amx", "avx512-intel")
        for grid in ("cpu", "cells")
        for n in (1, 2)
    ]
    runs = [json.loads((results / name).read_text()) for name in names]
    assert json.loads(measured.SHIPPED.read_text()) == measured.table_from(runs)
