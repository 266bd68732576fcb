#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace microbatch {

/// The header of a block of memory; the data follows it.
struct alignas(64) Block {
    std::uint64_t mark = 0;        ///< says that this is a block that somebody owns: see block_of()
    std::size_t bytes = 0;         ///< header, data and what rounding added
    std::int64_t asked_bytes = 0;  ///< by the owner; of no meaning in a cached block
    std::uint64_t cached = 0;      ///< 1 where nobody owns it
    Block* next = nullptr;         ///< cached blocks of its size class
    Block* previous = nullptr;
    Block* below = nullptr;  ///< neighbours by address; blocks with pages of their own only
    Block* above = nullptr;
};
inline constexpr std::size_t block_header_bytes = sizeof(Block);
static_assert(block_header_bytes == 64);

/// Blocks begin at even multiples of 64 and their data at odd ones: never at the start of a page.
inline constexpr std::size_t block_alignment = 2 * block_header_bytes;

inline void* data_of(Block* block) {
    return block + 1;
}

/// The block whose data this is, or nullptr if this came from another allocator. Reads nothing outside of the page in
/// which `data` begins.
Block* block_of(void* data);

/// An owner of `asked` bytes for a block that had none. keep_unowned() takes it back.
void give_to_owner(Block* block, std::size_t asked);
void keep_unowned(Block* block);

/// Before the memory of an unowned block goes back to the system, the last `bytes` of it.
void forget_tail(Block* block, std::size_t bytes);

/// Size classes, eight in each doubling: all sizes of a class are within an eighth.
std::size_t size_class_of(std::size_t bytes);
std::size_t largest_of_class(std::size_t size_class);

/// Unowned blocks by size class.
class BlockBins {
public:
    void put(Block* block);
    void remove(Block* block);

    /// A smallest block of at least `bytes`, and at most `most` to within a class; nullptr if there is none.
    Block* best_fit(std::size_t bytes, std::size_t most) const;

    /// A block of the largest class that has any, or nullptr.
    Block* largest() const;

private:
    static constexpr std::size_t classes = 384;  // up to 2^54 bytes

    std::size_t occupied_class_from(std::size_t size_class) const;

    std::array<Block*, classes> first_{};
    std::array<std::uint64_t, classes / 64> occupied_{};  // a bit for each class
};

}  // namespace microbatch
