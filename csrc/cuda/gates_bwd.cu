#include "gates_launch.h"

namespace lstm::cuda {

const char* run_step(const BackwardStep& step, Dtype dtype, int device, void* stream) {
    return run(step, dtype, device, stream);
}

}  // namespace lstm::cuda
