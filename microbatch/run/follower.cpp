#include "microbatch/run/follower.h"

namespace microbatch {

void follow(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss, const TrainerOptions& options,
            std::optional<StateDict>& state) {
    Trainer trainer(accumulator, dataset, loss, options);
    if (state) {
        load(trainer, StateReader(*state));
        state.reset();  // its files are open as long as its tensors may be read
    }
    bool diverged = false;
    while (!trainer.done() && !ends_on_any_rank(accumulator, options, diverged)) diverged = trainer.step().diverged;
}

}  // namespace microbatch
