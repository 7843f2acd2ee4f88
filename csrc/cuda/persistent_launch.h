// Launches a persistent kernel: clusters along x, as the plan says.
#pragma once

#include <cuda_runtime.h>

#include "persistent_common.h"

namespace lstm::persistent::cuda {

template <template <typename, bool, int> class Kernel, typename Walk, typename T, bool kExact, int kMost>
__global__ void __launch_bounds__(64 * kMost, 1) persistent_kernel(const __grid_constant__ Walk walk) {
    Kernel<T, kExact, kMost>(walk).run();
}

template <template <typename, bool, int> class Kernel, typename Walk>
const void* choose(Kind kind, int groups) {
    return with_instance(kind, groups, [](auto instance) {
        using I = decltype(instance);
        return reinterpret_cast<const void*>(persistent_kernel<Kernel, Walk, typename I::T, I::kExact, I::kMost>);
    });
}

struct Configuration {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config;

    Configuration(int cluster, int blocks, int threads, int shared, cudaStream_t stream) : attribute{}, config{} {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
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

template <template <typename, bool, int> class Kernel, typename Walk>
int resident_clusters(Kind kind, int device, int cluster, int threads, int shared) {
    const void* kernel = choose<Kernel, Walk>(kind, threads / 64);
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

template <template <typename, bool, int> class Kernel, typename Walk>
std::string launch(Walk walk, Kind kind, int device, void* stream) {
    lay_out(walk, kind);
    const Plan& plan = walk.plan;
    const void* kernel = choose<Kernel, Walk>(kind, plan.groups);
    // This copy of the runtime keeps its own current device, whatever torch's has.
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = prepare(kernel, plan.cluster, plan.shared);
    if (error == cudaSuccess) {
        const Configuration launch(plan.cluster, walk.sizes.directions * plan.clusters * plan.cluster, 64 * plan.groups,
                                   plan.shared, static_cast<cudaStream_t>(stream));
        void* arguments[] = {&walk};
        error = cudaLaunchKernelExC(&launch.config, kernel, arguments);
    }
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace lstm::persistent::cuda
