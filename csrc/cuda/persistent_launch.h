// Launches a persistent kernel as the plan says: clusters along x, or a grid that is resident as a whole.
#pragma once

#include <cuda_runtime.h>

#include "persistent_common.h"

namespace lstm::persistent::cuda {

template <template <typename, bool, int, bool> class Kernel, typename Walk, typename T, bool kExact, int kMost,
          bool kGrid>
__global__ void __launch_bounds__(64 * kMost, 1) persistent_kernel(const __grid_constant__ Walk walk) {
    Kernel<T, kExact, kMost, kGrid>(walk).run();
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

inline cudaError_t prepare(const void* kernel, int cluster, int shared) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess && cluster > 8) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
int resident_clusters(Kind kind, int device, int cluster, int threads, int shared) {
    const void* kernel = choose<Kernel, Walk, false>(kind, threads / 64);
    if (cudaSetDevice(device) != cudaSuccess) return 0;
    int count = 0;
    const Configuration launch(cluster, cluster, threads, shared, nullptr);
    if (prepare(kernel, cluster, shared) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) {
        cudaGetLastError();  // a refused size is an answer, not an error
        return 0;
    }
    return count;
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
int resident_blocks(Kind kind, int device, int threads, int shared) {
    const void* kernel = choose<Kernel, Walk, true>(kind, threads / 64);
    int multiprocessors = 0, in_each = 0;
    if (cudaSetDevice(device) != cudaSuccess || prepare(kernel, 0, shared) != cudaSuccess ||
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&in_each, kernel, threads, static_cast<std::size_t>(shared)) !=
            cudaSuccess) {
        cudaGetLastError();  // a refused size is an answer, not an error
        return 0;
    }
    return in_each > 0 ? multiprocessors : 0;  // more would share a multiprocessor's rates
}

template <template <typename, bool, int, bool> class Kernel, bool kGrid, typename Walk>
std::string launch(Walk walk, Kind kind, int device, void* stream) {
    lay_out(walk, kind);
    const Plan& plan = walk.plan;
    const int cluster = kGrid ? 0 : plan.cluster, blocks = plan.directions * plan.clusters * plan.cluster;
    const void* kernel = choose<Kernel, Walk, kGrid>(kind, plan.groups);
    // This copy of the runtime keeps its own current device, whatever torch's has.
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = prepare(kernel, cluster, plan.shared);
    const Configuration launch(cluster, blocks, 64 * plan.groups, plan.shared, static_cast<cudaStream_t>(stream));
    for (; error == cudaSuccess && walk.direction < walk.sizes.directions; walk.direction += plan.directions) {
        void* arguments[] = {&walk};
        error = cudaLaunchKernelExC(&launch.config, kernel, arguments);
    }
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace lstm::persistent::cuda
