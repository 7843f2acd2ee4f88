#include "../gates.h"

namespace lstm::host {
namespace {

template <typename T, int VEC, typename Step>
void walk(const Step& step) {
    for (Index b = 0; b < step.rows; ++b) {
        for (Index unit = 0; unit < step.sizes.hidden; unit += VEC) update<T, VEC>(step, b, unit);
    }
}

template <typename T, typename Step>
void walk(const Step& step) {
    vectorises(step, kVector<T>) ? walk<T, kVector<T>>(step) : walk<T, 1>(step);
}

template <typename Step>
void run(const Step& step, Dtype dtype) {
    switch (dtype) {
        case Dtype::float32:
            return walk<float>(step);
        case Dtype::float64:
            return walk<double>(step);
        case Dtype::bfloat16:
            return walk<BFloat16>(step);
        case Dtype::float16:
            return walk<Float16>(step);
    }
}

}  // namespace

void run_step(const ForwardStep& step, Dtype dtype) { run(step, dtype); }

void run_step(const BackwardStep& step, Dtype dtype) { run(step, dtype); }

}  // namespace lstm::host
