#include "microbatch/optim/torch_optimizer.h"

#include "microbatch/core/error.h"

namespace microbatch {

TorchOptimizer::TorchOptimizer(torch::optim::Optimizer& optimizer) : optimizer_(optimizer) {
    if (optimizer_.param_groups().empty()) throw Error(ErrorKind::usage, "the torch optimizer has no parameter group");
    const double first = learning_rate();
    for (const auto& group : optimizer_.param_groups()) {
        scales_.push_back(first == 0.0 ? 1.0 : group.options().get_lr() / first);
    }
}

double TorchOptimizer::learning_rate() const {
    return optimizer_.param_groups().front().options().get_lr();
}

void TorchOptimizer::set_learning_rate(double rate) {
    validate_setting("TorchOptimizer", "learning rate", rate);
    scales_.resize(optimizer_.param_groups().size(), 1.0);
    for (std::size_t i = 0; i < scales_.size(); ++i) optimizer_.param_groups()[i].options().set_lr(rate * scales_[i]);
}

std::vector<at::Tensor> TorchOptimizer::parameters() const {
    std::vector<at::Tensor> result;
    for (const auto& group : optimizer_.param_groups()) {
        result.insert(result.end(), group.params().begin(), group.params().end());
    }
    return result;
}

}  // namespace microbatch
