#pragma once

#include <initializer_list>
#include <string>

namespace microbatch::test {

/// An IDX file of fewer than 128 images.
inline std::string images_file(std::initializer_list<int> pixels, char height = 1, char width = 1) {
    const auto count = static_cast<char>(static_cast<int>(pixels.size()) / (height * width));
    std::string bytes{0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, height, 0, 0, 0, width};
    for (const int pixel : pixels) bytes += static_cast<char>(pixel);
    return bytes;
}

/// An IDX file of fewer than 128 labels.
inline std::string labels_file(std::initializer_list<int> labels) {
    std::string bytes{0, 0, 8, 1, 0, 0, 0, static_cast<char>(labels.size())};
    for (const int label : labels) bytes += static_cast<char>(label);
    return bytes;
}

/// The uint16 tokens 0, 1, ... count - 1.
inline std::string tokens_file(int count) {
    std::string bytes;
    for (int token = 0; token < count; ++token) {
        bytes += static_cast<char>(token & 0xff);
        bytes += static_cast<char>(token >> 8);
    }
    return bytes;
}

}  // namespace microbatch::test
