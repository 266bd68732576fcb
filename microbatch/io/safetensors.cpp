#include "microbatch/io/safetensors.h"

#include <bit>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/core/text.h"

namespace microbatch {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie in memory");

const char* dtype_name(const Parameter& tensor) {
    switch (tensor.tensor.scalar_type()) {
        case at::kDouble:
            return "F64";
        case at::kFloat:
            return "F32";
        case at::kHalf:
            return "F16";
        case at::kBFloat16:
            return "BF16";
        case at::kLong:
            return "I64";
        case at::kInt:
            return "I32";
        case at::kShort:
            return "I16";
        case at::kChar:
            return "I8";
        case at::kByte:
            return "U8";
        case at::kBool:
            return "BOOL";
        default:
            break;
    }
    throw Error(ErrorKind::usage,
                text(tensor.name, " is ", tensor.tensor.scalar_type(), ", which safetensors cannot hold"));
}

std::string make_header(const Parameters& tensors) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    std::int64_t offset = 0;
    for (const Parameter& tensor : tensors) {
        if (header.contains(tensor.name)) throw Error(ErrorKind::usage, text("two tensors are named ", tensor.name));
        const auto bytes = static_cast<std::int64_t>(tensor.tensor.nbytes());
        header[tensor.name] = {{"dtype", dtype_name(tensor)},
                               {"shape", tensor.tensor.sizes().vec()},
                               {"data_offsets", {offset, offset + bytes}}};
        offset += bytes;
    }
    std::string text = header.dump();
    // The data begins at a multiple of 8 bytes, as the format's own writer has it.
    text.append((8 - text.size() % 8) % 8, ' ');
    return text;
}

void write_all(const std::filesystem::path& path, const std::string& header, const Parameters& tensors) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    const std::uint64_t length = header.size();
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << header;
    for (const Parameter& tensor : tensors) {
        const at::Tensor data = tensor.tensor.detach().cpu().contiguous();
        file.write(static_cast<const char*>(data.const_data_ptr()), static_cast<std::streamsize>(data.nbytes()));
    }
    file.close();
    if (!file) {
        throw Error(ErrorKind::usage,
                    text("cannot write ", path.string(), ": is the folder there and the disk not full?"));
    }
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const Parameters& tensors) {
    const std::string header = make_header(tensors);
    const std::filesystem::path temporary = path.string() + ".part";
    try {
        write_all(temporary, header, tensors);
        std::filesystem::rename(temporary, path);
    } catch (const std::exception& error) {
        std::error_code ignored;
        std::filesystem::remove(temporary, ignored);
        if (dynamic_cast<const std::filesystem::filesystem_error*>(&error) == nullptr) throw;
        throw Error(ErrorKind::usage, text("cannot write ", path.string(), ": ", error.what()));
    }
}

}  // namespace microbatch
