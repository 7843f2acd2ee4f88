// Rows of packed sequences, on a GPU.
#include <cuda_runtime.h>

#include <algorithm>

#include "persistent.h"

namespace lstm::persistent::cuda {
namespace {

constexpr int kUploaded = 960;  // words of a launch; arguments end at 4096 bytes
struct Argument {
    std::int32_t values[kUploaded];
};

__global__ void upload_kernel(const __grid_constant__ Argument argument, int count, std::int32_t* to) {
    for (int j = static_cast<int>(threadIdx.x); j < count; j += static_cast<int>(blockDim.x))
        to[j] = argument.values[j];
}

// One block a row. T: 2, 4, 8 or 16 bytes at once; sizes in T.
template <typename T>
__global__ void __launch_bounds__(128) previous_kernel(const Previous p, int width, int stride) {
    const int row = static_cast<int>(blockIdx.x);
    int t = 0, after = p.steps;  // starts[t] <= row < starts[after]
    while (after - t > 1) {
        const int middle = (t + after) / 2;
        (p.starts[middle] <= row ? t : after) = middle;
    }
    const int b = row - p.starts[t], before = p.reverse ? t + 1 : t - 1;
    const bool known = before >= 0 && before < p.steps && b < p.starts[before + 1] - p.starts[before];
    const T* const from = known ? static_cast<const T*>(p.y) + Index{p.starts[before] + b} * stride
                                : static_cast<const T*>(p.initial) + Index{b} * width;
    T* const to = static_cast<T*>(p.before) + Index{row} * width;
    for (int j = static_cast<int>(threadIdx.x); j < width; j += 128) to[j] = from[j];
}

template <typename T>
void copy_previous(const Previous& p, cudaStream_t stream) {
    constexpr int size = sizeof(T);
    previous_kernel<T><<<static_cast<unsigned>(p.rows), 128, 0, stream>>>(p, p.width / size, p.stride / size);
}

}  // namespace

std::string previous(const Previous& p, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto bits = reinterpret_cast<std::uintptr_t>(p.y) | reinterpret_cast<std::uintptr_t>(p.initial) |
                      reinterpret_cast<std::uintptr_t>(p.before) | static_cast<unsigned>(p.width | p.stride);
    if (bits % 16 == 0) {
        copy_previous<uint4>(p, queue);
    } else if (bits % 8 == 0) {
        copy_previous<uint2>(p, queue);
    } else if (bits % 4 == 0) {
        copy_previous<std::uint32_t>(p, queue);
    } else {
        copy_previous<std::uint16_t>(p, queue);
    }
    error = cudaGetLastError();
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

std::string upload(const std::int32_t* from, int count, void* to, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    for (int done = 0; done < count; done += kUploaded) {
        Argument argument{};
        const int now = std::min(count - done, kUploaded);
        std::copy_n(from + done, now, argument.values);
        upload_kernel<<<1, 256, 0, static_cast<cudaStream_t>(stream)>>>(argument, now,
                                                                        static_cast<std::int32_t*>(to) + done);
    }
    error = cudaGetLastError();
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace lstm::persistent::cuda
