// Memory from the system, of whole pages of 2 MiB.
#pragma once

#include <cstdint>

namespace lstm::cpu {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

// Asks the system for pages of 2 MiB where they lie wholly within a result's bytes: made one by one, pages of 4 KiB
// take up to a third of a training step. Not on CPUs whose second cache is smaller than what is then zeroed at once:
// there large calls took up to a fifth longer.
void ask_for_huge_pages(void* result, std::int64_t bytes);

// Its last page is one of 2 MiB if it holds `fewest` of the bytes.
struct Block {
    explicit Block(std::int64_t bytes, std::int64_t fewest = 1);  // throws std::bad_alloc
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    const std::int64_t size;
    char* const data;
};

}  // namespace lstm::cpu
