// A malicious checkpoint with correct checksums: a clear error, in little memory.
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "support/forged.h"

namespace microbatch {
namespace {

using namespace test;
using Json = nlohmann::ordered_json;

/// A number of /proc/self/status, in bytes.
std::int64_t status(const std::string& key) {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with(key + ":")) return 1024 * std::stoll(line.substr(key.size() + 1));
    }
    return 0;
}

/// What a call takes of memory at its peak, beyond what there was.
template <class Call>
std::int64_t memory_of(const Call& call) {
    ::malloc_trim(0);
    std::ofstream("/proc/self/clear_refs") << 5;  // resets the peak
    const std::int64_t before = status("VmRSS");
    call();
    return status("VmHWM") - before;
}

void expect_refused_in_bounds(const Forged& checkpoint) {
    EXPECT_LE(memory_of([&] { checkpoint.expect_refused({"checkpoint"}); }), 100'000'000);
}

std::string repeated(const std::string& part, std::size_t times) {
    std::string all;
    all.reserve(part.size() * times);
    for (std::size_t i = 0; i < times; ++i) all += part;
    return all;
}

TEST(CheckpointHostile, ASoundOneIsSound) {
    EXPECT_FALSE(Forged().is_refused());
}

TEST(CheckpointHostile, NamesThatLeaveTheFolderAreRefused) {
    for (const std::string name : {"../x", "..", ".", "/etc/passwd", "a/b", "", ".hidden", "model.safetensors/", "A",
                                   "a b", "a\\b", "a\nb", "é", "~", "a:b", "%2e%2e"}) {
        const Forged checkpoint;
        std::ofstream(checkpoint.beside() / "x") << "content";
        checkpoint.change_manifest([&](CheckpointManifest& manifest) {
            manifest.files.push_back({name, 7, crc32c("content")});
        });
        checkpoint.expect_refused({"manifest.json", "invalid file name"});
    }
    const Forged checkpoint;
    for (const std::string& name : {std::string(1000, 'a'), std::string("a\0b", 3)}) {
        checkpoint.replace_manifest(R"({"version": 2, "steps": 0, "samples": 0, "tokens": 0, "open_samples": 0, )"
                                    R"("healthy": true, "kept": false, "files": {)" +
                                    Json(name).dump() + R"(: {"bytes": 0, "crc32c": "00000000"}})");
        checkpoint.expect_refused({"manifest.json", "invalid file name"});
    }
}

TEST(CheckpointHostile, AManifestOfAnythingElseIsRefused) {
    const Forged checkpoint;
    const auto refused = [&](const std::string& text) {
        checkpoint.replace_manifest(text);
        checkpoint.expect_refused({"manifest.json"});
    };
    refused("");
    refused("{");
    refused("[1");
    refused("not json");
    refused("{\"version\": 2");
    const std::string good =
        R"({"version": 2, "steps": 1, "samples": 1, "tokens": 1, "open_samples": 0, "healthy": true, "kept": false,)";
    for (const char* files :
         {"null", "5", "\"x\"", "[5]", R"({"a": 5})", R"({"a": {}})", R"({"a": {"bytes": 1}})",
          R"({"a": {"bytes": "1", "crc32c": "00000000"}})", R"({"a": {"bytes": -1, "crc32c": "00000000"}})",
          R"({"a": {"bytes": 1.5, "crc32c": "00000000"}})",
          R"({"a": {"bytes": 9223372036854775808, "crc32c": "00000000"}})",
          R"({"a": {"bytes": 18446744073709551616, "crc32c": "00000000"}})",
          R"({"a": {"bytes": 1e30, "crc32c": "00000000"}})", R"({"a": {"bytes": 1, "crc32c": 5}})",
          R"({"a": {"bytes": 1, "crc32c": "0"}})", R"({"a": {"bytes": 1, "crc32c": "0000000g"}})",
          R"({"a": {"bytes": 1, "crc32c": "-0000001"}})", R"({"a": {"bytes": 1, "crc32c": "0x000001"}})"}) {
        SCOPED_TRACE(files);
        refused(good + "\"files\": " + files);
    }
    for (const char* key : {"version", "steps", "samples", "tokens", "open_samples", "healthy", "kept"}) {
        for (const char* value : {"null", "-1", "1.5", "\"1\"", "[]", "{}", "9223372036854775808", "2e0"}) {
            SCOPED_TRACE(::testing::Message() << key << ' ' << value);
            Json manifest = Json::parse(good + "\"files\": {}}");
            manifest[key] = Json::parse(value);
            std::string text = manifest.dump();
            text.pop_back();
            refused(text);
        }
    }
    for (const char* version : {"0", "1", "3", "9223372036854775807"}) {
        checkpoint.replace_manifest(std::string(R"({"version": )") + version + R"(, "steps": 1)");
        checkpoint.expect_refused({"manifest.json", std::string("format ") + version, "reads format 2"});
    }
}

