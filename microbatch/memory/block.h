#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace microbatch {

/// The header of a block of memory; the data follows it.
struct alignas(64) Block {
    std::uint64_t mark = 0;        ///< marks a block that is in use: see block_of()
    std::size_t bytes = 0;         ///< header, data and rounding
    std::int64_t asked_bytes = 0;  ///< requested by the owner; meaningless in a cached block
    std::uint64_t cached = 0;      ///< 1 if it has no owner
    Block* next = nullptr;         ///< the next cached block of its size class
    Block* previous = nullptr;
    Block* below = nullptr;  ///< neighbours by address; only for blocks of whole pages
    Block* above = nullptr;
};
inline constexpr std::size_t block_header_bytes = sizeof(Block);
static_assert(block_header_bytes == 64);

/// Blocks begin at even multiples of 64 and their data at odd ones: never at the start of a page.
inline constexpr std::size_t block_alignment = 2 * block_header_bytes;

inline void* data_of(Block* block) {
    return block + 1;
}

/// The block that has this data, or nullptr if it came from another allocator. Reads only the page in which `data`
/// begins.
Block* block_of(void* data);

/// Gives an unowned block an owner of `asked` bytes. keep_unowned() reverses it.
void give_to_owner(Block* block, std::size_t asked);
void keep_unowned(Block* block);

/// Called before the last `bytes` of an unowned block are returned to the system.
void forget_tail(Block* block, std::size_t bytes);

/// Size classes, eight per doubling: all sizes of a class are within an eighth.
std::size_t size_class_of(std::size_t bytes);
std::size_t largest_of_class(std::size_t size_class);

/// Unowned blocks by size class.
class BlockBins {
public:
    void put(Block* block);
    void remove(Block* block);

    /// A smallest block of at least `bytes`, and at most `most`, to within a class; nullptr if no block fits.
    Block* best_fit(std::size_t bytes, std::size_t most) const;

    /// A block of the largest class that has any, or nullptr.
    Block* largest() const;

private:
    static constexpr std::size_t classes = 384;  // up to 2^54 bytes

    std::size_t occupied_class_from(std::size_t size_class) const;

    std::array<Block*, classes> first_{};
    std::array<std::uint64_t, classes / 64> occupied_{};  // one bit per class
};

}  // namespace microbatch
