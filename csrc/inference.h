// A module's whole inference on the CPU kernel in one call from Python, where the arguments are as plain as they mostly
// are: to look at them one by one from Python takes longer than a small product.
#pragma once

#include <string>
#include <vector>

#include "cpu/layer.h"
#include "tensors.h"

namespace lstm::tensors {

inline std::optional<Dtype> dtype_of(const View& x) {
    constexpr std::uint8_t ieee = 2, brain = 4;  // DLPack's codes
    if (x.lanes != 1) return std::nullopt;
    if (x.kind == brain && x.bits == 16) return Dtype::bfloat16;
    if (x.kind != ieee) return std::nullopt;
    if (x.bits == 16) return Dtype::float16;
    if (x.bits == 32) return Dtype::float32;
    return x.bits == 64 ? std::optional(Dtype::float64) : std::nullopt;
}

// What a module is: an LSTM with its layers, or an LSTMCell.
struct Module {
    std::int64_t input, hidden, features;  // I, H, R
    std::int64_t directions;               // D
    bool batch_first, cell;
};

// y, (h_n, c_n) of an LSTM, or (h', c') of an LSTMCell, as lstm_fast/lstm.py gives them for x and hx. `names` of the
// weights among `parameters`, a list for each direction of each layer. None where this quick look can't tell that all
// fit each other, or where something has to be copied first.
inline py::object infer(const py::dict& parameters, const py::list& names, const py::object& x, const py::object& hx,
                        const std::array<std::int64_t, 6>& of_module, int threads) {
    const Module module{of_module[0], of_module[1], of_module[2], of_module[3], of_module[4] != 0, of_module[5] != 0};
    const auto input = view(x);
    const int dims = module.cell ? 2 : 3;
    if (!input || (input->dims != dims && input->dims != dims - 1)) return py::none();
    const std::optional<Dtype> dtype = dtype_of(*input);
    if (!dtype || input->sizes[input->dims - 1] != module.input) return py::none();

    const bool batched = input->dims == dims, turned = batched && module.batch_first;
    const std::int64_t time = module.cell ? 1 : input->sizes[turned ? 1 : 0];
    const std::int64_t batch = batched ? input->sizes[module.cell || turned ? 0 : 1] : 1;
    if (time < 1 || batch < 1 || (turned && time > 1 && batch > 1)) return py::none();

    // of states, [D * layers, B, features], without the dimensions that a cell and an unbatched input don't have
    const auto count = static_cast<std::int64_t>(names.size());
    if (count < 1 || count % module.directions != 0) return py::none();
    const auto state_shape = [&](std::int64_t features) {
        TensorShape shape;
        if (!module.cell) shape.push_back(count);
        if (batched) shape.push_back(batch);
        shape.push_back(features);
        return shape;
    };
    const TensorShape h_shape = state_shape(module.features), c_shape = state_shape(module.hidden);
    std::array<std::optional<View>, 2> states;
    if (!hx.is_none()) {
        if (!py::isinstance<py::tuple>(hx) || py::len(hx) != states.size()) return py::none();
        const auto pair = py::reinterpret_borrow<py::tuple>(hx);
        for (std::size_t i = 0; i < states.size(); ++i) {
            const TensorShape& shape = i == 0 ? h_shape : c_shape;
            states[i] = view(py::object(pair[i]));
            if (!states[i] || !same_dtype(*states[i], *input)) return py::none();
            if (!std::equal(shape.begin(), shape.end(), states[i]->sizes, states[i]->sizes + states[i]->dims))
                return py::none();
        }
    }

    std::vector<py::object> held;  // while others may change the module
    std::vector<cpu::Weights> weights;
    for (std::int64_t k = 0; k < count; ++k) {
        WeightViews views;
        if (!py::isinstance<py::list>(names[k]) || py::len(names[k]) > views.size()) return py::none();
        const auto own = py::reinterpret_borrow<py::list>(names[k]);
        const bool projected = own.size() % 2 == 1;
        for (std::size_t i = 0; i < own.size(); ++i) {
            PyObject* const found = PyDict_GetItemWithError(parameters.ptr(), py::object(own[i]).ptr());
            if (found == nullptr) return py::none();
            if (found == Py_None) continue;
            held.push_back(py::reinterpret_borrow<py::object>(found));
            auto& place = views[projected && i + 1 == own.size() ? views.size() - 1 : i];
            place = view(held.back());
            if (!place) return py::none();
        }
        const std::int64_t inputs = k < module.directions ? module.input : module.directions * module.features;
        if (!weights_fit(views, *input, inputs, module.hidden, module.features)) return py::none();
        const auto data = [](const std::optional<View>& v) { return v ? v->data : nullptr; };
        weights.push_back({data(views[0]), data(views[1]), data(views[2]), data(views[3]), data(views[4])});
    }

    TensorShape y_shape(input->sizes, input->sizes + input->dims);
    y_shape.back() = module.directions * module.features;
    const std::int64_t size = size_of(*dtype);
    const Fresh y = new_empty(x, y_shape);
    const Fresh h_n = module.cell ? Fresh() : new_empty(x, h_shape);
    const Fresh c_n = new_empty(x, c_shape);
    {
        const py::gil_scoped_release released;
        const std::vector<std::int64_t> steps(time, batch);
        const std::int64_t rows = time * batch;
        std::array<std::vector<char>, 2> between;  // y of a layer and of the next, by turns
        const void* from = input->data;
        for (std::int64_t k = 0; k < count; k += module.directions) {
            const bool last = k + module.directions == count;
            auto& own = between[k / module.directions % 2];
            if (!last) own.resize(rows * y_shape.back() * size);
            char* const to = last ? y.data : own.data();
            const auto at = [&](auto* base, std::int64_t features) {
                return base == nullptr ? nullptr : base + k * batch * features * size;
            };
            const auto state = [&](int i, std::int64_t features) {
                return at(states[i] ? static_cast<const char*>(states[i]->data) : nullptr, features);
            };
            cpu::layer_forward(
                {steps.data(), time, batch, k == 0 ? module.input : y_shape.back(), module.hidden, module.features,
                 static_cast<int>(module.directions), *dtype, threads, cpu::best_instruction_set()},
                {from,
                 state(0, module.features),
                 state(1, module.hidden),
                 {weights[k], weights[k + module.directions - 1]},
                 to,
                 at(h_n.data, module.features),
                 at(c_n.data, module.hidden),
                 nullptr,
                 nullptr});
            from = to;
        }
    }
    if (module.cell) return py::make_tuple(y.tensor, c_n.tensor);
    return py::make_tuple(y.tensor, py::make_tuple(h_n.tensor, c_n.tensor));
}

}  // namespace lstm::tensors
