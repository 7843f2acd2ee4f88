// Launches a persistent kernel as the plan says: clusters along x, or a grid that is resident as a whole.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>

#include "persistent_common.h"

namespace lstm::persistent::cuda {

template <template <typename, bool, int, bool> class Kernel, typename Walk, typename T, bool kExact, int kMost,
          bool kGrid>
__global__ void __launch_bounds__(64 * kMost, 1) persistent_kernel(const __grid_constant__ Walk walk) {
    Kernel<T, kExact, kMost, kGrid>(walk).run();
}

// W_hh into the workspace, as the kernel's lanes take it up.
template <template <typename, bool, int, bool> class Kernel, typename Walk, typename T, bool kExact, int kMost,
          bool kGrid>
__global__ void __launch_bounds__(256) pack_kernel(const __grid_constant__ Walk walk) {
    const Index count = packed_count(walk), stride = Index{gridDim.x} * blockDim.x;
    for (Index j = Index{blockIdx.x} * blockDim.x + threadIdx.x; j < count; j += stride) {
        packed(walk)[j] = Kernel<T, kExact, kMost, kGrid>::word_of_weights(walk, j);
    }
}

template <template <typename, bool, int, bool> class Kernel, typename Walk, bool kGrid>
void pack(const Walk& walk, Kind kind, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(std::min<Index>((packed_count(walk) + 255) / 256, 1056));
    with_instance<kGrid>(kind, walk.plan.groups, [&](auto instance) {
        using I = decltype(instance);
        // what is packed doesn't depend on the groups that a kernel serves at most
        pack_kernel<Kernel, Walk, typename I::T, I::kExact, 4, false><<<blocks, 256, 0, stream>>>(walk);
    });
}

template <template <typename, bool, int, bool> class Kernel, typename Walk, bool kGrid>
const void* choose(Kind kind, int groups) {
    return with_instance<kGrid>(kind, groups, [](auto instance) {
        using I = decltype(instance);
        return reinterpret_cast<const void*>(
            persistent_kernel<Kernel, Walk, typename I::T, I::kExact, I::kMost, I::kGrid>);
    });
}

struct Configuration {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config;

    // cluster = 0: none, all blocks resident at once or no launch.
    Configuration(int cluster, int blocks, int threads, int shared, cudaStream_t stream) : attribute{}, config{} {
        if (cluster == 0) {
            attribute.id = cudaLaunchAttributeCooperative;
            attribute.val.cooperative = 1;
        } else {
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        }
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<std::size_t>(shared);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    Configuration(const Configuration&) = delete;  // config points into it
};

// Lets launches of the kernel on this thread's device have what it has, from the first launch on.
inline cudaError_t prepare(const void* kernel, int cluster, int device) {
    static std::mutex mutex;
    static std::set<std::tuple<const void*, int, bool>> prepared;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto asked = std::make_tuple(kernel, device, cluster > 8);
    if (prepared.count(asked) > 0) return cudaSuccess;
    int most = 0;
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess && cluster > 8) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error == cudaSuccess) prepared.insert(asked);
    return error;
}

// Whether the card grants what was asked. That a size is refused is an answer, and that there is no code for such
// a card; any other error is none, and is thrown.
inline bool granted(cudaError_t error) {
    if (error == cudaSuccess) return true;
    cudaGetLastError();  // or an innocent call would find it
    switch (error) {
        case cudaErrorInvalidValue:
        case cudaErrorInvalidConfiguration:
        case cudaErrorInvalidClusterSize:
        case cudaErrorLaunchOutOfResources:
        case cudaErrorCooperativeLaunchTooLarge:
        case cudaErrorNotSupported:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorNoKernelImageForDevice:
            return false;
        default:
            throw std::runtime_error(std::string("asking what the GPU can hold: ") + cudaGetErrorString(error));
    }
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
int resident_clusters(Kind kind, int device, int cluster, int threads, int shared) {
    const void* kernel = choose<Kernel, Walk, false>(kind, threads / 64);
    int count = 0;
    const Configuration launch(cluster, cluster, threads, shared, nullptr);
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = prepare(kernel, cluster, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
    return granted(error) ? count : 0;
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
int resident_blocks(Kind kind, int device, int threads, int shared) {
    const void* kernel = choose<Kernel, Walk, true>(kind, threads / 64);
    const auto bytes = static_cast<std::size_t>(shared);
    int multiprocessors = 0, in_each = 0;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = prepare(kernel, 0, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&in_each, kernel, threads, bytes);
    }
    return granted(error) && in_each > 0 ? multiprocessors : 0;  // more would share a multiprocessor's rates
}

template <template <typename, bool, int, bool> class Kernel, bool kGrid, typename Walk>
std::string launch(Walk walk, Kind kind, int device, void* stream) {
    lay_out(walk, kind);
    const Plan& plan = walk.plan;
    const int cluster = kGrid ? 0 : plan.cluster, blocks = plan.directions * plan.clusters * plan.cluster;
    const void* kernel = choose<Kernel, Walk, kGrid>(kind, plan.groups);
    // This copy of the runtime keeps its own current device, whatever torch's has.
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = prepare(kernel, cluster, device);
    const Configuration launch(cluster, blocks, threads_of(plan), plan.shared, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) pack<Kernel, Walk, kGrid>(walk, kind, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) error = cudaGetLastError();
    for (; error == cudaSuccess && walk.direction < walk.sizes.directions; walk.direction += plan.directions) {
        void* arguments[] = {&walk};
        error = cudaLaunchKernelExC(&launch.config, kernel, arguments);
    }
    if (error == cudaSuccess) return {};
    cudaGetLastError();  // or an innocent call would find it
    return cudaGetErrorString(error);
}

}  // namespace lstm::persistent::cuda
