#pragma once

#include <memory>
#include <string>

#include "support/training.h"

namespace microbatch::test {

/// A run whose state has all that a state can have, in the fewest bytes.
inline TrainingOptions rich(const std::string& optimizer = "adamw") {
    TrainingOptions how{.model = "norm", .optimizer = optimizer};
    how.trainer.batch = 8;  // in 3, 3 and 2, as batch norm wants more than one
    how.trainer.guard = SpikeGuardOptions{.window = 6, .least = 3, .most_refused = 1};
    how.trainer.recovery = RecoveryOptions{.every = 2, .margin = 1, .warmup = 2, .mend = 2};
    how.trainer.noise_every = 1;
    how.spikes = {6, 7};
    return how;
}

/// Ten steps of it, in which it went back once, and a batch that was left open.
inline std::unique_ptr<Training> rich_run(TrainingOptions how = rich()) {
    const auto pause = std::make_shared<bool>(false);
    how.trainer.pause = [pause] { return *pause; };
    auto run = std::make_unique<Training>(how);
    for (int i = 0; i < 10; ++i) run->step();
    EXPECT_EQ(run->trainer().state().recovery->times, 1);
    *pause = true;
    EXPECT_TRUE(run->step().paused);
    *pause = false;
    return run;
}

}  // namespace microbatch::test
