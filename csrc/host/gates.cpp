// The gate kernels' own source on the host, one fibre a thread.
#include <stdexcept>

#include "../cuda/gates_kernel.h"

namespace lstm::host {
namespace {

template <typename T, int VEC, typename Step>
void launch(const Step& step) {
    const gates::Grid grid = gates::grid<VEC>(step);
    const Launch launch{
        {grid.blocks_across, grid.blocks_down, 1}, {grid.threads_across, grid.threads_down, 1}, 1, 0, 0};
    const std::string error = run(launch, [&] { gates::run_thread<T, VEC>(step); });
    if (!error.empty()) throw std::runtime_error("the gate kernel could not run: " + error);
}

template <typename T, typename Step>
void launch(const Step& step) {
    vectorises(step, kVector<T>) ? launch<T, kVector<T>>(step) : launch<T, 1>(step);
}

template <typename Step>
void launch(const Step& step, Dtype dtype) {
    switch (dtype) {
        case Dtype::float32:
            return launch<float>(step);
        case Dtype::float64:
            return launch<double>(step);
        case Dtype::bfloat16:
            return launch<BFloat16>(step);
        case Dtype::float16:
            return launch<Float16>(step);
    }
}

}  // namespace

void run_step(const ForwardStep& step, Dtype dtype) { launch(step, dtype); }

void run_step(const BackwardStep& step, Dtype dtype) { launch(step, dtype); }

}  // namespace lstm::host
