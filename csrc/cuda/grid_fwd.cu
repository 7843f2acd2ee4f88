#include "persistent_fwd.h"
#include "persistent_launch.h"

namespace lstm::persistent::cuda {

int grid_resident_forward(Kind kind, int device, int threads, int shared) {
    return resident_blocks<ForwardKernel, Forward>(kind, device, threads, shared);
}

std::string grid_run(const Forward& walk, Kind kind, int device, void* stream) {
    return launch<ForwardKernel, true>(walk, kind, device, stream);
}

}  // namespace lstm::persistent::cuda
