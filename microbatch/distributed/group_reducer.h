#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "microbatch/distributed/group.h"
#include "microbatch/distributed/shards.h"
#include "microbatch/step/reducer.h"

namespace microbatch {

/// What each rank passes as the batch.
enum class Batches {
    whole,  ///< all the same one, of which each takes its share
    own     ///< its own part of the batch; there may be no sample in it
};

/// Sums over the ranks of a group, once a step: each rank gathers its share of the batch, and all have the whole batch's
/// gradient afterwards.
///
/// Ownership: shares the group.
/// Memory:    a megabyte for small gradients, and zeros for parameters that have a gradient on other ranks alone.
/// Cost:      the gradients once around the ring: 2 (W - 1) / W times their bytes, sent by each of W ranks; and four calls
///            with little data. Divided, as much: the gradients go to the rank that updates them, and the parameters back.
class GroupReducer final : public Reducer {
public:
    explicit GroupReducer(std::shared_ptr<Group> group, Batches batches = Batches::whole)
        : group_(std::move(group)), batches_(batches) {}

    int rank() const override { return group_->rank(); }
    int size() const override { return group_->size(); }
    Slice share(std::int64_t samples, std::int64_t grain) const override {
        return batches_ == Batches::own ? Slice{0, samples} : Reducer::share(samples, grain);
    }
    std::int64_t largest_share(std::int64_t samples, std::int64_t grain) const override {
        return batches_ == Batches::own ? samples : Reducer::largest_share(samples, grain);
    }
    void abandon(const std::string& why) noexcept override { group_->abandon(why); }
    std::optional<GatherFailure> agree(const std::optional<GatherFailure>& mine) override;
    Gathered reduce(Gathered gathered, const Parameters& parameters, double scale) override;
    bool any_rank(bool mine) override { return group_->any(mine); }
    std::vector<at::Tensor> gather(const at::Tensor& mine) override;
    std::vector<at::Tensor> divide(const std::vector<at::Tensor>& parameters) override;
    void unite() override { shards_.reset(); }
    bool divides() const override { return shards_.has_value(); }
    double exchange_seconds(const Parameters& parameters) override;
    std::int64_t buffer_bytes(const Parameters& parameters, bool in_double) const override;
    void share_update() override;

private:
    struct Parcels;
    template <class Call>
    static void send(const Parcels& parcels, const Call& call);
    Parcels parcels_of(const Parameters& parameters, bool in_double) const;
    void sum_totals(Gathered& gathered);
    void add_grains(Gathered& total, const GrainLosses& mine);
    void add_missing(GradientViews& sums, const Parameters& parameters);
    double sum_for_all(const GradientViews& sums);
    double sum_for_owners(GradientViews& sums, const Parameters& parameters);

    std::shared_ptr<Group> group_;
    Batches batches_;
    std::optional<Shards> shards_;     // if the parameters are divided
    std::vector<at::Tensor> reduced_;  // the parameters of the last batch
};

/// Overwrites the parameters and buffers of all ranks with those of rank 0, so that all begin at the same point. All
/// ranks.
/// Errors: ErrorKind::usage if their names or shapes differ.
void share_from_first(Group& group, const Parameters& parameters, const NamedTensors& buffers);

}  // namespace microbatch