TEST(CheckpointHostile, AManifestWithoutAFileIsRefused) {
    for (const std::string& name : Forged().names()) {
        if (name == "manifest.json") continue;
        const Forged checkpoint;
        checkpoint.change_manifest([&](CheckpointManifest& manifest) {
            std::erase_if(manifest.files, [&](const CheckpointFile& file) { return file.name == name; });
        });
        if (name == "state.json") checkpoint.expect_refused({name});
        EXPECT_TRUE(checkpoint.is_refused()) << name;  // what is loaded lacks what was in it
    }
}

TEST(CheckpointHostile, ALargeManifestIsRefusedInLittleMemory) {
    const Forged checkpoint;
    checkpoint.replace_manifest("{\"version\": 2, \"files\": {" + repeated("\"a\": 1,", 10'000'000) + "\"b\": 1}");
    expect_refused_in_bounds(checkpoint);
    checkpoint.replace_manifest("{\"version\": " + std::string(1'000'000, '['));
    expect_refused_in_bounds(checkpoint);
}

// Whatever value is anywhere in the state, the run is refused or can continue; nothing else happens.
TEST(CheckpointHostile, AnyValueAnywhereInTheStateIsRefusedOrHarmless) {
    const Forged checkpoint;
    const Json good = Json::parse(checkpoint.read("state.json"));
    const std::vector<Json> values = {nullptr,
                                      true,
                                      -1,
                                      0,
                                      3,
                                      1.5,
                                      1e300,
                                      "x",
                                      "nan",
                                      "inf",
                                      "-inf",
                                      Json::array(),
                                      Json::object(),
                                      Json::array({1}),
                                      std::numeric_limits<std::int64_t>::max(),
                                      std::numeric_limits<std::int64_t>::min(),
                                      std::numeric_limits<std::uint64_t>::max(),
                                      Json::array({Json::array({1, 2})})};
    int refused = 0, tried = 0;
    const auto flat = good.flatten();
    std::set<std::string> places;
    for (const auto& [place, value] : flat.items()) {
        for (std::string at = place; !at.empty(); at.resize(at.rfind('/'))) places.insert(at);
    }
    for (const std::string& place : places) {
        SCOPED_TRACE(place);
        const Json::json_pointer pointer(place);
        for (const Json& value : values) {
            SCOPED_TRACE(value.dump());
            Json state = good;
            state[pointer] = value;
            checkpoint.replace("state.json", state.dump());
            ++tried;
            refused += checkpoint.is_refused() ? 1 : 0;
        }
        Json state = good;
        Json& parent = state[pointer.parent_pointer()];
        if (parent.is_object()) parent.erase(pointer.back());
        if (parent.is_array()) parent.erase(std::stoul(pointer.back()));
        checkpoint.replace("state.json", state.dump());
        checkpoint.is_refused();
    }
    EXPECT_GT(places.size(), 80U);
    EXPECT_GT(refused, tried / 2);
}

