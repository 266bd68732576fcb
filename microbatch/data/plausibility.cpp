#include "microbatch/data/plausibility.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/core/units.h"
#include "microbatch/data/listing.h"

namespace microbatch {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const std::string& source, const Parts&... reason) {
    throw Error(ErrorKind::bad_data, source, ": ", reason...);
}

/// The tokens that occur, in increasing order.
std::vector<std::int64_t> values_seen(const TokenScan& seen, bool even, bool odd) {
    std::vector<std::int64_t> values;
    for (std::size_t token = 0; token < TokenScan::values; ++token) {
        if ((even && seen.seen[0][token] != 0) || (odd && seen.seen[1][token] != 0)) {
            values.push_back(static_cast<std::int64_t>(token));
        }
    }
    return values;
}

/// The high half of a uint32 is 0, or nearly so for vocabularies above 65,536.
void refuse_wider_tokens(const TokenScan& seen, const std::string& source) {
    if (seen.count < 2) return;
    const std::int64_t even = values_seen(seen, true, false).back(), odd = values_seen(seen, false, true).back();
    const std::int64_t small = std::min(even, odd), large = std::max(even, odd);
    if (small == 0 ? large == 0 : small >= 16 || large < 4096 || seen.count < 64) return;
    refuse(source, "every second token is ", small == 0 ? "0" : str_cat("at most ", small),
           ", as if a file of uint32 tokens were read as uint16: write it as uint16, with a tokenizer of at most "
           "65,536 tokens");
}

/// Two ASCII characters, or two small uint8 tokens, in one: both bytes vary, but the low one stays below 128.
void refuse_narrower_tokens(const std::vector<std::int64_t>& values, const std::string& source) {
    constexpr std::int64_t enough = 16;
    std::array<bool, 256> high{};
    for (const std::int64_t value : values) {
        if (value % 256 >= 128) return;
        high[static_cast<std::size_t>(value / 256)] = true;
    }
    if (std::count(high.begin(), high.end(), true) < enough) return;
    refuse(source,
           "no token has a low byte above 127, as if text or a file of uint8 tokens were read as uint16: give text a "
           "name that does not end in .bin, or write two bytes per token");
}

/// "0 to 9, 255".
std::string ranges_of(const std::vector<std::int64_t>& values) {
    std::vector<std::string> ranges;
    for (std::size_t first = 0; first < values.size();) {
        std::size_t last = first;
        while (last + 1 < values.size() && values[last + 1] == values[last] + 1) ++last;
        ranges.push_back(first == last ? format_count(values[first])
                                       : str_cat(format_count(values[first]), " to ", format_count(values[last])));
        first = last + 1;
    }
    return list_names(ranges);
}

using Counts = std::array<std::int64_t, 256>;

Counts count_labels(std::span<const std::uint8_t> labels) {
    Counts counts{};
    for (const std::uint8_t label : labels) ++counts[label];
    return counts;
}

std::vector<std::int64_t> labels_of(const Counts& counts) {
    std::vector<std::int64_t> labels;
    for (std::size_t i = 0; i < counts.size(); ++i) {
        if (counts[i] > 0) labels.push_back(static_cast<std::int64_t>(i));
    }
    return labels;
}

std::string images(std::int64_t count) {
    return str_cat(format_count(count), count == 1 ? " image" : " images");
}

}  // namespace

std::vector<std::string> check_tokens(const TokenScan& seen, const std::string& source) {
    const auto values = values_seen(seen, true, true);
    if (values.size() == 1) {
        refuse(source, "all ", format_count(seen.count), " tokens are ", values.front(),
               ": there is nothing to learn; write the file again");
    }
    refuse_wider_tokens(seen, source);
    refuse_narrower_tokens(values, source);
    // Few tokens above a gap of half of a large vocabulary, and dense ones below it: unlike the rare tokens of a small
    // file.
    for (std::size_t i = 1; i < values.size() && seen.vocabulary >= 512; ++i) {
        const std::int64_t below = values[i - 1];
        const auto last = static_cast<std::int64_t>(i), stray = static_cast<std::int64_t>(values.size()) - last;
        if (values[i] - below <= seen.vocabulary / 2 || 4 * last < below || 8 * stray > last) continue;
        return {str_cat(stray == 1 ? "token " : "tokens ", ranges_of({values.begin() + last, values.end()}),
                        stray == 1 ? " is" : " are", " far above the others, which end at ", format_count(below),
                        ": remove them if they are a mistake; otherwise the model gets a vocabulary of ",
                        format_count(seen.vocabulary))};
    }
    return {};
}

std::vector<std::string> check_labels(std::span<const std::uint8_t> trained, std::span<const std::uint8_t> held_out,
                                      const std::string& source) {
    const Counts of_trained = count_labels(trained), of_held_out = count_labels(held_out);
    if (const auto only = labels_of(of_trained); only.size() == 1) {
        refuse(source, "all ", format_count(static_cast<std::int64_t>(trained.size())), " training labels are ",
               only.front(), ": there is nothing to distinguish; give images of at least 2 classes");
    }
    Counts all{}, unseen{};
    for (std::size_t i = 0; i < all.size(); ++i) {
        all[i] = of_trained[i] + of_held_out[i];
        if (of_trained[i] == 0) unseen[i] = of_held_out[i];
    }
    std::vector<std::string> warnings;
    const auto present = labels_of(all);
    const std::int64_t classes = present.back() + 1, absent = classes - static_cast<std::int64_t>(present.size());
    if (absent > 0) {
        warnings.push_back(str_cat("the labels are ", ranges_of(present), " (",
                                   images(all[static_cast<std::size_t>(present.back())]), " of the largest): ", absent,
                                   " of the model's ", classes, " classes ", absent == 1 ? "has" : "have",
                                   " no image; number the classes from 0 without gaps"));
    }
    if (const auto labels = labels_of(unseen); !labels.empty()) {
        std::int64_t count = 0;
        for (const std::int64_t n : unseen) count += n;
        warnings.push_back(str_cat(images(count), " of label ", ranges_of(labels), count == 1 ? " is" : " are",
                                   " held out, but no training image has it"));
    }
    if (const auto labels = labels_of(of_held_out); labels.size() == 1 && held_out.size() >= 10) {
        warnings.push_back(str_cat("all ", format_count(static_cast<std::int64_t>(held_out.size())),
                                   " held-out images have label ", labels.front(),
                                   ": their loss says nothing about the other classes"));
    }
    return warnings;
}

void refuse_grouped(std::span<const std::uint8_t> labels, const std::string& source) {
    std::size_t runs = 1;
    for (std::size_t i = 1; i < labels.size(); ++i) runs += labels[i] != labels[i - 1] ? 1 : 0;
    if (runs == 1 || runs * 10 > labels.size() || labels_of(count_labels(labels)).size() != runs) return;
    refuse(source, "the images are sorted by class, so the last tenth, which is held out, has almost only label ",
           int{labels.back()}, " of ", runs,
           ": shuffle images and labels together, or add a t10k- pair as held-out data");
}

}  // namespace microbatch
