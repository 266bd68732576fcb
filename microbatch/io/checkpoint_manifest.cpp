#include "microbatch/io/checkpoint_manifest.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/json.h"

namespace microbatch {
namespace {

constexpr std::int64_t version = 2;
constexpr std::size_t most_values = 100'000;

std::string hex(std::uint32_t crc) {
    char digits[9];
    std::snprintf(digits, sizeof(digits), "%08x", crc);
    return digits;
}

std::string last_line(std::string_view before) {
    return str_cat(",\n  \"crc32c\": \"", hex(crc32c(before)), "\"\n}\n");
}

std::uint32_t crc_from(const std::string& digits) {
    const bool sound = digits.size() == 8 && digits.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (!sound) throw std::invalid_argument("invalid checksum");
    return static_cast<std::uint32_t>(std::stoul(digits, nullptr, 16));
}

// The name of a file in the folder itself, however the system treats dots and slashes.
std::string name_from(std::string name) {
    const bool sound = !name.empty() && name.size() <= 100 && name.front() != '.' &&
                       std::all_of(name.begin(), name.end(), [](unsigned char c) {
                           return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
                       });
    if (!sound) throw std::invalid_argument("invalid file name");
    return name;
}

CheckpointManifest manifest_from(const nlohmann::json& json, const std::string& source) {
    if (count_from(json.at("version")) != version) {
        throw AnotherVersion(ErrorKind::bad_data, source, ": it has checkpoint format ", count_from(json.at("version")),
                             ", but this version of microbatch reads format ", version,
                             ": resume the run with the version that wrote it (format 1: microbatch 0.1)");
    }
    CheckpointManifest manifest{
        .progress = {count_from(json.at("steps")), count_from(json.at("samples")), count_from(json.at("tokens"))},
        .open_samples = count_from(json.at("open_samples")),
        .healthy = json.at("healthy").get<bool>(),
        .kept = json.at("kept").get<bool>()};
    if (!json.at("files").is_object()) throw std::invalid_argument("its list of files is invalid");
    for (const auto& [name, file] : json.at("files").items()) {
        manifest.files.push_back({name_from(name), static_cast<std::uint64_t>(count_from(file.at("bytes"))),
                                  crc_from(file.at("crc32c").get<std::string>())});
    }
    std::sort(manifest.files.begin(), manifest.files.end(),
              [](const CheckpointFile& one, const CheckpointFile& other) { return one.name < other.name; });
    return manifest;
}

}  // namespace

std::string to_text(const CheckpointManifest& manifest) {
    nlohmann::ordered_json json;
    json["version"] = version;
    json["steps"] = manifest.progress.steps;
    json["samples"] = manifest.progress.samples;
    json["tokens"] = manifest.progress.tokens;
    json["open_samples"] = manifest.open_samples;
    json["healthy"] = manifest.healthy;
    json["kept"] = manifest.kept;
    json["files"] = nlohmann::ordered_json::object();
    for (const CheckpointFile& file : manifest.files) {
        json["files"][file.name] = {{"bytes", file.bytes}, {"crc32c", hex(file.crc32c)}};
    }
    std::string all = json.dump(2);
    all.resize(all.size() - 2);  // the end of the object
    return all + last_line(all);
}

CheckpointManifest parse_checkpoint_manifest(std::string_view content, const std::string& file) {
    const std::size_t end = last_line({}).size();
    const bool whole = content.size() > end &&
                       content.substr(content.size() - end) == last_line(content.substr(0, content.size() - end));
    if (!whole) throw Error(ErrorKind::bad_data, file, ": it is corrupted: CRC-32C mismatch");
    const auto read = [&file](const nlohmann::json& json) { return manifest_from(json, file); };
    return read_json(content, most_values, file, ": it is not the manifest of a checkpoint", read);
}

}  // namespace microbatch
