#pragma once

#include <cstddef>
#include <cstdint>

#include "microbatch/memory/block.h"
#include "microbatch/memory/page_heap.h"

namespace microbatch {

/// The largest block: more than the address space of any machine, and sums of sizes stay within 64 bits.
inline constexpr std::size_t largest_block_bytes = std::size_t{1} << 46;

/// Blocks from the system that are kept when they are freed, and reused: small ones by size class, large ones as whole
/// pages.
///
/// Threads: one at a time; nothing throws.
class BlockCache {
public:
    /// A cached block with room for `bytes`, 1 to largest_block_bytes; nullptr if no block fits.
    Block* reuse(std::size_t bytes);

    /// A block from the system. First returns cached blocks to the system if held_bytes() would exceed `most`; nullptr
    /// if the system has no memory.
    Block* add(std::size_t bytes, std::int64_t most);

    /// Takes back a block from reuse() or add().
    void keep(Block* block);

    /// Returns cached blocks to the system, large ones first, until held_bytes() is at most `bytes` or no block is
    /// cached.
    void shrink(std::int64_t bytes);

    /// The bytes of all blocks, and of unowned blocks, including headers and rounding.
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
