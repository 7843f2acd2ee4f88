"""The benchmark's protocol: what is counted, what stops the clock, and that nothing measured is lost."""

import collections
import gc
import json
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lstm_fast import files
from lstm_fast.bench import commands, memory, report, rivals, runner, timing
from lstm_fast.bench.cases import GRIDS, MODES, Case
from lstm_fast.bench.limits import Limits
from lstm_fast.bench.timing import FEWEST_OF_A_PASS

SMALL = Case(4, 3, 8)
KINDS = [
    SMALL,
    SMALL._replace(packed=True),
    SMALL._replace(P=4),
    SMALL._replace(layers=2, bidirectional=True),
    SMALL._replace(I=2, dtype="bfloat16"),
    Case(1, 3, 8, cell=True),
    SMALL._replace(last=True),
]
KNOWN = Limits({"float32": 100.0}, [(2**20, 40.0), (2**30, 10.0)], 1.0)


@pytest.mark.parametrize("case", KINDS, ids=Case.label)
def test_weights_are_counted(case: Case) -> None:
    matrices = [p.numel() for name, p in rivals.oracle(case, "cpu").named_parameters() if "weight" in name]
    assert case.weights() == sum(matrices)
    assert case.flops(7, "inference") == 14 * sum(matrices)
    assert case.flops(7, "forward+backward") == 42 * sum(matrices)


def test_grids_hold_what_others_published() -> None:
    assert {(case.T, case.B) for case in GRIDS["flashrnn"]["H = 768, T = 1024"]} >= {(1024, 2), (1024, 256)}
    assert Case(25, 64, 2048) in GRIDS["deepbench"]["training, T = 25"]
    assert all(case.T == 50 for case in GRIDS["haste"]["T = 50"])
    for grid in GRIDS.values():
        cases = [(group, case) for group in grid for case in grid[group]]
        assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", KINDS, ids=Case.label)
def test_all_sides_compute_the_same(case: Case, mode: str) -> None:
    oracle, x = rivals.oracle(case, "cpu"), rivals.make_input(case, "cpu")
    modules = {name: rivals.RIVALS[name].build(case, oracle) for name in ("torch", "reference")}
    modules["ours"] = rivals.ours(case, oracle)
    assert max(runner.check(case, modules, oracle, x).values()) < runner.TOLERANCE[case.dtype]
    outputs = [rivals.task(module, x, mode)() for module in modules.values()]
    assert all(y.requires_grad == (mode != "inference") for y in outputs)
    trained = [all(p.grad is not None for p in module.parameters()) for module in modules.values()]
    assert trained == [mode == "forward+backward"] * 3


def test_training_gives_the_inputs_gradient_too() -> None:
    seen: list[Tensor] = []

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            seen.append(x)
            return (2 * x,)

    for mode in MODES:
        rivals.task(Doubled(), torch.zeros(2, 3), mode)()
    assert [x.requires_grad for x in seen] == [False, True, True]
    assert torch.equal(seen[-1].grad, torch.full((2, 3), 2.0))  # type: ignore[arg-type]
    packed = rivals.make_input(SMALL._replace(packed=True), "cpu")
    leaf, values = rivals.differentiable(packed)
    assert leaf.data is values and values.is_leaf and torch.equal(leaf.batch_sizes, packed.batch_sizes)


def test_a_classifiers_gradients_are_of_the_last_states_alone() -> None:
    case = SMALL._replace(last=True)
    oracle, x = rivals.oracle(case, "cpu"), rivals.make_input(case, "cpu")
    for module in (oracle, rivals.ours(case, oracle)):
        want = torch.autograd.grad(oracle(x)[0][-1].sum(), oracle.parameters())
        assert rivals.task(module, x, "forward+backward", case.last)().shape == (case.T, case.B, case.H)
        for parameter, expected in zip(module.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.usefixtures("quick")
def test_a_classifiers_time_and_memory_are_measured_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, case = [], SMALL._replace(last=True)
    task = rivals.task

    def watched(module: nn.Module, x: Any, mode: str, last: bool = False) -> Any:
        asked.append(last)
        return task(module, x, mode, last)

    monkeypatch.setattr(rivals, "task", watched)
    run(tmp_path / "run.json", {"one": [case]})
    assert asked and all(asked)
    asked.clear()
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["memory", json.dumps(list(case)), "ours", "cpu", "auto", threads])
    memory.main()
    assert asked and all(asked)


