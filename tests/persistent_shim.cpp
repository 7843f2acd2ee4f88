// The host runs of the persistent kernels, for ctypes: tests/test_persistent_faults.py builds it with broken kernels.
#include <string>

#include "cuda/persistent_bwd.h"
#include "cuda/persistent_fwd.h"
#include "host/persistent_launch.h"

using namespace lstm::persistent;

namespace {

Sizes sizes(const std::int64_t* n) {
    return {n[0], static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<int>(n[3]), static_cast<int>(n[4])};
}

Plan plan(const std::int64_t* n) {
    return {static_cast<int>(n[5]), static_cast<int>(n[6]),  static_cast<int>(n[7]),  static_cast<int>(n[8]),
            static_cast<int>(n[9]), static_cast<int>(n[10]), static_cast<int>(n[11]), static_cast<int>(n[12])};
}

// The kernels of bf16 for up to four groups alone: others take time to compile.
template <template <typename, bool, int, bool> class Kernel, typename Walk>
const char* run(Walk walk, std::uint64_t schedule) {
    static std::string words;
    lay_out(walk, Kind::bfloat16);
    words = walk.plan.grid ? host::launch<Kernel, Instance<Bf16, false, 4, true>>(walk, schedule)
                           : host::launch<Kernel, Instance<Bf16, false, 4, false>>(walk, schedule);
    return words.c_str();
}

}  // namespace

// p: gates, h0, c0, w_hh, b_ih and b_hh of both directions, starts, y, h_n, c_n, cells, workspace; n: N, T, B, H, D,
// then the plan.
extern "C" const char* forward(void* const* p, const std::int64_t* n, std::uint64_t schedule) {
    const auto* starts = static_cast<const std::int32_t*>(p[9]);
    const Forward walk{p[0],  p[1],  p[2],     {p[3], p[4]}, {p[5], p[6]}, {p[7], p[8]}, starts, p[10], p[11],
                       p[12], p[13], sizes(n), plan(n),      p[14],        {},           {},     0};
    return run<ForwardKernel>(walk, schedule);
}

// p: gates, cells, c0, w_hh of both directions, starts, dy, dh_n, dc_n, dgates, dh0, dc0, workspace.
extern "C" const char* backward(void* const* p, const std::int64_t* n, std::uint64_t schedule) {
    const auto* starts = static_cast<const std::int32_t*>(p[5]);
    const Backward walk{p[0],  p[1],  p[2],     {p[3], p[4]}, starts, p[6], p[7], p[8], p[9],
                        p[10], p[11], sizes(n), plan(n),      p[12],  {},   {},   0};
    return run<BackwardKernel>(walk, schedule);
}
