// What is written can be read back; invalid files are named and create nothing.
#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "microbatch/io/safetensors.h"
#include "support/errors.h"
#include "support/gradients.h"
#include "support/one_thread.h"
#include "support/temp_folder.h"

namespace microbatch {
namespace {

using namespace test;

Parameters some_tensors() {
    at::manual_seed(1);
    return {{"weight", at::randn({3, 5})},
            {"half", at::randn({7}).to(at::kHalf)},
            {"scalar", at::tensor(3.5, at::kDouble)},
            {"empty", at::zeros({0, 2})},
            {"flags", at::tensor({1, 0, 1}).to(at::kBool)},
            {"counts", at::arange(6, at::kLong).view({2, 3})}};
}

std::string with_header(const std::string& header, const std::string& data) {
    const std::uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header + data;
}

TEST(ReadSafetensors, GivesBackWhatWasWritten) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, some_tensors());
    Parameters read = read_safetensors(path);
    Parameters wanted = some_tensors();
    const auto by_name = [](const Parameter& one, const Parameter& other) { return one.name < other.name; };
    std::sort(read.begin(), read.end(), by_name);
    std::sort(wanted.begin(), wanted.end(), by_name);
    ASSERT_EQ(read.size(), wanted.size());
    for (std::size_t i = 0; i < read.size(); ++i) {
        EXPECT_EQ(read[i].name, wanted[i].name);
        EXPECT_EQ(read[i].tensor.scalar_type(), wanted[i].tensor.scalar_type());
        EXPECT_TRUE(at::equal(read[i].tensor, wanted[i].tensor)) << read[i].name;
    }
}

TEST(ReadSafetensors, GivesBackHowATensorLay) {
    at::manual_seed(2);
    const Parameters tensors{{"rows", at::randn({3, 4})},
                             {"columns", at::randn({4, 3}).t()},
                             {"channels last", at::randn({2, 3, 4, 5}).contiguous(at::MemoryFormat::ChannelsLast)},
                             {"permuted", at::randn({2, 3, 4, 5}).permute({2, 0, 3, 1})},
                             {"ones", at::randn({1, 4, 1}).permute({2, 1, 0})},
                             {"every other", at::randn({8}).slice(0, 0, 8, 2)},  // is not dense: by rows
                             {"none", at::zeros({0, 3}).t()}};
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, tensors);
    const Parameters read = read_safetensors(path);
    ASSERT_EQ(read.size(), tensors.size());
    for (const Parameter& wanted : tensors) {
        const auto found =
            std::find_if(read.begin(), read.end(), [&](const auto& one) { return one.name == wanted.name; });
        ASSERT_NE(found, read.end());
        EXPECT_TRUE(same_bits(found->tensor, wanted.tensor)) << wanted.name;
        const bool dense = wanted.tensor.is_non_overlapping_and_dense();
        EXPECT_EQ(found->tensor.strides(), dense ? wanted.tensor.strides() : wanted.tensor.contiguous().strides())
            << wanted.name;
    }
}

TEST(ReadSafetensors, TensorsCanBeReadAfterTheFileIsDeleted) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, some_tensors());
    const StoredTensors tensors = open_safetensors(path);
    std::filesystem::remove(path);
    for (const Parameter& wanted : some_tensors()) {
        const auto found =
            std::find_if(tensors.begin(), tensors.end(), [&](const auto& one) { return one.first == wanted.name; });
        ASSERT_NE(found, tensors.end());
        const StoredTensor& tensor = found->second;
        EXPECT_FALSE(tensor.is_resident());
        EXPECT_EQ(tensor.shape().sizes(), wanted.tensor.sizes());
        EXPECT_EQ(tensor.shape().scalar_type(), wanted.tensor.scalar_type());
        EXPECT_TRUE(same_bits(tensor.get(), wanted.tensor));
        EXPECT_TRUE(same_bits(tensor.get(), wanted.tensor));  // and again, in memory of its own
        if (wanted.tensor.numel() > 0) {
            EXPECT_NE(tensor.get().data_ptr(), wanted.tensor.data_ptr());
        }
    }
}

