// A module's call on the CPU kernel in one call from Python, inference of all its layers or either pass of one in
// training, where the arguments are as plain as they mostly are: to look at them one by one from Python takes longer
// than a small product.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "layer_calls.h"

namespace lstm::tensors {

inline std::optional<Dtype> dtype_of(const View& x) {
    if (x.lanes != 1) return std::nullopt;
    if (x.kind == kBrain && x.bits == 16) return Dtype::bfloat16;
    if (x.kind != kIeee) return std::nullopt;
    if (x.bits == 16) return Dtype::float16;
    if (x.bits == 32) return Dtype::float32;
    return x.bits == 64 ? std::optional(Dtype::float64) : std::nullopt;
}

// What an LSTM's own attributes say, or an LSTMCell's, which has no list of names.
struct Module {
    std::int64_t input, hidden, features;  // I, H, R
    std::int64_t directions;               // D
    bool batch_first, drops, cell;
    PyObject* parameters;  // by name
    PyObject* names;       // of weights, a list for each direction of each layer
};

// None where one is missing, or isn't what torch.nn made it.
inline std::optional<Module> read_module(const py::dict& attributes) {
    struct Keys {
        static PyObject* of(const char* name) { return PyUnicode_InternFromString(name); }
        PyObject *parameters = of("_parameters"), *names = of("_all_weights"), *input = of("input_size"),
                 *hidden = of("hidden_size"), *projected = of("proj_size"), *both = of("bidirectional"),
                 *batch_first = of("batch_first"), *dropout = of("dropout"), *training = of("training");
    };
    static const Keys keys;
    static const py::handle names_of_cell = [] {
        py::list own, names;
        for (const char* const name : {"weight_ih", "weight_hh", "bias_ih", "bias_hh"})
            own.append(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)));
        names.append(own);
        return names.release();
    }();
    const auto get = [&](PyObject* key) { return PyDict_GetItemWithError(attributes.ptr(), key); };
    const auto size = [&](PyObject* key) {
        PyObject* const found = get(key);
        return found == nullptr ? 0 : static_cast<std::int64_t>(PyLong_AsLongLong(found));
    };
    PyObject* const names = get(keys.names);
    const bool cell = names == nullptr;
    bool whole = true;
    const auto is = [&](PyObject* key) {
        PyObject* const found = get(key);
        whole = whole && (cell || found != nullptr);  // else a subclass computes it
        return found != nullptr && PyObject_IsTrue(found) == 1;
    };
    const bool dropout = is(keys.dropout), training = is(keys.training);
    Module module{size(keys.input),
                  size(keys.hidden),
                  size(keys.projected),
                  is(keys.both) ? 2 : 1,
                  is(keys.batch_first),
                  dropout && training,
                  cell,
                  get(keys.parameters),
                  cell ? names_of_cell.ptr() : names};
    if (PyErr_Occurred()) {  // a size that is no number
        PyErr_Clear();
        return std::nullopt;
    }
    if (!whole) return std::nullopt;
    if (module.features == 0) module.features = module.hidden;
    const bool known = module.parameters != nullptr && PyDict_Check(module.parameters) && PyList_Check(module.names);
    return known ? std::optional(module) : std::nullopt;
}

// The active sequences of each step of so many rows: `batch` at every one, or what a PackedSequence's batch_sizes say;
// nothing where those don't fit.
inline std::optional<std::vector<std::int64_t>> read_steps(const py::object& batch_sizes, std::int64_t rows,
                                                           std::int64_t batch) {
    if (batch_sizes.is_none()) {
        if (rows < 1 || batch < 1 || rows % batch != 0) return std::nullopt;
        return std::vector<std::int64_t>(rows / batch, batch);
    }
    constexpr std::uint8_t signed_integer = 0;  // DLPack's code
    const auto found = view(batch_sizes);
    if (!found || found->dims != 1 || found->kind != signed_integer || found->bits != 64) return std::nullopt;
    const auto* const first = static_cast<const std::int64_t*>(found->data);
    std::vector<std::int64_t> steps(first, first + found->sizes[0]);
    const bool falls = std::is_sorted(steps.begin(), steps.end(), std::greater<>());
    if (steps.empty() || !falls || steps.back() < 1) return std::nullopt;
    if (std::accumulate(steps.begin(), steps.end(), std::int64_t{0}) != rows) return std::nullopt;
    return steps;
}

