#pragma once

#include <map>
#include <memory>
#include <string>

#include "support/training.h"

namespace microbatch::test {

/// A run whose state has all that a state can have, in the fewest bytes.
inline TrainingOptions rich(const std::string& optimizer = "adamw") {
    TrainingOptions how{.model = "norm", .optimizer = optimizer};
    how.trainer.batch = 8;  // in 3, 3 and 2, as batch norm wants more than one
    how.trainer.guard = SpikeGuardOptions{.window = 6, .least = 3, .most_refused = 1};
    how.trainer.recovery = RecoveryOptions{.every = 2, .margin = 1, .warmup = 2};
    how.trainer.noise_every = 1;
    how.spikes = {6, 7};
    return how;
}

/// Ten steps, in which the run was rolled back once, and a partial batch.
inline std::unique_ptr<Training> rich_run(TrainingOptions how = rich()) {
    const auto stop = std::make_shared<bool>(false);
    how.trainer.stop = [stop] { return *stop; };
    auto run = std::make_unique<Training>(how);
    run->accumulator().caps().remember({{1000}, {}}, {.micro_batch = 2});  // of no sample that there is
    for (int i = 0; i < 10; ++i) run->step();
    EXPECT_EQ(StateReader(state_of(run->trainer())).section("recovery").count("times"), 1);
    *stop = true;
    EXPECT_TRUE(run->step().paused);
    *stop = false;
    return run;
}

/// The state from which such a run resumes; created once.
inline const StateDict& rich_state(const std::string& optimizer = "adamw") {
    static std::map<std::string, StateDict> states;
    if (!states.contains(optimizer)) states.emplace(optimizer, rich_run(rich(optimizer))->taken_apart());
    return states.at(optimizer);
}

}  // namespace microbatch::test
