#include "microbatch/io/checkpoint.h"

#include <functional>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/input_file.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/io/state_json.h"

namespace microbatch {
namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr std::string_view state_section = "state", scalars_suffix = ".json";
constexpr std::string_view tensors_suffix = ".safetensors";
constexpr std::uint64_t most_manifest_bytes = std::uint64_t{1} << 20U;

/// Passes on the written bytes and computes their size and checksum.
class CountedFile final : public OutputFile {
public:
    explicit CountedFile(std::unique_ptr<OutputFile> file) : file_(std::move(file)) {}

    void write(std::string_view bytes) override {
        file_->write(bytes);
        bytes_ += bytes.size();
        crc_ = crc32c(bytes, crc_);
    }
    void sync() override { file_->sync(); }
    void close() override { file_->close(); }

    CheckpointFile counted(std::string name) const { return {std::move(name), bytes_, crc_}; }

private:
    std::unique_ptr<OutputFile> file_;
    std::uint64_t bytes_ = 0;
    std::uint32_t crc_ = 0;
};

// The tensors of a section, by the rest of their names.
StoredTensors tensors_in(const StateDict& state, const std::string& section) {
    StoredTensors tensors;
    for (const auto& [name, tensor] : StateReader(state).section(section).tensors())
        tensors.emplace_back(name, *tensor);
    return tensors;
}

// Refuses what could not be read again: a section is part of a file name.
std::set<std::string> sections_of(const StateDict& state) {
    std::set<std::string> sections;
    for (const auto& [name, tensor] : state.tensors()) {
        const std::string section = name.substr(0, name.find('/'));
        const bool sound = section.size() < std::min<std::size_t>(name.size(), 80) && !section.empty() &&
                           section.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
        if (!sound) {
            throw Error(ErrorKind::usage, "a checkpoint cannot hold a tensor named ", name,
                        ": name it SECTION/NAME, the section in lower-case letters");
        }
        sections.insert(section);
    }
    return sections;
}

CheckpointFile write_file(FileSystem& files, const std::filesystem::path& path,
                          const std::function<void(OutputFile&)>& content) {
    CountedFile file(files.create(path));
    content(file);
    file.sync();
    file.close();
    return file.counted(path.filename().string());
}

// SECTION<of_process>.safetensors and state<of_process>.json
std::vector<CheckpointFile> write_state(FileSystem& files, const std::filesystem::path& folder, const StateDict& state,
                                        const std::string& scalars, const std::string& of_process) {
    std::vector<CheckpointFile> written;
    for (const std::string& section : sections_of(state)) {
        written.push_back(write_file(files, folder / str_cat(section, of_process, tensors_suffix),
                                     [&](OutputFile& file) { write_safetensors(file, tensors_in(state, section)); }));
    }
    written.push_back(write_file(files, folder / str_cat(state_section, of_process, scalars_suffix),
                                 [&](OutputFile& file) { file.write(scalars); }));
    return written;
}

// Opens the file itself: a regular file in the folder, not a link.
InputFile open_plain(const std::filesystem::path& path) {
    std::error_code failure;
    if (std::filesystem::is_symlink(path, failure)) {
        throw Error(ErrorKind::bad_data, "cannot read ", path.string(), ": it is a symbolic link");
    }
    return InputFile(path);
}

void verify(const std::filesystem::path& path, const CheckpointFile& wanted) {
    const InputFile file = open_plain(path);
    if (file.size() != wanted.bytes) {
        throw Error(ErrorKind::bad_data, path.string(), " is corrupted: it has ", file.size(), " of the ", wanted.bytes,
                    " bytes that were written");
    }
    std::string chunk;
    std::uint32_t crc = 0;
    for (std::uint64_t at = 0; at < wanted.bytes; at += chunk.size()) {
        chunk.resize(std::min<std::uint64_t>(std::uint64_t{1} << 20U, wanted.bytes - at));
        file.read(at, std::as_writable_bytes(std::span(chunk)));
        crc = crc32c(chunk, crc);
    }
    if (crc == wanted.crc32c) return;
    throw Error(ErrorKind::bad_data, path.string(), " is corrupted: CRC-32C mismatch");
}

}  // namespace

CheckpointManifest manifest_of(const StateDict& state) {
    const StateReader data = StateReader(state).section("data");
    const StateReader batch = StateReader(state).section("batch");
    CheckpointManifest manifest;
    manifest.progress = {data.count("steps"), data.count("samples"), data.count("tokens")};
    manifest.open_samples = batch.has("samples") ? batch.count("samples") : 0;
    manifest.healthy = !data.has("healthy") || data.flag("healthy");
    return manifest;
}

void write_checkpoint(FileSystem& files, const std::filesystem::path& folder, const StateDict& state, bool kept,
                      CheckpointParts* others) {
    CheckpointManifest manifest = manifest_of(state);
    const std::string scalars = scalars_to_json(state);
    if (others != nullptr) others->begin(folder);
    try {
        manifest.files = write_state(files, folder, state, scalars, "");
    } catch (...) {
        if (others != nullptr) others->finish();
        throw;
    }
    if (others != nullptr) {
        for (CheckpointFile& file : others->finish()) manifest.files.push_back(std::move(file));
    }
    manifest.kept = kept;
    write_file(files, folder / manifest_name, [text = to_text(manifest)](OutputFile& file) { file.write(text); });
    files.sync(folder);
}

std::vector<CheckpointFile> write_checkpoint_part(FileSystem& files, const std::filesystem::path& folder,
                                                  const StateDict& state, int rank) {
    return write_state(files, folder, state, scalars_to_json(state), str_cat(".", rank));
}

CheckpointManifest read_checkpoint_manifest(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / manifest_name;
    return parse_checkpoint_manifest(open_plain(path).read_all(most_manifest_bytes), path.string());
}

StateDict read_checkpoint(const std::filesystem::path& folder) {
    const CheckpointManifest manifest = read_checkpoint_manifest(folder);
    for (const CheckpointFile& file : manifest.files) verify(folder / file.name, file);
    StateDict state;
    for (const CheckpointFile& file : manifest.files) {
        const std::filesystem::path path = folder / file.name;
        if (file.name.starts_with(state_section) && file.name.ends_with(scalars_suffix)) {
            read_scalars(open_plain(path).read_all(most_scalar_bytes), path.string(), state);
        } else if (file.name.ends_with(tensors_suffix)) {
            const std::string section = file.name.substr(0, file.name.find('.'));
            for (auto& [name, tensor] : open_safetensors(path)) state.put(section + "/" + name, std::move(tensor));
        }
    }
    CheckpointManifest found;
    try {
        found = manifest_of(state);
    } catch (const Error& error) {
        throw Error(ErrorKind::bad_data, (folder / str_cat(state_section, scalars_suffix)).string(), ": ",
                    error.what());
    }
    if (found.progress != manifest.progress || found.open_samples != manifest.open_samples) {
        throw Error(ErrorKind::bad_data, folder.string(), ": the manifest does not match the state");
    }
    return state;
}

}  // namespace microbatch
