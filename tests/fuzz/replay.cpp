// Runs the linked fuzz target on every file of a corpus: replays what fuzzing found, in any build. Usage:
// replay CORPUS
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <string>

#include "support/temp_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int, char** words) {
    int count = 0;
    for (const auto& file : std::filesystem::directory_iterator(words[1])) {
        std::cout << file.path().string() << std::endl;  // before it ends the process
        const std::string input = microbatch::test::read_file(file.path());
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
        ++count;
    }
    return count > 0 ? 0 : 1;
}
