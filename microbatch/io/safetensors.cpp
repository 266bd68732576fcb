#include "microbatch/io/safetensors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>

#include <bit>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <unordered_map>
#include <unordered_set>

#include "microbatch/core/error.h"
#include "microbatch/io/input_file.h"
#include "microbatch/io/safetensors_header.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie in memory");

struct NamedType {
    const char* name;
    at::ScalarType type;
};

constexpr NamedType types[] = {{"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
                               {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
                               {"U8", at::kByte},    {"BOOL", at::kBool}};

const char* dtype_name(const std::string& tensor, const at::Tensor& shape) {
    for (const auto& [name, type] : types) {
        if (type == shape.scalar_type()) return name;
    }
    throw Error(ErrorKind::usage, tensor, " is ", shape.scalar_type(), ", which safetensors cannot store");
}

at::ScalarType type_of(const std::string& dtype) {
    for (const auto& [name, type] : types) {
        if (dtype == name) return type;
    }
    throw Error(ErrorKind::bad_data, "unknown dtype ", dtype);
}

std::string make_header(const StoredTensors& tensors) {
    std::vector<SafetensorsEntry> entries;
    std::unordered_set<std::string> names;
    std::uint64_t offset = 0;
    for (const auto& [name, tensor] : tensors) {
        if (!names.insert(name).second) throw Error(ErrorKind::usage, "two tensors are named ", name);
        if (name == "__metadata__") {
            throw Error(ErrorKind::usage, "a tensor cannot be named __metadata__, a name that safetensors reserves");
        }
        const at::Tensor& shape = tensor.shape();
        const std::uint64_t end = offset + shape.nbytes();
        const std::vector<std::int64_t> sizes = shape.sizes().vec();
        entries.push_back(
            {.name = name,
             .dtype = dtype_name(name, shape),
             .shape = sizes,
             .strides = shape.is_non_overlapping_and_dense() ? shape.strides().vec() : row_major_strides(sizes),
             .begin = offset,
             .end = end});
        offset = end;
    }
    std::string header;
    try {
        header = make_safetensors_header(entries);
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::usage, "a tensor's name is not UTF-8");
    }
    // Ensures that what is written can be read again.
    try {
        parse_safetensors_header(std::string_view(header).substr(safetensors_length_bytes), offset, "the tensors");
    } catch (const Error& error) {
        throw Error(ErrorKind::usage, error.what());
    }
    return header;
}

std::string_view bytes_of(const at::Tensor& contiguous) {
    return {static_cast<const char*>(contiguous.const_data_ptr()), contiguous.nbytes()};
}

at::Tensor read_tensor(const InputFile& file, std::uint64_t data, const SafetensorsEntry& entry) {
    const at::NoGradGuard no_grad;
    const at::Tensor tensor = at::empty_strided(entry.shape, row_major_strides(entry.shape),
                                                at::TensorOptions(at::kCPU).dtype(type_of(entry.dtype)));
    file.read(data + entry.begin,
              std::as_writable_bytes(std::span(static_cast<char*>(tensor.mutable_data_ptr()), tensor.nbytes())));
    if (entry.strides == tensor.strides()) return tensor;
    const at::Tensor laid_out = at::empty_strided(entry.shape, entry.strides, tensor.options());
    return laid_out.copy_(tensor);
}

at::Tensor shape_of(const SafetensorsEntry& entry) {
    return at::empty_strided(entry.shape, entry.strides, at::TensorOptions(at::kMeta).dtype(type_of(entry.dtype)));
}

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

void write_safetensors(OutputFile& file, const StoredTensors& tensors) {
    const at::NoGradGuard no_grad;
    file.write(make_header(tensors));
    for (const auto& [name, stored] : tensors) {
        const at::Tensor tensor = stored.get().detach().cpu().contiguous();
        if (tensor.nbytes() != stored.shape().nbytes()) {
            throw Error(ErrorKind::usage, name, " does not have its declared size");
        }
        file.write(bytes_of(tensor));
    }
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors) {
    StoredTensors all;
    for (const NamedTensor& one : tensors) all.emplace_back(one.name, StoredTensor(one.tensor));
    make_header(all);  // validates before the file is created
    write_whole(path, [&all](OutputFile& file) { write_safetensors(file, all); });
}

StoredTensors open_safetensors(const std::filesystem::path& path) {
    const auto file = std::make_shared<const InputFile>(path);
    const auto read = [&file](std::uint64_t offset, std::uint64_t length) {
        std::string bytes(length, ' ');
        file->read(offset, std::as_writable_bytes(std::span(bytes)));
        return bytes;
    };
    const std::string first = read(0, std::min(file->size(), safetensors_length_bytes));
    const std::uint64_t length = safetensors_header_length(first, file->size(), path.string());
    const std::uint64_t data = safetensors_length_bytes + length;
    StoredTensors tensors;
    for (SafetensorsEntry& entry :
         parse_safetensors_header(read(safetensors_length_bytes, length), file->size() - data, path.string())) {
        const at::Tensor shape = shape_of(entry);
        std::string name = entry.name;
        tensors.emplace_back(std::move(name), StoredTensor(shape, [file, data, entry = std::move(entry)] {
                                 return read_tensor(*file, data, entry);
                             }));
    }
    return tensors;
}

NamedTensors read_safetensors(const std::filesystem::path& path) {
    NamedTensors tensors;
    for (const auto& [name, tensor] : open_safetensors(path)) tensors.push_back({name, tensor.get()});
    return tensors;
}

void copy_by_name(const NamedTensors& from, const NamedTensors& to, const std::string& what) {
    const auto refuse_tensor = [&](const auto&... words) { throw Error(ErrorKind::bad_data, what, ": ", words...); };
    std::unordered_map<std::string, at::Tensor> found;
    for (const NamedTensor& one : from) found.emplace(one.name, one.tensor);
    for (const NamedTensor& one : to) {
        const auto at = found.find(one.name);
        if (at == found.end()) refuse_tensor("missing tensor ", one.name);
        if (at->second.sizes() != one.tensor.sizes() || at->second.scalar_type() != one.tensor.scalar_type()) {
            refuse_tensor(one.name, " is ", at->second.scalar_type(), " of shape ", at->second.sizes(), ", not ",
                          one.tensor.scalar_type(), " of shape ", one.tensor.sizes());
        }
    }
    if (found.size() > to.size()) refuse_tensor("there are ", found.size(), " tensors for ", to.size());
    const at::NoGradGuard no_grad;
    for (const NamedTensor& one : to) at::Tensor(one.tensor).copy_(found.at(one.name));
}

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
