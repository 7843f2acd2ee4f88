// The one file that knows Python. Functions take addresses, sizes and a dtype code; lstm_fast/autograd.py has checked
// them, and the headers of the kernels say what each pointer means.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/recurrence.h"
#include "gates.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;
using Released = py::call_guard<py::gil_scoped_release>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

py::dict build_info() {
#ifdef LSTM_FAST_WITH_CUDA
    const py::object cuda_archs = py::str(LSTM_FAST_CUDA_ARCHS).attr("split")(";");
    const py::object nvcc = py::str(LSTM_FAST_NVCC_VERSION);
    const bool cuda = true;
#else
    const py::object cuda_archs = py::list();
    const py::object nvcc = py::none();
    const bool cuda = false;
#endif
#ifdef __clang__
    const char* compiler = __VERSION__;
#else
    const char* compiler = "GCC " __VERSION__;
#endif
#ifdef _OPENMP
    const bool openmp = true;
#else
    const bool openmp = false;
#endif
    return py::dict("cuda"_a = cuda, "cuda_archs"_a = cuda_archs, "nvcc"_a = nvcc, "compiler"_a = compiler,
                    "openmp"_a = openmp);
}

// ---- CPU -----------------------------------------------------------------------------------------------------------

lstm::cpu::Shape cpu_shape(const std::vector<std::int64_t>& steps, std::int64_t hidden, std::size_t directions,
                           int dtype, int threads, int instruction_set) {
    return {steps.data(),
            static_cast<std::int64_t>(steps.size()),
            steps.front(),
            hidden,
            static_cast<int>(directions),
            static_cast<lstm::Dtype>(dtype),
            threads,
            static_cast<lstm::cpu::InstructionSet>(instruction_set)};
}

void cpu_recurrence_forward(Address gates, Address h0, Address c0, const std::vector<Address>& w_hh,
                            const std::vector<std::int64_t>& steps, Address y, Address h_n, Address c_n, Address cells,
                            std::int64_t hidden, int dtype, int threads, int instruction_set) {
    lstm::cpu::recurrence_forward(cpu_shape(steps, hidden, w_hh.size(), dtype, threads, instruction_set),
                                  {pointer(gates),
                                   pointer(h0),
                                   pointer(c0),
                                   {pointer(w_hh.front()), pointer(w_hh.back())},
                                   pointer(y),
                                   pointer(h_n),
                                   pointer(c_n),
                                   pointer(cells)});
}

void cpu_recurrence_backward(Address gates, Address cells, Address c0, const std::vector<Address>& w_hh,
                             const std::vector<std::int64_t>& steps, Address dy, Address dh, Address dc, Address dgates,
                             std::int64_t hidden, int dtype, int threads, int instruction_set) {
    lstm::cpu::recurrence_backward(cpu_shape(steps, hidden, w_hh.size(), dtype, threads, instruction_set),
                                   {pointer(gates),
                                    pointer(cells),
                                    pointer(c0),
                                    {pointer(w_hh.front()), pointer(w_hh.back())},
                                    pointer(dy),
                                    pointer(dh),
                                    pointer(dc),
                                    pointer(dgates)});
}

void bind_cpu(py::module_& m) {
    // Those that this CPU runs, the best last; a call names one by its place here.
    py::list sets = py::list();
    for (int set = 0; set <= static_cast<int>(lstm::cpu::best_instruction_set()); ++set) {
        sets.append(std::array{"baseline", "avx2", "avx512"}[set]);
    }
    m.attr("CPU_INSTRUCTION_SETS") = sets;
    m.def("cpu_recurrence_forward", cpu_recurrence_forward, Released(), py::kw_only(), "gates"_a, "h0"_a, "c0"_a,
          "w_hh"_a, "steps"_a, "y"_a, "h_n"_a, "c_n"_a, "cells"_a, "hidden"_a, "dtype"_a, "threads"_a,
          "instruction_set"_a);
    m.def("cpu_recurrence_backward", cpu_recurrence_backward, Released(), py::kw_only(), "gates"_a, "cells"_a, "c0"_a,
          "w_hh"_a, "steps"_a, "dy"_a, "dh"_a, "dc"_a, "dgates"_a, "hidden"_a, "dtype"_a, "threads"_a,
          "instruction_set"_a);
}

