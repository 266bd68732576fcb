#include "microbatch/io/safetensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "support/errors.h"
#include "support/one_thread.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using test::expect_error;
using test::TempFolder;

struct File {
    nlohmann::json header;
    std::string data;
};

// The format as its specification has it: 8 bytes of length, JSON, bytes.
File parse(const std::string& bytes) {
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    EXPECT_EQ(length % 8, 0U);
    return {nlohmann::json::parse(bytes.substr(8, length)), bytes.substr(8 + length)};
}

std::string stored(const File& file, const std::string& name) {
    const auto offsets = file.header[name]["data_offsets"].get<std::vector<std::size_t>>();
    return file.data.substr(offsets[0], offsets[1] - offsets[0]);
}

std::string raw(const at::Tensor& tensor) {
    const at::Tensor contiguous = tensor.contiguous();
    return {static_cast<const char*>(contiguous.const_data_ptr()), contiguous.nbytes()};
}

TEST(Safetensors, HoldsEveryTensorBitForBit) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    const NamedTensors tensors{{"weight", at::randn({3, 5})},
                               {"transposed", at::randn({4, 6}).t()},
                               {"scalar", at::arange(1, at::kLong).squeeze()},
                               {"empty", at::zeros({0, 2})},
                               {"double", at::randn({2}, at::kDouble)},
                               {"half", at::randn({3}).to(at::kBFloat16)}};
    write_safetensors(path, tensors);
    const File file = parse(test::read_file(path));
    std::size_t end = 0;
    for (const NamedTensor& tensor : tensors) {
        EXPECT_EQ(file.header[tensor.name]["shape"].get<std::vector<std::int64_t>>(), tensor.tensor.sizes().vec());
        EXPECT_EQ(stored(file, tensor.name), raw(tensor.tensor)) << tensor.name;
        EXPECT_EQ(file.header[tensor.name]["data_offsets"][0].get<std::size_t>(), end);  // no holes
        end = file.header[tensor.name]["data_offsets"][1].get<std::size_t>();
    }
    EXPECT_EQ(end, file.data.size());
    EXPECT_EQ(file.header["weight"]["dtype"], "F32");
    EXPECT_EQ(file.header["scalar"]["dtype"], "I64");
    EXPECT_EQ(file.header["double"]["dtype"], "F64");
    EXPECT_EQ(file.header["half"]["dtype"], "BF16");
}

TEST(Safetensors, LeavesTheFileBeforeWhereItCannotWrite) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, {{"a", at::zeros({2})}});
    const std::string before = test::read_file(path);
    expect_error(ErrorKind::usage, {"two tensors", "a"}, [&] {
        write_safetensors(path, {{"a", at::zeros({1})}, {"a", at::zeros({1})}});
    });
    expect_error(ErrorKind::usage, {"c", "cannot store"}, [&] {
        write_safetensors(path, {{"c", at::zeros({1}, at::kComplexFloat)}});
    });
    // Also where it has no bytes that could be missed.
    for (const std::int64_t size : {0, 2}) {
        expect_error(ErrorKind::usage, {"__metadata__", "reserves"}, [&] {
            write_safetensors(path, {{"__metadata__", at::zeros({size})}});
        });
    }
    EXPECT_EQ(test::read_file(path), before);
    expect_error(ErrorKind::not_written, {"cannot write"}, [&] {
        write_safetensors(folder.path() / "none" / "m", {{"a", at::zeros({2})}});
    });
    std::filesystem::create_directory(folder.path() / "taken");
    expect_error(ErrorKind::not_written, {"cannot write", "taken"}, [&] {
        write_safetensors(folder.path() / "taken", {{"a", at::zeros({2})}});
    });
    EXPECT_FALSE(std::filesystem::exists(folder.path() / "taken.part"));
}

}  // namespace
}  // namespace microbatch
