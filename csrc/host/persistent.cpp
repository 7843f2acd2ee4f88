// The persistent kernels' own source on the host, one fibre a thread.
#include "../cuda/persistent_bwd.h"
#include "../cuda/persistent_fwd.h"

namespace lstm::persistent::host {
namespace {

template <template <typename, bool, int, bool> class Kernel, bool kGrid, typename Walk>
std::string launch(Walk walk, Kind kind, std::uint64_t schedule) {
    lay_out(walk, kind);
    const Plan& plan = walk.plan;
    const auto blocks = static_cast<unsigned>(plan.directions * plan.clusters * plan.cluster);
    lstm::host::Launch launch{{blocks, 1, 1},
                              {static_cast<unsigned>(64 * plan.groups), 1, 1},
                              static_cast<unsigned>(plan.cluster),
                              static_cast<std::size_t>(plan.shared),
                              schedule};
    if (kGrid) {
        launch.global = walk.global;
        launch.global_bytes = static_cast<std::size_t>(walk.workspace.end);
    }
    std::string error;
    for (; error.empty() && walk.direction < walk.sizes.directions; walk.direction += plan.directions) {
        error = with_instance<kGrid>(kind, plan.groups, [&](auto instance) {
            using I = decltype(instance);
            return lstm::host::run(launch, [&] { Kernel<typename I::T, I::kExact, I::kMost, I::kGrid>(walk).run(); });
        });
    }
    return error;
}

template <template <typename, bool, int, bool> class Kernel, typename Walk>
std::string launch(const Walk& walk, Kind kind, std::uint64_t schedule) {
    return walk.plan.grid ? launch<Kernel, true>(walk, kind, schedule) : launch<Kernel, false>(walk, kind, schedule);
}

}  // namespace

std::string run(const Forward& walk, Kind kind, std::uint64_t schedule) {
    return launch<ForwardKernel>(walk, kind, schedule);
}

std::string run(const Backward& walk, Kind kind, std::uint64_t schedule) {
    return launch<BackwardKernel>(walk, kind, schedule);
}

}  // namespace lstm::persistent::host
