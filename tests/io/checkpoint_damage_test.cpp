// A corrupted checkpoint is never taken for a valid one.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/forged.h"

namespace microbatch {
namespace {

using namespace test;
namespace fs = std::filesystem;

bool is_refused(const fs::path& checkpoint) {
    try {
        read_checkpoint(checkpoint);
    } catch (const Error& error) {
        return error.kind() == ErrorKind::bad_data;
    }
    return false;
}

TEST(CheckpointDamage, EveryBitThatIsFlippedIsFound) {
    const Forged checkpoint;
    ASSERT_FALSE(is_refused(checkpoint.path()));
    ASSERT_EQ(checkpoint.names().size(), 7U);
    for (const std::string& name : checkpoint.names()) {
        const std::string whole = checkpoint.read(name);
        const int file = ::open((checkpoint.path() / name).c_str(), O_WRONLY);
        ASSERT_GE(file, 0);
        int missed = 0;
        for (std::size_t at = 0; at < whole.size(); ++at) {
            for (unsigned bit = 0; bit < 8; ++bit) {
                const char flipped = static_cast<char>(whole[at] ^ (1U << bit));
                ASSERT_EQ(::pwrite(file, &flipped, 1, static_cast<off_t>(at)), 1);
                if (!is_refused(checkpoint.path())) ++missed;
            }
            ASSERT_EQ(::pwrite(file, &whole[at], 1, static_cast<off_t>(at)), 1);
        }
        ::close(file);
        EXPECT_EQ(missed, 0) << name;
    }
    EXPECT_FALSE(is_refused(checkpoint.path()));
}

TEST(CheckpointDamage, EveryFileThatIsTruncatedOrGrewIsFoundAndNamed) {
    const Forged checkpoint;
    for (const std::string& name : checkpoint.names()) {
        const std::string whole = checkpoint.read(name);
        for (std::size_t size = 0; size < whole.size(); size += 1 + size / 16) {
            checkpoint.write_plainly(name, whole.substr(0, size));
            checkpoint.expect_refused({name});
        }
        for (const std::string& more : {std::string(1, '\0'), std::string("\n"), whole}) {
            checkpoint.write_plainly(name, whole + more);
            checkpoint.expect_refused({name});
        }
        checkpoint.write_plainly(name, whole);
        EXPECT_FALSE(is_refused(checkpoint.path()));
    }
}

TEST(CheckpointDamage, EveryFileThatIsMissingOrAnotherOneIsFoundAndNamed) {
    const Forged checkpoint;
    const std::vector<std::string> names = checkpoint.names();
    for (const std::string& name : names) {
        const fs::path file = checkpoint.path() / name, aside = checkpoint.beside() / "aside";
        fs::rename(file, aside);
        checkpoint.expect_refused({name});
        for (const std::string& other : names) {
            if (other == name) continue;
            fs::copy_file(checkpoint.path() / other, file);
            checkpoint.expect_refused({name});
            fs::remove(file);
        }
        fs::rename(aside, file);
    }
    EXPECT_FALSE(is_refused(checkpoint.path()));
}

TEST(CheckpointDamage, WhatIsNoPlainFileIsRefusedWithoutWaiting) {
    const Forged checkpoint;
    for (const std::string& name : checkpoint.names()) {
        const fs::path file = checkpoint.path() / name, aside = checkpoint.beside() / "aside";
        fs::rename(file, aside);
        fs::create_symlink(aside, file);  // to what would be right
        checkpoint.expect_refused({name, "link"});
        fs::remove(file);
        fs::create_symlink("/dev/zero", file);
        checkpoint.expect_refused({name});
        fs::remove(file);
        ASSERT_EQ(::mkfifo(file.c_str(), 0600), 0);
        checkpoint.expect_refused({name, "not a regular file"});
        fs::remove(file);
        fs::create_directory(file);
        checkpoint.expect_refused({name});
        fs::remove(file);
        fs::rename(aside, file);
    }
    EXPECT_FALSE(is_refused(checkpoint.path()));
}

TEST(CheckpointDamage, AFolderThatIsNoCheckpointIsRefused) {
    const TempFolder folder;
    const auto refused = [](const fs::path& path) {
        expect_error(ErrorKind::bad_data, {path.string()}, [&] { read_checkpoint(path); });
        expect_error(ErrorKind::bad_data, {path.string()}, [&] { read_checkpoint_manifest(path); });
    };
    refused(folder.path());
    refused(folder.path() / "nowhere");
    refused(folder.write("file", "text"));
}

}  // namespace
}  // namespace microbatch
