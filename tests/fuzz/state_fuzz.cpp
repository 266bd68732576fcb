// state.json of a checkpoint: the scalars of a run's state.
#include <functional>
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/io/state_json.h"

namespace microbatch {
namespace {

using fuzz::accepted;
using fuzz::require;

std::optional<StateDict> parse(std::string_view text) {
    return accepted(ErrorKind::bad_data, [&] {
        StateDict state;
        read_scalars(text, "state.json", state);
        return state;
    });
}

/// Every value as every kind: refused, or what it was said to be.
void read_all(const StateDict& state) {
    const StateReader reader(state);
    for (const auto& [name, value] : state.scalars()) {
        const auto read = [](const std::function<void()>& call) {
            accepted(ErrorKind::bad_data, [&] {
                call();
                return true;
            });
        };
        read([&] { reader.flag(name); });
        read([&] { require(reader.count(name, 1, 10) <= 10, "a count is in its range"); });
        read([&] { reader.seed(name); });
        read([&] { reader.number(name); });
        read([&] { require(reader.positive(name) >= 0.0, "a positive number is none below 0"); });
        read([&] { reader.word(name); });
        read([&] { reader.counts(name); });
        read([&] { reader.numbers(name); });
    }
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const auto state = parse(fuzz::characters(data, size));
    if (!state) return 0;
    read_all(*state);
    const std::string written = scalars_to_json(*state);
    const auto again = parse(written);
    fuzz::require(again && scalars_to_json(*again) == written, "what is written reads back");
    return 0;
}
