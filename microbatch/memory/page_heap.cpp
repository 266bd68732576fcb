#include "microbatch/memory/page_heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace microbatch {
namespace {

std::size_t whole_pages(std::size_t bytes) {
    static const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}

Block* end_of(Block* block) {
    return reinterpret_cast<Block*>(reinterpret_cast<char*>(block) + block->bytes);
}

}  // namespace

std::size_t PageHeap::block_bytes(std::size_t bytes) {
    return whole_pages(bytes + block_header_bytes);
}

Block* PageHeap::reuse(std::size_t bytes) {
    const std::size_t wanted = block_bytes(bytes);
    Block* block = bins_.best_fit(wanted, SIZE_MAX);
    if (block == nullptr) return nullptr;
    remove(block);
    if (block->bytes > wanted) split(block, wanted);
    give_to_owner(block, bytes);
    return block;
}

Block* PageHeap::add(std::size_t bytes) {
    const std::size_t size = block_bytes(bytes);
    void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto* block = new (memory) Block;
    block->bytes = size;
    held_bytes_ += static_cast<std::int64_t>(size);
    insert_by_address(block);
    give_to_owner(block, bytes);
    return block;
}

void PageHeap::keep(Block* block) {
    if (Block* above = block->above; above != nullptr && above->cached != 0 && end_of(block) == above) {
        remove(above);
        join(block, above);
    }
    if (Block* below = block->below; below != nullptr && below->cached != 0 && end_of(below) == block) {
        remove(below);
        block->mark = 0;
        join(below, block);
        block = below;
    }
    keep_unowned(block);
    put(block);
}

void PageHeap::shrink(std::int64_t bytes) {
    while (held_bytes_ > bytes) {
        Block* block = bins_.largest();
        if (block == nullptr) return;
        const auto excess = static_cast<std::size_t>(held_bytes_ - std::max<std::int64_t>(bytes, 0));
        if (!release_tail(block, std::min(block->bytes, whole_pages(excess)))) return;
    }
}

// Returns the last `bytes` of a cached block to the system; false if that fails.
bool PageHeap::release_tail(Block* block, std::size_t bytes) {
    const Block before = *block;
    remove(block);
    forget_tail(block, bytes);
    if (::munmap(reinterpret_cast<char*>(block) + (before.bytes - bytes), bytes) != 0) {
        put(block);
        return false;
    }
    held_bytes_ -= static_cast<std::int64_t>(bytes);
    if (bytes < before.bytes) {
        block->bytes -= bytes;
        put(block);
    } else {
        (before.below != nullptr ? before.below->above : lowest_) = before.above;
        if (before.above != nullptr) before.above->below = before.below;
    }
    return true;
}

void PageHeap::insert_by_address(Block* block) {
    Block* below = nullptr;
    Block* above = lowest_;  // where Linux usually puts new pages
    while (above != nullptr && above < block) {
        below = above;
        above = above->above;
    }
    block->below = below;
    block->above = above;
    (below != nullptr ? below->above : lowest_) = block;
    if (above != nullptr) above->below = block;
}

// Splits off what follows the first `bytes` of a cached block.
void PageHeap::split(Block* block, std::size_t bytes) {
    auto* place = reinterpret_cast<char*>(block) + bytes;
    forget_tail(block, block->bytes - bytes);
    auto* rest = new (place) Block;
    rest->bytes = block->bytes - bytes;
    block->bytes = bytes;
    rest->below = block;
    rest->above = block->above;
    if (rest->above != nullptr) rest->above->below = rest;
    block->above = rest;
    keep_unowned(rest);
    put(rest);
}

// Merges two neighbouring blocks.
void PageHeap::join(Block* below, Block* above) {
    below->bytes += above->bytes;
    below->above = above->above;
    if (above->above != nullptr) above->above->below = below;
}

void PageHeap::put(Block* block) {
    cached_bytes_ += static_cast<std::int64_t>(block->bytes);
    bins_.put(block);
}

void PageHeap::remove(Block* block) {
    cached_bytes_ -= static_cast<std::int64_t>(block->bytes);
    bins_.remove(block);
}

}  // namespace microbatch
