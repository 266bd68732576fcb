#include "microbatch/core/plan_report.h"

#include <algorithm>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"

namespace microbatch {
namespace {

// A size to pass as a budget: three digits, and not below the bytes.
std::string enough(std::int64_t bytes) {
    const std::string rounded = format_bytes(bytes);
    return parse_bytes(rounded) >= bytes ? rounded : format_bytes(bytes + bytes / 200 + 1);
}

// What the user can do about a peak that is too large.
std::string advice(const PlanReport& report, const Candidate& candidate, const MemoryParts& parts) {
    const std::int64_t missing = candidate.peak_bytes() - report.budget_bytes;
    std::string result = str_cat("what would help: a budget of ", enough(candidate.peak_bytes()));
    if (report.given && candidate.plan.micro_batch > 1) result += ", a smaller micro-batch";
    if (parts.activations >= missing) result += ", shorter or smaller samples";
    if (parts.optimizer_state >= missing) {
        result += ", an optimizer that keeps less state (SGD without momentum keeps none)";
    }
    if (parts.other >= missing && parts.other > candidate.peak_bytes() / 20) {
        result += ", a smaller batch (all its samples are in memory)";
    }
    return result + ", a smaller model";
}

bool is_known(const PlanReport& report, const Candidate& candidate) {
    return candidate.peak_bytes() > 0 && (candidate.fits || candidate.peak_bytes() > report.budget_bytes);
}

// The whole batch at once, with or without recompute; nullptr if its peak is unknown.
const Candidate* whole_batch_of(const PlanReport& report, bool recompute) {
    for (const Candidate& one : report.candidates) {
        if (one.micro_batches == 1 && one.plan.recompute == recompute && is_known(report, one)) return &one;
    }
    return nullptr;
}

std::string explain_cut(const PlanReport& report, const Candidate& chosen) {
    if (chosen.micro_batches == 1) return "the whole batch fits and nothing is faster: no accumulation needed";
    const Candidate* kept = whole_batch_of(report, /*recompute=*/false);
    const Candidate* recomputed = whole_batch_of(report, /*recompute=*/true);
    const Candidate* whole = kept != nullptr ? kept : recomputed;
    if (whole == nullptr) return "the fastest that fits";
    if (whole->fits && whole->measured) return "the fastest; the whole batch would also fit, but is not faster";
    if (whole->fits) return "the fastest that was tried; the whole batch would also fit, but promises no gain";
    const bool fits_recomputed = recomputed != nullptr && recomputed->fits;
    return str_cat("the fastest that fits; the whole batch would need ", format_bytes(whole->peak_bytes()),
                   fits_recomputed ? ", or recompute, which is slower" : "");
}

std::string samples(std::int64_t count) {
    return str_cat(count, count == 1 ? " sample" : " samples");
}

}  // namespace

std::int64_t PhasePeaks::largest() const {
    return std::max({first_micro_batch, later_micro_batches, first_update, later_updates});
}

std::int64_t Candidate::peak_bytes() const {
    if (measured) return measured->largest();
    return predicted ? predicted->largest() : 0;
}

const Candidate& PlanReport::choice() const {
    if (!chosen) throw Error(ErrorKind::does_not_fit, explain_misfit(*this));
    return candidates.at(*chosen);
}

MemoryParts parts_of(const PlanReport& report, const Candidate& candidate) {
    if (!candidate.measured && !candidate.predicted) {
        throw Error(ErrorKind::usage, str_cat("the memory of a micro-batch of ", candidate.plan.micro_batch,
                                              " is unknown: it was not measured"));
    }
    const PhasePeaks& peaks = candidate.measured ? *candidate.measured : *candidate.predicted;
    MemoryParts parts = report.fixed;
    // In the other phases the gradients of the batch exist.
    if (peaks.first_micro_batch > std::max({peaks.later_micro_batches, peaks.first_update, peaks.later_updates})) {
        parts.gradients = 0;
    }
    // In a run of a single step the state is created after the micro-batches.
    if (peaks.later_updates == 0 && peaks.first_update < peaks.largest()) parts.optimizer_state = 0;
    parts.activations = std::max<std::int64_t>(0, peaks.largest() - parts.total());
    return parts;
}

const Candidate* smallest(const PlanReport& report) {
    const Candidate* result = nullptr;
    for (const Candidate& candidate : report.candidates) {
        if (!is_known(report, candidate)) continue;
        if (result == nullptr || candidate.peak_bytes() < result->peak_bytes()) result = &candidate;
    }
    return result;
}

std::string explain_choice(const PlanReport& report, bool given, bool forced) {
    if (!report.chosen) return "nothing fits";
    const Candidate& chosen = report.candidates.at(*report.chosen);
    std::string why = given ? "as given" : explain_cut(report, chosen);
    if (!chosen.plan.recompute || forced) return why;
    const bool any_kept = std::any_of(report.candidates.begin(), report.candidates.end(),
                                      [](const Candidate& one) { return !one.plan.recompute && one.fits; });
    return why + (any_kept ? "; recompute makes room for it" : "; without recompute it does not fit");
}

std::string explain_misfit(const PlanReport& report) {
    const std::string budget = format_bytes(report.budget_bytes);
    const Candidate* least = smallest(report);
    if (least == nullptr) {
        const std::int64_t size = report.candidates.empty() ? 1 : report.candidates.front().plan.micro_batch;
        return str_cat(
            "nothing fits: a micro-batch of ", samples(size),
            " and the optimizer's step after it do not fit in the memory budget of ", budget,
            ", and there was not enough memory to measure how much they need: use a larger budget, shorter or "
            "smaller samples, or a smaller model");
    }
    const MemoryParts parts = parts_of(report, *least);
    const std::string size = samples(least->plan.micro_batch);
    const std::string with = least->plan.recompute ? " with recompute" : "";
    const std::string subject =
        report.given ? str_cat("the micro-batch of ", size, " that was asked for does not fit:", with, " it")
                     : str_cat("nothing fits: the smallest peak, with a micro-batch of ", size, with, ",");
    return str_cat(subject, " needs ", format_bytes(least->peak_bytes()), ", ",
                   format_bytes(least->peak_bytes() - report.budget_bytes), " more than the memory budget of ", budget,
                   "\n  parameters       ", format_bytes(parts.parameters), "\n  gradients        ",
                   format_bytes(parts.gradients), "\n  optimizer state  ", format_bytes(parts.optimizer_state),
                   "\n  activations      ", format_bytes(parts.activations), " of ", size, ", with temporaries",
                   "\n  other            ", format_bytes(parts.other), "\n", advice(report, *least, parts));
}

}  // namespace microbatch
