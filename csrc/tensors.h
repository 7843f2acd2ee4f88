// torch's tensors without torch's headers, so that one binary serves every torch.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/block.h"
#include "lstm_math.h"

namespace lstm::tensors {

namespace py = pybind11;

// DLPack's codes of the CPU and of IEEE's and Brain's floats.
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kIeee = 2, kBrain = 4;

// Where a tensor's elements lie; null for None.
struct Data {
    void* address = nullptr;
};

// DLPack's description of a tensor where it lies, DLTensor (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
struct View {
    void* data;
    std::int32_t device_type, device;
    std::int32_t dims;
    std::uint8_t kind, bits;
    std::uint16_t lanes;
    const std::int64_t *sizes, *strides;
    std::uint64_t byte_offset;

    bool has_sizes(std::initializer_list<std::int64_t> expected) const {
        return static_cast<std::size_t>(dims) == expected.size() && std::equal(expected.begin(), expected.end(), sizes);
    }

    // Whether its elements lie one behind the other, and as they are. Zeros that torch doesn't store have no address; a
    // single float, which always lies so, may be part of a conjugate, whose sign this description doesn't tell.
    bool plain() const {
        std::int64_t elements = 1;
        for (int i = dims - 1; i >= 0; --i) {
            if (sizes[i] != 1 && strides[i] != elements) return false;
            elements *= sizes[i];
        }
        if (elements == 1 && kind == kIeee) return false;
        return elements == 0 || data != nullptr;
    }
};

// The head of its C exchange API, major version 1, whose `view` fills one in. torch has it from 2.10 on.
struct ExchangeApi {
    std::uint32_t major, minor;
    void *previous, *allocate, *from_python, *to_python;
    int (*view)(void* tensor, View* out);
};

// torch.Tensor's and torch.nn.Parameter's own types (what a subclass holds, only its author knows), torch.float32, and
// torch.utils.dlpack.from_dlpack.
struct Types {
    PyObject *tensor, *parameter, *float32, *from_dlpack;
    const ExchangeApi* api;  // null where this torch has none
};

inline const Types& types() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Types> found;  // an import may let other threads in
    const auto find = [] {
        const py::module_ torch = py::module_::import("torch");
        const py::object tensor = torch.attr("Tensor");
        const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
        const void* api = nullptr;
        if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
            api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
        const auto* const exchange = static_cast<const ExchangeApi*>(api);
        const py::object from_dlpack = py::module_::import("torch.utils.dlpack").attr("from_dlpack");
        const bool known = exchange != nullptr && exchange->major == 1;
        return Types{tensor.ptr(), py::module_::import("torch.nn").attr("Parameter").ptr(), torch.attr("float32").ptr(),
                     from_dlpack.ptr(), known ? exchange : nullptr};
    };
    return found.call_once_and_store_result(find).get_stored();
}

// Where a tensor's elements begin, in any torch; null with Python's error set where it can't say.
inline void* data_ptr(py::handle tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
    return address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
}

using TensorShape = std::vector<std::int64_t>;

// A tensor made for a result; None and null where there is none.
struct Fresh {
    py::object tensor = py::none();
    char* data = nullptr;
};

// As `like` in device and dtype, of `size` bytes an element; or of `dtype`.
inline Fresh new_empty(py::handle like, const TensorShape& shape, std::int64_t size, PyObject* dtype = nullptr) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    static PyObject* const keywords = PyTuple_Pack(1, PyUnicode_InternFromString("dtype"));
    std::vector<py::int_> sizes(shape.begin(), shape.end());
    std::vector<PyObject*> args{like.ptr()};  // sizes one by one: torch reads a tuple in half the time again
    for (const py::int_& size : sizes) args.push_back(size.ptr());
    const std::size_t positional = args.size();
    if (dtype != nullptr) args.push_back(dtype);
    Fresh made;
    made.tensor = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(name, args.data(), positional, dtype == nullptr ? nullptr : keywords));
    if (!made.tensor) throw py::error_already_set();
    made.data = static_cast<char*>(data_ptr(made.tensor));
    if (PyErr_Occurred()) throw py::error_already_set();
    for (const std::int64_t n : shape) size *= n;
    cpu::ask_for_huge_pages(made.data, size);
    return made;
}