@pytest.mark.parametrize("weight", ["weight_hh_l0", "bias_ih_l0"])
def test_a_wrong_result_stops_the_clock(weight: str) -> None:
    oracle, x = rivals.oracle(SMALL, "cpu"), rivals.make_input(SMALL, "cpu")
    ours = rivals.ours(SMALL, oracle)
    with torch.no_grad():
        getattr(ours, weight)[0] += 1e-2
    with pytest.raises(runner.WrongResultError, match=r"ours differs from torch by .* in norm, more than 1e-04"):
        runner.check(SMALL, {"ours": ours}, oracle, x)
    with torch.no_grad():
        getattr(ours, weight)[0] = float("nan")
    with pytest.raises(runner.WrongResultError, match="nan"):
        runner.check(SMALL, {"ours": ours}, oracle, x)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure", lambda *_: KNOWN)
    monkeypatch.setattr(memory, "startup", lambda *_: {})
    monkeypatch.setattr(memory, "peak", lambda *_: {"ours": 1.0, "torch": 2.0})


def run(output: Path, grid: dict[str, list[Case]], stop_at: int | None = None, names: tuple[str, ...] = ("torch",)):
    def progress(done: int, total: int, what: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    return runner.run("test", grid, ["inference", "forward+backward"], names, "cpu", 0.0, output, progress)


@pytest.mark.usefixtures("quick")
def test_a_run_is_written_whole(tmp_path: Path) -> None:
    output = tmp_path / "new" / "run.json"
    record = run(output, {"one": [SMALL], "two": KINDS[1:3]}, names=("torch", "haste"))
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    assert [(row["group"], row["mode"]) for row in record["rows"]] == [
        (group, mode) for group in ("one", "two", "two") for mode in ("inference", "forward+backward")
    ]
    assert record["skipped"] == {"haste": "haste_pytorch is not installed"} and record["failed"] == []
    assert record["after"].keys() == {"clocks", "load"} <= record.keys()
    for row in record["rows"]:
        case = Case(*(row[name] for name in Case._fields))
        assert row["choice"].startswith("cpu:") and row["best_rival"] == "torch"
        assert row["ratio"] == row["rivals"]["torch"]["ratio"] > 0
        assert row["us_per_step"] == 1e3 * row["ours"]["ms"] / case.T
        assert row["share"] == row["limit_ms"] / row["ours"]["ms"]
    assert [row["group"] for row in record["rows"] if "memory_mb" in row] == ["one", "two"]
    lengths = rivals.make_input(KINDS[1], "cpu").data.size(0)
    packed = record["rows"][2]
    assert packed["gflops"] == pytest.approx(KINDS[1].flops(lengths, "inference") / packed["ours"]["ms"] / 1e6)


@pytest.mark.usefixtures("quick")
def test_a_disturbance_owns_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that makes ours slow while one case is timed, unseen by a witness: those rounds don't count."""
    timed: list[float] = []

    def rounds(
        calls: dict[str, Any], device: str, seconds: float, fewest: int, witness: Any, patience: float
    ) -> timing.Rounds:
        timed.append(seconds)
        slow = len(timed) in (3, 4)  # both modes of the second case, in the first pass
        return timing.Rounds([{"ours": 10.0 if slow else 1.0, "torch": 2.0}] * 3, [{"ours": 20.0, "torch": 2.0}])

    rates = iter((100.0, 300.0, 200.0))
    monkeypatch.setattr(runner, "measure", lambda *_: KNOWN._replace(gflops={"float32": next(rates)}))
    monkeypatch.setattr(runner, "interleave", rounds)
    record = runner.run(
        "test",
        {"one": KINDS[:2]},
        ["inference", "forward"],
        ["torch"],
        "cpu",
        0.3,
        tmp_path / "run.json",
        lambda *_: None,
    )
    assert timed == [0.3 / runner.PASSES] * 4 * runner.PASSES
    assert [(row["packed"], row["mode"]) for row in record["rows"]] == [
        (packed, mode) for packed in (False, True) for mode in ("inference", "forward")
    ]
    assert [(row["ours"]["ms"], row["ratio"], row["rounds"]) for row in record["rows"]] == [
        (1.0, 2.0, rounds) for rounds in (9, 9, 6, 6)
    ]
    assert [each["limits"]["gflops"]["float32"] for each in record["passes"]] == [100.0, 300.0, 200.0]
    assert record["limits"]["gflops"]["float32"] == 300.0 and record["rounds_left_out"] == len(timed) + 2 * 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rests_after", [4, 100])
def test_rows_that_others_disturbed_are_measured_again(
    rests_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour in all rounds of one case's training: in its passes 0 to 4, or always."""
    timed: collections.Counter[tuple[int, str]] = collections.Counter()
    troubled = 2, "forward+backward"

    def rounds(
        calls: dict[str, Callable[[], Any]], device: str, seconds: float, fewest: int, witness: Any, patience: float
    ) -> timing.Rounds:
        what = calls["ours"]()
        timed[what] += 1
        again = timed[what] > runner.PASSES
        assert (fewest, patience) == ((0, runner._PATIENCE) if again else (FEWEST_OF_A_PASS, seconds))
        busy = what == troubled and timed[what] <= rests_after
        each = [{"ours": 10.0 if busy else 1.0, "torch": 2.0}] * 6
        return timing.Rounds([], each) if busy else timing.Rounds(each, [])

    monkeypatch.setattr(runner, "interleave", rounds)
    monkeypatch.setattr(rivals, "task", lambda module, x, mode, last: lambda: (x.size(1), mode))
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(timed.total()))
    record = run(tmp_path / "run.json", {"one": [SMALL, SMALL._replace(B=2)]})
    at_most = runner.PASSES + 4 * runner.PASSES  # for the three passes' time it alone is measured
    passes = min(rests_after + 1, at_most)
    assert timed.pop(troubled) == passes == len(record["passes"]) and list(timed.values()) == [runner.PASSES] * 3
    disturbed = rests_after > at_most
    assert [row["disturbed"] for row in record["rows"]] == [False, False, False, disturbed]
    last = record["rows"][-1]
    assert (last["ours"]["ms"], last["rounds"]) == ((10.0, 6 * passes) if disturbed else (1.0, 6))
    assert record["rounds_left_out"] == (0 if disturbed else 6 * rests_after)


def test_what_torch_launches_is_noted_in_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "launches", lambda module, x: {"count": module.hidden_size * x.size(1)})
    rows = [{**SMALL._asdict(), "rivals": names} for names in ({"torch": {}}, {"haste": {}})]
    runner.count_launches(rows, "cpu")
    assert rows[0]["launches"] == {"count": SMALL.H * SMALL.B} and "launches" not in rows[1]


