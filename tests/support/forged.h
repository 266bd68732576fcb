#pragma once

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "microbatch/core/crc32c.h"
#include "microbatch/io/checkpoint.h"
#include "support/errors.h"
#include "support/faulty_files.h"
#include "support/rich_run.h"
#include "support/temp_folder.h"

namespace microbatch::test {

/// A malicious checkpoint of a rich_run(): whatever it contains, the checksums are correct.
class Forged {
public:
    Forged() {
        std::filesystem::create_directory(path());
        FaultyFiles files(beside());  // no operation fails; they do not wait for the disk
        write_checkpoint(files, path(), rich_state());
    }

    std::filesystem::path path() const { return folder_.path() / "checkpoint"; }
    std::filesystem::path beside() const { return folder_.path(); }

    std::vector<std::string> names() const {
        std::vector<std::string> all{"manifest.json"};
        for (const CheckpointFile& file : read_checkpoint_manifest(path()).files) all.push_back(file.name);
        return all;
    }

    std::string read(const std::string& name) const { return read_file(path() / name); }

    /// Another content for a file, new ones too.
    void replace(const std::string& name, const std::string& content) const {
        write_plainly(name, content);
        change_manifest([&](CheckpointManifest& manifest) {
            std::erase_if(manifest.files, [&](const CheckpointFile& file) { return file.name == name; });
            manifest.files.push_back({name, content.size(), crc32c(content)});
        });
    }

    void change_manifest(const std::function<void(CheckpointManifest&)>& change) const {
        CheckpointManifest manifest = read_checkpoint_manifest(path());
        change(manifest);
        write_plainly("manifest.json", to_text(manifest));
    }

    /// A manifest whose text this is, up to its end and checksum.
    void replace_manifest(const std::string& text) const {
        char digits[9];
        std::snprintf(digits, sizeof(digits), "%08x", crc32c(text));
        write_plainly("manifest.json", text + ",\n  \"crc32c\": \"" + digits + "\"\n}\n");
    }

    /// Whatever its checksum is.
    void write_plainly(const std::string& name, const std::string& content) const {
        std::ofstream(path() / name, std::ios::binary) << content;
    }

    void expect_refused(const std::vector<std::string>& parts = {}) const {
        expect_error(ErrorKind::bad_data, parts, [&] { read_checkpoint(path()); });
    }

    /// True if reading it, or loading what was read, is refused. If it is not, a step succeeds, or reports why not.
    bool is_refused() const {
        Training run(rich());
        try {
            const StateDict state = read_checkpoint(path());
            load(run.trainer(), StateReader(state));
        } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::bad_data) << error.what();
            return true;
        }
        try {
            run.step();
        } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::usage) << error.what();  // such as a count that would leave 64 bits
        }
        return false;
    }

private:
    TempFolder folder_;
};

}  // namespace microbatch::test
