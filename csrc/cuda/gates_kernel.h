// The gate kernel: a thread for every VEC units of a sequence, over the step of csrc/gates.h; and its launch's shape.
#pragma once

#include <algorithm>

#include "../gates.h"
#include "simt.h"

namespace lstm::gates {

constexpr int kThreads = 128;
constexpr Index kMostBlocksDown = 65535;  // gridDim.y ends here; the kernel's loop covers the rows beyond

template <typename T, int VEC, typename Step>
SIMT void run_thread(const Step& step) {
    const Index unit = (Index{blockIdx.x} * blockDim.x + threadIdx.x) * VEC;
    if (unit >= step.sizes.hidden) return;
    for (Index b = Index{blockIdx.y} * blockDim.y + threadIdx.y; b < step.rows; b += Index{gridDim.y} * blockDim.y) {
        update<T, VEC>(step, b, unit);
    }
}

struct Grid {
    unsigned blocks_across, blocks_down;    // of the grid
    unsigned threads_across, threads_down;  // of a block
};

template <int VEC, typename Step>
Grid grid(const Step& step) {
    const Index threads = (step.sizes.hidden + VEC - 1) / VEC;  // of one sequence
    int across = 1;
    while (across < threads && across < kThreads) across *= 2;
    const int down = kThreads / across;
    return {static_cast<unsigned>((threads + across - 1) / across),
            static_cast<unsigned>(std::min((step.rows + down - 1) / down, kMostBlocksDown)),
            static_cast<unsigned>(across), static_cast<unsigned>(down)};
}

}  // namespace lstm::gates
