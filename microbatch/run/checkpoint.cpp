#include "microbatch/run/checkpoint.h"

#include <algorithm>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/bounded_json.h"
#include "microbatch/io/input_file.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/run/trainer_json.h"

namespace microbatch {
namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr const char* state_name = "state.json";
constexpr std::uint64_t most_state_bytes = std::uint64_t{16} << 20U;
constexpr std::uint64_t most_manifest_bytes = std::uint64_t{1} << 20U;
constexpr std::size_t most_state_values = 400'000;

/// Passes on what is written, and adds it up.
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

std::string snapshot_name(std::int64_t steps) {
    return str_cat("snapshot-", steps, ".safetensors");
}

StoredTensors joined(const std::vector<std::pair<std::string, const StoredTensors*>>& lists) {
    StoredTensors all;
    for (const auto& [prefix, list] : lists) {
        for (const StoredTensor& tensor : *list) all.push_back({prefix + tensor.name, tensor.shape, tensor.get});
    }
    return all;
}

/// Writes files into a folder and keeps count of them.
class Writer {
public:
    Writer(FileSystem& files, std::filesystem::path folder) : files_(files), folder_(std::move(folder)) {}

    void write(const std::string& name, const std::function<void(OutputFile&)>& content) {
        CountedFile file(files_.create(folder_ / name));
        content(file);
        file.sync();
        file.close();
        written_.push_back(file.counted(name));
    }

    void write(const std::string& name, const StoredTensors& tensors) {
        write(name, [&tensors](OutputFile& file) { write_safetensors(file, tensors); });
    }

    void write(const std::string& name, const std::string& content) {
        write(name, [&content](OutputFile& file) { file.write(content); });
    }

    const std::vector<CheckpointFile>& written() const { return written_; }

private:
    FileSystem& files_;
    std::filesystem::path folder_;
    std::vector<CheckpointFile> written_;
};

nlohmann::json notes_of(const Checkpoint& checkpoint) {
    try {
        nlohmann::json notes = parse_bounded(checkpoint.notes, most_state_values);
        if (notes.is_object()) return notes;
    } catch (const std::invalid_argument&) {
    }
    throw Error(ErrorKind::usage, "the notes of a checkpoint must be a JSON object");
}

// The file that it must be: a regular one of the folder itself, whatever else may have its name.
InputFile open_plain(const std::filesystem::path& path) {
    std::error_code failure;
    if (std::filesystem::is_symlink(path, failure)) {
        throw Error(ErrorKind::bad_data, str_cat("cannot read ", path.string(), ": it is a link that leads elsewhere"));
    }
    return InputFile(path);
}

void verify(const std::filesystem::path& path, const CheckpointFile& wanted) {
    const InputFile file = open_plain(path);
    if (file.size() != wanted.bytes) {
        throw Error(ErrorKind::bad_data, str_cat(path.string(), " is damaged: it has ", file.size(), " bytes of the ",
                                                 wanted.bytes, " that were written"));
    }
    std::string chunk;
    std::uint32_t crc = 0;
    for (std::uint64_t at = 0; at < wanted.bytes; at += chunk.size()) {
        chunk.resize(std::min<std::uint64_t>(std::uint64_t{1} << 20U, wanted.bytes - at));
        file.read(at, std::as_writable_bytes(std::span(chunk)));
        crc = crc32c(chunk, crc);
    }
    if (crc == wanted.crc32c) return;
    throw Error(ErrorKind::bad_data, str_cat(path.string(), " is damaged: its checksum is another one"));
}

/// Takes tensors in the order in which they were written.
class Tensors {
public:
    Tensors(std::filesystem::path path, StoredTensors tensors) : path_(std::move(path)), tensors_(std::move(tensors)) {}

    // The next ones, as many as the list has; their names begin with the prefix, which is left out.
    void take(StoredTensors& list, const std::string& prefix = {}) {
        for (StoredTensor& one : list) {
            if (next_ == tensors_.size()) refuse();
            one = std::move(tensors_[next_++]);
            if (!one.name.starts_with(prefix)) refuse();
            one.name.erase(0, prefix.size());
        }
    }

    void end() const {
        if (next_ != tensors_.size()) refuse();
    }

private:
    [[noreturn]] void refuse() const {
        throw Error(ErrorKind::bad_data,
                    str_cat(path_.string(), " does not hold the tensors that ", state_name, " tells of"));
    }

