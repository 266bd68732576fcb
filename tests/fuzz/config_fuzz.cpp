// config.toml, as --config and a resumed run read it.
#include <cstdio>
#include <string>

#include "cli/options/config_file.h"
#include "cli/options/flags.h"
#include "fuzz/fuzz.h"

namespace microbatch::cli {
namespace {

using fuzz::require;

/// The command line, made once: making it takes longer than all else.
struct CommandLine {
    Settings settings, others;
    CLI::App application;
    CLI::App* train = application.add_subcommand("train");

    CommandLine() {
        add_job_options(*train, settings);
        add_length_options(*train, settings, "100 steps");
        add_job_options(*application.add_subcommand("plan"), others);
    }
};

void apply(const std::string& text) {
    static CommandLine line;
    line.settings = {};
    line.train->clear();
    const auto applied = fuzz::accepted(ErrorKind::usage, [&] {
        apply_config(*line.train, text, "config.toml");
        return true;
    });
    const Settings& s = line.settings;
    require(!applied || (s.batch >= 0 && s.length >= 0 && s.seed >= 0 && s.threads >= 0), "a count is not negative");
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
