#include "microbatch/step/micro_batch_caps.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>

namespace microbatch {

SampleShape shape_of(const Batch& batch) {
    SampleShape shape;
    for (const at::Tensor& field : batch.fields) {
        const at::IntArrayRef sizes = field.sizes();
        shape.emplace_back(sizes.begin() + 1, sizes.end());
    }
    return shape;
}

void MicroBatchCaps::remember(const SampleShape& shape, const Plan& plan) {
    // Removes caps that the new one implies: the list stays as short as the number of different shapes.
    std::erase_if(caps_, [&](const Cap& old) {
        return covers(shape, old.shape) && plan.micro_batch <= old.plan.micro_batch &&
               plan.recompute >= old.plan.recompute;
    });
    caps_.push_back({shape, plan});
}

Plan MicroBatchCaps::within(const Plan& plan, const SampleShape& shape) const {
    Plan result = plan;
    for (const Cap& cap : caps_) {
        if (!covers(cap.shape, shape)) continue;
        result.micro_batch = std::min(result.micro_batch, cap.plan.micro_batch);
        result.recompute = result.recompute || cap.plan.recompute;
    }
    return result;
}

bool MicroBatchCaps::covers(const SampleShape& smaller, const SampleShape& larger) {
    const auto field_covers = [](const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), std::less_equal<>());
    };
    return smaller.empty() || std::equal(smaller.begin(), smaller.end(), larger.begin(), larger.end(), field_covers);
}

void MicroBatchCaps::save(const StateWriter& writer) const {
    writer.put("caps", caps_.size());
    for (std::size_t i = 0; i < caps_.size(); ++i) {
        const StateWriter one = writer.section(std::to_string(i));
        one.put("micro_batch", caps_[i].plan.micro_batch);
        one.put("recompute", caps_[i].plan.recompute);
        one.put("fields", caps_[i].shape.size());
        for (std::size_t j = 0; j < caps_[i].shape.size(); ++j) one.put(std::to_string(j), caps_[i].shape[j]);
    }
}

Commit MicroBatchCaps::prepare(const StateReader& reader) {
    constexpr std::int64_t most = 10'000;  // far more than there are shapes
    std::vector<Cap> caps(static_cast<std::size_t>(reader.count("caps", 0, most)));
    for (std::size_t i = 0; i < caps.size(); ++i) {
        const StateReader one = reader.section(std::to_string(i));
        caps[i].plan = {.micro_batch = one.count("micro_batch", 1), .recompute = one.flag("recompute")};
        const std::int64_t fields = one.count("fields", 0, most);
        for (std::int64_t j = 0; j < fields; ++j) caps[i].shape.push_back(one.counts(std::to_string(j)));
    }
    return [this, caps = std::move(caps)] { caps_ = caps; };
}

void forget_caps(StateDict& run) {
    run.erase("caps/");
    run.set("caps/caps", std::int64_t{0});
}

}  // namespace microbatch
