#include "microbatch/memory/block.h"

#include <algorithm>
#include <bit>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace microbatch {
namespace {

constexpr std::size_t smallest_shift = 6;  // the smallest classes are 64 bytes apart

std::uint64_t mark_of(const Block* block) {
    return 0x6d69'6372'6f62'6c6bULL ^ reinterpret_cast<std::uintptr_t>(block);
}

// Tells the address sanitizer that data without an owner must not be accessed.
void forbid_access([[maybe_unused]] Block* block) {
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(data_of(block), block->bytes - block_header_bytes);
#endif
}
void allow_access([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace

// The sanitizer does not allow reading what precedes a foreign block.
__attribute__((no_sanitize_address)) Block* block_of(void* data) {
    if (reinterpret_cast<std::uintptr_t>(data) % block_alignment != block_header_bytes) return nullptr;
    Block* block = static_cast<Block*>(data) - 1;
    return block->mark == mark_of(block) ? block : nullptr;
}

void give_to_owner(Block* block, std::size_t asked) {
    allow_access(data_of(block), asked);
    block->mark = mark_of(block);
    block->asked_bytes = static_cast<std::int64_t>(asked);
    block->cached = 0;
}

void keep_unowned(Block* block) {
    block->mark = 0;
    block->cached = 1;
    forbid_access(block);
}

void forget_tail(Block* block, std::size_t bytes) {
    allow_access(reinterpret_cast<char*>(block) + (block->bytes - bytes), bytes);
}

std::size_t size_class_of(std::size_t bytes) {
    const auto width = static_cast<std::size_t>(std::bit_width(bytes - 1));
    const std::size_t shift = std::max(width, smallest_shift + 4) - 4;
    return 8 * (shift - smallest_shift) + ((bytes - 1) >> shift);
}

std::size_t largest_of_class(std::size_t size_class) {
    const std::size_t doubling = size_class < 8 ? 0 : size_class / 8 - 1;
    return (size_class - 8 * doubling + 1) << (smallest_shift + doubling);
}

void BlockBins::put(Block* block) {
    const std::size_t size_class = size_class_of(block->bytes);
    Block*& first = first_[size_class];
    block->previous = nullptr;
    block->next = first;
    if (first != nullptr) first->previous = block;
    first = block;
    occupied_[size_class / 64] |= std::uint64_t{1} << (size_class % 64);
}

void BlockBins::remove(Block* block) {
    const std::size_t size_class = size_class_of(block->bytes);
    Block*& first = first_[size_class];
    (block->previous != nullptr ? block->previous->next : first) = block->next;
    if (block->next != nullptr) block->next->previous = block->previous;
    if (first == nullptr) occupied_[size_class / 64] &= ~(std::uint64_t{1} << (size_class % 64));
}

Block* BlockBins::best_fit(std::size_t bytes, std::size_t most) const {
    const std::size_t last = std::min(size_class_of(most), classes - 1);
    std::size_t size_class = size_class_of(bytes);
    for (; (size_class = occupied_class_from(size_class)) <= last; ++size_class) {
        Block* best = nullptr;
        for (Block* block = first_[size_class]; block != nullptr; block = block->next) {
            if (block->bytes >= bytes && (best == nullptr || block->bytes < best->bytes)) best = block;
            if (block->bytes == bytes) break;
        }
        if (best != nullptr) return best;
    }
    return nullptr;
}

Block* BlockBins::largest() const {
    for (std::size_t word = occupied_.size(); word-- > 0;) {
        if (occupied_[word] != 0)
            return first_[64 * word + 63 - static_cast<std::size_t>(std::countl_zero(occupied_[word]))];
    }
    return nullptr;
}

// `classes` if no class fits.
std::size_t BlockBins::occupied_class_from(std::size_t size_class) const {
    std::size_t word = size_class / 64;
    if (word >= occupied_.size()) return classes;
    std::uint64_t bits = occupied_[word] & (~std::uint64_t{0} << (size_class % 64));
    while (bits == 0 && ++word < occupied_.size()) bits = occupied_[word];
    return bits == 0 ? classes : 64 * word + static_cast<std::size_t>(std::countr_zero(bits));
}

}  // namespace microbatch
