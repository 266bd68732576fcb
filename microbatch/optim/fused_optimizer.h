#pragma once

#include "microbatch/optim/optimizer.h"

namespace microbatch {

/// What AdamW and Sgd share: groups, lazily made state, and one update for all tensors of a group, device and dtype:
/// our own in one pass where there is one (float and double on the CPU), otherwise torch's fused kernel after a pass
/// that divides.
class FusedOptimizer : public Optimizer {
public:
    /// Gradients are left as they were by our own update, divided by torch's.
    /// Errors: ErrorKind::usage if a gradient is sparse or of another dtype or shape than its parameter, or a parameter
    /// has changed its own since its state was made; nothing has changed then.
    void step(std::span<const GradientView> gradients, double divisor) final;
    using Optimizer::step;
    void dry_run(std::span<const GradientView> gradients, double divisor) final;
    using Optimizer::dry_run;
    void end_dry_run() final;
    bool has_state() const final;
    void save(const StateWriter& writer) const final;
    Commit prepare(const StateReader& reader) final;
    double learning_rate() const final { return learning_rate_; }
    void set_learning_rate(double rate) final;
    std::vector<at::Tensor> parameters() const final;

    /// Takes over another group, such as a head added to the model; its state begins with its first gradient.
    /// Errors: ErrorKind::usage if a setting is out of range, a parameter is not a dense floating-point tensor, or is
    /// in a group already; nothing has changed then.
    void add_group(const ParameterGroup& group);

protected:
    /// Tensors that are updated together: of one device, dtype and kind of settings. state[i] holds the i-th state
    /// tensor of every parameter.
    struct Bucket {
        double learning_rate, weight_decay, divisor;
        std::vector<at::Tensor> parameters = {}, gradients = {};
        std::vector<std::vector<at::Tensor>> state = {};
        at::Tensor constant = {};  // for torch's kernel alone
    };

    /// `name` begins every message.
    FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate);

    /// The state of a parameter before its first step.
    virtual std::vector<at::Tensor> make_state(const at::Tensor& parameter) const = 0;

    /// One step of a bucket of which updates_in_one_pass(). Neither this nor update_by_torch() may allocate: running
    /// out of memory between the buckets would leave some of the parameters updated.
    virtual void update(const Bucket& bucket) const = 0;

    /// The same by torch's kernel, with gradients that are divided already.
    virtual void update_by_torch(Bucket& bucket) const = 0;

    /// A number that update_by_torch() needs as a tensor: a number alone would be made into one in the middle of the
    /// updates.
    virtual at::Tensor make_constant(const Bucket& bucket) const = 0;

private:
    struct Slot {
        Parameter parameter;
        double weight_decay, learning_rate_scale;  // of its group
        std::vector<at::Tensor> state = {}, dry_run_state = {};
    };
    using Buckets = std::vector<Bucket>;
    using State = std::vector<at::Tensor> Slot::*;

    std::vector<StoredTensor> state_of(const Slot& slot, const StateReader& reader) const;
    static void restore(Slot& slot, const std::vector<StoredTensor>& state);

    /// All parameters that have a gradient, and all else that a step allocates. If it throws, no state is kept that was
    /// not there before.
    Buckets make_buckets(std::span<const GradientView> gradients, double divisor, State state);
    Bucket& bucket_for(const Slot& slot, double divisor, Buckets& buckets) const;
    void update_all(Buckets& buckets) const;

    const char* name_;
    std::vector<Slot> slots_;
    double learning_rate_;
};

}  // namespace microbatch
