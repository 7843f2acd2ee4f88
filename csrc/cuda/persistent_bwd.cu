#include "persistent_bwd.h"
#include "persistent_launch.h"

namespace lstm::persistent::cuda {

int resident_backward(Kind kind, int device, int cluster, int threads, int shared) {
    return resident_clusters<BackwardKernel, Backward>(kind, device, cluster, threads, shared);
}

std::string run(const Backward& walk, Kind kind, int device, void* stream) {
    return launch<BackwardKernel, false>(walk, kind, device, stream);
}

}  // namespace lstm::persistent::cuda