// A module's call, of all layers or of one.
struct ModuleCall {
    Module module;
    View input;
    Dtype dtype;
    std::vector<std::int64_t> steps;
    TensorShape h_shape, c_shape;                 // of all states
    std::array<const void*, 2> states = {};       // null for zeros
    std::vector<std::array<py::object, 5>> held;  // each direction's weights, while others may change the module
    std::vector<cpu::Weights> weights;
};

// Of x and hx; batch_sizes are None where x isn't packed. Nothing where this quick look can't tell that all fit each
// other, or where something has to be copied or dropped.
inline std::optional<ModuleCall> read_call(const py::dict& attributes, std::optional<std::int64_t> layer,
                                           const py::object& x, const py::object& hx, const py::object& batch_sizes) {
    ModuleCall call;
    const auto read = read_module(attributes);
    if (!read) return std::nullopt;
    const Module& module = call.module = *read;
    const auto all = static_cast<std::int64_t>(PyList_GET_SIZE(module.names));
    const std::int64_t begin = layer ? *layer * module.directions : 0, count = layer ? module.directions : all;
    if (all < 1 || all % module.directions != 0 || begin + count > all) return std::nullopt;
    if (module.drops && all > module.directions) return std::nullopt;
    const auto inputs_of = [&](std::int64_t k) {
        return k < module.directions ? module.input : module.directions * module.features;
    };
    const auto input = view(x);
    const bool packed = !batch_sizes.is_none();
    const int dims = module.cell || packed ? 2 : 3;
    if (!input || (input->dims != dims && input->dims != dims - 1)) return std::nullopt;
    const std::optional<Dtype> dtype = dtype_of(*input);
    if (!dtype || input->sizes[input->dims - 1] != inputs_of(begin)) return std::nullopt;

    const bool batched = input->dims == dims, turned = batched && !packed && module.batch_first && !layer;
    const std::int64_t rows =
        std::accumulate(input->sizes, input->sizes + input->dims - 1, std::int64_t{1}, std::multiplies<>());
    auto steps = read_steps(batch_sizes, rows, batched && !packed ? input->sizes[module.cell || turned ? 0 : 1] : 1);
    if (!steps || (packed && !batched) || (turned && steps->size() > 1 && steps->front() > 1)) return std::nullopt;
    const std::int64_t batch = steps->front();

    // of states, [D * layers, B, features], without the dimensions that a cell and an unbatched input don't have
    const auto state_shape = [&](std::int64_t features) {
        TensorShape shape;
        if (!module.cell) shape.push_back(count);
        if (batched) shape.push_back(batch);
        shape.push_back(features);
        return shape;
    };
    call.h_shape = state_shape(module.features);
    call.c_shape = state_shape(module.hidden);
    if (!hx.is_none()) {
        if (!py::isinstance<py::tuple>(hx) || py::len(hx) != call.states.size()) return std::nullopt;
        const auto pair = py::reinterpret_borrow<py::tuple>(hx);
        for (std::size_t i = 0; i < call.states.size(); ++i) {
            const TensorShape& shape = i == 0 ? call.h_shape : call.c_shape;
            const auto found = view(py::object(pair[i]));
            if (!found || !same_dtype(*found, *input)) return std::nullopt;
            if (!std::equal(shape.begin(), shape.end(), found->sizes, found->sizes + found->dims)) return std::nullopt;
            call.states[i] = found->data;
        }
    }

    for (std::int64_t k = begin; k < begin + count; ++k) {
        WeightViews views;
        auto& held = call.held.emplace_back();
        held.fill(py::none());
        PyObject* const names = PyList_GET_ITEM(module.names, k);
        if (!PyList_Check(names) || PyList_GET_SIZE(names) > static_cast<Py_ssize_t>(views.size())) return std::nullopt;
        const auto own = py::reinterpret_borrow<py::list>(names);
        const bool projected = own.size() % 2 == 1;
        for (std::size_t i = 0; i < own.size(); ++i) {
            PyObject* const found = PyDict_GetItemWithError(module.parameters, py::object(own[i]).ptr());
            if (found == nullptr) return std::nullopt;
            if (found == Py_None) continue;
            const std::size_t place = projected && i + 1 == own.size() ? views.size() - 1 : i;
            held[place] = py::reinterpret_borrow<py::object>(found);
            views[place] = view(found);
            if (!views[place]) return std::nullopt;
        }
        if (!weights_fit(views, *input, inputs_of(k), module.hidden, module.features)) return std::nullopt;
        const auto data = [](const std::optional<View>& v) { return v ? v->data : nullptr; };
        call.weights.push_back({data(views[0]), data(views[1]), data(views[2]), data(views[3]), data(views[4])});
    }
    call.input = *input;
    call.dtype = *dtype;
    call.steps = std::move(*steps);
    return call;
}

