#pragma once

#include "microbatch/optim/optimizer.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// A Python optimizer, through a driver of microbatch.optimizers.
///
/// Threads: called without the GIL; takes it for every call into Python.
class PythonOptimizer final : public Optimizer {
public:
    explicit PythonOptimizer(py::object driver) : driver_(std::move(driver)) {}
    ~PythonOptimizer() override;

    void step(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::step;
    void dry_run(std::span<const GradientView> gradients, double divisor) override;
    using Optimizer::dry_run;
    void end_dry_run() override;
    bool has_state() const override;
    double learning_rate() const override;
    void set_learning_rate(double rate) override;
    std::vector<at::Tensor> parameters() const override;
    void update_only(const std::vector<at::Tensor>& parameters) override;
    bool keeps(std::string_view name) const override;
    bool is_partial() const override;

    /// Tensors `PARAMETER/KEY`; numbers that the optimizer keeps are tensors of one element.
    void save(const StateWriter& writer) const override;
    Commit prepare(const StateReader& reader) override;

private:
    void lift_restriction() override;
    void call(const char* method, std::span<const GradientView> gradients, double divisor);

    py::object driver_;
};

}  // namespace microbatch::python
