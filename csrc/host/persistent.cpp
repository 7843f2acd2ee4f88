#include "../cuda/persistent_bwd.h"
#include "../cuda/persistent_fwd.h"
#include "persistent_launch.h"

namespace lstm::persistent::host {
namespace {

template <template <typename, bool, int, bool> class Kernel, bool kGrid, typename Walk>
std::string run_in(const Walk& walk, Kind kind, std::uint64_t schedule) {
    return with_instance<kGrid>(kind, walk.plan.groups,
                                [&](auto instance) { return launch<Kernel, decltype(instance)>(walk, schedule); });
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
std::string run_any(Walk walk, Kind kind, std::uint64_t schedule) {
    lay_out(walk, kind);
    return walk.plan.grid ? run_in<Kernel, true>(walk, kind, schedule) : run_in<Kernel, false>(walk, kind, schedule);
}

}  // namespace

std::string run(const Forward& walk, Kind kind, std::uint64_t schedule) {
    return run_any<ForwardKernel>(walk, kind, schedule);
}

std::string run(const Backward& walk, Kind kind, std::uint64_t schedule) {
    return run_any<BackwardKernel>(walk, kind, schedule);
}

}  // namespace lstm::persistent::host
