#include "microbatch/run/trainer_json.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

#include "microbatch/io/json_number.h"

namespace microbatch {
namespace {

using Json = nlohmann::json;
using Written = nlohmann::ordered_json;

// In all lists together: far beyond any model, and still little memory.
constexpr std::size_t most_tensors = 300'000;

/// Makes lists of as many tensors as they say, as long as that is not too many.
class Lists {
public:
    StoredTensors as_many(std::size_t size) {
        if (size > left_) throw std::invalid_argument("there are too many tensors");
        left_ -= size;
        return StoredTensors(size);
    }
    StoredTensors as_many(const Json& number) { return as_many(static_cast<std::size_t>(count_from(number))); }

    // As all the counts together.
    StoredTensors as_many(const std::vector<std::size_t>& counts) {
        std::size_t sum = 0;
        for (const std::size_t one : counts) {
            if (one > left_ || (sum += one) > left_) throw std::invalid_argument("there are too many tensors");
        }
        return as_many(sum);
    }

private:
    std::size_t left_ = most_tensors;
};

std::vector<std::size_t> counts(const Json& numbers) {
    std::vector<std::size_t> result;
    for (const Json& number : numbers) result.push_back(static_cast<std::size_t>(count_from(number)));
    return result;
}

std::uint64_t seed_from(const Json& number) {
    if (!number.is_number_unsigned()) throw std::invalid_argument("a seed is none");
    return number.get<std::uint64_t>();
}

decltype(MicroBatchCap::shape) shape_from(const Json& fields) {
    decltype(MicroBatchCap::shape) shape;
    for (const Json& field : fields) {
        shape.emplace_back();
        for (const Json& size : field) shape.back().push_back(count_from(size));
    }
    return shape;
}

Written written(const Plan& plan) {
    return {{"micro_batch", plan.micro_batch}, {"recompute", plan.recompute}};
}

Plan plan_from(const Json& json) {
    return {.micro_batch = count_from(json.at("micro_batch")), .recompute = json.at("recompute").get<bool>()};
}

Written written(const SpikeGuardState& guard) {
    Written accepted = Written::array();
    for (const auto& [loss, norm] : guard.accepted) accepted.push_back({json_number(loss), json_number(norm)});
    Written json;
    json["accepted"] = accepted;
    json["refused_in_a_row"] = guard.refused_in_a_row;
    json["lowest_mean"] = guard.lowest_mean ? json_number(*guard.lowest_mean) : Written();
    json["lowest_deviation"] = json_number(guard.lowest_deviation);
    json["last_mean"] = json_number(guard.last_mean);
    json["scale"] = json_number(guard.scale);
    return json;
}

SpikeGuardState guard_from(const Json& json) {
    SpikeGuardState guard{.refused_in_a_row = count_from(json.at("refused_in_a_row")),
                          .lowest_deviation = number_from(json.at("lowest_deviation")),
                          .last_mean = number_from(json.at("last_mean")),
                          .scale = number_from(json.at("scale"))};
    if (!json.at("lowest_mean").is_null()) guard.lowest_mean = number_from(json.at("lowest_mean"));
    for (const Json& pair : json.at("accepted")) {
        guard.accepted.push_back({number_from(pair.at(0)), number_from(pair.at(1))});
    }
    return guard;
}

Written written(const RecoveryState& recovery) {
    Written points = Written::array();
    for (const RecoveryState::Point& point : recovery.points) {
        points.push_back({{"steps", point.steps},
                          {"guard", written(point.guard)},
                          {"tensors", point.tensors.size()},
                          {"optimizer_counts", point.state_counts}});
    }
    return {{"points", points},
            {"times", recovery.times},
            {"gone_back_at", recovery.gone_back_at},
            {"in_files", recovery.in_files},
            {"failed", recovery.failed}};
}

RecoveryState recovery_from(const Json& json, Lists& lists) {
    RecoveryState recovery{.times = count_from(json.at("times")),
                           .gone_back_at = count_from(json.at("gone_back_at")),
                           .in_files = json.at("in_files").get<bool>(),
                           .failed = json.at("failed").get<bool>()};
    if (json.at("points").size() > RecoveryState::most_points) throw std::invalid_argument("too many snapshots");
    for (const Json& point : json.at("points")) {
        recovery.points.push_back({.steps = count_from(point.at("steps")),
                                   .guard = guard_from(point.at("guard")),
                                   .tensors = lists.as_many(point.at("tensors")),
                                   .state_counts = counts(point.at("optimizer_counts"))});
    }
    return recovery;
}

Written written(const OpenBatchState& open) {
    const NoiseSums& parts = open.so_far.parts;
    Written json;
    json["samples"] = open.samples;
    json["loss_sum"] = json_number(open.so_far.loss_sum);
    json["weight"] = json_number(open.so_far.weight);
    json["micro_batches"] = open.so_far.micro_batches;
    json["parts"] = {
        {"count", parts.count}, {"weight", json_number(parts.weight)}, {"squares", json_number(parts.squares)}};
    json["measure_parts"] = open.measure_parts;
    json["plan"] = written(open.plan);
    json["out_of_memory"] = open.out_of_memory;
    json["seconds"] = json_number(open.seconds);
    json["gradients"] = open.gradients.size();
    json["buffers"] = open.buffers.size();
    json["generators"] = open.generators.size();
    return json;
}

OpenBatchState open_from(const Json& json, Lists& lists) {
    OpenBatchState open{.samples = count_from(json.at("samples")),
                        .so_far = {.loss_sum = number_from(json.at("loss_sum")),
                                   .weight = number_from(json.at("weight")),
                                   .micro_batches = count_from(json.at("micro_batches"))},
                        .measure_parts = json.at("measure_parts").get<bool>(),
                        .plan = plan_from(json.at("plan")),
                        .out_of_memory = count_from(json.at("out_of_memory")),
                        .seconds = number_from(json.at("seconds")),
                        .gradients = lists.as_many(json.at("gradients")),
                        .buffers = lists.as_many(json.at("buffers")),
                        .generators = lists.as_many(json.at("generators"))};
    const Json& parts = json.at("parts");
    open.so_far.parts = {.count = count_from(parts.at("count")),
                         .weight = number_from(parts.at("weight")),
                         .squares = number_from(parts.at("squares"))};
    return open;
}

}  // namespace

Written to_json(const TrainerState& state) {
    Written json;
    json["steps"] = state.progress.steps;
    json["samples"] = state.progress.samples;
    json["tokens"] = state.progress.tokens;
    json["sampler"] = {
        {"seed", state.sampler.seed}, {"epoch", state.sampler.epoch}, {"position", state.sampler.position}};
    json["dataset_size"] = state.dataset_size;
    json["learning_rate"] = json_number(state.learning_rate);
    json["own_rate"] = json_number(state.own_rate);
    json["last_batch"] = state.last_batch;
    json["shrunk_at"] = state.shrunk_at;
    json["guard"] = state.guard ? written(*state.guard) : Written();
    json["noise"] = {{"weight", json_number(state.noise.weight)},
                     {"variance", json_number(state.noise.sum.variance)},
                     {"squared_gradient", json_number(state.noise.sum.squared_gradient)}};
    json["recovery"] = state.recovery ? written(*state.recovery) : Written();
    json["limits"] = Written::array();
    for (const MicroBatchCap& limit : state.limits) {
        json["limits"].push_back({{"shape", limit.shape}, {"plan", written(limit.plan)}});
    }
    json["open_batch"] = state.open ? written(*state.open) : Written();
    json["parameters"] = state.parameters.size();
    json["buffers"] = state.buffers.size();
    json["optimizer_counts"] = state.optimizer_counts;
    json["generators"] = state.generators.size();
    return json;
}

TrainerState trainer_state_from(const Json& json) {
    const Json &sampler = json.at("sampler"), &noise = json.at("noise");
    Lists lists;
    TrainerState state{
        .progress = {count_from(json.at("steps")), count_from(json.at("samples")), count_from(json.at("tokens"))},
        .sampler = {.seed = seed_from(sampler.at("seed")),
                    .epoch = count_from(sampler.at("epoch")),
                    .position = count_from(sampler.at("position"))},
        .dataset_size = count_from(json.at("dataset_size")),
        .learning_rate = number_from(json.at("learning_rate")),
        .own_rate = number_from(json.at("own_rate")),
        .last_batch = count_from(json.at("last_batch")),
        .shrunk_at = count_from(json.at("shrunk_at")),
        .noise = {.weight = number_from(noise.at("weight")),
                  .sum = {.variance = number_from(noise.at("variance")),
                          .squared_gradient = number_from(noise.at("squared_gradient"))}},
        .parameters = lists.as_many(json.at("parameters")),
        .buffers = lists.as_many(json.at("buffers")),
        .optimizer_counts = counts(json.at("optimizer_counts")),
        .generators = lists.as_many(json.at("generators"))};
    state.optimizer = lists.as_many(state.optimizer_counts);
    if (!json.at("guard").is_null()) state.guard = guard_from(json.at("guard"));
    if (!json.at("recovery").is_null()) state.recovery = recovery_from(json.at("recovery"), lists);
    for (const Json& limit : json.at("limits")) {
        state.limits.push_back({shape_from(limit.at("shape")), plan_from(limit.at("plan"))});
    }
    if (!json.at("open_batch").is_null()) state.open = open_from(json.at("open_batch"), lists);
    return state;
}

}  // namespace microbatch