// A tensor as it lies; nothing where torch can't tell in this way, or it isn't plain.
inline std::optional<View> view_anywhere(py::handle tensor) {
    const Types& known = types();
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    if (known.api == nullptr || (type != known.tensor && type != known.parameter)) return std::nullopt;
    View found;
    if (known.api->view(tensor.ptr(), &found) != 0) {
        PyErr_Clear();
        return std::nullopt;
    }
    if (!found.plain()) return std::nullopt;
    return found;
}

// The same of a tensor on the CPU.
inline std::optional<View> view(py::handle tensor) {
    const auto found = view_anywhere(tensor);
    return found && found->device_type == kCpu ? found : std::nullopt;
}

// w_ih, w_hh, b_ih, b_hh, w_hr of one direction; nothing where one is absent.
using WeightViews = std::array<std::optional<View>, 5>;

inline bool same_dtype(const View& a, const View& b) {
    return a.kind == b.kind && a.bits == b.bits && a.lanes == b.lanes;
}
inline bool same_device(const View& a, const View& b) { return a.device_type == b.device_type && a.device == b.device; }

// Whether weights have x's dtype and the sizes of I, H and R features.
inline bool weights_fit(const WeightViews& weights, const View& x, std::int64_t input, std::int64_t hidden,
                        std::int64_t features) {
    const auto& [w_ih, w_hh, b_ih, b_hh, w_hr] = weights;
    for (const auto& weight : weights) {
        if (weight && !same_dtype(*weight, x)) return false;
    }
    if (!w_ih || !w_ih->has_sizes({4 * hidden, input}) || !w_hh || !w_hh->has_sizes({4 * hidden, features}))
        return false;
    if (b_ih.has_value() != b_hh.has_value()) return false;
    if (b_ih && !(b_ih->has_sizes({4 * hidden}) && b_hh->has_sizes({4 * hidden}))) return false;
    return w_hr ? w_hr->has_sizes({features, hidden}) : features == hidden;
}

// Whether the 13 inputs of a layer (lstm_fast/autograd.py), states or none, lie contiguously on one device, in one
// dtype and with sizes that fit each other; or those of a cell, whose states have no D. False says no more than that
// this quick look can't tell.
inline bool layer_inputs_fit(const py::sequence& inputs, bool cell) {
    constexpr std::size_t states = 3, of_direction = std::tuple_size_v<WeightViews>;
    const py::object first = inputs[0], h = inputs[1], c = inputs[2];
    const auto x = view_anywhere(first), one = view_anywhere(py::object(inputs[states + 1]));  // w_hh
    if (!x || !one || x->dims < 2 || one->dims != 2) return false;
    std::int64_t directions = py::object(inputs[states + of_direction]).is_none() ? 1 : 2;
    std::int64_t features = one->sizes[1], hidden = features;
    if (!h.is_none() || !c.is_none()) {
        const auto h0 = view_anywhere(h), c0 = view_anywhere(c);
        const int dims = cell ? 2 : 3;
        if (!h0 || !c0 || h0->dims != dims || c0->dims != dims) return false;
        if (!cell) directions = c0->sizes[0];
        hidden = c0->sizes[dims - 1], features = h0->sizes[dims - 1];
        if (directions < 1 || directions > 2 || !std::equal(h0->sizes, h0->sizes + dims - 1, c0->sizes)) return false;
        if (!same_dtype(*h0, *x) || !same_dtype(*c0, *x)) return false;
        if (!same_device(*h0, *x) || !same_device(*c0, *x)) return false;
    }
    for (std::int64_t d = 0; d < directions; ++d) {
        WeightViews weights;
        for (std::size_t i = 0; i < of_direction; ++i) {
            const py::object weight = inputs[states + d * of_direction + i];
            if (weight.is_none()) continue;
            weights[i] = view_anywhere(weight);
            if (!weights[i] || !same_device(*weights[i], *x)) return false;
        }
        if (!weights_fit(weights, *x, x->sizes[x->dims - 1], hidden, features)) return false;
    }
    return true;
}

}  // namespace lstm::tensors

namespace pybind11::detail {

template <>
struct type_caster<lstm::tensors::Data> {
    PYBIND11_TYPE_CASTER(lstm::tensors::Data, const_name("torch.Tensor | None"));

    bool load(handle from, bool) {
        if (from.is_none()) return true;
        value.address = lstm::tensors::data_ptr(from);
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};

}  // namespace pybind11::detail