@pytest.mark.usefixtures("quick")
def test_progress_counts_what_comes_after_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Witness, "disturbed", lambda _: False)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(memory, "peak", lambda *arguments: asked.append(arguments) or {})
    told: list[tuple[int, int]] = []
    grid, modes = {"one": [SMALL], "two": KINDS[1:3]}, ["inference", "forward+backward"]
    backend, output = "reference", tmp_path / "run.json"
    runner.run("test", grid, modes, [], "cpu", 0.0, output, lambda *step: told.append(step[:2]), backend)
    steps = 3 * runner.PASSES + 2  # memory of a case of each group
    assert told == [(done, steps) for done in range(steps + 1)]
    assert [each[1:] for each in asked] == [("cpu", "reference", torch.get_num_threads())] * 2


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run.json"
    monkeypatch.setattr(timing.Witness, "disturbed", lambda _: False)
    for stop_at, kept in (1, [(3, 3)] * 2), (3, [(3, 6)] * 2 + [(2, 3)] * 2):  # in the first pass, in the second
        with pytest.raises(KeyboardInterrupt):
            run(output, {"one": [SMALL, SMALL._replace(B=2)]}, stop_at)
        assert [(row["B"], row["rounds"]) for row in json.loads(files.unfinished(output).read_text())["rows"]] == kept
    assert not output.exists()


@pytest.mark.usefixtures("quick")
def test_a_case_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = rivals.ours

    def broken(case: Case, source: nn.Module, backend: str) -> nn.Module:
        module = build(case, source, backend)
        if case.B == 2:
            nn.init.zeros_(next(module.parameters()))
        return module

    monkeypatch.setattr(rivals, "ours", broken)
    monkeypatch.setattr(timing.Witness, "disturbed", lambda _: False)
    record = run(tmp_path / "run.json", {"one": [SMALL._replace(B=2), SMALL]})
    assert [(row["B"], row["rounds"]) for row in record["rows"]] == [(3, 9)] * 2
    assert [(row["B"], row["why"].split(" by ")[0]) for row in record["failed"]] == [(2, "ours differs from torch")]


@pytest.mark.usefixtures("quick")
def test_a_case_that_the_backend_refuses_is_named_as_skipped(tmp_path: Path) -> None:
    grid = {"one": [SMALL._replace(P=2), SMALL]}
    record = runner.run(
        "test", grid, ["inference"], ["torch"], "cpu", 0.0, tmp_path / "run.json", lambda *_: None, "persistent"
    )
    assert record["rows"] == record["failed"] == [] and len(record["skipped"]) == 2
    assert "cannot serve this call" in record["skipped"][SMALL.label()]


