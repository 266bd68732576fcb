#include "microbatch/train/snapshot.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

// Its numbers one after the other, as they lie.
at::Tensor on_the_cpu(const at::Tensor& tensor) {
    const at::Tensor there = tensor.detach().to(at::kCPU);
    return there.is_non_overlapping_and_dense() ? there : there.contiguous();
}

}  // namespace

struct Snapshot::File {
    std::filesystem::path path;

    explicit File(std::filesystem::path at) : path(std::move(at)) {}
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() {
        std::error_code ignored;
        std::filesystem::remove(path, ignored);
    }
};

Snapshot::Snapshot(const std::vector<at::Tensor>& tensors) {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& tensor : tensors) copies_.push_back(tensor.detach().clone());
}

Snapshot::Snapshot(const std::vector<at::Tensor>& tensors, const std::filesystem::path& file) {
    const at::NoGradGuard no_grad;
    if (std::filesystem::exists(std::filesystem::symlink_status(file))) {
        throw Error(ErrorKind::usage, text(file.string(), " exists already"));
    }
    file_ = std::make_shared<File>(file);
    errno = 0;
    std::ofstream stream(file, std::ios::binary | std::ios::trunc);
    for (const at::Tensor& tensor : tensors) {
        const at::Tensor bytes = on_the_cpu(tensor);
        stream.write(static_cast<const char*>(bytes.const_data_ptr()), static_cast<std::streamsize>(bytes.nbytes()));
        copies_.push_back(at::empty_like(bytes, at::TensorOptions(at::kMeta)));
    }
    stream.close();
    if (!stream) throw Error(ErrorKind::usage, text("cannot write ", file.string(), ": ", std::strerror(errno)));
}

std::vector<at::Tensor> Snapshot::tensors() const {
    if (!file_) return copies_;
    const at::NoGradGuard no_grad;
    std::ifstream stream(file_->path, std::ios::binary);
    std::vector<at::Tensor> result;
    for (const at::Tensor& shape : copies_) {
        result.push_back(at::empty_like(shape, at::TensorOptions(at::kCPU)));
        stream.read(static_cast<char*>(result.back().mutable_data_ptr()),
                    static_cast<std::streamsize>(result.back().nbytes()));
        if (!stream) throw Error(ErrorKind::bad_data, text(file_->path.string(), " is not as it was written"));
    }
    return result;
}

std::int64_t Snapshot::memory_bytes() const {
    return file_ ? 0 : bytes_of(copies_);
}

std::int64_t bytes_of(const std::vector<at::Tensor>& tensors) {
    std::int64_t bytes = 0;
    for (const at::Tensor& tensor : tensors) bytes += static_cast<std::int64_t>(tensor.nbytes());
    return bytes;
}

}  // namespace microbatch
