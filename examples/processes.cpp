// Two processes that train as one: each gathers its share of the batch, and both make the update of the whole. Run alone,
// it starts itself twice; torchrun --no-python --nproc-per-node 2 example_processes does the same.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "microbatch/microbatch.h"

int train(const microbatch::Launched& launched) {
    at::set_num_threads(1);
    at::manual_seed(7);  // the same model on both, and the same data
    microbatch::Mlp model(microbatch::MlpConfig{.inputs = 8, .width = 16, .classes = 3});
    microbatch::AdamW optimizer(microbatch::split_by_decay(microbatch::parameters_of(model), 0.0),
                                {.learning_rate = 1e-2});
    microbatch::Accumulator accumulator(model, optimizer,
                                        {.plan = {.micro_batch = 4},
                                         .clip_norm = 1.0,
                                         .reducer = std::make_shared<microbatch::GroupReducer>(launched.join())});
    const auto loss = [&](const microbatch::Batch& micro) -> microbatch::WeightedLoss {
        const at::Tensor logits = model->forward(micro.fields[0]);
        return {microbatch::cross_entropy_sum(logits, micro.fields[1]), microbatch::count_targets(micro.fields[1])};
    };
    double first = 0.0, last = 0.0;
    for (int step = 0; step < 100; ++step) {
        const at::Tensor inputs = at::randn({25, 8}), targets = inputs.narrow(1, 0, 3).argmax(1);
        const microbatch::StepReport report = accumulator.step(microbatch::Batch{{inputs, targets}}, loss);
        last = report.loss;  // of all 25 samples: 12 on one rank, 13 on the other
        if (step == 0) first = last;
    }
    std::printf("rank %d of %d: loss %.3f at the first step, %.3f at the last\n", launched.rank, launched.size, first,
                last);
    return last < 0.5 * first ? 0 : 1;
}

// Starts this program as rank 0 and rank 1.
int start_two(char** arguments) {
    const microbatch::Launcher launcher;
    int failures = 0;
    for (int rank = 0; rank < 2; ++rank) {
        if (::fork() != 0) continue;
        for (const std::string& variable : launcher.environment(rank, 2)) {
            const std::size_t equals = variable.find('=');
            ::setenv(variable.substr(0, equals).c_str(), variable.c_str() + equals + 1, 1);
        }
        ::execv("/proc/self/exe", arguments);
        ::_exit(127);
    }
    for (int status = 0; ::wait(&status) > 0;) failures += status != 0;
    return failures;
}

int main(int, char** arguments) {
    const auto launched = microbatch::Launched::from_environment();
    return launched.size > 1 ? train(launched) : start_two(arguments);
}
