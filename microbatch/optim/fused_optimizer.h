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
    void reserve(std::span<const GradientView> gradients) final;
    void dry_run(std::span<const GradientView> gradients, double divisor) final;
    using Optimizer::dry_run;
    void end_dry_run() final;
    bool has_state() const final;
    void save(const StateWriter& writer) const final;
    Commit prepare(const StateReader& reader) final;
    double learning_rate() const final { return learning_rate_; }
    void set_learning_rate(double rate) final;
    std::vector<at::Tensor> parameters() const final;
    void update_only(const std::vector<at::Tensor>& parameters) final;
    bool keeps(std::string_view name) const final;

    /// Adds another group, such as a head added to the model; its state is created with its first gradient.
    /// Errors: ErrorKind::usage if a setting is out of range, a parameter is not a dense floating-point tensor, or is
    ///         already in a group; nothing has changed then.
    void add_group(const ParameterGroup& group);

    /// Other settings for the group with this number, in the order in which groups were added.
    /// Errors: ErrorKind::usage if a setting is out of range or there is no such group; nothing has changed then.
    void set_group(std::size_t group, double learning_rate_scale, double weight_decay);

protected:
    /// Tensors that are updated together: of one device, dtype and kind of settings. state[i] has the i-th state
    /// tensor of every parameter.
    struct Bucket {
        double learning_rate, weight_decay, divisor;
        std::vector<at::Tensor> parameters = {}, gradients = {};
        std::vector<std::vector<at::Tensor>> state = {};
        at::Tensor constant = {};  // only for torch's kernel
    };

    /// `name` is the start of every message.
    FusedOptimizer(const char* name, const std::vector<ParameterGroup>& groups, double learning_rate);

    /// Creates the state of a parameter before its first step.
    virtual std::vector<at::Tensor> make_state(const at::Tensor& parameter) const = 0;

    /// One step of a bucket for which updates_in_one_pass(). Neither this nor update_by_torch() may allocate: running
    /// out of memory between buckets would leave only some of the parameters updated.
    virtual void update(const Bucket& bucket) const = 0;

    /// The same with torch's kernel, for gradients that are already divided.
    virtual void update_by_torch(Bucket& bucket) const = 0;

    /// A number that update_by_torch() needs as a tensor: a plain number would be converted to a tensor, which
    /// allocates between the updates.
    virtual at::Tensor make_constant(const Bucket& bucket) const = 0;

private:
    struct Slot {
        Parameter parameter;
        std::size_t group;
        double weight_decay, learning_rate_scale;  // of its group
        std::vector<at::Tensor> state = {}, dry_run_state = {};
    };
    using Buckets = std::vector<Bucket>;
    using State = std::vector<at::Tensor> Slot::*;

    std::vector<StoredTensor> state_of(const Slot& slot, const StateReader& reader) const;
    static void restore(Slot& slot, const std::vector<StoredTensor>& state);

    /// All parameters that have a gradient, and all else that a step allocates. If it throws, no new
    /// state remains.
    Buckets make_buckets(std::span<const GradientView> gradients, double divisor, State state);
    Bucket& bucket_for(const Slot& slot, double divisor, Buckets& buckets) const;
    void update_buckets(Buckets& buckets) const;

    const char* name_;
    std::vector<Slot> slots_;
    std::size_t group_count_ = 0;
    double learning_rate_;
};

}  // namespace microbatch