// y, (h_n, c_n) of an LSTM, or (h', c') of an LSTMCell, as lstm_fast/lstm.py gives them for x and hx; or None.
inline py::object infer(const py::dict& attributes, const py::object& x, const py::object& hx,
                        const py::object& batch_sizes, int threads, int set) {
    const auto call = read_call(attributes, std::nullopt, x, hx, batch_sizes);
    if (!call) return py::none();
    const Module& module = call->module;
    TensorShape y_shape(call->input.sizes, call->input.sizes + call->input.dims);
    y_shape.back() = module.directions * module.features;
    const std::int64_t size = size_of(call->dtype), count = static_cast<std::int64_t>(call->weights.size());
    const Fresh y = new_empty(x, y_shape, size);
    const Fresh h_n = module.cell ? Fresh() : new_empty(x, call->h_shape, size);
    const Fresh c_n = new_empty(x, call->c_shape, size);
    {
        const py::gil_scoped_release released;
        const auto time = static_cast<std::int64_t>(call->steps.size()), batch = call->steps.front();
        const std::int64_t rows = std::accumulate(call->steps.begin(), call->steps.end(), std::int64_t{0});
        std::array<std::unique_ptr<char[]>, 2> between;  // y of a layer and of the next, by turns
        const void* from = call->input.data;
        for (std::int64_t k = 0; k < count; k += module.directions) {
            const bool last = k + module.directions == count;
            auto& own = between[k / module.directions % 2];
            if (!last && own == nullptr) {
                const std::int64_t bytes = rows * y_shape.back() * size;
                own.reset(new char[bytes]);
                cpu::ask_for_huge_pages(own.get(), bytes);
            }
            char* const to = last ? y.data : own.get();
            const auto at = [&](auto* base, std::int64_t features) {
                return base == nullptr ? nullptr : base + k * batch * features * size;
            };
            const auto state = [&](int i, std::int64_t features) {
                return at(static_cast<const char*>(call->states[i]), features);
            };
            cpu::layer_forward({call->steps.data(), time, batch, k == 0 ? module.input : y_shape.back(), module.hidden,
                                module.features, static_cast<int>(module.directions), call->dtype, threads,
                                static_cast<cpu::InstructionSet>(set)},
                               {from,
                                state(0, module.features),
                                state(1, module.hidden),
                                {call->weights[k], call->weights[k + module.directions - 1]},
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

// The 13 inputs of one layer of an LSTM or of an LSTMCell, and what its forward pass gives and saves: (inputs, (y, h_n,
// c_n, gates, cells)) of lstm_fast/autograd.py; or None. x [T, B, I], of a cell [B, I]; hx is the layer's own, and
// states of zeros are made.
inline py::object train(const py::dict& attributes, std::int64_t layer, const py::object& x, const py::object& hx,
                        const py::object& batch_sizes, int threads, int set) {
    const auto call = read_call(attributes, layer, x, hx, batch_sizes);
    if (!call) return py::none();
    const Module& module = call->module;
    if (call->input.dims != (module.cell || !batch_sizes.is_none() ? 2 : 3)) return py::none();

    const auto zeros = [&](const TensorShape& shape) {
        const std::int64_t size = size_of(call->dtype);
        const Fresh made = new_empty(x, shape, size);
        std::memset(made.data, 0, std::accumulate(shape.begin(), shape.end(), size, std::multiplies<>()));
        return made.tensor;
    };
    constexpr std::size_t of_direction = std::tuple_size_v<WeightViews>, of_states = 3;
    py::tuple inputs(of_states + 2 * of_direction);
    inputs[0] = x;
    if (!hx.is_none()) {
        const auto states = py::reinterpret_borrow<py::tuple>(hx);
        inputs[1] = states[0], inputs[2] = states[1];
    } else {
        const py::object c0 = zeros(call->c_shape);
        inputs[1] = module.features == module.hidden ? c0 : zeros(call->h_shape);
        inputs[2] = c0;
    }
    for (std::size_t i = 0; i < 2 * of_direction; ++i) {
        const std::size_t d = i / of_direction;
        inputs[of_states + i] = d < call->held.size() ? call->held[d][i % of_direction] : py::none();
    }
    const LayerSizes sizes{call->input.sizes[call->input.dims - 1], module.hidden, module.features,
                           static_cast<int>(call->dtype),           threads,       set};
    return py::make_tuple(inputs, layer_forward({inputs, call->input, call->steps, sizes, module.cell}, true));
}

// The gradients of the 13 inputs from what was saved of a layer's call or a cell's (those inputs, batch_sizes, y, gates
// and cells), and None for as many others as `needs` goes on for; or None in place of all. `grads`: of y, h_n, c_n.
inline py::object train_backward(const py::tuple& saved, const py::tuple& grads, const py::sequence& needs, int threads,
                                 int set) {
    constexpr std::size_t of_inputs = 13;
    const auto x = view(py::object(saved[0])), h0 = view(py::object(saved[1])), c0 = view(py::object(saved[2]));
    const auto y = view(py::object(saved[of_inputs + 1])), gates = view(py::object(saved[of_inputs + 2])),
               cells = view(py::object(saved[of_inputs + 3]));
    if (!x || !h0 || !c0 || !y || !gates || !cells) return py::none();
    const bool cell = c0->dims == 2;
    if (!layer_inputs_fit(saved, cell)) return py::none();  // who kept them may have changed them
    const std::int64_t batch = c0->sizes[c0->dims - 2], hidden = c0->sizes[c0->dims - 1];
    const std::int64_t features = h0->sizes[h0->dims - 1], directions = cell ? 1 : c0->sizes[0];
    const std::int64_t rows = std::accumulate(x->sizes, x->sizes + x->dims - 1, std::int64_t{1}, std::multiplies<>());
    const bool alike = y->dims == x->dims && std::equal(x->sizes, x->sizes + x->dims - 1, y->sizes);
    if (!alike || y->sizes[y->dims - 1] != directions * features || !same_dtype(*y, *x)) return py::none();
    if (!gates->has_sizes({directions, rows, 4 * hidden}) || !same_dtype(*gates, *x)) return py::none();
    const bool wide = cells->kind == kIeee && cells->lanes == 1 && cells->bits == std::max<int>(x->bits, 32);
    if (!cells->has_sizes({directions, rows, hidden}) || !wide) return py::none();
    std::array<Data, 3> of_outputs;
    std::array<py::object, 3> contiguous;
    for (std::size_t i = 0; i < of_outputs.size(); ++i) {
        const py::object grad = grads[i];
        if (grad.is_none()) continue;
        const View& output = i == 0 ? *y : i == 1 ? *h0 : *c0;
        auto found = view(grad);
        if (!found) found = view(contiguous[i] = grad.attr("contiguous")());
        if (!found || !same_dtype(*found, *x) || found->dims != output.dims ||
            !std::equal(output.sizes, output.sizes + output.dims, found->sizes))
            return py::none();
        of_outputs[i].address = found->data;
    }
    const std::optional<Dtype> dtype = dtype_of(*x);
    auto steps = read_steps(saved[of_inputs], rows, batch);
    if (!dtype || !steps || steps->front() != batch || (cell && steps->size() > 1)) return py::none();
    const LayerSizes sizes{x->sizes[x->dims - 1], hidden, features, static_cast<int>(*dtype), threads, set};
    py::list found = layer_backward({saved, *x, std::move(*steps), sizes, cell}, Data{y->data}, Data{gates->data},
                                    Data{cells->data}, of_outputs, needs);
    while (found.size() < needs.size()) found.append(py::none());
    return py::tuple(found);
}

}  // namespace lstm::tensors
