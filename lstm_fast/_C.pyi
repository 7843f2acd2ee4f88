from typing import Any

DTYPES: dict[str, int]

def build_info() -> dict[str, Any]: ...
def cpu_recurrence_forward(
    *,
    gates: int,
    h0: int,
    c0: int,
    w_hh: list[int],
    steps: list[int],
    y: int,
    h_n: int,
    c_n: int,
    cells: int,
    hidden: int,
    dtype: int,
    threads: int,
) -> None: ...
def cpu_recurrence_backward(
    *,
    gates: int,
    cells: int,
    c0: int,
    w_hh: list[int],
    steps: list[int],
    dy: int,
    dh: int,
    dc: int,
    dgates: int,
    hidden: int,
    dtype: int,
    threads: int,
) -> None: ...