// ---- The gate kernel: on the host for tests, and with CUDA ---------------------------------------------------------

// The gate kernel with all but the step bound: called at each step of a walk, on `device`, or on the host without one.
template <typename Step>
struct Gates {
    Step step;
    lstm::Dtype dtype;
    std::optional<int> device;
    Address stream;

    void run() const {
        if (!device) return lstm::host::run_step(step, dtype);
#ifdef LSTM_FAST_WITH_CUDA
        const char* error = lstm::cuda::run_step(step, dtype, *device, pointer(stream));
        if (error != nullptr)
            throw std::runtime_error(std::string("the CUDA gate kernel could not be queued: ") + error);
#else
        throw std::runtime_error("lstm_fast._C was built without CUDA");
#endif
    }
};

using ForwardGates = Gates<lstm::ForwardStep>;
using BackwardGates = Gates<lstm::BackwardStep>;

lstm::GateSizes gate_sizes(const std::array<std::int64_t, 4>& sizes) {
    return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

ForwardGates gates_forward(Address gates, Address product, Address c, Address h, Address y, Address cells,
                           const std::array<std::int64_t, 4>& sizes, int dtype, std::optional<int> device,
                           Address stream) {
    return {{pointer(gates), pointer(product), pointer(c), pointer(h), pointer(y), pointer(cells), gate_sizes(sizes), 0,
             0, 0},
            static_cast<lstm::Dtype>(dtype),
            device,
            stream};
}

BackwardGates gates_backward(Address gates, Address cells, Address c0, Address dy, Address dh, Address dc,
                             Address dgates, const std::array<std::int64_t, 4>& sizes, int dtype,
                             std::optional<int> device, Address stream) {
    return {{pointer(gates), pointer(cells), pointer(c0), pointer(dy), pointer(dh), pointer(dc), pointer(dgates),
             gate_sizes(sizes), 0, 0, 0, 0, 0},
            static_cast<lstm::Dtype>(dtype),
            device,
            stream};
}

void step_forward(ForwardGates& gates, std::int64_t direction, std::int64_t first, std::int64_t rows) {
    gates.step.direction = direction;
    gates.step.first = first;
    gates.step.rows = rows;
    gates.run();
}

void step_backward(BackwardGates& gates, std::int64_t direction, std::int64_t first, std::int64_t rows,
                   std::int64_t previous_first, std::int64_t previous_rows) {
    gates.step.direction = direction;
    gates.step.first = first;
    gates.step.rows = rows;
    gates.step.previous_first = previous_first;
    gates.step.previous_rows = previous_rows;
    gates.run();
}

void bind_gates(py::module_& m) {
    py::class_<ForwardGates>(m, "ForwardGates").def("__call__", step_forward, Released());
    py::class_<BackwardGates>(m, "BackwardGates").def("__call__", step_backward, Released());
    m.def("gates_forward", gates_forward, py::kw_only(), "gates"_a, "product"_a, "c"_a, "h"_a, "y"_a, "cells"_a,
          "sizes"_a, "dtype"_a, "device"_a, "stream"_a);
    m.def("gates_backward", gates_backward, py::kw_only(), "gates"_a, "cells"_a, "c0"_a, "dy"_a, "dh"_a, "dc"_a,
          "dgates"_a, "sizes"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "lstm_fast's compiled kernels.";
    m.attr("DTYPES") = py::dict(
        "float32"_a = static_cast<int>(lstm::Dtype::float32), "float64"_a = static_cast<int>(lstm::Dtype::float64),
        "bfloat16"_a = static_cast<int>(lstm::Dtype::bfloat16), "float16"_a = static_cast<int>(lstm::Dtype::float16));
    m.def("build_info", build_info, "How this extension was built.");
    bind_cpu(m);
    bind_gates(m);
}
