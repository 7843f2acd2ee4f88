// What a layer needs of its rows beside the walk, on a GPU.
#include <cuda_runtime.h>

#include <algorithm>

#include "persistent_common.h"

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
    const T* const from = known                  ? static_cast<const T*>(p.y) + Index{p.starts[before] + b} * stride
                          : p.initial == nullptr ? nullptr
                                                 : static_cast<const T*>(p.initial) + Index{b} * width;
    T* const to = static_cast<T*>(p.before) + Index{row} * width;
    for (int j = static_cast<int>(threadIdx.x); j < width; j += 128) to[j] = from == nullptr ? T{} : from[j];
}

// One block a row, as above.
template <typename T>
__global__ void __launch_bounds__(128) interleave_kernel(const Interleaved p, int width) {
    const int row = static_cast<int>(blockIdx.x), gates = 4 * p.hidden, j = row % gates;
    const T* const from = static_cast<const T*>(p.from[row / gates]) + (Index{j % 4} * p.hidden + j / 4) * width;
    T* const to = static_cast<T*>(p.to) + Index{row} * width;
    for (int k = static_cast<int>(threadIdx.x); k < width; k += 128) to[k] = from[k];
}

// visit(T{}) with the widest type that all addresses and sizes, or-ed in `bits`, allow.
template <typename Visit>
void by_width(std::uintptr_t bits, Visit visit) {
    if (bits % 16 == 0) {
        visit(uint4{});
    } else if (bits % 8 == 0) {
        visit(uint2{});
    } else if (bits % 4 == 0) {
        visit(std::uint32_t{});
    } else {
        visit(std::uint16_t{});
    }
}

// A block sums 32 bytes of each row, V at once: first each thread its own rows, then a sixteenth of the block's threads
// what all have found.
constexpr int kStripe = 32, kThreads = 256, kParts = 16;

template <typename T, typename V>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Sums sums) {
    constexpr int own = sizeof(V) / sizeof(T), across = kStripe / sizeof(V), down = kThreads / across;
    constexpr int columns = kStripe / sizeof(T);
    const int thread = static_cast<int>(threadIdx.x), place = thread % across, first = thread / across;
    const Index column = Index{blockIdx.x} * columns + place * own;
    float found[own] = {};
    if (column < sums.width) {
        const T* const from = static_cast<const T*>(sums.rows) + column;
#pragma unroll 4
        for (Index row = first; row < sums.count; row += down) {
            const V some = *reinterpret_cast<const V*>(from + row * sums.width);
            T values[own];
            std::memcpy(values, &some, sizeof(V));
            for (int j = 0; j < own; ++j) found[j] += load(values[j]);
        }
    }
    __shared__ float of_rows[down][columns], of_parts[kParts][columns];
    for (int j = 0; j < own; ++j) of_rows[first][place * own + j] = found[j];
    __syncthreads();
    if (thread < kParts * columns) {
        float sum = 0.0f;
        for (int j = thread / columns; j < down; j += kParts) sum += of_rows[j][thread % columns];
        of_parts[thread / columns][thread % columns] = sum;
    }
    __syncthreads();
    const Index to = Index{blockIdx.x} * columns + thread;
    if (thread >= columns || to >= sums.width) return;
    float sum = 0.0f;
    for (int j = 0; j < kParts; ++j) sum += of_parts[j][thread];
    static_cast<T*>(sums.to)[to] = store<T>(sum);
    if (sums.again != nullptr) static_cast<T*>(sums.again)[to] = store<T>(sum);
}

template <typename T>
void sum_of(const Sums& sums, cudaStream_t stream) {
    const Index bytes = Index{sums.width} * static_cast<Index>(sizeof(T));
    const auto blocks = static_cast<unsigned>((bytes + kStripe - 1) / kStripe);
    if ((reinterpret_cast<std::uintptr_t>(sums.rows) | static_cast<std::uintptr_t>(bytes)) % sizeof(uint4) == 0) {
        sum_kernel<T, uint4><<<blocks, kThreads, 0, stream>>>(sums);
    } else {
        sum_kernel<T, T><<<blocks, kThreads, 0, stream>>>(sums);
    }
}

// What went wrong, or nothing.
template <typename Launch>
std::string launched(int device, Launch launch) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        launch();
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace

std::string sum(const Sums& sums, Kind kind, int device, void* stream) {
    return launched(device, [&] {
        const auto queue = static_cast<cudaStream_t>(stream);
        if (kind == Kind::bfloat16) {
            sum_of<Bf16>(sums, queue);
        } else if (kind == Kind::float16) {
            sum_of<Fp16>(sums, queue);
        } else {
            sum_of<float>(sums, queue);
        }
    });
}

std::string previous(const Previous& p, int device, void* stream) {
    return launched(device, [&] {
        const auto queue = static_cast<cudaStream_t>(stream);
        const auto bits = reinterpret_cast<std::uintptr_t>(p.y) | reinterpret_cast<std::uintptr_t>(p.initial) |
                          reinterpret_cast<std::uintptr_t>(p.before) | static_cast<unsigned>(p.width | p.stride);
        by_width(bits, [&](auto zero) {
            constexpr int size = sizeof(zero);
            previous_kernel<decltype(zero)>
                <<<static_cast<unsigned>(p.rows), 128, 0, queue>>>(p, p.width / size, p.stride / size);
        });
    });
}

std::string interleave(const Interleaved& p, int device, void* stream) {
    return launched(device, [&] {
        const auto bits = reinterpret_cast<std::uintptr_t>(p.from[0]) | reinterpret_cast<std::uintptr_t>(p.from[1]) |
                          reinterpret_cast<std::uintptr_t>(p.to) | static_cast<unsigned>(p.width);
        by_width(bits, [&](auto zero) {
            interleave_kernel<decltype(zero)>
                <<<static_cast<unsigned>(4 * p.hidden * p.directions), 128, 0, static_cast<cudaStream_t>(stream)>>>(
                    p, p.width / static_cast<int>(sizeof(zero)));
        });
    });
}

std::string upload(const std::int32_t* from, int count, void* to, int device, void* stream) {
    return launched(device, [&] {
        for (int done = 0; done < count; done += kUploaded) {
            Argument argument{};
            const int now = std::min(count - done, kUploaded);
            std::copy_n(from + done, now, argument.values);
            upload_kernel<<<1, 256, 0, static_cast<cudaStream_t>(stream)>>>(argument, now,
                                                                            static_cast<std::int32_t*>(to) + done);
        }
    });
}

}  // namespace lstm::persistent::cuda
