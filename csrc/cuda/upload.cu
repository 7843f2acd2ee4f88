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

}  // namespace

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
