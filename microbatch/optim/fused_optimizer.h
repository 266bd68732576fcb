#pragma once

#include "microbatch/optim/optimizer.h"

namespace microbatch {

/// What AdamW and Sgd share: groups, lazily made state, and one call of torch's fused kernel for all tensors of a
/// device and dtype.
class FusedOptimizer : public Optimizer {
public:
    void step() final;
    void rehearse() final;
    void end_rehearsal() final;
    bool has_state() const final;
    double learning_rate() const final { return learning_rate_; }
    void set_learning_rate(double rate) final;
    std::vector<at::Tensor> parameters() const final;

    /// Takes over another group, such as a head added to the model; its state begins with its first gradient.
    /// Errors: ErrorKind::usage if a setting is out of range, a parameter is not a dense floating-point tensor, or is
    /// in a group already; nothing has changed then.
    void add_group(const ParameterGroup& group);

protected:
    /// Tensors for one call of a kernel. state[i] holds the i-th state tensor of every parameter.
    struct Bucket {
        std::vector<at::Tensor> parameters, gradients;
        std::vector<std::vector<at::Tensor>> state;
        at::Tensor constant;
    };

    /// `name` begins every message.
    FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate);

    /// The state of a parameter before its first step.
    virtual std::vector<at::Tensor> make_state(const at::Tensor& parameter) const = 0;

    /// A number that update() needs as a tensor, beside a parameter: a number alone would be made into one in the midst
    /// of the updates.
    virtual at::Tensor make_constant(const at::Tensor& parameter, double learning_rate, double weight_decay) const = 0;

    /// One step of the bucket at this learning rate. Must not allocate: running out of memory between the buckets would
    /// leave some of the parameters updated.
    virtual void update(Bucket& bucket, double learning_rate, double weight_decay) const = 0;

private:
    struct Slot {
        Parameter parameter;
        std::vector<at::Tensor> state, rehearsed_state;
    };
    struct Group {
        std::vector<Slot> slots;
        double weight_decay;
        double learning_rate_scale;
    };

    double rate_of(const Group& group) const { return learning_rate_ * group.learning_rate_scale; }

    using State = std::vector<at::Tensor> Slot::*;

    /// Everything that a step allocates. If it throws, no state is kept that was not there before.
    std::vector<std::vector<Bucket>> prepare(State state);
    std::vector<Bucket> buckets_of(Group& group, State state) const;
    void update_all(std::vector<std::vector<Bucket>>& buckets) const;

    const char* name_;
    std::vector<Group> groups_;
    double learning_rate_;
};

}  // namespace microbatch
