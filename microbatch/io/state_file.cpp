#include "microbatch/io/state_file.h"

#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "microbatch/io/file_system.h"
#include "microbatch/io/safetensors.h"

namespace microbatch {
namespace {

/// Deletes the file when its last tensor is destroyed.
struct TemporaryFile {
    std::filesystem::path path;

    explicit TemporaryFile(std::filesystem::path file) : path(std::move(file)) {}
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() {
        std::error_code ignored;
        std::filesystem::remove(path, ignored);
    }
};

}  // namespace

StateDict moved_to_file(const StateDict& state, const std::filesystem::path& file) {
    const std::unique_ptr<OutputFile> out = system_files().create(file);  // never overwrites a file
    const auto owner = std::make_shared<const TemporaryFile>(file);
    write_safetensors(*out, {state.tensors().begin(), state.tensors().end()});
    out->close();
    StateDict moved;
    for (const auto& [name, scalar] : state.scalars()) moved.put(name, scalar);
    for (auto& [name, tensor] : open_safetensors(file)) {
        at::Tensor shape = tensor.shape();
        moved.put(name, StoredTensor(std::move(shape), [owner, tensor = tensor] { return tensor.get(); }));
    }
    return moved;
}

}  // namespace microbatch
