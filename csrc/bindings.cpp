// What Python sees. Functions take tensors or their addresses, sizes and a dtype code; lstm_fast/autograd.py has
// checked them, and the headers of the kernels say what each pointer means.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/limits.h"
#include "cuda/persistent.h"
#include "gates.h"
#include "layer_calls.h"
#include "module_calls.h"
#include "tensors.h"

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
#ifdef LSTM_FAST_WITH_CLUSTERS
    const bool clusters = true;
#else
    const bool clusters = false;
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
    return py::dict("cuda"_a = cuda, "cuda_archs"_a = cuda_archs, "nvcc"_a = nvcc, "clusters"_a = clusters,
                    "compiler"_a = compiler, "openmp"_a = openmp);
}

// ---- CPU -----------------------------------------------------------------------------------------------------------

double cpu_peak_rate(int dtype, int set, int threads) {
    return lstm::cpu::peak_rate(static_cast<lstm::Dtype>(dtype), static_cast<lstm::cpu::InstructionSet>(set), threads);
}

void bind_cpu(py::module_& m) {
    using namespace lstm::tensors;
    // Those that this CPU runs, the best last; a call names one by its place here.
    py::list sets = py::list();
    for (int set = 0; set <= static_cast<int>(lstm::cpu::best_instruction_set()); ++set) {
        sets.append(std::array{"baseline", "avx2", "avx512", "avx512_bf16", "avx512_slow_bf16", "amx"}[set]);
    }
    m.attr("CPU_INSTRUCTION_SETS") = sets;
    m.def(
        "cpu_layer_forward",
        [](const py::tuple& inputs, const LayerSizes& sizes, bool save) {
            return layer_forward({inputs, sizes}, save);
        },
        "inputs"_a, "sizes"_a, "save"_a);
    m.def(
        "cpu_layer_backward",
        [](const py::tuple& inputs, const LayerSizes& sizes, Data y, Data gates, Data cells,
           const std::array<Data, 3>& grads,
           const py::sequence& needs) { return layer_backward({inputs, sizes}, y, gates, cells, grads, needs); },
        "inputs"_a, "sizes"_a, "y"_a, "gates"_a, "cells"_a, "grads"_a, "needs"_a);
    m.def("cpu_peak_rate", cpu_peak_rate, Released(), "dtype"_a, "instruction_set"_a, "threads"_a);
    m.def("cpu_meeting_seconds", lstm::cpu::meeting_seconds, Released(), "threads"_a);
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

// ---- The persistent kernels: on the host for tests, and with CUDA ---------------------------------------------------

using lstm::persistent::Kind;
using lstm::persistent::Plan;

// Plan's members in their order.
using PlanTuple = std::tuple<int, int, int, int, int, int, int, int, int, int>;

Plan plan_of(const PlanTuple& plan) {
    return std::apply([](auto... numbers) { return Plan{numbers...}; }, plan);
}

// `granted(grid, cluster, threads, shared)`: clusters, or a grid's blocks, that run at once. None if no layout fits.
std::optional<PlanTuple> persistent_plan(int kind, bool backward, int hidden, int batch, int directions,
                                         const py::function& granted) {
    const auto resident = [&](bool grid, int cluster, int threads, int shared) {
        return granted(grid, cluster, threads, shared).cast<int>();
    };
    const Plan plan = lstm::persistent::plan(static_cast<Kind>(kind), backward, hidden, batch, directions, resident);
    if (plan.cluster == 0) return std::nullopt;
    return PlanTuple{plan.cluster,  plan.groups, plan.splits, plan.tiles,      plan.columns,
                     plan.clusters, plan.shared, plan.grid,   plan.directions, plan.clocks};
}

double persistent_library_clocks(int kind, int hidden, int batch, bool plain) {
    return lstm::persistent::library_clocks(static_cast<Kind>(kind), hidden, batch, plain);
}

// Bytes of a grid's workspace: of its flags, and in all.
std::pair<std::int64_t, std::int64_t> persistent_workspace(int kind, bool backward, const PlanTuple& plan,
                                                           int directions) {
    const auto at = lstm::persistent::workspace(backward, static_cast<Kind>(kind), plan_of(plan), directions);
    return {at.state, at.end};
}

int persistent_granted([[maybe_unused]] int kind, [[maybe_unused]] bool backward, [[maybe_unused]] int device,
                       [[maybe_unused]] bool grid, [[maybe_unused]] int cluster, [[maybe_unused]] int threads,
                       [[maybe_unused]] int shared) {
#ifdef LSTM_FAST_WITH_CUDA
    using namespace lstm::persistent::cuda;
    if (grid) {
        const auto ask = backward ? grid_resident_backward : grid_resident_forward;
        return ask(static_cast<Kind>(kind), device, threads, shared);
    }
#endif
#ifdef LSTM_FAST_WITH_CLUSTERS
    const auto ask = backward ? resident_backward : resident_forward;
    return ask(static_cast<Kind>(kind), device, cluster, threads, shared);
#else
    return 0;
#endif
}

// On `device` in the stream `queue`; without a device on the host, in the schedule `queue`.
template <typename Walk>
void run_persistent(const Walk& walk, int kind, std::optional<int> device, std::uint64_t queue) {
    if (reinterpret_cast<std::uintptr_t>(walk.gates) % 16 != 0)
        throw std::runtime_error("gates should begin at a multiple of 16 bytes");
    std::string error;
    if (!device) {
        error = lstm::persistent::host::run(walk, static_cast<Kind>(kind), queue);
    } else if (walk.plan.grid != 0) {
#ifdef LSTM_FAST_WITH_CUDA
        error = lstm::persistent::cuda::grid_run(walk, static_cast<Kind>(kind), *device, pointer(queue));
#else
        error = "lstm_fast._C was built without CUDA";
#endif
    } else {
#ifdef LSTM_FAST_WITH_CLUSTERS
        error = lstm::persistent::cuda::run(walk, static_cast<Kind>(kind), *device, pointer(queue));
#else
        error = "lstm_fast._C was built without clusters";
#endif
    }
    if (!error.empty()) throw std::runtime_error("the persistent kernel could not run: " + error);
}

lstm::persistent::Sizes persistent_sizes(const std::array<std::int64_t, 5>& sizes) {
    return {sizes[0], static_cast<int>(sizes[1]), static_cast<int>(sizes[2]), static_cast<int>(sizes[3]),
            static_cast<int>(sizes[4])};
}

using Tensor = lstm::tensors::Data;  // None for null

// On tensors of csrc/cuda/persistent.h.
void persistent_forward(Tensor gates, Tensor h0, Tensor c0, const std::vector<Tensor>& w_hh,
                        const std::vector<std::pair<Tensor, Tensor>>& biases, Tensor starts, Tensor y, Tensor h_n,
                        Tensor c_n, Tensor cells, const std::array<std::int64_t, 5>& sizes, const PlanTuple& plan,
                        Tensor workspace, int kind, std::optional<int> device, std::uint64_t queue) {
    const py::gil_scoped_release released;
    const lstm::persistent::Forward walk{gates.address,
                                         h0.address,
                                         c0.address,
                                         {w_hh.front().address, w_hh.back().address},
                                         {biases.front().first.address, biases.back().first.address},
                                         {biases.front().second.address, biases.back().second.address},
                                         static_cast<const std::int32_t*>(starts.address),
                                         y.address,
                                         h_n.address,
                                         c_n.address,
                                         cells.address,
                                         persistent_sizes(sizes),
                                         plan_of(plan),
                                         workspace.address,
                                         {},
                                         {},
                                         0};
    run_persistent(walk, kind, device, queue);
}

void persistent_backward(Tensor gates, Tensor cells, Tensor c0, const std::vector<Tensor>& w_hh, Tensor starts,
                         Tensor dy, Tensor dh_n, Tensor dc_n, Tensor dgates, Tensor dh0, Tensor dc0,
                         const std::array<std::int64_t, 5>& sizes, const PlanTuple& plan, Tensor workspace, int kind,
                         std::optional<int> device, std::uint64_t queue) {
    const py::gil_scoped_release released;
    const lstm::persistent::Backward walk{gates.address,
                                          cells.address,
                                          c0.address,
                                          {w_hh.front().address, w_hh.back().address},
                                          static_cast<const std::int32_t*>(starts.address),
                                          dy.address,
                                          dh_n.address,
                                          dc_n.address,
                                          dgates.address,
                                          dh0.address,
                                          dc0.address,
                                          persistent_sizes(sizes),
                                          plan_of(plan),
                                          workspace.address,
                                          {},
                                          {},
                                          0};
    run_persistent(walk, kind, device, queue);
}

// csrc/cuda/persistent.h, Previous.
void previous([[maybe_unused]] Address y, [[maybe_unused]] Address initial, [[maybe_unused]] Address starts,
              [[maybe_unused]] Address before, [[maybe_unused]] std::int64_t rows, [[maybe_unused]] int steps,
              [[maybe_unused]] int width, [[maybe_unused]] int stride, [[maybe_unused]] bool reverse,
              [[maybe_unused]] int device, [[maybe_unused]] Address stream) {
#ifdef LSTM_FAST_WITH_CUDA
    const lstm::persistent::cuda::Previous asked{pointer(y),
                                                 pointer(initial),
                                                 static_cast<const std::int32_t*>(pointer(starts)),
                                                 pointer(before),
                                                 rows,
                                                 steps,
                                                 width,
                                                 stride,
                                                 reverse};
    const std::string error = lstm::persistent::cuda::previous(asked, device, pointer(stream));
#else
    const std::string error = "lstm_fast._C was built without CUDA";
#endif
    if (!error.empty()) throw std::runtime_error("the rows of the steps before could not be copied: " + error);
}

// csrc/cuda/persistent.h, Interleaved.
void interleave([[maybe_unused]] const std::vector<Tensor>& from, [[maybe_unused]] Tensor to,
                [[maybe_unused]] int hidden, [[maybe_unused]] int width, [[maybe_unused]] int device,
                [[maybe_unused]] Address stream) {
#ifdef LSTM_FAST_WITH_CUDA
    const std::string error = lstm::persistent::cuda::interleave(
        {{from.front().address, from.back().address}, to.address, hidden, static_cast<int>(from.size()), width}, device,
        pointer(stream));
#else
    const std::string error = "lstm_fast._C was built without CUDA";
#endif
    if (!error.empty()) throw std::runtime_error("the rows of weight_ih could not be interleaved: " + error);
}

// csrc/cuda/persistent.h, Sums.
void row_sums([[maybe_unused]] Tensor rows, [[maybe_unused]] std::int64_t count, [[maybe_unused]] int width,
              [[maybe_unused]] Tensor to, [[maybe_unused]] Tensor again, [[maybe_unused]] int kind,
              [[maybe_unused]] int device, [[maybe_unused]] Address stream) {
#ifdef LSTM_FAST_WITH_CUDA
    const std::string error = lstm::persistent::cuda::sum({rows.address, count, width, to.address, again.address},
                                                          static_cast<Kind>(kind), device, pointer(stream));
#else
    const std::string error = "lstm_fast._C was built without CUDA";
#endif
    if (!error.empty()) throw std::runtime_error("the gradients of the biases could not be summed: " + error);
}

// int32 values into the device's memory, without a wait.
void upload([[maybe_unused]] const std::vector<std::int32_t>& values, [[maybe_unused]] Address to,
            [[maybe_unused]] int device, [[maybe_unused]] Address stream) {
#ifdef LSTM_FAST_WITH_CUDA
    const std::string error = lstm::persistent::cuda::upload(values.data(), static_cast<int>(values.size()),
                                                             pointer(to), device, pointer(stream));
#else
    const std::string error = "lstm_fast._C was built without CUDA";
#endif
    if (!error.empty()) throw std::runtime_error("the starts of the steps could not be copied: " + error);
}

// How many clusters of each size run at once, and for each step what it is, its size, blocks, clocks and nanoseconds.
std::vector<std::pair<int, int>> clusters_at_once([[maybe_unused]] int device) {
#ifdef LSTM_FAST_WITH_CLUSTERS
    return lstm::persistent::cuda::clusters_at_once(device);
#else
    throw std::runtime_error("lstm_fast._C was built without clusters");
#endif
}

// report(what, size, blocks, clocks, ns) for each step.
void measure_exchange([[maybe_unused]] int device, [[maybe_unused]] const py::function& report) {
#ifdef LSTM_FAST_WITH_CLUSTERS
    lstm::persistent::cuda::measure_exchange(device, [&](const lstm::persistent::cuda::Latency& step) {
        report(step.what, step.size, step.blocks, step.clocks, step.ns);
    });
#else
    throw std::runtime_error("lstm_fast._C was built without clusters");
#endif
}

void bind_persistent(py::module_& m) {
    m.def("persistent_plan", persistent_plan, py::kw_only(), "kind"_a, "backward"_a, "hidden"_a, "batch"_a,
          "directions"_a, "granted"_a);
    m.def("persistent_granted", persistent_granted, py::kw_only(), "kind"_a, "backward"_a, "device"_a, "grid"_a,
          "cluster"_a, "threads"_a, "shared"_a);
    m.def("persistent_library_clocks", persistent_library_clocks, py::kw_only(), "kind"_a, "hidden"_a, "batch"_a,
          "plain"_a);
    m.def("persistent_workspace", persistent_workspace, py::kw_only(), "kind"_a, "backward"_a, "plan"_a,
          "directions"_a);
    m.def("persistent_forward", persistent_forward, "gates"_a, "h0"_a, "c0"_a, "w_hh"_a, "biases"_a, "starts"_a, "y"_a,
          "h_n"_a, "c_n"_a, "cells"_a, "sizes"_a, "plan"_a, "workspace"_a, "kind"_a, "device"_a, "queue"_a);
    m.def("persistent_backward", persistent_backward, "gates"_a, "cells"_a, "c0"_a, "w_hh"_a, "starts"_a, "dy"_a,
          "dh_n"_a, "dc_n"_a, "dgates"_a, "dh0"_a, "dc0"_a, "sizes"_a, "plan"_a, "workspace"_a, "kind"_a, "device"_a,
          "queue"_a);
    m.def("clusters_at_once", clusters_at_once, "device"_a);
    m.def("measure_exchange", measure_exchange, "device"_a, "report"_a);
    m.def("previous", previous, Released(), py::kw_only(), "y"_a, "initial"_a, "starts"_a, "before"_a, "rows"_a,
          "steps"_a, "width"_a, "stride"_a, "reverse"_a, "device"_a, "stream"_a);
    m.def("interleave", interleave, "from_"_a, "to"_a, "hidden"_a, "width"_a, "device"_a, "stream"_a);
    m.def("row_sums", row_sums, "rows"_a, "count"_a, "width"_a, "to"_a, "again"_a, "kind"_a, "device"_a, "stream"_a);
    m.def("upload", upload, Released(), py::kw_only(), "values"_a, "to"_a, "device"_a, "stream"_a);
}

// Out of memory is torch's error of that kind, by whose words those know it who look for a batch size that fits.
void translate_out_of_memory(std::exception_ptr thrown) {
    try {
        std::rethrow_exception(std::move(thrown));
    } catch (const std::bad_alloc&) {
        PyErr_SetString(PyExc_RuntimeError,
                        "DefaultCPUAllocator: can't allocate memory for what an LSTM's call needs beside its results");
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "lstm_fast's compiled kernels.";
    py::register_local_exception_translator(translate_out_of_memory);
    m.attr("DTYPES") = py::dict(
        "float32"_a = static_cast<int>(lstm::Dtype::float32), "float64"_a = static_cast<int>(lstm::Dtype::float64),
        "bfloat16"_a = static_cast<int>(lstm::Dtype::bfloat16), "float16"_a = static_cast<int>(lstm::Dtype::float16));
    m.def("build_info", build_info, "How this extension was built.");
    m.def("environment_has", [](const char* name) { return std::getenv(name) != nullptr; }, "name"_a);
    m.def("layer_inputs_fit", lstm::tensors::layer_inputs_fit, "inputs"_a, "cell"_a = false);
    m.def("train_backward", lstm::tensors::train_backward, "saved"_a, "grads"_a, "needs"_a, "threads"_a,
          "instruction_set"_a);
    m.def("train", lstm::tensors::train, "attributes"_a, "layer"_a, "x"_a, "hx"_a, "batch_sizes"_a, "threads"_a,
          "instruction_set"_a);
    m.def("infer", lstm::tensors::infer, "attributes"_a, "x"_a, "hx"_a, "batch_sizes"_a, "threads"_a,
          "instruction_set"_a);
    bind_cpu(m);
    bind_gates(m);
    bind_persistent(m);
}
