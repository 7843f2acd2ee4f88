#include <algorithm>
#include <limits>

#include "persistent.h"

namespace lstm::persistent {
namespace {

constexpr int kSharedLimit = 232448;  // bytes of a block: compute capability 9.0 and 10.x
constexpr int kMostOfGrid = 8;        // warps of a grid's block

// Clocks, fitted to walks measured on an H100 (docs/persistent.md).
constexpr double kExchange = 650;             // of a message and its barrier, when one tile has to wait for it
constexpr double kCells = 400, kColumn = 25;  // gates, global memory and bookkeeping of an item, and of each column
constexpr double kCellsOfMany = 1000;         // more of it where threads have no registers to keep pointers in
constexpr double kProduct = 6.0;              // of one simt::mma in a quarter of a multiprocessor
constexpr double kBytesFromSmem = 70;         // a clock, while the matrix unit multiplies
constexpr double kBytesFromCluster = 17.0;    // a clock
// The same through global memory: words, flags and their waiters, in part for each item, since all its blocks meet;
// backward, a thread reads one word from each of the blocks. Bytes past the L1 cache, when all blocks read, forward
// each thread 16 at once. Pairs: forward, backward.
constexpr double kGridExchange[] = {1300, 600}, kGridItem[] = {1050, 1800}, kGridBlock[] = {5, 75};
constexpr double kBytesFromL2 = 30, kBytesFromL2Warp = 4;
constexpr double kPart = 30;  // of the sums over a part of K past the first two, estimated from the machine code

// What torch's LSTM takes there: a step's launches, and flops a clock, in 16 bits and in fp32, at less than half of the
// card's rate, as its products are thin; and cuDNN's own persistent kernel, by cells.
constexpr double kLibraryStep[] = {20000, 24000};  // of 16 bits, of fp32
constexpr double kLibraryFlops = 225e3, kLibraryFlops32 = 27e3;
constexpr double kLibraryPersistent = 2200, kLibraryCell = 0.26;
// Of what that one takes, what ours has to stay below: it was measured to be faster at 16 x 768 and 16 x 1024, and what
// ours should have gained there since was not.
constexpr double kSure = 0.75;

double clocks_of_item(Kind kind, bool backward, const Plan& plan) {
    const int element = element_size(kind);
    const int warps = warps_of(plan), hidden = plan.cluster * plan.groups * kGroup;
    double products, smem, incoming;
    if (backward) {
        const BackwardLayout at = backward_layout(kind, plan);
        products = at.tiles * at.blocks * 2.0 * warps;
        smem = warps * at.blocks * (at.in_smem * 1024.0 + 512);
        incoming = hidden * travelling(plan) * 4.0;
    } else {
        const ForwardLayout at = forward_layout(kind, plan);
        products = at.part * 4.0 * warps;
        smem = warps * (at.in_smem * 2048.0 + at.part * 512.0);
        // over a grid, a thread has as many loads in flight whatever they bring
        incoming = hidden * (plan.grid ? kColumns : plan.columns) * element;
    }
    const int each = kind == Kind::float32 ? 3 : 1;
    const double work = std::max(products / 4 * kProduct * each, smem / kBytesFromSmem);
    const double item = kCells + kColumn * plan.columns + (plan.groups > 4 ? kCellsOfMany : 0) + work;
    if (!plan.grid) return item + incoming / kBytesFromCluster;
    const double meeting = kGridItem[backward] + plan.cluster * kGridBlock[backward];
    if (backward) return item + meeting + incoming / (2 * kBytesFromL2);
    return item + meeting + incoming / std::min(kBytesFromL2, warps * kBytesFromL2Warp) + kPart * (plan.splits - 2);
}

int divide_up(int a, int b) { return (a + b - 1) / b; }

class Search {
  public:
    Search(Kind kind, bool backward, int hidden, int batch, int directions, const Resident& resident)
        : kind_(kind),
          backward_(backward),
          hidden_(hidden),
          batch_(std::max(1, batch)),
          directions_(directions),
          resident_(resident) {}

