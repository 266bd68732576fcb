#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "microbatch/autograd/tape.h"
#include "microbatch/core/batch_plan.h"
#include "microbatch/data/batch.h"
#include "microbatch/model/model.h"
#include "microbatch/step/loss.h"

namespace microbatch {

/// See GatherOptions::on_piece.
using PieceObserver = std::function<void(bool first, bool last)>;

/// A batch in which every BatchNorm normalises by the whole batch, forward and backward, although it is cut.
///
/// Every BatchNorm is a barrier: the micro-batches run up to it, one after the other, and go on once the statistics of
/// all are known. Backward goes the other way, segment by segment, and adds the gradients of all micro-batches. Each
/// micro-batch runs on a thread of its own that pauses at the barriers; operators still run on the caller's thread.
///
/// Source:  reference: docs/batch-norm.md. Deviation: none.
/// Errors:  ErrorKind::usage, naming the layer, if the micro-batches do not meet the same BatchNorms in the same order,
///          or as Tape's.
/// Threads: the loss function runs on other threads, one at a time.
class ExactBatch {
public:
    /// `plans` must outlive the batch.
    ExactBatch(std::shared_ptr<Model> model, const KeepPlans& plans, const Plan& plan, PieceObserver on_piece = {});
    ~ExactBatch();

    /// Adds a micro-batch: runs its forward up to the first BatchNorm. Without the last one, a single value per channel
    /// is allowed.
    void add(const LossFunction& loss, Batch micro, bool is_last);

    /// Runs all to the end, and moves the running statistics of every layer once. Returns the losses, without graphs.
    std::vector<WeightedLoss> finish_forward();

    /// Adds the gradients of the sum of all losses, times `scale`, to the parameters' .grad.
    void backward(double scale);

    /// Of the first micro-batch. Requires: finish_forward() has returned.
    Program program() const;
    std::uint64_t fingerprint() const;

private:
    struct MicroBatch;

    void advance(MicroBatch& one);
    bool any_waits() const;
    void done_with(const MicroBatch& one) const;
    bool is_count(const at::Tensor& tensor) const;
    void meet();
    std::string name_of(const BatchNormCall& call) const;

    std::shared_ptr<Model> model_;
    const Keep& keep_;
    NamedTensors buffers_;
    std::vector<at::Device> devices_;
    PieceObserver on_piece_;
    std::deque<MicroBatch> micro_batches_;
    std::deque<BatchStatistics> statistics_;  // by barrier
    bool complete_ = false;                   // all micro-batches have been added
};

/// Learns what to keep from one micro-batch, with the model's state restored afterwards. Errors: as ExactBatch.
KeepPlans learn_keep_plans(const std::shared_ptr<Model>& model, const LossFunction& loss, const Batch& micro);

}  // namespace microbatch
