#include "microbatch/core/learning_rate.h"

#include <array>
#include <cmath>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

namespace {

constexpr std::array<std::pair<RateRule, std::string_view>, 5> names = {{{RateRule::none, "none"},
                                                                         {RateRule::linear, "linear"},
                                                                         {RateRule::sqrt, "sqrt"},
                                                                         {RateRule::adam_sde, "adam-sde"},
                                                                         {RateRule::beta2_time, "beta2-time"}}};

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::usage, message);
}

// 1 - k (1 - beta): with fewer samples per step the average is over more steps.
double sde_beta(const char* name, double beta, double k) {
    const double forgotten = k * (1.0 - beta);
    if (forgotten >= 1.0 - 1e-12) {  // 10 (1 - 0.9) is one rounding below 1
        refuse(str_cat("adam-sde has no ", name, " for a batch of ", k, " times the reference: 1 - ", name, " = ",
                       1.0 - beta, " times that is not below 1. Use a batch below ", 1.0 / (1.0 - beta),
                       " times the reference, or the rule sqrt"));
    }
    return 1.0 - forgotten;
}

void require_usable(const RateConstants& scaled, RateRule rule, double k) {
    if (scaled.adam) {
        for (const double beta : {scaled.adam->beta1, scaled.adam->beta2}) {
            if (beta > 0.0 && beta < 1.0) continue;
            refuse(str_cat("the rule ", to_string(rule), " at ", k, " times the reference batch gives a beta of ", beta,
                           ": check both batches"));
        }
    }
    if (std::isfinite(scaled.learning_rate) && (!scaled.adam || std::isfinite(scaled.adam->epsilon))) return;
    refuse(str_cat("the rule ", to_string(rule), " at ", k, " times the reference batch gives a learning rate of ",
                   scaled.learning_rate, ": check the rate and both batches"));
}

}  // namespace

RateRule parse_rate_rule(std::string_view name) {
    std::string all;
    for (const auto& [rule, its] : names) {
        if (its == name) return rule;
        all += str_cat(all.empty() ? "" : ", ", its);
    }
    refuse(str_cat("unknown rule \"", name, "\"; choose one of ", all));
}

std::string_view to_string(RateRule rule) {
    for (const auto& [one, name] : names) {
        if (one == rule) return name;
    }
    return "";
}

RateConstants scale_to_batch(const RateConstants& reference, RateRule rule, std::int64_t reference_batch,
                             std::int64_t batch) {
    if (reference_batch < 1) refuse(str_cat("the reference batch is ", reference_batch, "; it must be at least 1"));
    if (batch < 1) refuse(str_cat("the batch is ", batch, "; it must be at least 1"));
    if ((rule == RateRule::adam_sde || rule == RateRule::beta2_time) && !reference.adam) {
        refuse(str_cat("the rule ", to_string(rule),
                       " changes Adam's constants, but this optimizer has none; use linear or sqrt"));
    }
    const double k = static_cast<double>(batch) / static_cast<double>(reference_batch);
    RateConstants scaled = reference;
    if (rule == RateRule::linear) scaled.learning_rate *= k;
    if (rule == RateRule::sqrt || rule == RateRule::adam_sde) scaled.learning_rate *= std::sqrt(k);
    if (rule == RateRule::adam_sde) {
        scaled.adam->beta1 = sde_beta("beta1", reference.adam->beta1, k);
        scaled.adam->beta2 = sde_beta("beta2", reference.adam->beta2, k);
        scaled.adam->epsilon /= std::sqrt(k);
    }
    if (rule == RateRule::beta2_time) scaled.adam->beta2 = std::pow(reference.adam->beta2, k);
    if (rule != RateRule::none) require_usable(scaled, rule, k);
    return scaled;
}

std::string describe_scaling(const RateConstants& reference, const RateConstants& scaled, RateRule rule,
                             std::int64_t reference_batch, std::int64_t batch) {
    std::string line = str_cat("rate ", reference.learning_rate, " at batch ", reference_batch, " is ",
                               scaled.learning_rate, " at ", batch, " (", to_string(rule), ")");
    if (!reference.adam || !scaled.adam || *reference.adam == *scaled.adam) return line;
    const auto change = [&line](const char* name, double before, double after) {
        if (before != after) line += str_cat(", ", name, " ", before, " is ", after);
    };
    change("beta1", reference.adam->beta1, scaled.adam->beta1);
    change("beta2", reference.adam->beta2, scaled.adam->beta2);
    change("epsilon", reference.adam->epsilon, scaled.adam->epsilon);
    return line;
}

}  // namespace microbatch
