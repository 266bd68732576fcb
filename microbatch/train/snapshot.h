#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
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

    /// In a new file, which goes with this. The folder must exist.
    /// Errors: ErrorKind::usage if there is one already, or it cannot be written whole (disk full, read-only); nothing
    /// is left of it then.
    Snapshot(const std::vector<at::Tensor>& tensors, const std::filesystem::path& file);

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

    [[noreturn]] void refuse_file() const;

    std::vector<at::Tensor> copies_;  // of a file without storage: shapes alone
    std::shared_ptr<const File> file_;
};

/// Bytes of all of them.
std::int64_t bytes_of(const std::vector<at::Tensor>& tensors);

}  // namespace microbatch
