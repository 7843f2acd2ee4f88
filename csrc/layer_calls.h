// One layer on the CPU kernel as lstm_fast/kernels/cpu.py calls it: results are made here, since to make them one by
// one from Python takes as long as a small layer.
#pragma once

#include <pybind11/stl.h>

#include <cstring>
#include <utility>
#include <vector>

#include "cpu/layer.h"
#include "kept_tensors.h"

namespace lstm::tensors {

// I, H, R, dtype, threads, instruction set
using LayerSizes = std::array<std::int64_t, 6>;

// kernels.LayerInputs: x [.., I] with N rows in all, h0, c0, the weights of each direction, steps.
struct LayerInputs {
    LayerInputs(const py::tuple& inputs, const LayerSizes& of)
        : x(inputs[0]),
          h0(inputs[1]),
          c0(inputs[2]),
          x_shape(x.attr("shape").cast<TensorShape>()),
          steps(inputs[4].cast<std::vector<std::int64_t>>()),
          sizes(of) {
        for (const py::handle direction : inputs[3]) weights.push_back(direction.cast<std::array<Data, 5>>());
    }
    // Of the 13 inputs one behind the other (lstm_fast/autograd.py), of a layer or of a cell; the first is seen.
    LayerInputs(const py::tuple& flat, const View& seen, std::vector<std::int64_t> of_steps, const LayerSizes& of,
                bool of_cell)
        : x(flat[0]),
          h0(flat[1]),
          c0(flat[2]),
          x_shape(seen.sizes, seen.sizes + seen.dims),
          steps(std::move(of_steps)),
          sizes(of),
          cell(of_cell) {
        for (std::size_t first = 3; first < 13 && !py::object(flat[first]).is_none(); first += 5) {
            auto& own = weights.emplace_back();
            for (std::size_t i = 0; i < own.size(); ++i) own[i] = py::object(flat[first + i]).cast<Data>();
        }
    }

    std::int64_t directions() const { return static_cast<std::int64_t>(weights.size()); }
    std::int64_t rows() const {
        std::int64_t rows = 0;
        for (const std::int64_t n : steps) rows += n;
        return rows;
    }
    Dtype dtype() const { return static_cast<Dtype>(sizes[3]); }
    TensorShape state_shape(std::int64_t n) const {
        return cell ? TensorShape{steps.front(), n} : TensorShape{directions(), steps.front(), n};
    }
    cpu::Shape shape() const {
        return {steps.data(),
                static_cast<std::int64_t>(steps.size()),
                steps.front(),
                sizes[0],
                sizes[1],
                sizes[2],
                static_cast<int>(weights.size()),
                dtype(),
                static_cast<int>(sizes[4]),
                static_cast<cpu::InstructionSet>(sizes[5])};
    }
    cpu::Weights weights_of(std::size_t direction) const {
        const auto& w = weights[direction];
        return {w[0].address, w[1].address, w[2].address, w[3].address, w[4].address};
    }

