"""What reports say of recorded runs, number by number."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lstm_fast.bench import report
from lstm_fast.bench.cases import Case
from tests.bench_case import SMALL, lonely, row, run, write


def test_table_has_a_line_a_row_and_geometric_means() -> None:
    first, second = row(ratio=1.0), row(SMALL._replace(B=64, packed=True), ratio=4.0, ms=12.5)
    other = row(SMALL._replace(dtype="bfloat16"), ratio=0.5, group="bf16", mode="forward")
    lines = report.table(run(first, second, other, lonely(group="alone"))).splitlines()
    assert lines[0] == "test: 2026-11-23, 1 thread, A CPU, torch 2.13.0, commit 012345678"
    assert lines[2] == "dense"
    assert lines[3].split("  ")[1].strip() == "case" and lines[3].endswith("of the limit")
    assert re.split(" {2,}", lines[5].strip()) == [
        *("T4 B64 H8 packed float32", "inference", "12.5", "torch", "50", "4.00×", "3.90..4.10"),
        *("3125", "200", "3", "75 % flops"),
    ]
    assert lines[6] == "  geometric mean, inference: 2.00× (1.00..4.00)"
    assert lines[8] == "bf16"
    assert lines[11] == "  geometric mean, forward: 0.50× (0.50..0.50)"
    assert lines[13] == "alone"
    assert re.split(" {2,}", lines[15].strip()) == [
        "T4 B3 H8 float32",
        "inference",
        "1",
        *"––––",
        "250",
        "200",
        "3",
        "–",
    ]
    assert len(lines) == 16
    rows = [line for line in lines if line.startswith("  T4")]
    assert len({line.index("inference" if "inference" in line else "forward") for line in rows}) == 1


def test_table_names_the_rows_that_are_torchs_own() -> None:
    text = report.table(run(row(), row(mode="forward", choice="torch: cpu: torch's own takes 0.8 of its time")))
    (line,) = (line for line in text.splitlines() if "left to torch" in line)
    assert line == f"  left to torch: {SMALL.label()}, forward: cpu: torch's own takes 0.8 of its time"


def test_table_names_the_best_rival_and_its_ratio() -> None:
    found = row()
    found["rivals"]["haste"] = {
        **found["rivals"]["torch"],
        "ms": 1.5,
        "ratio": 1.5,
        "ratio_low": 1.4,
        "ratio_high": 1.6,
    }
    found.update(best_rival="haste", ratio=1.5)
    text = report.table(run(found, device="cuda", gpu="A GPU"))
    assert re.search(r"haste +1\.5 +1\.50× +1\.40\.\.1\.60", text)
    assert "A GPU" in text and "A CPU" not in text


def test_table_says_what_the_machine_could_do_and_what_starting_takes() -> None:
    limits = {"gflops": {"float32": 270.0}, "bandwidth": [[2**19, 180.0], [2**25, 50.0]], "exchange_us": 0.25}
    names = ("import_lstm_fast_ms", "import_torch_ms", "first_call_ms", "first_call_torch_ms")
    startup = dict(zip(names, (15.0, 700.0, 2.0, 25.0), strict=True))
    memory = row(Case(9, 8, 16), mode="forward+backward", memory_mb={"ours": 10.0, "torch": 20.0}, disturbed=True)
    states = {"clocks": ["1980 MHz", "2619 MHz"], "load": 0.5, "after": {"clocks": [], "load": 1.25}}
    passes = [{"limits": {"gflops": {"float32": rate, "float64": rate / 2}}} for rate in (270.0, 180.0)]
    lines = report.table(
        run(memory, limits=limits, passes=passes, rounds_left_out=10, startup=startup, **states)
    ).splitlines()
    assert lines[1:7] == [
        "limits: float32 270 GFLOP/s; 180 GB/s to 0.5 MiB, 50 GB/s to 32 MiB; 0.25 µs to meet",
        "GFLOP/s before each pass: float32 270, 180; float64 135, 90",
        "10 of 40 rounds left out: the machine was slowed down",
        "in 1 of 1 rows others slowed the machine down all the while",
        "clocks 1980 MHz, 2619 MHz, load 0.50; after the last row not told, load 1.25",
        "import 15 ms after torch's 700; first training pass 2 ms, torch's 25",
    ]
    assert lines[-1] == "  peak memory of T9 B8 H16 float32, forward+backward: ours 10 MB, torch 20 MB"


def test_table_says_what_was_not_measured() -> None:
    whole = {"group": "dense", **SMALL._asdict(), "why": "ours differs from torch"}
    recorded = run(skipped={"haste": "not installed"}, failed=[whole, {**whole, "mode": "forward", "why": "no"}])
    assert report.table(recorded).splitlines()[-4:] == [
        "",
        "skipped haste: not installed",
        "failed T4 B3 H8 float32: ours differs from torch",
        "failed T4 B3 H8 float32, forward: no",
    ]


def two_runs(**other: Any) -> list[dict[str, Any]]:
    """With two threads and with one; the group "late" is only in the second."""
    trained = [row(ratio=ratio, mode="forward+backward") for ratio in (1.0, 2.0, 4.0)]
    return [
        run(row(ratio=3.0), threads=2, **other),
        run(row(ratio=1.0), row(ratio=4.0), *trained, lonely(), row(group="late"), row(ratio=9.0, mode="forward")),
    ]


def test_readme_table() -> None:
    assert report.readme_table(two_runs()).splitlines() == [
        "How many times as long torch.nn.LSTM takes as lstm_fast.LSTM: the geometric mean, and the least and the most "
        "of a group's shapes, each the median of interleaved pairs. A CPU, torch 2.13.0, commit 012345678.",
        "",
        "| | inference, 1 thread | inference, 2 threads | forward+backward, 1 thread | forward+backward, 2 threads |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 2.00× (1.00..4.00) | 3.00× (3.00..3.00) | 2.00× (1.00..4.00) | – |",
        "| late | 2.00× (2.00..2.00) | – | – | – |",
    ]


def test_readme_tells_what_others_disturbed() -> None:
    one, two = run(row(disturbed=True), row(disturbed=False)), run(row(disturbed=True), row(disturbed=True), threads=2)
    for runs, said in (
        ([two, one], " Of 4 shapes and modes others disturbed all rounds of 1 on 1 thread, of 2 on 2 threads."),
        ([one], " Of 2 shapes and modes others disturbed all rounds of 1 on 1 thread."),
    ):
        assert report.readme_table(runs).splitlines()[0].endswith("commit 012345678." + said)


def test_readme_ratios_are_those_against_torch() -> None:
    found = row(ratio=2.0)
    found["rivals"]["haste"] = {**found["rivals"]["torch"], "ratio": 1.5}
    text = report.readme_table([run({**found, "best_rival": "haste", "ratio": 1.5}, commit="0123456789a+changes")])
    assert text.endswith("| dense | 2.00× (2.00..2.00) | – |\n")
    assert "commit 012345678+changes." in text


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"commit": "fedcba"}, "commit (0123456789abcdef, fedcba)"),
        ({"cpu": "B CPU", "torch": "2.12.0"}, "machine (A CPU, B CPU) and torch (2.12.0, 2.13.0)"),
        ({"device": "cuda", "gpu": "A GPU"}, "machine (A CPU, A GPU)"),
    ],
)
def test_mixed_runs_are_refused(other: dict[str, str], what: str) -> None:
    with pytest.raises(report.ReportError) as caught:
        report.readme_table(two_runs(**other))
    assert str(caught.value) == f"a table needs runs of one machine, torch and commit; they differ in {what}"


def test_readme_keeps_all_but_the_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = report.MARKERS
    readme.write_bytes(f"# Über\r\n{begin}\nold\n{end}\n\nmore {end}\n".encode())
    for _ in range(2):
        report.write_readme(readme, two_runs())
        table = report.readme_table(two_runs())
        assert readme.read_bytes().decode() == f"# Über\r\n{begin}\n{table}{end}\n\nmore {end}\n"
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize("text", ["no marker", report.MARKERS[0], "\n".join(reversed(report.MARKERS))])
def test_a_readme_without_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(report.ReportError, match=r"README\.md has no table to replace"):
        report.write_readme(readme, two_runs())
    assert readme.read_text() == text


def test_runs_that_are_refused_leave_the_readme_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(report.MARKERS))
    with pytest.raises(report.ReportError, match="differ in commit"):
        report.write_readme(readme, two_runs(commit="fedcba"))
    assert readme.read_text() == "\n".join(report.MARKERS) and list(tmp_path.iterdir()) == [readme]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save: Callable[..., None] = Figure.savefig

    def spy(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def grid() -> list[dict[str, Any]]:
    """Dense rows at T 25 and 128, B 1 and 8, H 64 and 256, without one of them; at T 1 for B = 1 only; and others."""
    shapes = [*product((25, 128), (1, 8), (64, 256)), (1, 1, 64), (1, 1, 256)]
    shapes.remove((128, 8, 256))
    rows = [row(Case(*shape), ratio=shape[1] / 2, ms=shape[0] * shape[1] * shape[2] / 1e4) for shape in shapes]
    return [*rows, row(Case(512, 512, 512, packed=True)), row(Case(512, 512, 512, layers=2))]


def test_heat_maps(tmp_path: Path, figures: list[Figure]) -> None:
    paths = report.plots(run(*grid()), tmp_path / "new", "name")
    assert [path.name for path in paths] == [f"name-{kind}-inference-float32.png" for kind in ("ratio", "time")]
    assert all(min(imread(path).shape[:2]) > 300 for path in paths)
    *panels, bar = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["T = 25", "T = 128"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [
        ["0.50", "0.50", "4.00", "4.00"],
        ["0.50", "0.50", "4.00"],
    ]
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "256"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "8"]
        norm = axes.images[0].norm
        assert norm(1.0) == pytest.approx(0.5) and norm(4.0) == pytest.approx(1) and norm(0.5) == pytest.approx(0.25)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.25", "1.00", "4.00"]


def test_two_runs_plots_lie_side_by_side(command: Callable[..., tuple[int, str, str]]) -> None:
    for path in (Path("one.json"), Path("two.json"), Path("other/one.json")):
        path.parent.mkdir(exist_ok=True)
        write(path, run(*grid()))
    status, out, _ = command("bench", "report", "one.json", "two.json", "--plots", "new")
    names = [f"{name}-{kind}-inference-float32.png" for name in ("one", "two") for kind in ("ratio", "time")]
    assert status == 0 and sorted(path.name for path in Path("new").iterdir()) == names
    assert all(name in out for name in names)
    status, out, error = command("bench", "report", "one.json", "other/one.json", "--plots", "more")
    assert (status, out) == (2, "") and "should differ, got: one, one" in error and not Path("more").exists()


def test_a_bad_file_hides_no_other(command: Callable[..., tuple[int, str, str]]) -> None:
    Path("cut.json").write_text("{")
    write(Path("whole.json"), run(row()))
    Path("README.md").write_text("\n".join(report.MARKERS))
    status, out, error = command("bench", "report", "cut.json", "missing.json", "whole.json", "--readme", "README.md")
    assert status == 2 and SMALL.label() in out
    assert error.startswith("lstm-fast: cut.json is not a run") and len(error.splitlines()) == 1
    assert Path("README.md").read_text() == "\n".join(report.MARKERS)


def test_titles_are_within_their_figures(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [row(Case(25, B, H)) for B in (1, 8) for H in (64, 256)]
    report.plots(run(*rows, cpu="Intel(R) Xeon(R) Processor with avx512_slow_bf16"), tmp_path, "name")
    assert len(figures) == 2
    for figure in figures:
        figure.draw_without_rendering()
        title = figure.texts[0].get_window_extent()
        assert title.x0 > 0 and title.x1 < figure.bbox.x1


def test_curves(tmp_path: Path, figures: list[Figure]) -> None:
    """B = 1 serves six points over T; both T serve both B for H = 64, T = 25 for H = 256 too."""
    report.plots(run(*grid()), tmp_path, "name")
    over_steps, over_batches = figures[1].axes
    assert (over_steps.get_title(), over_steps.get_xlabel()) == ("B = 1", "T")
    assert (over_batches.get_title(), over_batches.get_xlabel()) == ("T = 25", "B")
    assert {axes.get_xscale() + axes.get_yscale() for axes in figures[1].axes} == {"loglog"}
    ours, torch, limit = over_steps.lines[:3]  # of H = 64
    assert list(ours.get_xdata()) == [1, 25, 128]
    assert list(ours.get_ydata()) == pytest.approx([0.0064, 0.16, 0.8192])
    assert list(torch.get_ydata()) == pytest.approx([0.0032, 0.08, 0.4096])
    assert list(limit.get_ydata()) == pytest.approx([0.0048, 0.12, 0.6144])
    assert [line.get_linestyle() for line in (ours, torch, limit)] == ["-", "--", ":"]
    assert len({line.get_color() for line in (ours, torch, limit)}) == 1
    assert over_steps.lines[3].get_color() != ours.get_color()


def test_bands_show_the_limit_of_most_rows(tmp_path: Path, figures: list[Figure]) -> None:
    limits = {1: ["exchange", "exchange", "flops"], 4: ["flops", "bytes", "bytes"], 16: [None, None, None]}
    rows = [
        row(Case(T, 1, H), limit=limit)
        for T, found in limits.items()
        for H, limit in zip((8, 16, 32), found, strict=True)
    ]
    assert len(report.plots(run(*rows), tmp_path, "name")) == 1  # of one B there is no heat map
    first, second = figures[0].axes[0].patches
    assert (first.get_x(), first.get_x() + first.get_width()) == pytest.approx((1 / 1.2, 2))
    assert (second.get_x(), second.get_x() + second.get_width()) == pytest.approx((2, 8))
    legend = figures[0].legends[0]
    colors = {patch.get_label(): patch.get_facecolor() for patch in legend.get_patches()}
    assert [each.get_facecolor() for each in (first, second)] == [colors["limit: exchange"], colors["limit: bytes"]]


def test_nothing_to_plot_writes_nothing(tmp_path: Path) -> None:
    alone = [lonely(), row(SMALL._replace(packed=True)), row(SMALL._replace(packed=True, B=2, H=2))]
    assert report.plots(run(*alone), tmp_path / "new", "name") == []
    assert not (tmp_path / "new").exists()


def test_missing_rivals_and_limits_leave_curves(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [lonely(T=T, B=B, H=H) for T in (1, 2) for B in (1, 2) for H in (8, 16)]
    assert [path.name for path in report.plots(run(*rows), tmp_path, "name")] == ["name-time-inference-float32.png"]
    assert len(figures[0].axes) == 2 and not figures[0].axes[0].patches


def test_each_mode_dtype_and_input_has_its_own_plots(tmp_path: Path) -> None:
    rows = [
        {**each, "mode": mode, "dtype": dtype, "I": inputs}
        for each in grid()
        for mode, dtype, inputs in [
            ("forward", "float32", 0),
            ("inference", "bfloat16", 0),
            ("inference", "bfloat16", 1),
        ]
    ]
    names = [path.name for path in report.plots(run(*rows, threads=2), tmp_path, "name")]
    assert names == [
        f"name-{kind}-{what}.png"
        for what in ("forward-float32", "inference-bfloat16", "inference-bfloat16-I1")
        for kind in ("ratio", "time")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_slower_rows_are_found_and_noisy_ones_are_not() -> None:
    cases = [SMALL._replace(H=H) for H in (1, 2, 3, 4)]
    old = run(*(row(case) for case in cases), row(SMALL._replace(H=5)))
    noisy = {"ms": 2.0, "p20": 1.1, "p80": 3.0}  # its p20 is the old p80
    times = [1.5, 3.0, 2.0, 1 / 9]
    new = run(*(row(case, ms=ms, ratio=3 / ms, group="renamed") for case, ms in zip(cases, times, strict=True)))
    new["rows"][2]["ours"] = noisy
    text, slower = report.compare(old, new)
    assert slower
    assert text.splitlines() == [
        "slower: 3.00×  T4 B3 H2 float32, inference: 1 ms, then 3 ms",
        "slower: 1.50×  T4 B3 H1 float32, inference: 1 ms, then 1.5 ms",
        "2 of 4 rows slower; new time / old time: 1.00× (0.11..3.00)",
        "torch in the same rows, new time / old time: 1.50× (1.50..1.50)",
        "rows only in the old run: 1; only in the new: 0",
    ]
    assert "1 of 4 rows slower" in report.compare(old, new, threshold=1.5)[0]
    assert not report.compare(old, new, threshold=3.0)[1]


def test_a_row_is_known_by_case_and_mode() -> None:
    old = run(row(), row(mode="forward"), row(SMALL._replace(dtype="bfloat16")))
    new = run(row(ms=1.01), row(SMALL._replace(packed=True), ms=9.0), row(mode="forward+backward", ms=9.0))
    text, slower = report.compare(old, new)
    assert not slower and text.splitlines() == [
        "0 of 1 rows slower; new time / old time: 1.01× (1.01..1.01)",
        "torch in the same rows, new time / old time: 1.01× (1.01..1.01)",
        "rows only in the old run: 2; only in the new: 2",
    ]
    with pytest.raises(report.ReportError, match="the two runs have no row in common"):
        report.compare(run(row()), run(row(mode="forward")))


def test_rows_that_others_disturbed_are_not_called_slower() -> None:
    calm, other = SMALL, SMALL._replace(H=9)
    old, new = run(row(calm), row(other)), run(row(calm), row(other, ms=9.0, disturbed=True))
    for before, after in (old, new), (new, old):
        text, slower = report.compare(before, after)
        assert not slower and text.splitlines()[-4:] == [
            "0 of 1 rows slower; new time / old time: 1.00× (1.00..1.00)",
            "torch in the same rows, new time / old time: 1.00× (1.00..1.00)",
            "rows only in the old run: 0; only in the new: 0",
            "rows left out, as others disturbed them: 1",
        ]
    with pytest.raises(report.ReportError, match="no row in common that others left alone"):
        report.compare(run(row(other)), run(row(other, disturbed=True)))


@pytest.mark.parametrize(
    ("other", "then"),
    [
        ({"threads": 2}, "A CPU with 2 threads"),
        ({"cpu": "B CPU"}, "B CPU with 1 thread"),
        ({"device": "cuda", "gpu": "A GPU"}, "A GPU with 1 thread"),
    ],
)
def test_comparing_machines_is_said_first(other: dict[str, Any], then: str) -> None:
    text, slower = report.compare(run(row()), run(row(), **other))
    assert text.splitlines()[0] == f"The machines differ: A CPU with 1 thread, then {then}."
    assert not slower
