#include <algorithm>

#include "persistent.h"

namespace lstm::persistent {
namespace {

constexpr int kSharedLimit = 232448;  // bytes of a block: compute capability 9.0 and 10.x

// Clocks, from published latencies and rates of an H100 (docs/persistent.md), not yet measured by us.
constexpr double kExchange = 500;           // of a message and its barrier, when one tile has to wait for it
constexpr double kCells = 350;              // gates and bookkeeping of an item
constexpr double kProduct = 6.5;            // of one simt::mma in a quarter of a multiprocessor
constexpr double kBytesFromSmem = 100;      // a clock
constexpr double kBytesFromCluster = 20.0;  // a clock

double clocks_of_item(Kind kind, bool backward, const Plan& plan, int element, int most_groups) {
    const Held kept = held(element, most_groups);
    const int warps = 2 * plan.groups, hidden = plan.cluster * plan.groups * kGroup;
    double products, smem, incoming;
    if (backward) {
        const BackwardLayout at = backward_layout(element, kept.tiles, plan);
        products = at.tiles * at.blocks * 2.0 * warps;
        smem = warps * at.blocks * (at.in_smem * 1024.0 + 512);
        incoming = hidden * kColumns * 4.0;
    } else {
        const ForwardLayout at = forward_layout(element, kept.blocks, plan);
        products = at.blocks / 2 * 4.0 * warps;
        smem = warps * (at.in_smem * 2048.0 + at.blocks / 2 * 512.0);
        incoming = hidden * kColumns * element;
    }
    const int each = kind == Kind::float32 ? 3 : 1;
    return kCells + products / 4 * kProduct * each + smem / kBytesFromSmem + incoming / kBytesFromCluster;
}

}  // namespace

Plan plan(Kind kind, bool backward, int hidden, int batch, int directions, const Resident& resident) {
    const int element = element_size(kind), all_tiles = std::max(1, (batch + kColumns - 1) / kColumns);
    Plan best{};
    double best_clocks = 0;
    for (int cluster : {2, 4, 8, 16}) {
        Plan candidate{cluster, (hidden + cluster * kGroup - 1) / (cluster * kGroup), 0, 0, 0};
        const int serves = most_groups(kind, candidate.groups);
        if (serves == 0) continue;
        const Held kept = held(element, serves);
        for (int tiles = 1; tiles <= all_tiles; ++tiles) {
            candidate.tiles = tiles;
            candidate.clusters = (all_tiles + tiles - 1) / tiles;
            candidate.shared = backward ? backward_layout(element, kept.tiles, candidate).end
                                        : forward_layout(element, kept.blocks, candidate).end;
            if (candidate.shared > kSharedLimit) break;
            const int at_once = resident(cluster, 64 * candidate.groups, candidate.shared);
            if (at_once == 0) break;
            const int rounds = (candidate.clusters * directions + at_once - 1) / at_once;
            const double item = clocks_of_item(kind, backward, candidate, element, serves);
            const double clocks = rounds * std::max(tiles * item, item + kExchange);
            if (best.cluster == 0 || clocks < best_clocks) {
                best = candidate;
                best_clocks = clocks;
            }
            if (rounds == 1) break;  // more tiles a cluster would only wait for one another
        }
    }
    return best;
}

}  // namespace lstm::persistent
