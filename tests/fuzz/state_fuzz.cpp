// state.json of a checkpoint: a trainer's state without its tensors.
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "fuzz/fuzz.h"
#include "microbatch/io/bounded_json.h"
#include "microbatch/run/trainer_json.h"

namespace microbatch {
namespace {

constexpr std::size_t most_values = 100'000;

/// The state as text, or nothing where the text is none.
std::optional<std::string> read_and_write_again(std::string_view text) {
    try {
        return to_json(trainer_state_from(parse_bounded(text, most_values))).dump();
    } catch (const nlohmann::json::exception&) {
        return std::nullopt;
    } catch (const std::invalid_argument&) {
        return std::nullopt;
    }
}

}  // namespace
}  // namespace microbatch

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace microbatch;
    const auto once = read_and_write_again(fuzz::characters(data, size));
    if (once) fuzz::require(read_and_write_again(*once) == once, "what is written reads back");
    return 0;
}
