#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "microbatch/core/error.h"
#include "microbatch/io/file_system.h"

namespace microbatch::test {

/// Simulates the death of a process; not a std::exception, so that it is not handled as an error.
struct Crash {};

/// What becomes of the operation that is struck.
enum class Fault {
    error,        ///< throws, and has done nothing
    half_error,   ///< throws when half of the bytes are written, or half of the files removed
    crash,        ///< the process ends before it
    half_crash,   ///< when half is done
    crash_after,  ///< when it is done
};

/// What a machine that loses power makes of what was not synced.
enum class Loss {
    none,      ///< the process ended, the machine continued
    contents,  ///< of files
    names,     ///< contents, and what was done to the names in folders
};

/// The system's files, of which one operation is struck. Counts create, write, sync and close of a file, rename,
/// make_folder, remove_all and sync of a folder. Nothing is really synced: what would have been is remembered.
class FaultyFiles final : public FileSystem {
public:
    /// `attic` is an empty folder on the same disk. The `strike`-th operation, from 1, fails; 0: none.
    explicit FaultyFiles(std::filesystem::path attic, int strike = 0, Fault fault = Fault::error)
        : attic_(std::move(attic)), strike_(strike), fault_(fault) {}

    int operations() const { return operations_; }
    bool crashed() const { return crashed_; }

    std::unique_ptr<OutputFile> create(const std::filesystem::path& file) override {
        std::unique_ptr<OutputFile> made;
        operate([&] {
            made = system_files().create(file);
            synced_bytes_[inode_of(file)] = 0;
            undo_.push_back({inode_of(file.parent_path()), unmake(inode_of(file))});
        });
        return std::make_unique<File>(*this, std::move(made), inode_of(file));
    }

    void make_folder(const std::filesystem::path& folder) override {
        operate([&] {
            for (std::filesystem::path at; const auto& part : folder) {
                at /= part;
                if (std::filesystem::exists(at)) continue;
                system_files().make_folder(at);
                undo_.push_back({inode_of(at.parent_path()), unmake(inode_of(at))});
            }
        });
    }

    void rename(const std::filesystem::path& from, const std::filesystem::path& to) override {
        operate([&] {
            const bool replaces = std::filesystem::is_regular_file(to);
            const std::filesystem::path before = replaces ? hide(to) : std::filesystem::path();
            system_files().rename(from, to);
            undo_.push_back({inode_of(to.parent_path()), [from, to, before](const auto&) {
                                 std::filesystem::rename(to, from);
                                 if (!before.empty()) std::filesystem::rename(before, to);
                             }});
        });
    }

    void remove_all(const std::filesystem::path& path) override {
        operate([&] { remove(path); }, [&] { remove_half(path); });
    }

    void sync(const std::filesystem::path& path) override {
        operate([&] {
            if (!std::filesystem::exists(path)) system_files().sync(path);  // throws
            if (!std::filesystem::is_directory(path)) {
                synced_bytes_.erase(inode_of(path));
                return;
            }
            std::erase_if(undo_, [folder = inode_of(path)](const Change& change) { return change.folder == folder; });
        });
    }

    /// What the disk below `root` is found like, once the power is back.
    void lose(Loss loss, const std::filesystem::path& root) {
        if (loss == Loss::none) return;
        for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
            if (!entry.is_regular_file()) continue;
            const auto synced = synced_bytes_.find(inode_of(entry.path()));
            if (synced != synced_bytes_.end()) std::filesystem::resize_file(entry.path(), synced->second);
        }
        if (loss == Loss::contents) return;
        for (auto change = undo_.rbegin(); change != undo_.rend(); ++change) change->undo(root);
        undo_.clear();
    }

private:
    using Undo = std::function<void(const std::filesystem::path& root)>;

    /// Of a name in a folder, which may have another name by now.
    struct Change {
        ino_t folder;
        Undo undo;
    };

    class File final : public OutputFile {
    public:
        File(FaultyFiles& files, std::unique_ptr<OutputFile> file, ino_t inode)
            : files_(files), file_(std::move(file)), inode_(inode) {}

        void write(std::string_view bytes) override {
            files_.operate(
                [&] {
                    file_->write(bytes);
                    written_ += bytes.size();
                },
                [&] { file_->write(bytes.substr(0, bytes.size() / 2)); });
        }
        void sync() override {
            files_.operate([&] { files_.synced_bytes_[inode_] = written_; });
        }
        void close() override {
            files_.operate([&] { file_->close(); });
        }

    private:
        FaultyFiles& files_;
        std::unique_ptr<OutputFile> file_;
        ino_t inode_;
        std::uintmax_t written_ = 0;
    };

    void operate(
        const std::function<void()>& all, const std::function<void()>& half = [] {}) {
        if (crashed_) throw Crash();
        if (++operations_ != strike_) return all();
        if (fault_ == Fault::half_error || fault_ == Fault::half_crash) half();
        if (fault_ == Fault::crash_after) all();
        crashed_ = fault_ != Fault::error && fault_ != Fault::half_error;
        if (crashed_) throw Crash();
        throw Error(ErrorKind::not_written, "struck by the test");
    }

    static ino_t inode_of(const std::filesystem::path& file) {
        struct stat status {};
        ::stat(file.c_str(), &status);
        return status.st_ino;
    }

    // Wherever it is by now.
    Undo unmake(ino_t made) {
        return [this, made](const std::filesystem::path& root) {
            std::vector<std::filesystem::path> found;
            for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
                if (inode_of(entry.path()) == made) found.push_back(entry.path());
            }
            for (const auto& path : found) hide(path);
        };
    }

    std::filesystem::path hide(const std::filesystem::path& path) {
        static int number = 0;
        const std::filesystem::path hidden = attic_ / std::to_string(number++);
        std::filesystem::rename(path, hidden);
        return hidden;
    }

    // What is removed is only out of sight: the power may bring it back.
    void remove(const std::filesystem::path& path) {
        if (!std::filesystem::exists(std::filesystem::symlink_status(path))) return;
        undo_.push_back({inode_of(path.parent_path()),
                         [path, hidden = hide(path)](const auto&) { std::filesystem::rename(hidden, path); }});
    }

    void remove_half(const std::filesystem::path& path) {
        if (!std::filesystem::is_directory(path)) return;
        std::vector<std::filesystem::path> files;
        for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
        std::sort(files.begin(), files.end());
        for (std::size_t i = 0; i < files.size() / 2; ++i) remove(files[i]);
    }

    std::filesystem::path attic_;
    int strike_;
    Fault fault_;
    int operations_ = 0;
    bool crashed_ = false;
    std::map<ino_t, std::uintmax_t> synced_bytes_;  // of files that were created here
    std::vector<Change> undo_;                      // not synced yet, in their order
};

}  // namespace microbatch::test
