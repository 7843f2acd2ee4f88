// The persistent kernels' own source on the host, one fibre a thread.
#include "../cuda/persistent_bwd.h"
#include "../cuda/persistent_fwd.h"

namespace lstm::persistent::host {
namespace {

template <template <typename, bool, int> class Kernel, typename Walk>
std::string launch(Walk walk, Kind kind, std::uint64_t schedule) {
    lay_out(walk, kind);
    const Plan& plan = walk.plan;
    const auto blocks = static_cast<unsigned>(walk.sizes.directions * plan.clusters * plan.cluster);
    const lstm::host::Launch launch{{blocks, 1, 1},
                                    {static_cast<unsigned>(64 * plan.groups), 1, 1},
                                    static_cast<unsigned>(plan.cluster),
                                    static_cast<std::size_t>(plan.shared),
                                    schedule};
    return with_instance(kind, plan.groups, [&](auto instance) {
        using I = decltype(instance);
        return lstm::host::run(launch, [&] { Kernel<typename I::T, I::kExact, I::kMost>(walk).run(); });
    });
}

}  // namespace

std::string run(const Forward& walk, Kind kind, std::uint64_t schedule) {
    return launch<ForwardKernel>(walk, kind, schedule);
}

std::string run(const Backward& walk, Kind kind, std::uint64_t schedule) {
    return launch<BackwardKernel>(walk, kind, schedule);
}

}  // namespace lstm::persistent::host
