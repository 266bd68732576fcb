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

/// What --resume makes of an option that differs from the checkpoint's.
enum class AtResume {
    noted,        ///< told, and taken
    another_run,  ///< refused, but for --resume-changed
    another_cut,  ///< told: the same batches, but bits may differ
    ignored,      ///< says nothing of what is trained
    not_recorded  ///< not in config.toml
};

/// The numbers that an option takes.
struct Range {
    const char* text = "";  ///< after "must be"
    bool (*holds)(double) = nullptr;
};

/// An option that only has a meaning beside some values of another one.
struct OnlyWith {
    const char* option = "";
    std::vector<std::string> values = {};
};

/// One option: its flag, its key in TOML files and in config.toml, its line in --help, and what --resume makes of it.
struct Option {
    using Member =
        std::variant<bool Settings::*, std::string Settings::*, std::int64_t Settings::*, std::uint64_t Settings::*,
                     double Settings::*, std::optional<std::int64_t> Settings::*, std::optional<double> Settings::*>;
    struct Traits {
        std::optional<AtResume> at_resume = {};  ///< none: that of its group
        std::string fallback = {};               ///< the default in words, where Settings has none
        Range range = {};                        ///< of numbers
        std::vector<std::string> choices = {};   ///< of texts; of an optional number: a word for none
        OnlyWith only_with = {};
        std::vector<const char*> reset_by = {};  ///< where one of these changes, the recorded value has no meaning
        unsigned commands = 0;                   ///< 0: those of its group
    };

    std::string name;  ///< of the flag without dashes, and the key
    Member member;
    std::string value;  ///< what --help shows for the value; empty for a switch
    std::string help;
    Traits traits = {};
    std::string group = {};

    bool is_switch() const { return std::holds_alternative<bool Settings::*>(member); }
    bool is_text() const { return std::holds_alternative<std::string Settings::*>(member); }
};

inline constexpr const char* length_group = "How long (give one)";

/// All options of all commands, in the order of --help. One name may stand for several, of different commands.
const std::vector<Option>& options();

/// The option of that name; null if there is none. With `commands`: one that any of these has.
const Option* find_option(std::string_view name, unsigned commands = ~0U);

/// The option's value as a flag would give it; empty if it has none.
std::string text_of(const Option& option, const Settings& settings);

/// False if its value has no meaning beside that of another option, such as --decay without --schedule wsd.
bool applies(const Option& option, const Settings& settings);

/// Throws ErrorKind::usage if an option was given that does not apply.
void require_options_apply(const Settings& settings);

/// Sets the option from text, as a flag or a file gives it.
/// Errors: ErrorKind::usage, naming the flag, if the text is empty, cannot be read, or is out of range.
void read(const Option& option, const std::string& text, Settings& settings);

/// The names of a command's options.
std::vector<std::string> names_of(unsigned commands);

/// "; did you mean 'batch'?" with the name that is nearest to `given`; empty if none is near enough for a typing error.
std::string did_you_mean(std::string_view given, const std::vector<std::string>& names);

bool is_in(const std::vector<std::string>& words, const std::string& word);

/// "adamw or sgd".
std::string one_of(const std::vector<std::string>& words);

using Values = std::map<std::string, std::string>;  ///< by name, as flags would give them

/// What a command was given.
struct Arguments {
    unsigned command = command::train;
    Settings settings = {};
    Values flags = {};  ///< on the command line
    Values given = {};  ///< there, or in a file

    bool has(const std::string& name) const { return given.contains(name); }

    /// Errors: as read().
    void set(const Option& option, const std::string& text) {
        read(option, text, settings);
        given[option.name] = text;
    }
};

/// How a run differs from its checkpoint, each as "lr was 0.001, is 0.002".
struct Differences {
    std::vector<std::string> another_run, another_cut, noted;
};

/// Compares two config.toml by what the table of options says.
Differences differences(const Values& was, const Values& is);

/// The recorded options, overridden by those that were given.
Values overridden(const Values& was, const Values& given);

/// Recorded options that mean nothing beside those of `now`, which override them.
std::set<std::string> outdated(const Values& was, const Values& now);

/// The value of that name, or "not given".
const std::string& value_in(const Values& values, const std::string& name);

}  // namespace microbatch::cli
