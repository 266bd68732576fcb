#include "microbatch/step/micro_batch_caps.h"

#include <algorithm>

namespace microbatch {

void MicroBatchCaps::remember(const Batch& batch, const Plan& plan) {
    const Shape shape = shape_of(batch);
    // What the new limit implies is not needed any more: the list stays as short as the shapes are different.
    std::erase_if(limits_, [&](const MicroBatchCap& old) {
        return covers(shape, old.shape) && plan.micro_batch <= old.plan.micro_batch &&
               plan.recompute >= old.plan.recompute;
    });
    limits_.push_back({shape, plan});
}

Plan MicroBatchCaps::within(const Plan& plan, const Batch& batch) const {
    const Shape shape = shape_of(batch);
    Plan result = plan;
    for (const MicroBatchCap& limit : limits_) {
        if (!covers(limit.shape, shape)) continue;
        result.micro_batch = std::min(result.micro_batch, limit.plan.micro_batch);
        result.recompute = result.recompute || limit.plan.recompute;
    }
    return result;
}

MicroBatchCaps::Shape MicroBatchCaps::shape_of(const Batch& batch) {
    Shape shape;
    for (const at::Tensor& field : batch.fields) {
        const at::IntArrayRef sizes = field.sizes();
        shape.emplace_back(sizes.begin() + 1, sizes.end());
    }
    return shape;
}

bool MicroBatchCaps::covers(const Shape& smaller, const Shape& larger) {
    const auto field_covers = [](const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), std::less_equal<>());
    };
    return std::equal(smaller.begin(), smaller.end(), larger.begin(), larger.end(), field_covers);
}

}  // namespace microbatch