TEST(ReadSafetensors, ATensorThatIsNotAskedForIsNotRead) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, {{"a", at::ones({100})}, {"b", at::ones({100})}});
    const StoredTensors tensors = open_safetensors(path);
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 4);  // of b
    EXPECT_TRUE(at::equal(tensors[0].second.get(), at::ones({100})));
    expect_error(ErrorKind::bad_data, {"model.safetensors"}, [&] { tensors[1].second.get(); });
}

TEST(ReadSafetensors, EveryTruncatedFileIsRefused) {
    const TempFolder folder;
    const auto path = folder.path() / "model.safetensors";
    write_safetensors(path, some_tensors());
    const std::string whole = read_file(path);
    for (std::size_t size = 0; size < whole.size(); ++size) {
        folder.write("cut", whole.substr(0, size));
        expect_error(ErrorKind::bad_data, {"cut"}, [&] { read_safetensors(folder.path() / "cut"); });
    }
    folder.write("long", whole + "x");
    expect_error(ErrorKind::bad_data, {"long"}, [&] { read_safetensors(folder.path() / "long"); });
}

TEST(ReadSafetensors, AnInconsistentHeaderIsRefused) {
    const TempFolder folder;
    const auto refused = [&](const std::string& word, const std::string& header, const std::string& data) {
        const auto path = folder.write("bad", with_header(header, data));
        expect_error(ErrorKind::bad_data, {"bad", word}, [&] { read_safetensors(path); });
    };
    const std::string eight(8, 'x');
    const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
        return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
    };
    refused("JSON", "not json", "");
    refused("JSON object", "[1]", "");
    refused("a", R"({"a":1})", "");
    refused("dtype", entry("F31", "[2]", "[0,8]"), eight);
    refused("differ", entry("F32", "[3]", "[0,8]"), eight);
    refused("differ", entry("F32", "[4294967296,4294967296,4294967296]", "[0,8]"), eight);
    refused("shape", entry("F32", "[-2]", "[0,8]"), eight);
    refused("shape", entry("F32", "[2.5]", "[0,8]"), eight);
    refused("shape", entry("F32", "\"2\"", "[0,8]"), eight);
    refused("its offsets are invalid", entry("F32", "[2]", "[8,0]"), eight);
    refused("its offsets are invalid", entry("F32", "[2]", "[0,8,9]"), eight);
    refused("its offsets are invalid", entry("F32", "[2]", "[-8,0]"), eight);
    refused("follow", entry("F32", "[1]", "[4,8]"), eight);
    refused("has 8", entry("F32", "[1]", "[0,4]"), eight);
    refused("has 8", entry("F32", "[4]", "[0,16]"), eight);
    refused(
        "follow",
        R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
        eight);
    std::string huge(8, '\xFF');
    expect_error(ErrorKind::bad_data, {"it is truncated"}, [&] { read_safetensors(folder.write("bad", huge)); });
    expect_error(ErrorKind::bad_data, {"nowhere"}, [&] { read_safetensors(folder.path() / "nowhere"); });
    expect_error(ErrorKind::bad_data, {}, [&] { read_safetensors(folder.path()); });
}

TEST(CopyByName, CopiesAllOrNothing) {
    const Parameters from = some_tensors();
    Parameters to = some_tensors();
    for (const Parameter& one : to) at::Tensor(one.tensor).zero_();
    copy_by_name(from, to, "file");
    for (std::size_t i = 0; i < to.size(); ++i) EXPECT_TRUE(at::equal(to[i].tensor, from[i].tensor));
    const auto refused = [&](const std::string& word, const std::function<void(Parameters&)>& change) {
        Parameters other = some_tensors();
        for (Parameter& one : other) one.tensor = at::zeros_like(one.tensor);
        change(other);
        expect_error(ErrorKind::bad_data, {"file", word}, [&] { copy_by_name(other, to, "file"); });
        for (std::size_t i = 0; i < to.size(); ++i) EXPECT_TRUE(at::equal(to[i].tensor, from[i].tensor));
    };
    refused("weight", [](Parameters& all) { all.erase(all.begin()); });
    refused("7 tensors", [](Parameters& all) { all.push_back({"more", at::ones({1})}); });
    refused("half", [](Parameters& all) { all[1].tensor = at::zeros({7}); });
    refused("counts", [](Parameters& all) { all[5].tensor = at::zeros({3, 2}, at::kLong); });
}

}  // namespace
}  // namespace microbatch
