#include "persistent_fwd.h"
#include "persistent_launch.h"

namespace lstm::persistent::cuda {

int resident_forward(Kind kind, int device, int cluster, int threads, int shared) {
    return resident_clusters<ForwardKernel, Forward>(kind, device, cluster, threads, shared);
}

std::string run(const Forward& walk, Kind kind, int device, void* stream) {
    return launch<ForwardKernel, false>(walk, kind, device, stream);
}

}  // namespace lstm::persistent::cuda
