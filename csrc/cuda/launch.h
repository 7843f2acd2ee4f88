// Launches a step of csrc/gates.h: a thread for every VEC units of a sequence.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../gates.h"

namespace lstm::cuda {

constexpr int kThreads = 128;
constexpr Index kMostBlocksDown = 65535;  // gridDim.y ends here; the kernel's loop covers the rows beyond

template <typename T, int VEC, typename Step>
__global__ void __launch_bounds__(kThreads) gate_kernel(const Step step) {
    const Index unit = (Index{blockIdx.x} * blockDim.x + threadIdx.x) * VEC;
    if (unit >= step.sizes.hidden) return;
    for (Index b = Index{blockIdx.y} * blockDim.y + threadIdx.y; b < step.rows; b += Index{gridDim.y} * blockDim.y) {
        update<T, VEC>(step, b, unit);
    }
}

template <typename T, int VEC, typename Step>
void launch(const Step& step, cudaStream_t stream) {
    const Index threads = (step.sizes.hidden + VEC - 1) / VEC;  // of one sequence
    int across = 1;                                             // of a block
    while (across < threads && across < kThreads) across *= 2;
    const int down = kThreads / across;
    const dim3 grid(static_cast<unsigned>((threads + across - 1) / across),
                    static_cast<unsigned>(std::min((step.rows + down - 1) / down, kMostBlocksDown)));
    gate_kernel<T, VEC><<<grid, dim3(across, down), 0, stream>>>(step);
}

template <typename T, typename Step>
void launch(const Step& step, cudaStream_t stream) {
    vectorises(step, kVector<T>) ? launch<T, kVector<T>>(step, stream) : launch<T, 1>(step, stream);
}

template <typename Step>
const char* run(const Step& step, Dtype dtype, int device, void* stream) {
    // This copy of the runtime keeps its own current device, whatever torch's has.
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case Dtype::float32:
            launch<float>(step, queue);
            break;
        case Dtype::float64:
            launch<double>(step, queue);
            break;
        case Dtype::bfloat16:
            launch<__nv_bfloat16>(step, queue);
            break;
        case Dtype::float16:
            launch<__half>(step, queue);
            break;
    }
    error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lstm::cuda
