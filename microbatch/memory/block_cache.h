#pragma once

#include <cstddef>
#include <cstdint>

#include "microbatch/memory/block.h"
#include "microbatch/memory/page_heap.h"

namespace microbatch {

/// No block is larger: more than any machine's address space, and all sums of sizes stay within 64 bits.
inline constexpr std::size_t largest_block_bytes = std::size_t{1} << 46;

/// Blocks from the system, kept when they are freed and given out again: small ones by size class, large ones as whole
/// pages.
///
/// Threads: one at a time; nothing throws.
class BlockCache {
public:
    /// A cached block with room for `bytes`, 1 to largest_block_bytes; nullptr if there is none.
    Block* reuse(std::size_t bytes);

    /// A block from the system, for which cached ones are given back where held_bytes() would rise above `most`;
    /// nullptr if the system has no memory.
    Block* add(std::size_t bytes, std::int64_t most);

    /// Takes back a block that reuse() or add() gave out.
    void keep(Block* block);

    /// Gives cached blocks back to the system, large ones first, until held_bytes() is at most `bytes` or none is
    /// cached.
    void shrink(std::int64_t bytes);

    /// Of all blocks, and of those that nobody owns; headers and rounding included.
    std::int64_t held_bytes() const { return small_held_bytes_ + pages_.held_bytes(); }
    std::int64_t cached_bytes() const { return small_cached_bytes_ + pages_.cached_bytes(); }

private:
    Block* reuse_small(std::size_t bytes);
    Block* add_small(std::size_t bytes);

    PageHeap pages_;
    BlockBins small_;
    std::int64_t small_held_bytes_ = 0;
    std::int64_t small_cached_bytes_ = 0;
};

}  // namespace microbatch
