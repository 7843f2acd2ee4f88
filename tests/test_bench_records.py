"""What a record of the benchmark has to be: what isn't one is refused in one sentence, and older ones are read."""

import re
from pathlib import Path
from typing import Any

import pytest

from lstm_fast.bench import report
from tests.bench_case import SMALL, lonely, row, run, without, write


def test_runs_from_before_there_were_classifiers_are_read(tmp_path: Path) -> None:
    older = without(row(), "last")
    found = report.load(
        write(tmp_path / "run.json", run(older, failed=[{**without(SMALL._asdict(), "last"), "why": "?"}]))
    )
    assert "T4 B3 H8 float32" in report.table(found)
    assert report.compare(found, run(row()))[1] is False


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    recorded = run(row(), lonely(), failed=[{"group": "dense", **SMALL._asdict(), "why": "no memory"}])
    assert report.load(write(tmp_path / "run.json", recorded)) == recorded


def test_an_older_runs_rows_stand_beside_the_limit_of_today(tmp_path: Path) -> None:
    """2 * 12 * 512 operations take 150 us at AMX's quarter of 327.68 Mflop/s, which older runs didn't count."""
    limits = {"gflops": {"float32": 0.02, "bfloat16": 0.32768}, "bandwidth": [[2**30, 1.0]], "exchange_us": 0.0}
    taken = row(gflops=2 * 12 * 512 / 1e6, share=3.0)
    for cpu, ms, what in ("A CPU with amx", 0.15, "flops"), ("A CPU with avx2", 0.6144, "flops"):
        found = report.load(write(tmp_path / "run.json", run(taken, cpu=cpu, limits=limits)))["rows"][0]
        assert (found["limit_ms"], found["share"], found["limit"]) == (pytest.approx(ms), pytest.approx(ms), what)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([], "it is not a JSON object"),
        (without(run(), "rows"), "it has no 'rows'"),
        (run(device="cuda"), "it has no 'gpu'"),
        (run(device="cuda", gpu="A GPU"), "it has no 'capability'"),
        (run(rows={}), "its 'rows' is not a list"),
        (run(skipped=["haste"]), "its 'skipped' is not a JSON object"),
        (run(failed=[{}]), "its failed row 1 has no 'T'"),
        (run(row(), 3), "its row 2 is not a JSON object"),
        (run(row(), without(row(), "dtype")), "its row 2 has no 'dtype'"),
        (run(row(ours={"ms": 1.0, "p20": 1.0})), "'ours' in its row 1 has no 'p80'"),
        (run(commit=None), "its 'commit' should be a text, got: None"),
        (run(threads="2"), "its 'threads' should be a number above 0, got: '2'"),
        (run(limits={"gflops": {}}), "its 'limits' has no 'bandwidth'"),
        (run(row(gflops=None)), "its row 1's 'gflops' should be a number above 0, got: None"),
        *(
            (
                run(row(ours={"ms": ms, "p20": 1.0, "p80": 1.0})),
                f"its row 1's 'ms' should be a number above 0, got: {ms}",
            )
            for ms in (None, 0, float("nan"))
        ),
        (run(row(best_rival="haste")), "'rivals' in its row 1 has no 'haste'"),
        (run(row(rivals={"torch": {"ms": 1.0, "ratio": 1.0}})), "'torch' in its row 1 has no 'ratio_low'"),
    ],
)
def test_another_file_is_refused_with_what_is_wrong(found: object, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", found)
    with pytest.raises(report.ReportError) as caught:
        report.load(path)
    assert str(caught.value) == f"{path} is not a run that `lstm-fast bench` recorded: {why}"


LIMITS = {"gflops": {"float32": 1.0, "bfloat16": 1.0}, "bandwidth": [[2**30, 1.0]], "exchange_us": 0.0}


@pytest.mark.parametrize(
    "found",
    [
        run(row(), limits={**LIMITS, "bandwidth": []}),
        run(row(), limits={**LIMITS, "gflops": None}),
        run(row(us_per_step="x")),
        run(row(memory_mb=5)),
        run(row(), passes=[{}]),
        run(row(), startup={"import_torch_ms": 1.0}),
    ],
)
def test_values_that_are_looked_at_late_are_refused_in_one_sentence_too(found: object, command: Any) -> None:
    write(Path("good.json"), run(row()))
    write(Path("bad.json"), found)
    status, out, error = command("bench", "report", "bad.json", "good.json")
    assert status == 2 and "T4 B3 H8 float32" in out  # the other's table
    assert error.startswith(
        "lstm-fast: bad.json is not a run that `lstm-fast bench` recorded: its values can't be used ("
    )
    assert error.count("\n") == 1


def test_nor_are_such_runs_compared_or_made_a_table(command: Any) -> None:
    write(Path("a.json"), run(row()))
    write(Path("b.json"), run(row(mode=[1], rounds=6, choice=3)))
    for arguments in (("compare", "a.json", "b.json"), ("tune", "a.json", "b.json", "--out", "table.json")):
        status, _, error = command("bench", *arguments)
        assert (
            status == 2 and "a.json or b.json is not a run that `lstm-fast bench` recorded: its values can't" in error
        )
    assert not Path("table.json").exists()


def test_runs_that_do_not_go_together_are_told_so_by_the_command(command: Any) -> None:
    write(Path("a.json"), run(row()))
    write(Path("b.json"), run(row(mode="forward")))
    status, _, error = command("bench", "compare", "a.json", "b.json")
    expected = "the two runs have no row in common: no case is measured in the same mode in both"
    assert (status, error) == (2, f"lstm-fast: {expected}\n")


def test_limits_that_are_new_to_this_version_are_passed_over(tmp_path: Path) -> None:
    found = report.load(write(tmp_path / "run.json", run(row(), limits={**LIMITS, "launch_us": 1.0})))
    assert found["rows"][0]["limit_ms"] > 0


@pytest.mark.parametrize("content", [b'{"rows": [', b"\xff", b""])
def test_a_file_that_is_cut_short_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(
        report.ReportError, match=re.escape(f"{path} is not a run that `lstm-fast bench` recorded: it is not JSON (")
    ):
        report.load(path)
