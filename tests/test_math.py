"""csrc/lstm_math.h and csrc/cpu/activations.h over the whole range of float, against torch in float64."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lstm_fast._C import CPU_INSTRUCTION_SETS
from tests.compiled import CSRC, compiled

SOURCE = """
#include "cpu/activations.h"
using namespace lstm;
using namespace lstm::cpu;
#define MAP(name, From, To, expression) \\
    extern "C" void name(const From* from, To* to, long n) { \\
        for (long k = 0; k < n; ++k) { const From x = from[k]; to[k] = expression; } \\
    }
MAP(tanh_float, float, float, math::tanh(x))
MAP(sigmoid_float, float, float, math::sigmoid(x))
MAP(tanh_fast, float, float, math::tanh<math::Speed::fast>(x))
MAP(sigmoid_fast, float, float, math::sigmoid<math::Speed::fast>(x))
MAP(tanh_double, double, double, math::tanh(x))
MAP(sigmoid_double, double, double, math::sigmoid(x))
MAP(load_bfloat16, BFloat16, float, load(x))
MAP(load_float16, Float16, float, load(x))
MAP(store_bfloat16, float, BFloat16, store<BFloat16>(x))
MAP(store_float16, float, Float16, store<Float16>(x))

template <typename Isa, bool kCoarse, unsigned kTanh, typename A>
LSTM_HD void activate_all(const A* from, A* to, long n) {
    Vector<Isa, A> x[4];
    for (long k = 0; k < n; k += sizeof(x) / sizeof(A)) {
        std::memcpy(x, from + k, sizeof(x));
        activate<Isa, kCoarse, kTanh>(x);
        std::memcpy(to + k, x, sizeof(x));
    }
}
#define ACTIVATION(name, A, Isa, coarse, tanhs, target) \\
    extern "C" target void name(const A* x, A* y, long n) { activate_all<Isa, coarse, tanhs>(x, y, n); }