    // Of as few tiles a cluster as let all clusters run at once, of any width: more would wait for one another.
    // Clusters beyond those that run at once follow when others have ended. Those that run at once, but not on
    // multiprocessors of their own, take each other's time.
    void clusters_of(int cluster) {
        Plan candidate = of(cluster, divide_up(hidden_, cluster * kGroup), 2, false, directions_);
        if (most_groups(kind_, candidate.groups, false) == 0) return;
        const int threads = threads_of(candidate), alone = resident_(false, cluster, threads, kSharedLimit);
        for (int tiles = 1;; ++tiles) {
            bool fits = false, in_one_round = false;
            for (int columns = kColumns; columns > 0; --columns) {
                if (!lay_out(candidate, tiles, columns) || tiles * clocks_of_item(candidate) >= most_) continue;
                const int at_once = resident_(false, cluster, threads, candidate.shared);
                if (at_once == 0) continue;
                const int all = candidate.clusters * directions_, rounds = divide_up(all, at_once);
                const bool share = alone > 0 && std::min(all, at_once) > alone;
                offer(candidate, share ? 2 * rounds : rounds, kExchange);
                fits = true;
                in_one_round = in_one_round || rounds == 1;
            }
            if (!fits || in_one_round) return;
        }
    }

    // All clusters of a grid are resident at once; of both directions if they can be, else of one after the other.
    void grid_of(int groups, int splits, int columns, int at_a_time) {
        Plan candidate = of(divide_up(hidden_, groups * kGroup), groups, splits, true, at_a_time);
        int tiles = 1;
        while (lay_out(candidate, tiles, columns) && tiles * clocks_of_item(candidate) < most_) {
            const int blocks = resident_(true, candidate.cluster, threads_of(candidate), candidate.shared);
            const int clusters = blocks / (candidate.cluster * at_a_time);
            if (clusters == 0) return;
            if (candidate.clusters <= clusters)
                return offer(candidate, directions_ / at_a_time, kGridExchange[backward_]);
            tiles = std::max(tiles + 1, divide_up(divide_up(batch_, columns), clusters));
        }
    }

    Plan best{};

  private:
    static Plan of(int cluster, int groups, int splits, bool grid, int at_a_time) {
        return {cluster, groups, splits, 0, 0, 0, 0, grid ? 1 : 0, at_a_time, 0};
    }

    // False if no kernel serves the candidate, it needs more memory than a block has, or a cluster would get more tiles
    // than there are.
    bool lay_out(Plan& candidate, int tiles, int columns) const {
        if (most_groups(kind_, candidate.groups, candidate.grid) == 0) return false;
        const int all_tiles = divide_up(batch_, columns);
        if (tiles > all_tiles) return false;
        candidate.tiles = tiles;
        candidate.columns = columns;
        candidate.clusters = divide_up(all_tiles, tiles);
        candidate.shared = backward_ ? backward_layout(kind_, candidate).end : forward_layout(kind_, candidate).end;
        return candidate.shared <= kSharedLimit;
    }

    double clocks_of_item(const Plan& candidate) const {
        return persistent::clocks_of_item(kind_, backward_, candidate);
    }

    void offer(const Plan& candidate, int rounds, double exchange) {
        const double item = clocks_of_item(candidate);
        const double clocks = rounds * std::max(candidate.tiles * item, item + exchange);
        if (clocks >= most_) return;
        best = candidate;
        best.clocks = static_cast<int>(most_ = clocks);
    }

    double most_ = std::numeric_limits<double>::infinity();  // clocks that a better plan has to stay below
    const Kind kind_;
    const bool backward_;
    const int hidden_, batch_, directions_;
    const Resident& resident_;
};

}  // namespace

Plan plan(Kind kind, bool backward, int hidden, int batch, int directions, const Resident& resident) {
    Search search(kind, backward, hidden, batch, directions, resident);
    for (int cluster : {2, 4, 8, 16}) search.clusters_of(cluster);
    for (int at_a_time = directions; at_a_time > 0; --at_a_time) {
        for (int groups = 4; groups > 0; --groups) {
            for (int splits = 2; splits * groups <= (backward ? 2 * groups : kMostOfGrid); splits *= 2) {
                for (int columns = kColumns; columns > 0; --columns) search.grid_of(groups, splits, columns, at_a_time);
            }
        }
    }
    return search.best;
}

double library_clocks(Kind kind, int hidden, int batch, bool plain) {
    // the corner where torch lets cuDNN use its persistent kernel, but for the input size
    if (plain && kind == Kind::float16 && hidden % 128 == 0 && hidden <= 1024 && batch % 8 == 0 && batch <= 128) {
        return kSure * (kLibraryPersistent + kLibraryCell * batch * hidden);
    }

    const double flops = 8.0 * batch * hidden * hidden;
    const double rate = kind == Kind::float32 ? kLibraryFlops32
                        : kind == Kind::tf32  ? kLibraryFlops / 2
                                              : kLibraryFlops;
    return kLibraryStep[element_size(kind) == 4] + flops / rate;
}

}  // namespace lstm::persistent
