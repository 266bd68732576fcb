#pragma once

#include "microbatch/optim/optimizer.h"

namespace microbatch {

/// The common part of AdamW and Sgd: groups, lazily created state, and one update for all tensors of a group, device
/// and dtype: our own one-pass update where it is supported (float and double on the CPU), otherwise torch's fused
/// kernel after a pass that divides.
class FusedOptimizer : public Optimizer {
public:
    /// Our own update leaves the gradients unchanged; torch's leaves them divided.
    /// Errors: ErrorKind::usage if a gradient is sparse or differs from its parameter in dtype or shape, or a parameter
    ///         has changed since its state was created; nothing has changed then.
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

    /// Adds another group, such as a head added to the model; its state is created with its first gradient.
    /// Errors: ErrorKind::usage if a setting is out of range, a parameter is not a dense floating-point tensor, or is
    ///         already in a group; nothing has changed then.
    void add_group(const ParameterGroup& group);

protected:
    /// Tensors that are updated together. state[i] has the i-th state tensor of every parameter.
    struct Bucket {
        std::vector<at::Tensor> parameters, gradients;
        std::vector<std::vector<at::Tensor>> state;
        at::Tensor constant;  // only for torch's kernel
    };
    struct Settings {
        double learning_rate, weight_decay, divisor;
    };

    /// `name` is the start of every message.
    FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate);

    /// The number of tensors that make_state() creates.
    virtual std::size_t state_count() const = 0;

    /// Creates the state of a parameter before its first step.
    virtual std::vector<at::Tensor> make_state(const at::Tensor& parameter) const = 0;

    /// One step of a bucket for which updates_in_one_pass(). Neither this nor update_by_torch() may allocate: running
    /// out of memory between buckets would leave only some of the parameters updated.
    virtual void update(const Bucket& bucket, const Settings& settings) const = 0;

    /// The same with torch's kernel, for gradients that are already divided.
    virtual void update_by_torch(Bucket& bucket, const Settings& settings) const = 0;

    /// A number that update_by_torch() needs as a tensor next to a parameter; a plain number would be converted to a
    /// tensor, which allocates between the updates.
    virtual at::Tensor make_constant(const at::Tensor& parameter, double learning_rate, double weight_decay) const = 0;

private:
    struct Slot {
        Parameter parameter;
        std::vector<at::Tensor> state = {}, dry_run_state = {};
        at::Tensor gradient = {};  // during a step
    };
    /// A bucket and its origin.
    struct Part {
        Bucket bucket;
        std::vector<const Slot*> slots;
        std::size_t group;
    };
    using Parts = std::vector<Part>;
    struct Forget;
    struct Group {
        std::vector<Slot> slots;
        double weight_decay;
        double learning_rate_scale;
    };

    double rate_of(const Group& group) const { return learning_rate_ * group.learning_rate_scale; }

    using State = std::vector<at::Tensor> Slot::*;

    void take(std::span<const GradientView> gradients);
    std::vector<StoredTensor> state_of(const Slot& slot, const StateReader& reader) const;
    static void restore(Slot& slot, const std::vector<StoredTensor>& state);

    /// All parameters that have a gradient, without their gradients. If it throws, no new state remains.
    Parts make_parts(State state);
    void add_to(Parts& parts, Slot& slot, std::size_t group, State state) const;

    /// False if parameters have since received their first gradient, or lost it.
    bool still_right(const Parts& parts) const;

    /// Takes the current gradients, and everything else that a step allocates.
    void refresh(Parts& parts, double divisor) const;
    void update_all(Parts& parts, double divisor) const;

    const char* name_;
    std::vector<Group> groups_;
    Parts parts_;  // of the last step
    double learning_rate_;
};

}  // namespace microbatch