#define ACTIVATIONS(set, Isa, target) \\
    ACTIVATION(tanh_##set, float, Isa, false, 15, target) \\
    ACTIVATION(sigmoid_##set, float, Isa, false, 0, target) \\
    ACTIVATION(tanh_coarse_##set, float, Isa, true, 15, target) \\
    ACTIVATION(sigmoid_coarse_##set, float, Isa, true, 0, target) \\
    ACTIVATION(tanh_double_##set, double, Isa, false, 15, target) \\
    ACTIVATION(sigmoid_double_##set, double, Isa, false, 0, target)
ACTIVATIONS(baseline, Baseline, )
#ifdef LSTM_X86
ACTIVATIONS(avx2, Avx2, __attribute__((target(LSTM_AVX2_TARGET))))
ACTIVATIONS(avx512, Avx512, __attribute__((target(LSTM_AVX512_TARGET))))
#endif
"""
SETS = CPU_INSTRUCTION_SETS[:3]  # floats of those from the fourth on are AVX-512's
ULPS = 2.5

Map = Callable[[str, Tensor, torch.dtype], Tensor]


@pytest.fixture(scope="module", params=["-O3", "-O3 -march=native"])
def apply(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Map:
    """apply(name, x, dtype): the C++ function of that name on every element of x, as dtype."""
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE)
    flags = ["-fno-math-errno", "-fno-trapping-math", *request.param.split(), f"-I{CSRC}"]
    library = ctypes.CDLL(str(compiled(folder / "math.so", *flags, folder / "math.cpp")))

    def call(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        padded = torch.cat([x, x.new_zeros(-x.numel() % 64)])  # vectors come whole
        result = torch.empty(padded.shape, dtype=dtype)
        pointers = (ctypes.c_void_p(padded.data_ptr()), ctypes.c_void_p(result.data_ptr()))
        getattr(library, name)(*pointers, ctypes.c_long(padded.numel()))
        return result[: x.numel()]

    return call


def every_kind_of_float() -> Tensor:
    """Bit patterns at a prime stride: both zeros' neighbours, subnormals, all exponents, infinities and NaNs."""
    patterns = torch.arange(-(2**31), 2**31, 2053, dtype=torch.int64).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
    return torch.cat([patterns, edges, torch.linspace(-110, 95, 1_000_003), torch.linspace(-12, 12, 1_000_003)])


@pytest.mark.parametrize("form", ["float", *SETS])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_float_functions_are_accurate_over_the_whole_range(apply: Map, name: str, form: str) -> None:
    x = every_kind_of_float()
    exact = getattr(torch, name)(x.double())
    rounded = exact.float()
    got = apply(f"{name}_{form}", x, torch.float32)

    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(2.0), rounded[~finite].nan_to_num(2.0))
    if name == "sigmoid":  # what would be subnormal may be 0
        tiny = torch.finfo(torch.float32).tiny
        small = exact < tiny
        assert ((got[small] >= 0) & (got[small] <= tiny)).all()
        finite &= ~small
    size = rounded[finite].abs()
    ulp = (torch.nextafter(size, torch.tensor(torch.inf)).double() - size).clamp(max=2.0**104)
    errors = (got[finite].double() - exact[finite]).abs() / ulp
    worst = errors.argmax()
    assert errors[worst] <= ULPS, f"{errors[worst]:.2f} ulp at {x[finite][worst]}"


@pytest.mark.parametrize("form", ["fast", *(f"coarse_{name}" for name in SETS)])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_forms_for_16_bit_states_keep_seventeen_bits(apply: Map, name: str, form: str) -> None:
    """GPU kernels take the fast one; a GPU's exponential adds its own error, within the bound."""
    x = every_kind_of_float()
    exact = getattr(torch, name)(x.double())
    got = apply(f"{name}_{form}", x, torch.float32)
    assert torch.equal(got.isnan(), x.isnan())
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    assert ((got.double() - exact).abs()[normal] <= exact.abs()[normal] * 2.0**-17).all()
    saturated = torch.tensor([200.0, -200.0, torch.inf, -torch.inf])
    assert torch.equal(apply(f"{name}_{form}", saturated, torch.float32), getattr(torch, name)(saturated))


@pytest.mark.parametrize("form", ["double", *(f"double_{name}" for name in SETS)])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_double_functions_are_accurate_over_the_whole_range(apply: Map, name: str, form: str) -> None:
    """Against the processor's own 80-bit numbers, or those that stand in for them."""
    patterns = torch.arange(-(2**63), 2**63 - 2**44, 2**44 + 12_345).view(torch.float64)
    edges = torch.tensor([0.0, -0.0, 5e-324, -5e-324, 2.3e-308, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    near = [torch.linspace(-limit, limit, 100_003, dtype=torch.float64) for limit in (1.0, 22.0, 745.0)]
    x = torch.cat([patterns, edges, *near])
    got = apply(f"{name}_{form}", x, torch.float64).numpy()

    long = x.numpy().astype(np.longdouble)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.tanh(long) if name == "tanh" else 1 / (1 + np.exp(-long))
    tiny = np.finfo(np.float64).tiny
    assert (np.isnan(got) == np.isnan(exact)).all()
    small, sized = np.abs(exact) < tiny, np.abs(exact) >= tiny
    if name == "sigmoid":  # what would be subnormal may be 0
        assert ((got[small] >= 0) & (got[small] <= tiny)).all()
    else:
        assert (np.abs(got[small] - exact[small]) <= ULPS * 5e-324).all()
    errors = np.abs(got[sized] - exact[sized]) / np.spacing(np.abs(exact[sized]).astype(np.float64))
    worst = errors.argmax()
    assert errors[worst] <= ULPS, f"{errors[worst]:.2f} ulp at {x.numpy()[sized][worst]}"


@pytest.mark.parametrize("kind", ["float", "double", *SETS])
def test_saturation_is_exact_and_nan_stays(apply: Map, kind: str) -> None:
    dtype = torch.float64 if kind == "double" else torch.float32
    x = torch.tensor([200.0, 1e30, torch.inf, -1000.0, -1e30, -torch.inf], dtype=dtype)
    assert apply(f"sigmoid_{kind}", x, dtype).tolist() == [1, 1, 1, 0, 0, 0]
    assert apply(f"tanh_{kind}", x, dtype).tolist() == [1, 1, 1, -1, -1, -1]
    nan = torch.tensor([torch.nan, -torch.nan], dtype=dtype)
    for name in ("tanh", "sigmoid"):
        assert apply(f"{name}_{kind}", nan, dtype).isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_16_bits_is_exact(apply: Map, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = apply(f"load_{dtype}".replace("torch.", ""), x, torch.float32)
    assert torch.equal(got.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(got[known].view(torch.int32), x[known].float().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_16_bits_rounds_to_nearest_even(apply: Map, dtype: torch.dtype) -> None:
    stored = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    stored = stored[stored.isfinite()]
    ties = (stored[1:] + stored[:-1]) / 2
    around = [torch.nextafter(ties, torch.tensor(limit)) for limit in (torch.inf, -torch.inf)]
    x = torch.cat([every_kind_of_float(), ties, -ties, *around])
    got, want = apply(f"store_{dtype}".replace("torch.", ""), x, dtype), x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    known = ~want.isnan()
    assert torch.equal(got[known].view(torch.int16), want[known].view(torch.int16))
