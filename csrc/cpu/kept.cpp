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

constexpr std::int64_t kMostHeld = std::int64_t{128} << 20, kMostOfPool = std::int64_t{1} << 30;

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
    Pool& all = pool();
    const auto with_others = [&] {
        std::int64_t size = owned->size;
        for (const auto& other : all.blocks) size += other->size;
        return size;
    };
    std::unique_lock<std::mutex> lock(all.mutex);
#ifdef MADV_FREE
    if (with_others() > kMostHeld) {
        lock.unlock();  // while the system looks at each page
        madvise(owned->data, owned->size, MADV_FREE);
        lock.lock();
    }
#endif
    if (with_others() <= kMostOfPool) all.blocks.push_back(std::move(owned));
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
    return KeptBlock(new Block(bytes, kHugePage / 2));
}

}  // namespace lstm::cpu
