#include "kept.h"

#include <mutex>
#include <new>
#include <utility>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "arena.h"

namespace lstm::cpu {
namespace {

constexpr std::int64_t kAlignment = std::int64_t{2} << 20, kMostOfPool = std::int64_t{1} << 30;

struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<Block>> blocks;
};

Pool& pool() {
    static Pool& all = *new Pool;  // never destroyed: a tensor may live longer than what is static
    return all;
}

std::int64_t rounded(std::int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Block::Block(std::int64_t bytes) : data(std::aligned_alloc(kAlignment, rounded(bytes))), size(rounded(bytes)) {
    if (data == nullptr) throw std::bad_alloc();
    ask_for_huge_pages(data, bytes);
}

void Keep::operator()(Block* block) const {
    std::unique_ptr<Block> owned(block);
#ifdef MADV_FREE
    madvise(owned->data, owned->size, MADV_FREE);
#endif
    Pool& all = pool();
    const std::lock_guard<std::mutex> lock(all.mutex);
    std::int64_t size = owned->size;
    for (const auto& block : all.blocks) size += block->size;
    if (size > kMostOfPool) return;
    all.blocks.push_back(std::move(owned));
}

std::unique_ptr<Block, Keep> take_block(std::int64_t bytes) {
    std::vector<std::unique_ptr<Block>> freed;
    {
        Pool& all = pool();
        const std::lock_guard<std::mutex> lock(all.mutex);
        auto best = all.blocks.end();
        for (auto one = all.blocks.begin(); one != all.blocks.end(); ++one) {
            const std::int64_t size = (*one)->size;
            if (bytes <= size && size / 2 <= bytes && (best == all.blocks.end() || size < (*best)->size)) best = one;
        }
        if (best != all.blocks.end()) {
            std::unique_ptr<Block, Keep> block(best->release());
            all.blocks.erase(best);
            return block;
        }
        freed.swap(all.blocks);
    }
    freed.clear();
    return std::unique_ptr<Block, Keep>(new Block(bytes));
}

}  // namespace lstm::cpu