TEST(CheckpointHostile, AHugeStateIsRefusedInLittleMemory) {
    const Forged checkpoint;
    const Json good = Json::parse(checkpoint.read("state.json"));
    const auto refused = [&](const char* name, const Json& value) {
        SCOPED_TRACE(name);
        ASSERT_TRUE(good.contains(name));
        Json state = good;
        state[name] = value;
        checkpoint.replace("state.json", state.dump());
        EXPECT_LE(memory_of([&] { EXPECT_TRUE(checkpoint.is_refused()); }), 100'000'000);
    };
    for (const char* count :
         {"caps/caps", "caps/0/fields", "optimizer/tensors", "recovery/points", "recovery/0/optimizer/tensors"}) {
        for (const std::int64_t much : {std::int64_t{10'000}, std::int64_t{1'000'000}, INT64_MAX}) refused(count, much);
    }
    for (const char* list : {"gate/losses", "gate/gradient_norms", "recovery/1/gate/losses"}) {
        refused(list, Json(390'000, 1.0));  // without as many of the other
        refused(list, Json(500'000, 1.0));
    }
    refused("batch/before/training_flags", Json(390'000, 1));
    refused("caps/0/0", Json(500'000, 1));
}

TEST(CheckpointHostile, AnInvalidStateIsRefusedInLittleMemory) {
    const Forged checkpoint;
    const auto refused = [&](const std::string& text) {
        checkpoint.replace("state.json", text);
        expect_refused_in_bounds(checkpoint);
    };
    for (const char* text : {"", "{}", "[]", "null", "{\"data\": {}}", "no json", "{\"data\": \"\xff\"}"})
        refused(text);
    refused(std::string(16'000'000, '['));
    refused("{\"notes\": " + std::string(8'000'000, '[') + std::string(8'000'000, ']') + "}");
    refused(repeated("{\"a\":", 3'000'000));
    refused("[" + repeated("0,", 8'000'000) + "0]");
    refused("[" + repeated("[],", 5'000'000) + "0]");
    refused("{\"" + std::string(15'000'000, 'a') + "\": 1}");
    refused(std::string(20'000'000, ' ') + "{}");
    std::string keys = "{";
    for (int i = 0; i < 900'000; ++i) keys += '"' + std::to_string(i) + "\":0,";
    refused(keys + "\"a\":0}");
}

std::string with_header(const std::string& header, const std::string& data = {}) {
    const std::uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header + data;
}

TEST(CheckpointHostile, TensorsThatDoNotMatchTheStateAreRefused) {
    for (const std::string& name : Forged().names()) {
        if (!name.ends_with(".safetensors")) continue;
        SCOPED_TRACE(name);
        const Forged checkpoint;
        const std::string whole = checkpoint.read(name);
        std::uint64_t length = 0;
        std::memcpy(&length, whole.data(), sizeof(length));
        const Json header = Json::parse(whole.substr(8, length));
        const std::string data = whole.substr(8 + length);
        const auto forge = [&](const std::function<void(Json&)>& change, const std::string& bytes) {
            Json forged = header;
            change(forged);
            checkpoint.replace(name, with_header(forged.dump(), bytes));
        };
        std::string more = "more";
        if (name.starts_with("batch")) more = "gradient/more";
        if (name.starts_with("recovery")) more = "0/model/more";
        forge([&](Json& all) { all[more] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}}; }, data);
        EXPECT_TRUE(checkpoint.is_refused());
        for (const auto& [tensor, entry] : header.items()) {
            if (tensor == "__metadata__") continue;
            const auto offsets = entry["data_offsets"].get<std::vector<std::uint64_t>>();
            const std::uint64_t bytes = offsets[1] - offsets[0];
            // Overlapping, outside, wrapping around, of other shapes, types and names.
            for (const Json& change : std::vector<Json>{{{"data_offsets", {0, bytes + 1}}},
                                                        {{"data_offsets", {offsets[0] + 1, offsets[1] + 1}}},
                                                        {{"data_offsets", {offsets[0], data.size() + 1}}},
                                                        {{"data_offsets", {UINT64_MAX, 0}}},
                                                        {{"data_offsets", {UINT64_MAX - 7, UINT64_MAX}}},
                                                        {{"shape", {UINT64_MAX, 2}}},
                                                        {{"shape", {INT64_MAX, 4}}},
                                                        {{"shape", {std::int64_t{1} << 32, std::int64_t{1} << 32}}},
                                                        {{"shape", {bytes + 1}}},
                                                        {{"dtype", "F8"}},
                                                        {{"dtype", 5}},
                                                        {{"dtype", "BOOL"}}}) {
                forge([&](Json& all) { all[tensor].update(change); }, data);
                EXPECT_TRUE(checkpoint.is_refused()) << tensor << change;
            }
            forge(
                [&](Json& all) {
                    all[tensor + "x"] = std::exchange(all[tensor], nullptr);
                    all.erase(tensor);
                },
                data);
            EXPECT_TRUE(checkpoint.is_refused()) << tensor;
        }
        checkpoint.replace(name, whole);
        EXPECT_FALSE(checkpoint.is_refused());
    }
}

TEST(CheckpointHostile, StridesThatWouldLeadOutOfATensorAreNotFollowed) {
    const Forged checkpoint;
    const std::string whole = checkpoint.read("model.safetensors");
    std::uint64_t length = 0;
    std::memcpy(&length, whole.data(), sizeof(length));
    for (const char* strides : {"[1000,1]", "[-1,1]", "[0,0]", "[1,1]", "[9223372036854775807,9223372036854775807]",
                                "[1]", "[1,2,3]", "5", "\"x\"", "[1.5,2]", "[[1],2]", "[18446744073709551615,1]"}) {
        Json header = Json::parse(whole.substr(8, length));
        ASSERT_TRUE(header["__metadata__"]["microbatch.strides"].is_string());
        header["__metadata__"]["microbatch.strides"] = std::string("{\"0.weight\":") + strides + "}";
        checkpoint.replace("model.safetensors", with_header(header.dump(), whole.substr(8 + length)));
        EXPECT_FALSE(checkpoint.is_refused()) << strides;  // its numbers are as they were
    }
}

TEST(CheckpointHostile, AHugeHeaderIsRefusedInLittleMemory) {
    const Forged checkpoint;
    const auto refused = [&](const std::string& content) {
        checkpoint.replace("model.safetensors", content);
        expect_refused_in_bounds(checkpoint);
    };
    std::string huge(8, '\xFF');
    refused(huge);
    refused(huge.substr(0, 7) + '\x7F');
    refused(with_header(std::string(5'000'000, '[')));
    refused(with_header("{\"__metadata__\":" + repeated("{\"a\":", 1'000'000)));
    refused(with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[" + repeated("1,", 1'000'000) +
                        "0],\"data_offsets\":[0,0]}}"));
}

}  // namespace
}  // namespace microbatch
