#include "microbatch/state/snapshot.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

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

Snapshot Snapshot::of_copies(std::vector<at::Tensor> copies) {
    Snapshot snapshot;
    snapshot.copies_ = std::move(copies);
    return snapshot;
}

Snapshot::Snapshot(const std::vector<at::Tensor>& tensors, const std::filesystem::path& file)
    : Snapshot(
          tensors.size(), [&](std::size_t i) { return tensors[i]; }, file) {}

Snapshot::Snapshot(std::size_t count, const std::function<at::Tensor(std::size_t)>& tensor,
                   const std::filesystem::path& file) {
    const at::NoGradGuard no_grad;
    if (std::filesystem::exists(std::filesystem::symlink_status(file))) {
        throw Error(ErrorKind::usage, str_cat(file.string(), " exists already"));
    }
    file_ = std::make_shared<File>(file);
    errno = 0;
    std::ofstream stream(file, std::ios::binary | std::ios::trunc);
    for (std::size_t i = 0; i < count; ++i) {
        const at::Tensor bytes = on_the_cpu(tensor(i));
        stream.write(static_cast<const char*>(bytes.const_data_ptr()), static_cast<std::streamsize>(bytes.nbytes()));
        copies_.push_back(at::empty_like(bytes, at::TensorOptions(at::kMeta)));
    }
    stream.close();
    if (!stream) throw Error(ErrorKind::usage, str_cat("cannot write ", file.string(), ": ", std::strerror(errno)));
}

/// The file, found whole.
struct Snapshot::Reader {
    const Snapshot& snapshot;
    std::ifstream stream;

    explicit Reader(const Snapshot& of) : snapshot(of), stream(of.file_->path, std::ios::binary) {
        std::error_code failure;
        const auto size = std::filesystem::file_size(of.file_->path, failure);
        if (!stream || failure || size != static_cast<std::uintmax_t>(bytes_of(of.copies_))) of.refuse_file();
    }

    // All of it, so that what fails does so before anything is changed.
    void require_readable() {
        std::string chunk(std::size_t{1} << 20U, '\0');
        for (std::int64_t left = bytes_of(snapshot.copies_); left > 0;) {
            const std::int64_t size = std::min(left, static_cast<std::int64_t>(chunk.size()));
            stream.read(chunk.data(), size);
            if (!stream) snapshot.refuse_file();
            left -= size;
        }
        stream.seekg(0);
    }

    // The next one, into a tensor that is laid out as it was.
    void read(const at::Tensor& into) {
        stream.read(static_cast<char*>(into.mutable_data_ptr()), static_cast<std::streamsize>(into.nbytes()));
        if (!stream) snapshot.refuse_file();
    }
};

at::Tensor Snapshot::tensor(std::size_t i) const {
    if (!file_) return copies_.at(i);
    Reader reader(*this);
    const auto first = copies_.begin();
    reader.stream.seekg(bytes_of({first, first + static_cast<std::ptrdiff_t>(i)}));
    const at::Tensor result = at::empty_like(copies_.at(i), at::TensorOptions(at::kCPU));
    reader.read(result);
    return result;
}

std::vector<at::Tensor> Snapshot::tensors() const {
    if (!file_) return copies_;
    std::vector<at::Tensor> result;
    for (const at::Tensor& shape : copies_) result.push_back(at::empty_like(shape, at::TensorOptions(at::kCPU)));
    copy_into(result);
    return result;
}

void Snapshot::copy_into(const std::vector<at::Tensor>& live) const {
    const at::NoGradGuard no_grad;
    const auto alike = [](const at::Tensor& one, const at::Tensor& other) {
        return one.sizes() == other.sizes() && one.scalar_type() == other.scalar_type();
    };
    if (!std::equal(live.begin(), live.end(), copies_.begin(), copies_.end(), alike)) {
        throw Error(ErrorKind::usage, "a snapshot is of tensors of other shapes");
    }
    if (!file_) {
        for (std::size_t i = 0; i < live.size(); ++i) at::Tensor(live[i]).copy_(copies_[i]);
        return;
    }
    Reader reader(*this);
    reader.require_readable();
    for (std::size_t i = 0; i < live.size(); ++i) {
        const bool in_place = live[i].is_cpu() && live[i].strides() == copies_[i].strides();
        const at::Tensor bytes = in_place ? live[i] : at::empty_like(copies_[i], at::TensorOptions(at::kCPU));
        reader.read(bytes);
        if (!in_place) at::Tensor(live[i]).copy_(bytes);
    }
}

void Snapshot::refuse_file() const {
    throw Error(ErrorKind::bad_data, str_cat(file_->path.string(), " is not as it was written"));
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
