#include "microbatch/run/follower.h"

#include "microbatch/io/file_system.h"
#include "microbatch/run/checkpoint_parts.h"

namespace microbatch {

void follow(Accumulator& accumulator, const Dataset& dataset, const LossFunction& loss, const TrainerOptions& options,
            std::optional<StateDict>& state) {
    Trainer trainer(accumulator, dataset, loss, options);
    if (state) {
        load(trainer, StateReader(*state));
        state.reset();  // its files are open as long as its tensors may be read
    }
    const auto write_checkpoints = [&] {
        if (!accumulator.is_sharded()) return;
        write_parts(accumulator.reducer(), system_files(), [&] { return state_of(trainer); });
    };
    bool diverged = false;
    while (!trainer.done() && !ends_on_any_rank(accumulator, options, diverged)) {
        diverged = trainer.step().diverged;
        write_checkpoints();
    }
    write_checkpoints();
}

}  // namespace microbatch
