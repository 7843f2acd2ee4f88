// Tensors of a training step: large ones lie in memory that is kept from step to step.
#pragma once

#include <limits>
#include <memory>
#include <utility>

#include "cpu/kept.h"
#include "tensors.h"

namespace lstm::tensors {

// DLPack's tensor with an owner, DLManagedTensor: the one from before versions, which every torch takes.
struct Managed {
    View tensor;
    void* owner;
    void (*deleter)(Managed*);
};

// A tensor on the CPU whose memory is kept for others when it goes.
inline Fresh keep_empty(const TensorShape& shape, Dtype dtype, std::int64_t bytes) {
    constexpr const char* name = "dltensor";  // until torch has taken it
    struct Kept {
        TensorShape shape;
        cpu::KeptBlock block;
        Managed managed;
    };
    auto kept = std::make_unique<Kept>(Kept{shape, cpu::take_block(bytes), {}});
    char* const data = kept->block->data;
    const auto dims = static_cast<std::int32_t>(shape.size());
    const std::uint8_t kind = dtype == Dtype::bfloat16 ? kBrain : kIeee;
    const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
    kept->managed = {{data, kCpu, 0, dims, kind, bits, 1, kept->shape.data(), nullptr, 0},
                     kept.get(),
                     [](Managed* own) { delete static_cast<Kept*>(own->owner); }};
    const py::capsule capsule(&kept->managed, name, [](PyObject* own) {
        if (!PyCapsule_IsValid(own, name)) return;
        auto* const refused = static_cast<Managed*>(PyCapsule_GetPointer(own, name));
        refused->deleter(refused);
    });
    kept.release();
    auto tensor = py::reinterpret_steal<py::object>(PyObject_CallOneArg(types().from_dlpack, capsule.ptr()));
    if (!tensor) throw py::error_already_set();
    return {std::move(tensor), data};
}

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// As new_empty, on the CPU; from `least` bytes on in memory that comes again at the next step.
inline Fresh kept_empty(py::handle like, const TensorShape& shape, Dtype dtype, std::int64_t least,
                        PyObject* other = nullptr) {
    std::int64_t bytes = size_of(dtype);
    for (const std::int64_t n : shape) bytes *= n;
    return bytes < least ? new_empty(like, shape, size_of(dtype), other) : keep_empty(shape, dtype, bytes);
}

}  // namespace lstm::tensors
