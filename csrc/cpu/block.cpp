#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lstm::cpu {
namespace {

std::int64_t whole_pages(std::int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

// Pages that nobody has touched, the first so many bytes of them of 2 MiB: malloc's may be of 4 KiB already, and stay
// so.
char* map(std::int64_t size, [[maybe_unused]] std::int64_t huge) {
#ifdef __linux__
    const std::int64_t room = size + kHugePage;
    void* const found = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(found);
    const auto at = reinterpret_cast<std::intptr_t>(begin);
    char* const data = begin + (whole_pages(at) - at);
    if (data > begin) munmap(begin, data - begin);
    munmap(data + size, begin + room - (data + size));
    madvise(data, huge, MADV_HUGEPAGE);
    return data;
#else
    auto* const data = static_cast<char*>(std::aligned_alloc(kHugePage, size));
    if (data == nullptr) throw std::bad_alloc();
    return data;
#endif
}

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* result, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    static const bool zeroed_in_cache = sysconf(_SC_LEVEL2_CACHE_SIZE) >= kHugePage;
    constexpr std::uintptr_t page = kHugePage;
    const auto begin = reinterpret_cast<std::uintptr_t>(result);
    const std::uintptr_t from = (begin + page - 1) / page * page, to = (begin + bytes) / page * page;
    if (zeroed_in_cache && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Block::Block(std::int64_t bytes, std::int64_t fewest)
    : size(whole_pages(std::max(bytes, std::int64_t{1}))), data(map(size, whole_pages(bytes + 1 - fewest))) {}

Block::~Block() {
#ifdef __linux__
    munmap(data, size);
#else
    std::free(data);
#endif
}

}  // namespace lstm::cpu
