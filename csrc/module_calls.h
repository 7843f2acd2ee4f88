// A module's call on the CPU kernel in one call from Python, inference of all its layers or the forward pass of one in
// training, where the arguments are as plain as they mostly are: to look at them one by one from Python takes longer
// than a small product.
#pragma once

#include <string>
#include <vector>

#include "layer_calls.h"

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

// What a call of a module was given.
struct ModuleCall {
    Module module;
    View input;
    Dtype dtype;
    std::int64_t time, batch;
    TensorShape h_shape, c_shape;            // of all layers' states
    std::array<const void*, 2> states = {};  // null for zeros
    std::vector<std::array<py::object, 5>>
        held;  // weights of each direction of each layer, while others may change them
    std::vector<cpu::Weights> weights;

    cpu::Shape shape(const std::vector<std::int64_t>& steps, std::int64_t width, int threads, int set) const {
        return {steps.data(),
                time,
                batch,
                width,
                module.hidden,
                module.features,
                static_cast<int>(module.directions),
                dtype,
                threads,
                static_cast<cpu::InstructionSet>(set)};
    }
    TensorShape y_shape() const {
        TensorShape shape(input.sizes, input.sizes + input.dims);
        shape.back() = module.directions * module.features;
        return shape;
    }
};

// `names` of the weights among `parameters`, a list for each direction of each layer. None where this quick look can't
// tell that all fit each other, or where something has to be copied first.
inline std::optional<ModuleCall> read_call(const py::dict& parameters, const py::list& names, const py::object& x,
                                           const py::object& hx, const std::array<std::int64_t, 6>& of_module) {
    ModuleCall call;
    const Module& module =
        call.module = {of_module[0], of_module[1], of_module[2], of_module[3], of_module[4] != 0, of_module[5] != 0};
    const auto input = view(x);
    const int dims = module.cell ? 2 : 3;
    if (!input || (input->dims != dims && input->dims != dims - 1)) return std::nullopt;
    const std::optional<Dtype> dtype = dtype_of(*input);
    if (!dtype || input->sizes[input->dims - 1] != module.input) return std::nullopt;

    const bool batched = input->dims == dims, turned = batched && module.batch_first;
    const std::int64_t time = module.cell ? 1 : input->sizes[turned ? 1 : 0];
    const std::int64_t batch = batched ? input->sizes[module.cell || turned ? 0 : 1] : 1;
    if (time < 1 || batch < 1 || (turned && time > 1 && batch > 1)) return std::nullopt;

    // of states, [D * layers, B, features], without the dimensions that a cell and an unbatched input don't have
    const auto count = static_cast<std::int64_t>(names.size());
    if (count < 1 || count % module.directions != 0) return std::nullopt;
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

    for (std::int64_t k = 0; k < count; ++k) {
        WeightViews views;
        auto& held = call.held.emplace_back();
        held.fill(py::none());
        if (!py::isinstance<py::list>(names[k]) || py::len(names[k]) > views.size()) return std::nullopt;
        const auto own = py::reinterpret_borrow<py::list>(names[k]);
        const bool projected = own.size() % 2 == 1;
        for (std::size_t i = 0; i < own.size(); ++i) {
            PyObject* const found = PyDict_GetItemWithError(parameters.ptr(), py::object(own[i]).ptr());
            if (found == nullptr) return std::nullopt;
            if (found == Py_None) continue;
            const std::size_t place = projected && i + 1 == own.size() ? views.size() - 1 : i;
            held[place] = py::reinterpret_borrow<py::object>(found);
            views[place] = view(found);
            if (!views[place]) return std::nullopt;
        }
        const std::int64_t inputs = k < module.directions ? module.input : module.directions * module.features;
        if (!weights_fit(views, *input, inputs, module.hidden, module.features)) return std::nullopt;
        const auto data = [](const std::optional<View>& v) { return v ? v->data : nullptr; };
        call.weights.push_back({data(views[0]), data(views[1]), data(views[2]), data(views[3]), data(views[4])});
    }
    call.input = *input;
    call.dtype = *dtype;
    call.time = time;
    call.batch = batch;
    return call;
}