    std::filesystem::path path_;
    StoredTensors tensors_;
    std::size_t next_ = 0;
};

Checkpoint read_state(const std::filesystem::path& path) {
    try {
        const nlohmann::json json = parse_bounded(open_plain(path).read_all(most_state_bytes), most_state_values);
        return {trainer_state_from(json.at("trainer")), json.at("notes").dump()};
    } catch (const nlohmann::json::exception&) {
        throw Error(ErrorKind::bad_data, str_cat(path.string(), " is not as it is written"));
    } catch (const std::invalid_argument& error) {
        throw Error(ErrorKind::bad_data, str_cat(path.string(), ": ", error.what()));
    }
}

}  // namespace

namespace {

// What is written must be something that is read again.
void require_readable(const std::string& state) {
    if (state.size() > most_state_bytes) throw Error(ErrorKind::usage, str_cat(state_name, " would be too large"));
    try {
        trainer_state_from(parse_bounded(state, most_state_values).at("trainer"));
    } catch (const std::exception& error) {
        throw Error(ErrorKind::usage, str_cat(state_name, " could not be read again: ", error.what()));
    }
}

}  // namespace

void write_checkpoint(FileSystem& files, const std::filesystem::path& folder, const Checkpoint& checkpoint, bool kept) {
    const TrainerState& state = checkpoint.trainer;
    nlohmann::ordered_json json;
    json["trainer"] = to_json(state);
    json["notes"] = notes_of(checkpoint);
    const std::string text_of_state = json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    require_readable(text_of_state);
    Writer writer(files, folder);
    writer.write("weights.safetensors", joined({{"", &state.parameters}, {"", &state.buffers}}));
    writer.write("optimizer.safetensors", state.optimizer);
    writer.write("generators.safetensors", state.generators);
    if (state.recovery) {
        for (const auto& point : state.recovery->points) writer.write(snapshot_name(point.steps), point.tensors);
    }
    if (const auto& open = state.open) {
        writer.write(
            "open_batch.safetensors",
            joined({{"gradient.", &open->gradients}, {"buffer.", &open->buffers}, {"generator.", &open->generators}}));
    }
    writer.write(state_name, text_of_state);
    const CheckpointManifest manifest{.progress = state.progress,
                                      .open_samples = state.open ? state.open->samples : 0,
                                      .kept = kept,
                                      .files = writer.written()};
    writer.write(manifest_name, to_text(manifest));
    files.sync(folder);
}

CheckpointManifest read_checkpoint_manifest(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / manifest_name;
    return parse_checkpoint_manifest(open_plain(path).read_all(most_manifest_bytes), path.string());
}

Checkpoint read_checkpoint(const std::filesystem::path& folder) {
    const CheckpointManifest manifest = read_checkpoint_manifest(folder);
    for (const CheckpointFile& file : manifest.files) verify(folder / file.name, file);
    const auto require_listed = [&](const std::string& name) {
        const auto known = [&name](const CheckpointFile& file) { return file.name == name; };
        if (std::none_of(manifest.files.begin(), manifest.files.end(), known)) {
            throw Error(ErrorKind::bad_data, str_cat((folder / name).string(), " is not in the manifest"));
        }
    };
    require_listed(state_name);
    Checkpoint checkpoint = read_state(folder / state_name);
    TrainerState& state = checkpoint.trainer;
    const auto take = [&](const std::string& name, const std::vector<std::pair<std::string, StoredTensors*>>& lists) {
        require_listed(name);
        Tensors all(folder / name, open_safetensors(folder / name));
        for (const auto& [prefix, list] : lists) all.take(*list, prefix);
        all.end();
    };
    take("weights.safetensors", {{"", &state.parameters}, {"", &state.buffers}});
    take("optimizer.safetensors", {{"", &state.optimizer}});
    take("generators.safetensors", {{"", &state.generators}});
    if (state.recovery) {
        for (auto& point : state.recovery->points) take(snapshot_name(point.steps), {{"", &point.tensors}});
    }
    if (auto& open = state.open) {
        take("open_batch.safetensors",
             {{"gradient.", &open->gradients}, {"buffer.", &open->buffers}, {"generator.", &open->generators}});
    }
    return checkpoint;
}

}  // namespace microbatch
