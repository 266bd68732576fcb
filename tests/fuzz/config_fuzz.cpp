// config.toml, as --config and a resumed run read it.
#include <cstdio>
#include <string>

#include "cli/options/config.h"
#include "fuzz/fuzz.h"

namespace microbatch::cli {
namespace {

using fuzz::require;

void apply(const std::string& text) {
    Arguments arguments;
    const auto applied = fuzz::accepted(ErrorKind::usage, [&] {
        apply_config(arguments, text, "config.toml");
        return true;
    });
    const Settings& s = arguments.settings;
    require(!applied || (s.batch >= 1 && s.length.value_or(1) >= 1 && s.keep >= 1 && s.threads.value_or(1) >= 1),
            "a number is in its range");
}

/// As TOML, by its rules for basic strings.
std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        const bool plain = byte >= 0x20 && byte != 0x7f && c != '"' && c != '\\';
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", byte);
        result += plain ? std::string(1, c) : escape;
    }
    return result + '"';
}

std::string written(const std::map<std::string, std::string>& values) {
    std::string result;
    for (const auto& [key, value] : values) result += quoted(key) + " = " + quoted(value) + "\n";
    return result;
}

}  // namespace
}  // namespace microbatch::cli

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const std::string text(fuzz::characters(data, size));
    cli::apply(text);
    const auto read = [](const std::string& from) { return cli::config_values(from, "config.toml"); };
    const auto values = fuzz::accepted(ErrorKind::bad_data, [&] { return read(text); });
    if (values) fuzz::require(read(cli::written(*values)) == *values, "what is written reads back");
    return 0;
}