// y, (h_n, c_n) of an LSTM, or (h', c') of an LSTMCell, as lstm_fast/lstm.py gives them for x and hx; or None.
inline py::object infer(const py::dict& parameters, const py::list& names, const py::object& x, const py::object& hx,
                        const std::array<std::int64_t, 6>& of_module, int threads, int set) {
    const auto call = read_call(parameters, names, x, hx, of_module);
    if (!call) return py::none();
    const Module& module = call->module;
    const TensorShape y_shape = call->y_shape();
    const std::int64_t size = size_of(call->dtype), count = static_cast<std::int64_t>(call->weights.size());
    const Fresh y = new_empty(x, y_shape);
    const Fresh h_n = module.cell ? Fresh() : new_empty(x, call->h_shape);
    const Fresh c_n = new_empty(x, call->c_shape);
    {
        const py::gil_scoped_release released;
        const std::vector<std::int64_t> steps(call->time, call->batch);
        const std::int64_t rows = call->time * call->batch;
        std::array<std::vector<char>, 2> between;  // y of a layer and of the next, by turns
        const void* from = call->input.data;
        for (std::int64_t k = 0; k < count; k += module.directions) {
            const bool last = k + module.directions == count;
            auto& own = between[k / module.directions % 2];
            if (!last) own.resize(rows * y_shape.back() * size);
            char* const to = last ? y.data : own.data();
            const auto at = [&](auto* base, std::int64_t features) {
                return base == nullptr ? nullptr : base + k * call->batch * features * size;
            };
            const auto state = [&](int i, std::int64_t features) {
                return at(static_cast<const char*>(call->states[i]), features);
            };
            cpu::layer_forward(call->shape(steps, k == 0 ? module.input : y_shape.back(), threads, set),
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

// The 13 inputs of one layer of an LSTM, and what its forward pass gives and saves: (inputs, (y, h_n, c_n, gates,
// cells)) of lstm_fast/autograd.py; or None. x [T, B, I]; states of zeros are made.
inline py::object train(const py::dict& parameters, const py::list& names, const py::object& x, const py::object& hx,
                        const std::array<std::int64_t, 6>& of_module, int threads, int set) {
    const auto call = read_call(parameters, names, x, hx, of_module);
    if (!call || call->input.dims != 3 || call->module.batch_first || call->module.cell) return py::none();
    const Module& module = call->module;
    const auto directions = static_cast<std::size_t>(module.directions);
    if (call->weights.size() != directions) return py::none();

    py::object states[2];
    for (int i = 0; i < 2; ++i) {
        if (!hx.is_none()) {
            states[i] = py::reinterpret_borrow<py::tuple>(hx)[i];
        } else if (i == 1 && module.features == module.hidden) {
            states[1] = states[0];
        } else {
            const Fresh zeros = new_empty(x, i == 0 ? call->h_shape : call->c_shape);
            std::memset(
                zeros.data, 0,
                call->batch * module.directions * size_of(call->dtype) * (i == 0 ? module.features : module.hidden));
            states[i] = zeros.tensor;
        }
    }
    constexpr std::size_t of_direction = std::tuple_size_v<WeightViews>, of_states = 3;
    py::tuple inputs(of_states + 2 * of_direction);
    inputs[0] = x, inputs[1] = states[0], inputs[2] = states[1];
    for (std::size_t i = 0; i < 2 * of_direction; ++i) {
        const bool there = i / of_direction < directions;
        inputs[of_states + i] = there ? call->held[i / of_direction][i % of_direction] : py::none();
    }

    const std::int64_t rows = call->time * call->batch;
    PyObject* const wide = size_of(call->dtype) == 2 ? types().float32 : nullptr;
    const Fresh y = new_empty(x, call->y_shape()), h_n = new_empty(x, call->h_shape), c_n = new_empty(x, call->c_shape);
    const Fresh gates = new_empty(x, {module.directions, rows, 4 * module.hidden});
    const Fresh cells = new_empty(x, {module.directions, rows, module.hidden}, wide);
    {
        const py::gil_scoped_release released;
        const std::vector<std::int64_t> steps(call->time, call->batch);
        cpu::layer_forward(call->shape(steps, module.input, threads, set),
                           {call->input.data,
                            call->states[0],
                            call->states[1],
                            {call->weights.front(), call->weights.back()},
                            y.data,
                            h_n.data,
                            c_n.data,
                            gates.data,
                            cells.data});
    }
    return py::make_tuple(inputs, py::make_tuple(y.tensor, h_n.tensor, c_n.tensor, gates.tensor, cells.tensor));
}

// The gradients of the 13 inputs from what was saved of a dense call: those inputs, None, y, gates and cells; or None.
inline py::object train_backward(const py::tuple& saved, const py::tuple& grads, const py::sequence& needs, int threads,
                                 int set) {
    constexpr std::size_t of_inputs = 13;
    const auto x = view(py::object(saved[0])), h0 = view(py::object(saved[1])), c0 = view(py::object(saved[2]));
    const auto y = view(py::object(saved[of_inputs + 1]));
    if (!saved[of_inputs].is_none() || !x || !h0 || !c0 || !y || x->dims != 3) return py::none();
    const std::optional<Dtype> dtype = dtype_of(*x);
    if (!layer_inputs_fit(saved)) return py::none();  // who kept them may have changed them
    std::array<Data, 3> of_outputs;
    for (std::size_t i = 0; i < of_outputs.size(); ++i) {
        const py::object grad = grads[i];
        if (grad.is_none()) continue;
        const View& output = i == 0 ? *y : i == 1 ? *h0 : *c0;
        const auto found = view(grad);
        if (!found || !same_dtype(*found, *x) || found->dims != output.dims ||
            !std::equal(output.sizes, output.sizes + output.dims, found->sizes))
            return py::none();
        of_outputs[i].address = found->data;
    }
    const std::int64_t time = x->sizes[0], batch = x->sizes[1];
    if (!dtype || time < 1 || batch < 1) return py::none();
    const LayerInputs inputs(saved, time, batch,
                             {x->sizes[2], c0->sizes[2], h0->sizes[2], static_cast<int>(*dtype), threads, set});
    const auto data = [&](std::size_t i) { return py::object(saved[of_inputs + i]).cast<Data>(); };
    py::list found = layer_backward(inputs, data(1), data(2), data(3), of_outputs, needs);
    while (found.size() < of_inputs) found.append(py::none());
    return found;
}

}  // namespace lstm::tensors
