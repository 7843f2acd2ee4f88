"""The benchmark's protocol, and that every figure in the README comes from a recorded run."""

import json

import pytest
import torch

from benchmarks import compare, environment, memory


def test_readme_table_is_the_recorded_one():
    results = compare.recorded()
    assert results, "no recorded run under benchmarks/results"
    text = compare.README.read_text()
    begin, end = (text.index(marker) for marker in compare.MARKERS)
    assert text[begin + len(compare.MARKERS[0]) : end].strip() == compare.render(results).strip()


def test_readme_scores_are_the_recorded_ones():
    record = json.loads((compare.ROOT / "results" / "translator-tatoeba.json").read_text())
    text = compare.README.read_text()
    for name, signature in (("bleu", "bleu_signature"), ("chrf", "chrf_signature")):
        assert f"{record[name]:.2f}  {record[signature]}" in text
    assert f"{record['training']['seconds'] / 60:.0f} minutes on one" in text
    assert f"{record['training']['sentences_per_second']:.0f} sentences a second" in text


def test_a_wrong_result_stops_the_clock(monkeypatch):
    monkeypatch.setattr(compare, "SECONDS_PER_ROW", 0.0)
    right = torch.ones(3)
    assert compare.measure(lambda: right, lambda: right.clone())["pairs"] >= compare.FEWEST_PAIRS
    with pytest.raises(AssertionError):
        compare.measure(lambda: right + 0.1, lambda: right)


@pytest.mark.parametrize("mode", compare.MODES)
@pytest.mark.parametrize(
    "case", [compare.Case(4, 3, 8), compare.Case(4, 3, 8, packed=True), compare.Case(4, 3, 8, P=4)], ids=str
)
def test_both_sides_compute_the_same(case, mode):
    x, theirs, ours = compare.build(case)
    torch.testing.assert_close(compare.task(ours, x, mode)(), compare.task(theirs, x, mode)())
    trained = mode == "forward+backward"
    assert (ours.weight_hh_l0.grad is not None) == trained == (theirs.weight_hh_l0.grad is not None)


def test_a_run_has_a_row_for_every_case_and_the_table_a_line_for_every_group(monkeypatch):
    monkeypatch.setattr(compare, "SECONDS_PER_ROW", 0.0)
    small = compare.Case(3, 2, 8)
    groups = {"dense": [small, small._replace(B=1)], "bf16, packed": [small._replace(packed=True, dtype="bfloat16")]}
    monkeypatch.setattr(compare, "GROUPS", groups)
    monkeypatch.setattr(compare, "MEMORY", [])
    threads = torch.get_num_threads()
    try:
        result = json.loads(json.dumps(compare.run(1)))
    finally:
        torch.set_num_threads(threads)
    assert [(row["group"], row["B"], row["mode"]) for row in result["rows"]] == [
        (group, case.B, mode) for group, cases in groups.items() for case in cases for mode in compare.MODES
    ]
    assert all(row["choice"].startswith("cpu:") and row["ratio"] > 0 for row in result["rows"])
    assert result["peak_gflops_of_a_core"] is None or result["peak_gflops_of_a_core"] > 1
    lines = compare.render([result]).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == list(groups)


def test_peak_memory_is_that_of_the_shape():
    """A hundred thousand rows of 64 hidden units: gates, cells and outputs are 100 MB at least, and not a gigabyte."""
    found = memory.peak_memory(compare.Case(1000, 100, 64))
    assert all(100 < megabytes < 1000 for megabytes in found.values())


def test_a_record_names_machine_versions_and_commit():
    found = environment.describe()
    assert found["cpu"] and found["torch"] == torch.__version__ and found["commit"] != ""
