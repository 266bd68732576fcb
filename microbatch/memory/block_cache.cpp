#include "microbatch/memory/block_cache.h"

#include <stdlib.h>

#include <new>

namespace microbatch {
namespace {

// Above this size, rounding to whole pages costs less than a sixteenth.
constexpr std::size_t smallest_of_pages = std::size_t{64} << 10;

std::size_t small_block_bytes(std::size_t bytes) {
    return largest_of_class(size_class_of(bytes + block_header_bytes));
}

}  // namespace

Block* BlockCache::reuse(std::size_t bytes) {
    return bytes < smallest_of_pages ? reuse_small(bytes) : pages_.reuse(bytes);
}

Block* BlockCache::add(std::size_t bytes, std::int64_t most) {
    const bool small = bytes < smallest_of_pages;
    const std::size_t size = small ? small_block_bytes(bytes) : PageHeap::block_bytes(bytes);
    shrink(most - static_cast<std::int64_t>(size));
    Block* block = small ? add_small(bytes) : pages_.add(bytes);
    if (block != nullptr || cached_bytes() == 0) return block;
    shrink(0);
    return small ? add_small(bytes) : pages_.add(bytes);
}

void BlockCache::keep(Block* block) {
    if (static_cast<std::size_t>(block->asked_bytes) >= smallest_of_pages) return pages_.keep(block);
    keep_unowned(block);
    small_cached_bytes_ += static_cast<std::int64_t>(block->bytes);
    small_.put(block);
}

void BlockCache::shrink(std::int64_t bytes) {
    pages_.shrink(bytes - small_held_bytes_);
    while (held_bytes() > bytes) {
        Block* block = small_.largest();
        if (block == nullptr) return;
        small_.remove(block);
        small_cached_bytes_ -= static_cast<std::int64_t>(block->bytes);
        small_held_bytes_ -= static_cast<std::int64_t>(block->bytes);
        forget_tail(block, block->bytes);
        ::free(block);
    }
}

Block* BlockCache::reuse_small(std::size_t bytes) {
    const std::size_t size = small_block_bytes(bytes);
    Block* block = small_.best_fit(size, size + size / 2);
    if (block == nullptr) return nullptr;
    small_.remove(block);
    small_cached_bytes_ -= static_cast<std::int64_t>(block->bytes);
    give_to_owner(block, bytes);
    return block;
}

Block* BlockCache::add_small(std::size_t bytes) {
    const std::size_t size = small_block_bytes(bytes);
    void* memory = nullptr;
    if (::posix_memalign(&memory, block_alignment, size) != 0) return nullptr;
    auto* block = new (memory) Block;
    block->bytes = size;
    small_held_bytes_ += static_cast<std::int64_t>(size);
    give_to_owner(block, bytes);
    return block;
}

}  // namespace microbatch
