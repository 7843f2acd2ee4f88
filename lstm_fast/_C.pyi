from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lstm_fast.kernels import LayerInputs

_Tensors = Sequence[Tensor | None]

CPU_INSTRUCTION_SETS: list[str]
DTYPES: dict[str, int]

def build_info() -> dict[str, Any]: ...
def environment_has(name: str) -> bool: ...
def layer_inputs_fit(inputs: _Tensors, cell: bool = ...) -> bool: ...
def infer(
    attributes: dict[str, Any], x: Tensor, hx: Any, batch_sizes: Tensor | None, threads: int, instruction_set: int
) -> Any: ...
def train(
    attributes: dict[str, Any],
    layer: int,
    x: Tensor,
    hx: Any,
    batch_sizes: Tensor | None,
    threads: int,
    instruction_set: int,
) -> Any: ...
def train_backward(
    saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], needs: Sequence[bool], threads: int, instruction_set: int
) -> tuple[Tensor | None, ...] | None: ...
def cpu_layer_forward(
    inputs: LayerInputs, sizes: tuple[int, int, int, int, int, int], save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def cpu_layer_backward(
    inputs: LayerInputs,
    sizes: tuple[int, int, int, int, int, int],
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    grads: _Tensors,
    needs: Sequence[bool],
) -> list[Tensor | None]: ...
def cpu_peak_rate(dtype: int, instruction_set: int, threads: int) -> float: ...
def cpu_meeting_seconds(threads: int) -> float: ...

class ForwardGates:
    def __call__(self, direction: int, first: int, rows: int, /) -> None: ...

class BackwardGates:
    def __call__(self, direction: int, first: int, rows: int, previous_first: int, previous_rows: int, /) -> None: ...

def gates_forward(
    *,
    gates: int,
    product: int,
    c: int,
    h: int,
    y: int,
    cells: int,
    sizes: tuple[int, int, int, int],
    dtype: int,
    device: int | None,
    stream: int,
) -> ForwardGates: ...
def gates_backward(
    *,
    gates: int,
    cells: int,
    c0: int,
    dy: int,
    dh: int,
    dc: int,
    dgates: int,
    sizes: tuple[int, int, int, int],
    dtype: int,
    device: int | None,
    stream: int,
) -> BackwardGates: ...
def persistent_plan(
    *,
    kind: int,
    backward: bool,
    hidden: int,
    batch: int,
    directions: int,
    granted: Callable[[bool, int, int, int], int],
) -> tuple[int, int, int, int, int, int, int, int, int, int] | None: ...
def persistent_granted(
    *, kind: int, backward: bool, device: int, grid: bool, cluster: int, threads: int, shared: int
) -> int: ...
def persistent_library_clocks(*, kind: int, hidden: int, batch: int, plain: bool) -> float: ...
def persistent_workspace(
    *, kind: int, backward: bool, plan: tuple[int, int, int, int, int, int, int, int, int, int], directions: int
) -> tuple[int, int]: ...
def persistent_forward(
    gates: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: list[Tensor],
    biases: list[tuple[Tensor | None, Tensor | None]],
    starts: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    sizes: tuple[int, int, int, int, int],
    plan: tuple[int, int, int, int, int, int, int, int, int, int],
    workspace: Tensor,
    kind: int,
    device: int | None,
    queue: int,
) -> None: ...
def persistent_backward(
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    w_hh: list[Tensor],
    starts: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    sizes: tuple[int, int, int, int, int],
    plan: tuple[int, int, int, int, int, int, int, int, int, int],
    workspace: Tensor,
    kind: int,
    device: int | None,
    queue: int,
) -> None: ...
def interleave(from_: list[Tensor], to: Tensor, hidden: int, width: int, device: int, stream: int) -> None: ...
def row_sums(
    rows: Tensor, count: int, width: int, to: Tensor | None, again: Tensor | None, kind: int, device: int, stream: int
) -> None: ...
def clusters_at_once(device: int) -> list[tuple[int, int]]: ...
def measure_exchange(device: int, report: Callable[[str, int, int, float, float], None]) -> None: ...
def previous(
    *,
    y: int,
    initial: int,
    starts: int,
    before: int,
    rows: int,
    steps: int,
    width: int,
    stride: int,
    reverse: bool,
    device: int,
    stream: int,
) -> None: ...
def upload(*, values: list[int], to: int, device: int, stream: int) -> None: ...
