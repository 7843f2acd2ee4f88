// Runs one persistent kernel's own source on the host, one fibre a thread.
#pragma once

#include <string>

#include "../cuda/persistent_common.h"

namespace lstm::persistent::host {

// All directions of a walk that is laid out; `schedule`: simt.h.
template <template <typename, bool, int, bool> class Kernel, typename Instance, typename Walk>
std::string launch(Walk walk, std::uint64_t schedule) {
    const Plan& plan = walk.plan;
    const auto blocks = static_cast<unsigned>(plan.directions * plan.clusters * plan.cluster);
    lstm::host::Launch launch{{blocks, 1, 1},
                              {static_cast<unsigned>(threads_of(plan)), 1, 1},
                              static_cast<unsigned>(plan.cluster),
                              static_cast<std::size_t>(plan.shared),
                              schedule};
    if (Instance::kGrid) {
        launch.global = walk.global;
        launch.global_bytes = static_cast<std::size_t>(walk.workspace.end);
    }
    for (Index j = 0; j < packed_count(walk); ++j) {
        packed(walk)[j] =
            Kernel<typename Instance::T, Instance::kExact, Instance::kMost, Instance::kGrid>::word_of_weights(walk, j);
    }
    std::string error;
    for (; error.empty() && walk.direction < walk.sizes.directions; walk.direction += plan.directions) {
        error = lstm::host::run(launch, [&] {
            Kernel<typename Instance::T, Instance::kExact, Instance::kMost, Instance::kGrid>(walk).run();
        });
    }
    return error;
}

}  // namespace lstm::persistent::host