def test_rivals_say_what_they_cannot_do() -> None:
    assert "minutes to compile" in str(rivals.RIVALS["compile"].refuses(Case(64, 1, 8), "cpu"))
    assert rivals.RIVALS["compile"].refuses(SMALL, "cpu") is None
    for name in ("haste", "flashrnn"):
        rival = rivals.RIVALS[name]
        assert "on a GPU" in str(rival.refuses(SMALL, "cpu"))
        assert rival.refuses(SMALL, "cuda") is None
        assert rival.refuses(SMALL._replace(packed=True), "cuda") is not None
    assert rivals.RIVALS["haste"].refuses(SMALL._replace(dtype="bfloat16"), "cuda") is not None


def steps_of(x: Tensor, states: Tensor, r: Tensor, b: Tensor, order: str) -> Tensor:
    """y [T, B, H], of x W already there [T, B, 4H] and R [H, 4H], with the gates in this order."""
    h, c, found = states[0], states[1], []
    for step in x:
        part = dict(zip(order, (step + h @ r + b).chunk(4, dim=-1), strict=True))
        c = part["f"].sigmoid() * c + part["i"].sigmoid() * part["g"].tanh()
        h = part["o"].sigmoid() * c.tanh()
        found.append(h)
    return torch.stack(found)


def fake_flashrnn(w_x: Tensor, r: Tensor, b: Tensor, **kind: Any) -> tuple[Tensor, None]:
    """As its config documents the shapes: BTGHD in, recurrent GHDP, bias GHD, states and output SBTHD."""
    states = kind.pop("states")
    assert kind == {"function": "lstm", "backend": "cuda_fused", "dtype": "float32"}  # its default dtype is bf16
    batch, time, _, _, hidden = w_x.shape
    assert r.shape == (4, 1, hidden, hidden) and b.shape == (4, 1, hidden) and states.shape == (2, batch, 1, 1, hidden)
    recurrent = r[:, 0].flatten(0, 1).t()  # [P, G * D]
    y = steps_of(w_x.flatten(2).transpose(0, 1), states[:, :, 0, 0], recurrent, b.flatten(), "ifgo")
    return y.transpose(0, 1).reshape(1, batch, time, 1, hidden), None


class FakeHaste(nn.Module):
    """As haste's LSTM names and shapes its parameters, gates i, g, f, o."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(input_size, 4 * hidden_size))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden_size, 4 * hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        start = x.new_zeros(2, x.size(1), self.recurrent_kernel.size(0))
        return steps_of(x @ self.kernel, start, self.recurrent_kernel, self.bias, "igfo"), None


@pytest.mark.parametrize("name", ["flashrnn", "haste"])
def test_other_libraries_are_given_the_oracles_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stand-ins with their interfaces; the libraries themselves need a GPU."""
    package, holds, what = {
        "flashrnn": ("flashrnn", "flashrnn", fake_flashrnn),
        "haste": ("haste_pytorch", "LSTM", FakeHaste),
    }[name]
    library = types.ModuleType(package)
    setattr(library, holds, what)
    monkeypatch.setitem(sys.modules, package, library)
    oracle, x = rivals.oracle(SMALL, "cpu"), rivals.make_input(SMALL, "cpu")
    built = rivals.RIVALS[name].build(SMALL, oracle)
    assert runner.check(SMALL, {name: built}, oracle, x)[name] < runner.TOLERANCE["float32"]
    for mode in ("forward+backward", "inference"):
        assert rivals.task(built, x, mode)().shape == (*x.shape[:2], SMALL.H)
    assert name == "flashrnn" or not built.training  # haste saves what a backward pass needs whenever it is training


def test_peak_memory_counts_one_side_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []
    oracle = rivals.oracle

    def remembered(case: Case, device: str) -> nn.Module:
        module = oracle(case, device)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(rivals, "oracle", remembered)
    for side in memory.SIDES:
        module = memory._module(SMALL, side, "cpu", "reference")
        gc.collect()
        assert made[-1]() is (None if side == "ours" else module)
        assert side == "torch" or module.backend == "reference"


def test_peak_memory_is_that_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """40,000 rows of 64 hidden units: gates, cells and outputs are 40 MB at least, and not ten times as many."""
    monkeypatch.setattr(memory, "_PROCESSES", 1)
    found = memory.peak(Case(400, 100, 64), "cpu", "auto", 2)
    assert all(40 < megabytes < 400 for megabytes in found.values())


