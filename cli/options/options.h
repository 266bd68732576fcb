#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "cli/options/settings.h"

namespace microbatch::cli {

/// Which commands have an option: a sum of these.
namespace command {
inline constexpr unsigned train = 1, plan = 2, compare = 4, advise = 8, report = 16, doctor = 32, any_job = 15;
}

/// What --resume does with an option that differs from the checkpoint.
enum class AtResume {
    noted,        ///< applied and reported
    another_run,  ///< refused, unless --resume-changed is given
    another_cut,  ///< applied and reported: the same batches, but bits may differ
    ignored,      ///< does not affect what is trained
    not_recorded  ///< not in config.toml
};

/// The valid numbers for an option.
struct Range {
    const char* text = "";  ///< after "must be"
    bool (*holds)(double) = nullptr;
};

/// Limits an option to some values of another one.
struct OnlyWith {
    const char* option = "";
    std::vector<std::string> values = {};
};

/// One option: its flag, its key in TOML files and in config.toml, its entry in --help, and what --resume does with it.
struct Option {
    using Member =
        std::variant<bool Settings::*, std::string Settings::*, std::int64_t Settings::*, std::uint64_t Settings::*,
                     double Settings::*, std::optional<std::int64_t> Settings::*, std::optional<double> Settings::*>;
    struct Traits {
        std::optional<AtResume> at_resume = {};  ///< empty: as its group
        std::string fallback = {};               ///< the default in words, if Settings has none
        Range range = {};                        ///< for numbers
        std::vector<std::string> choices = {};   ///< for texts; for an optional number, the word for no value
        OnlyWith only_with = {};
        std::string unrecorded = {};             ///< its value in a config.toml from before the option, if it matters
        std::vector<const char*> reset_by = {};  ///< if one of these changes, the recorded value loses its meaning
        unsigned commands = 0;                   ///< 0: as its group
    };

    std::string name;  ///< the flag without dashes; also the key
    Member member;
    std::string value;  ///< what --help shows for the value; empty for a switch
    std::string help;
    Traits traits = {};
    std::string group = {};

    bool is_switch() const { return std::holds_alternative<bool Settings::*>(member); }
    bool is_text() const { return std::holds_alternative<std::string Settings::*>(member); }
};

inline constexpr const char* length_group = "How long (give one)";

/// All options of all commands, in the order of --help. Different commands may have options with the same name.
const std::vector<Option>& options();

/// The option with this name, or null. With `commands`, an option of any of these commands.
const Option* find_option(std::string_view name, unsigned commands = ~0U);

/// The value of the option as a flag would set it; empty if it is not set.
std::string text_of(const Option& option, const Settings& settings);

/// False if the value of another option makes it meaningless, such as --decay without --schedule wsd.
bool applies(const Option& option, const Settings& settings);

/// Throws ErrorKind::usage if an option was given that does not apply.
void require_options_apply(const Settings& settings);

/// Sets the option from the text of a flag or a file.
/// Errors: ErrorKind::usage, naming the flag, if the text is empty, cannot be parsed, or is out of range.
void read(const Option& option, const std::string& text, Settings& settings);

/// The names of a command's options.
std::vector<std::string> names_of(unsigned commands);

/// "; did you mean 'batch'?" with the name that is most similar to `given`; empty if no name is similar enough.
std::string did_you_mean(std::string_view given, const std::vector<std::string>& names);

bool is_in(const std::vector<std::string>& words, const std::string& word);

/// "adamw or sgd".
std::string one_of(const std::vector<std::string>& words);

using Values = std::map<std::string, std::string>;  ///< by name, as flags would set them

/// The arguments of a command.
struct Arguments {
    unsigned command = command::train;
    Settings settings = {};
    Values flags = {};  ///< from the command line
    Values given = {};  ///< from the command line or a file

    bool has(const std::string& name) const { return given.contains(name); }

    /// Errors: as read().
    void set(const Option& option, const std::string& text) {
        read(option, text, settings);
        given[option.name] = text;
    }
};

/// The differences between a run and its checkpoint, each as "lr was 0.001, is 0.002".
struct Differences {
    std::vector<std::string> another_run, another_cut, noted;
};

/// Compares two config.toml texts by the table of options.
Differences differences(const Values& was, const Values& is);

/// The recorded options, overridden by the given ones.
Values overridden(const Values& was, const Values& given);

/// Recorded options that have no meaning with the options of `now`, which override them.
std::set<std::string> outdated(const Values& was, const Values& now);

/// The value of that name, or "not given".
const std::string& value_in(const Values& values, const std::string& name);

}  // namespace microbatch::cli
