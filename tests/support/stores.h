#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "microbatch/io/checkpoint_store.h"
#include "support/errors.h"
#include "support/temp_folder.h"
#include "support/training.h"

namespace microbatch::test {

using Names = std::vector<std::string>;

inline Names names_in(const std::filesystem::path& folder) {
    Names names;
    if (!std::filesystem::exists(folder)) return names;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

/// All bytes below a folder, by their path in it.
inline std::map<std::string, std::string> contents_of(const std::filesystem::path& folder) {
    std::map<std::string, std::string> contents;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
        if (entry.is_regular_file())
            contents[std::filesystem::relative(entry.path(), folder).string()] = read_file(entry.path());
    }
    return contents;
}

inline std::int64_t steps_in(const StateDict& state) {
    return StateReader(state).section("data").count("steps");
}

/// A run, and where its checkpoints are.
class CheckpointFolder : public ::testing::Test {
protected:
    std::filesystem::path folder() const { return temp_.path() / "run" / "checkpoints"; }

    /// The run's state after so many steps more.
    StateDict after(int steps) {
        for (int i = 0; i < steps; ++i) run_.step();
        return state_of(run_.trainer());
    }

    /// Flips a bit of a file in a checkpoint.
    void damage(const std::string& checkpoint, const std::string& file = "model.safetensors") const {
        std::string content = read_file(folder() / checkpoint / file);
        content.back() = static_cast<char>(content.back() ^ 1);
        std::ofstream(folder() / checkpoint / file, std::ios::binary) << content;
    }

    TempFolder temp_;
    Training run_{{}};
};

}  // namespace microbatch::test
