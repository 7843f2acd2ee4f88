#include "persistent_bwd.h"
#include "persistent_launch.h"

namespace lstm::persistent::cuda {

int grid_resident_backward(Kind kind, int device, int threads, int shared) {
    return resident_blocks<BackwardKernel, Backward>(kind, device, threads, shared);
}

std::string grid_run(const Backward& walk, Kind kind, int device, void* stream) {
    return launch<BackwardKernel, true>(walk, kind, device, stream);
}

}  // namespace lstm::persistent::cuda