@pytest.mark.parametrize(("device", "processes"), [("cpu", 6), ("cuda", 2)])
def test_peak_memory_takes_medians_where_it_varies(
    device: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[str] = []

    def answer(command: list[str], **_: Any) -> Any:
        assert command[-3:] == [device, "reference", "2"]
        sides.append(command[-4])
        return mock.Mock(stdout=str(len(sides)))

    monkeypatch.setattr(subprocess, "run", answer)
    found = memory.peak(SMALL, device, "reference", 2)
    assert len(sides) == processes and found == {"ours": processes / 2, "torch": processes / 2 + 1}


@pytest.mark.usefixtures("quick")
def test_a_run_that_measured_nothing_is_no_success(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    chosen = ["--device", "cpu", "--backend", "persistent", "--seconds", "0", "--out", str(output)]
    result = CliRunner().invoke(commands.app, chosen)
    assert result.exit_code == 1 and "skipped T32 B1 H64 float32: " in result.stdout
    assert json.loads(output.read_text())["rows"] == []


def test_startup_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROCESSES", 1)
    found = memory.startup("cpu", 2)
    assert found["import_torch_ms"] > 100 and 0 < found["import_lstm_fast_ms"] < found["import_torch_ms"]
    assert found["first_call_ms"] > 0 and found["first_call_torch_ms"] > 0


def test_startup_is_measured_with_the_threads_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return mock.Mock(stdout="1 1 1 1")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(memory, "peak", lambda *_: {})
    monkeypatch.setattr(runner, "measure", lambda *_: KNOWN)
    monkeypatch.setattr(runner, "describe", lambda _: {})
    monkeypatch.setattr(runner, "state", lambda _: {})
    run(tmp_path / "run.json", {})
    assert [command[-2:] for command in commands] == [["cpu", "3"]] * 3


def test_a_record_names_machine_versions_and_commit() -> None:
    found = runner.describe("cpu")
    assert found["cpu"] and found["torch"] == torch.__version__ and found["commit"] != ""


def test_a_record_notes_load_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "cpuinfo", lambda: "cpu MHz\t\t: 2000.000\nflags : fpu\ncpu MHz\t\t: 3001.000\n")
    monkeypatch.setattr(runner, "_ask_gpu", lambda what: [what])
    assert runner.state("cpu")["clocks"] == ["2500 MHz"] and runner.state("cpu")["load"] >= 0
    assert runner.state("cuda")["clocks"] == ["clocks.sm,clocks.mem"]
    monkeypatch.setattr(runner, "cpuinfo", str)
    assert runner.state("cpu")["clocks"] == []


def test_another_projects_commit_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "runner.py").touch()
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    assert runner.commit() == "unknown"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "training"), "--modes should be among inference, forward, forward+backward, got: training"),
        (
            ("--rivals", "torch,keras"),
            "--rivals should be among torch, flashrnn, haste, reference, compile, got: keras",
        ),
        (("--device", "tpu"), "--device should be among cpu, cuda, got: tpu"),
        (("--grid", "huge"), "'huge'"),
        (("train", "--steps", "1"), "'--steps'"),
        (
            ("--threads", "1", "--out", "a.json", "tune"),
            "options of tune come behind it, got before it: --threads, --out",
        ),
        (("report", "missing.json"), "missing.json"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...], message: str, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, error = command("bench", *arguments)
    assert status == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


ROOT = Path(__file__).parents[1]


def test_the_readmes_table_is_the_recorded_runs() -> None:
    runs = [report.load(ROOT / "benchmarks" / "results" / f"cpu-{threads}t-amx.json") for threads in (1, 2)]
    before, _, rest = (ROOT / "README.md").read_text().partition("<!-- table: begin -->\n")
    assert before and rest.partition("<!-- table: end -->")[0].strip() == report.readme_table(runs).strip()


def test_the_readmes_scores_are_the_recorded_ones() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "translator-tatoeba.json").read_text())
    text = (ROOT / "README.md").read_text()
    for name, signature in (("bleu", "bleu_signature"), ("chrf", "chrf_signature")):
        assert f"{record[name]:.2f}  {record[signature]}" in text
    assert f"{record['training']['seconds'] / 60:.0f} minutes on one" in text
    assert f"{record['training']['sentences_per_second']:.0f} sentences a second" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_missing_is_named(command: Callable[..., tuple[int, str, str]]) -> None:
    status, _, error = command("bench", "--device", "cuda")
    assert status == 2 and "--device cuda needs an NVIDIA GPU" in error
    assert len(error.strip().splitlines()) == 1
