#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

namespace microbatch {

/// A copy of tensors, in memory or in a file that only this process reads.
///
/// Threads: none may change the tensors while they are copied.
class Snapshot {
public:
    /// In memory, each on its tensor's device. Throws c10::OutOfMemoryError if there is no room.
    explicit Snapshot(const std::vector<at::Tensor>& tensors);

    /// Of copies that are made already, and that nobody else changes.
    static Snapshot of_copies(std::vector<at::Tensor> copies);

    /// In a new file, which goes with this. The folder must exist.
    /// Errors: ErrorKind::usage if there is one already, or it cannot be written whole (disk full, read-only); nothing
    /// is left of it then.
    Snapshot(const std::vector<at::Tensor>& tensors, const std::filesystem::path& file);

    /// The same of tensors that are asked for one after the other and not held.
    Snapshot(std::size_t count, const std::function<at::Tensor(std::size_t)>& tensor,
             const std::filesystem::path& file);

    std::size_t size() const { return copies_.size(); }

    /// Its i-th tensor: the copy itself; of a file, read anew. Errors: as tensors().
    at::Tensor tensor(std::size_t i) const;

    /// Sizes, strides and dtype of the i-th tensor; of a file without its numbers.
    const at::Tensor& shape(std::size_t i) const { return copies_[i]; }

    /// The tensors as they were; of a file, read anew.
    /// Errors: ErrorKind::bad_data if the file is not there whole.
    std::vector<at::Tensor> tensors() const;

    /// Makes `live` what the tensors were. Of a file one after the other, so that it takes no memory beside them (on
    /// the CPU; elsewhere that of the largest). Errors: ErrorKind::usage if they are not as many, of other shapes or
    /// dtypes; ErrorKind::bad_data if the file is
    ///         not there whole. Nothing has changed then.
    void copy_into(const std::vector<at::Tensor>& live) const;

    /// What the copies take of memory: 0 for a file.
    std::int64_t memory_bytes() const;

private:
    /// Removes the file at its end.
    struct File;

    struct Reader;

    Snapshot() = default;

    [[noreturn]] void refuse_file() const;

    std::vector<at::Tensor> copies_;  // of a file without storage: shapes alone
    std::shared_ptr<const File> file_;
};

/// Bytes of all of them.
std::int64_t bytes_of(const std::vector<at::Tensor>& tensors);

}  // namespace microbatch
