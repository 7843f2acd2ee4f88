#include "kept.h"

#include <iterator>
#include <mutex>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lstm::cpu {
namespace {

constexpr std::int64_t kMostOfPool = std::int64_t{1} << 30;

struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<Block>> blocks;
};

Pool& pool() {
    static Pool& all = *new Pool;  // never destroyed: a tensor may live longer than what is static
    return all;
}

}  // namespace

void Keep::operator()(Block* block) const {
    std::unique_ptr<Block> owned(block);
#ifdef MADV_FREE
    madvise(owned->data, owned->size, MADV_FREE);
#endif
    Pool& all = pool();
    const std::lock_guard<std::mutex> lock(all.mutex);
    std::int64_t size = owned->size;
    for (const auto& other : all.blocks) size += other->size;
    if (size > kMostOfPool) return;
    all.blocks.push_back(std::move(owned));
}

KeptBlock take_block(std::int64_t bytes) {
    std::vector<std::unique_ptr<Block>> freed;
    {
        Pool& all = pool();
        const std::lock_guard<std::mutex> lock(all.mutex);
        auto best = all.blocks.end();
        for (auto one = all.blocks.begin(); one != all.blocks.end(); ++one) {
            const std::int64_t size = (*one)->size;
            if (bytes <= size && size / 2 <= bytes && (best == all.blocks.end() || size <= (*best)->size)) best = one;
        }
        if (best != all.blocks.end()) {
            KeptBlock block(best->release());
            all.blocks.erase(best);
            return block;
        }
        auto end = all.blocks.begin();
        for (std::int64_t size = 0; end != all.blocks.end() && size < bytes; ++end) size += (*end)->size;
        freed.assign(std::make_move_iterator(all.blocks.begin()), std::make_move_iterator(end));
        all.blocks.erase(all.blocks.begin(), end);
    }
    freed.clear();
    KeptBlock block(new Block(bytes));
#ifdef MADV_HUGEPAGE  // whatever the second cache holds: they are zeroed but once
    const std::int64_t of_huge_pages = (bytes + kHugePage / 2) / kHugePage * kHugePage;
    madvise(block->data, of_huge_pages, MADV_HUGEPAGE);
#endif
    return block;
}

}  // namespace lstm::cpu
