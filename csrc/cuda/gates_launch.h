// Launches the gate kernel for a step of csrc/gates.h.
#pragma once

#include <cuda_runtime.h>

#include "gates_kernel.h"

namespace lstm::cuda {

template <typename T, int VEC, typename Step>
__global__ void __launch_bounds__(gates::kThreads) gate_kernel(const Step step) {
    gates::run_thread<T, VEC>(step);
}

template <typename T, int VEC, typename Step>
void launch(const Step& step, cudaStream_t stream) {
    const gates::Grid grid = gates::grid<VEC>(step);
    gate_kernel<T, VEC>
        <<<dim3(grid.blocks_across, grid.blocks_down), dim3(grid.threads_across, grid.threads_down), 0, stream>>>(step);
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