    const py::object x, h0, c0;
    const TensorShape x_shape;
    std::vector<std::array<Data, 5>> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr
    const std::vector<std::int64_t> steps;
    const LayerSizes sizes;
    const bool cell = false;  // states are [B, R] and [B, H], and h_n is y
};

inline void* address(const py::object& tensor) { return tensor.cast<Data>().address; }

// y [.., D * R], h_n (None of a cell), c_n; gates [D, N, 4H] and cells [D, N, H] with `save`, else None.
inline py::tuple layer_forward(const LayerInputs& inputs, bool save) {
    const auto [hidden, features] = std::array{inputs.sizes[1], inputs.sizes[2]};
    const std::int64_t directions = inputs.directions(), rows = inputs.rows();
    TensorShape y_shape = inputs.x_shape;
    y_shape.back() = directions * features;
    const std::int64_t size = size_of(inputs.dtype());
    const Fresh y = new_empty(inputs.x, y_shape, size);
    const Fresh h_n = inputs.cell ? Fresh() : new_empty(inputs.x, inputs.state_shape(features), size);
    const Fresh c_n = new_empty(inputs.x, inputs.state_shape(hidden), size);
    const auto saved = [&](const TensorShape& shape, Dtype dtype, PyObject* other = nullptr) {
        return save ? kept_empty(inputs.x, shape, dtype, cpu::kLeastSaved, other) : Fresh();
    };
    const Fresh gates = saved({directions, rows, 4 * hidden}, inputs.dtype());
    PyObject* const wide = size == 2 ? types().float32 : nullptr;
    const Dtype of_cells = wide == nullptr ? inputs.dtype() : Dtype::float32;
    const Fresh cells = saved({directions, rows, hidden}, of_cells, wide);
    const cpu::ForwardArgs args{address(inputs.x),
                                address(inputs.h0),
                                address(inputs.c0),
                                {inputs.weights_of(0), inputs.weights_of(inputs.weights.size() - 1)},
                                y.data,
                                h_n.data,
                                c_n.data,
                                gates.data,
                                cells.data};
    {
        const py::gil_scoped_release released;
        cpu::layer_forward(inputs.shape(), args);
    }
    return py::make_tuple(y.tensor, h_n.tensor, c_n.tensor, gates.tensor, cells.tensor);
}

// The gradients of x, h0, c0, and of each direction's w_ih, w_hh, b_ih, b_hh, w_hr; None where `needs`, in the same
// order, has none. `grads`: of y, h_n and c_n, None for zero.
inline py::list layer_backward(const LayerInputs& inputs, Data y, Data gates, Data cells,
                               const std::array<Data, 3>& grads, const py::sequence& needs) {
    const auto [input, hidden, features] = std::array{inputs.sizes[0], inputs.sizes[1], inputs.sizes[2]};
    const std::int64_t size = size_of(inputs.dtype());
    py::list found;
    const auto next = [&](const TensorShape& shape, bool there = true,
                          std::int64_t least = kNever) {  // of the next input
        const bool needed = there && py::object(needs[py::len(found)]).cast<bool>();
        const Fresh made = needed ? kept_empty(inputs.x, shape, inputs.dtype(), least) : Fresh();
        found.append(made.tensor);
        return made.data;
    };
    void* const dx = next(inputs.x_shape);
    void* const dh0 = next(inputs.state_shape(features));
    void* const dc0 = next(inputs.state_shape(hidden));
    cpu::WeightGradients gradients[2] = {};
    void* same[2] = {};  // as gradients[d].bias: the other bias's gradient
    for (std::size_t d = 0; d < inputs.weights.size(); ++d) {
        const auto& w = inputs.weights[d];
        gradients[d].w_ih = next({4 * hidden, input}, true, cpu::kLeastGradient);
        gradients[d].w_hh = next({4 * hidden, features}, true, cpu::kLeastGradient);
        gradients[d].bias = next({4 * hidden}, w[2].address != nullptr);
        same[d] = next({4 * hidden}, w[3].address != nullptr);
        if (gradients[d].bias == nullptr) std::swap(gradients[d].bias, same[d]);
        gradients[d].w_hr = next({features, hidden}, w[4].address != nullptr, cpu::kLeastGradient);
    }
    const cpu::BackwardArgs args{address(inputs.x),
                                 address(inputs.h0),
                                 address(inputs.c0),
                                 {inputs.weights_of(0), inputs.weights_of(inputs.weights.size() - 1)},
                                 y.address,
                                 gates.address,
                                 cells.address,
                                 grads[0].address,
                                 grads[1].address,
                                 grads[2].address,
                                 dx,
                                 dh0,
                                 dc0,
                                 {gradients[0], gradients[inputs.weights.size() - 1]}};
    {
        const py::gil_scoped_release released;
        cpu::layer_backward(inputs.shape(), args);
        for (std::size_t d = 0; d < inputs.weights.size(); ++d) {
            if (same[d] != nullptr) std::memcpy(same[d], gradients[d].bias, 4 * hidden * size);
        }
    }
    return found;
}

}  // namespace lstm::tensors
