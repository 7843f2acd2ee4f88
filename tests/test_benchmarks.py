"""The benchmark's protocol, and that every figure in the README comes from a recorded run."""

import json

import pytest
import torch

from benchmarks import compare, environment


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
    assert compare.measure(lambda: right, lambda: right.clone())["pairs"] >= 20
    with pytest.raises(AssertionError):
        compare.measure(lambda: right + 0.1, lambda: right)


@pytest.mark.parametrize("mode", compare.MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_both_sides_compute_the_same(packed, mode):
    x, theirs, ours = compare.build(4, 3, 8, packed)
    torch.testing.assert_close(compare.task(ours, x, mode)(), compare.task(theirs, x, mode)())
    trained = mode == "forward+backward"
    assert (ours.weight_hh_l0.grad is not None) == trained == (theirs.weight_hh_l0.grad is not None)


def test_a_record_names_machine_versions_and_commit():
    found = environment.describe()
    assert found["cpu"] and found["torch"] == torch.__version__ and found["commit"] != ""
