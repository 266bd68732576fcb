#include "microbatch/core/keep.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

namespace microbatch {
namespace {

using Values = std::vector<std::int32_t>;

/// A place of a program, after one of its operators, and what is alive there.
struct Place {
    std::int32_t after = -1;
    Values alive = {};
    std::int64_t bytes = 0;
};

class Layout {
public:
    explicit Layout(const Program& program) : program_(program) {}

    std::int32_t barriers() const { return static_cast<std::int32_t>(program_.barriers.size()); }

    std::int32_t begin(std::int32_t segment) const {
        return segment == 0 ? 0 : program_.barriers[static_cast<std::size_t>(segment - 1)];
    }
    std::int32_t end(std::int32_t segment) const {
        return segment == barriers() ? program_.operators : begin(segment + 1);
    }

    /// The values that a segment uses and an earlier one made.
    Values needed_by(std::int32_t segment) const {
        return those([&](const ProgramValue& value) {
            const auto use = std::ranges::lower_bound(value.used_by, begin(segment));
            return value.made_by < begin(segment) && use != value.used_by.end() && *use < end(segment);
        });
    }

    /// The place in the segment where the fewest bytes are alive; the last such one.
    Place least_in(std::int32_t segment) const {
        Place least{.bytes = std::numeric_limits<std::int64_t>::max()};
        for (std::int32_t after = begin(segment); after < end(segment); ++after) {
            Values alive = those([after](const ProgramValue& value) {
                return value.made_by <= after && !value.used_by.empty() && value.used_by.back() > after;
            });
            const std::int64_t size = bytes(alive);
            if (size <= least.bytes) least = {after, std::move(alive), size};
        }
        return least;
    }

    std::int64_t bytes(const Values& values) const {
        std::set<std::int32_t> counted;
        std::int64_t sum = 0;
        for (const std::int32_t i : values) {
            const ProgramValue& value = program_.values[static_cast<std::size_t>(i)];
            // A copy is kept of what is overwritten.
            if (value.overwritten || counted.insert(value.storage).second) sum += value.bytes;
        }
        return sum;
    }

    bool made_after(std::int32_t value, const Place& place) const {
        return program_.values[static_cast<std::size_t>(value)].made_by > place.after;
    }

private:
    template <class Predicate>
    Values those(const Predicate& predicate) const {
        Values chosen;
        for (std::size_t i = 0; i < program_.values.size(); ++i) {
            if (predicate(program_.values[i])) chosen.push_back(static_cast<std::int32_t>(i));
        }
        return chosen;
    }

    const Program& program_;
};

Keep keep_nothing(const Program& program) {
    return {.fingerprint = program.fingerprint,
            .forward = std::vector<bool>(program.values.size(), false),
            .before = std::vector<Values>(program.barriers.size() + 1)};
}

void mark(Keep& keep, const Values& values) {
    for (const std::int32_t value : values) keep.forward[static_cast<std::size_t>(value)] = true;
}

/// Chooses the places. Place i lies before barrier i; number 0 is the start of the program, where nothing is alive yet.
class Choice {
public:
    explicit Choice(const Program& program) : layout_(program), barriers_(layout_.barriers()) {
        places_.push_back({});
        for (std::int32_t segment = 0; segment < barriers_; ++segment) places_.push_back(layout_.least_in(segment));
        for (std::int32_t barrier = 1; barrier <= barriers_; ++barrier) needed_.push_back(layout_.needed_by(barrier));
        measure_spans();
    }

    /// What the chosen places take, in bytes, and their numbers, in order, the start first.
    std::pair<std::int64_t, std::vector<std::int32_t>> least() const {
        std::vector<std::int32_t> best;
        std::int64_t best_bytes = std::numeric_limits<std::int64_t>::max();
        for (const std::int64_t most : limits()) {
            const auto [bytes, chosen] = within(most);
            if (chosen.empty() || bytes + most >= best_bytes) continue;
            best_bytes = bytes + most;
            best = chosen;
        }
        return {best_bytes, best};
    }

    const Place& place(std::int32_t number) const { return places_[static_cast<std::size_t>(number)]; }

    /// What the segments after the barriers [first, last] need and what is made after the place.
    Values inside(std::int32_t place_number, std::int32_t first, std::int32_t last) const {
        std::set<std::int32_t> all;
        for (std::int32_t barrier = first; barrier <= last; ++barrier) {
            for (const std::int32_t value : needed_[static_cast<std::size_t>(barrier - 1)]) {
                if (layout_.made_after(value, place(place_number))) all.insert(value);
            }
        }
        return {all.begin(), all.end()};
    }

private:
    // spans_[a][b]: the bytes inside if place a is chosen and the next one lies after barrier b. The barriers between
    // them begin with the one that the place lies before; the start lies before the first.
    void measure_spans() {
        spans_.resize(places_.size());
        for (std::int32_t a = 0; a <= barriers_; ++a) {
            auto& row = spans_[static_cast<std::size_t>(a)];
            row.assign(places_.size(), 0);
            for (std::int32_t b = first_of(a); b <= barriers_; ++b) {
                row[static_cast<std::size_t>(b)] = layout_.bytes(inside(a, first_of(a), b));
            }
        }
    }

    static std::int32_t first_of(std::int32_t place_number) { return std::max(place_number, 1); }

    std::vector<std::int64_t> limits() const {
        constexpr std::size_t most = 64;
        std::set<std::int64_t> sizes;
        for (const auto& row : spans_) sizes.insert(row.begin(), row.end());
        const std::vector<std::int64_t> all(sizes.begin(), sizes.end());
        if (all.size() <= most) return all;
        std::vector<std::int64_t> some;
        for (std::size_t i = 0; i < most; ++i) some.push_back(all[i * (all.size() - 1) / (most - 1)]);
        return some;
    }

    // Shortest path: of the choices in which no span exceeds the limit, the one that keeps the fewest bytes. Empty if every
    // choice has a larger span.
    std::pair<std::int64_t, std::vector<std::int32_t>> within(std::int64_t most) const {
        constexpr std::int64_t unknown = std::numeric_limits<std::int64_t>::max();
        const auto count = static_cast<std::size_t>(barriers_) + 1;
        std::vector<std::int64_t> bytes(count, unknown);
        std::vector<std::int32_t> previous(count, -1);
        bytes[0] = 0;
        std::int64_t best = unknown;
        std::int32_t last = -1;
        for (std::int32_t a = 0; a <= barriers_; ++a) {
            if (bytes[static_cast<std::size_t>(a)] == unknown) continue;
            const auto& row = spans_[static_cast<std::size_t>(a)];
            const std::int64_t so_far = bytes[static_cast<std::size_t>(a)];
            if (row.back() <= most && so_far < best) {
                best = so_far;
                last = a;
            }
            for (std::int32_t next = a + 1; next <= barriers_; ++next) {
                if (next - 1 >= first_of(a) && row[static_cast<std::size_t>(next - 1)] > most) break;
                const std::int64_t sum = so_far + place(next).bytes;
                if (sum < bytes[static_cast<std::size_t>(next)]) {
                    bytes[static_cast<std::size_t>(next)] = sum;
                    previous[static_cast<std::size_t>(next)] = a;
                }
            }
        }
        std::vector<std::int32_t> chosen;
        for (; last >= 0; last = previous[static_cast<std::size_t>(last)]) chosen.push_back(last);
        std::ranges::reverse(chosen);
        return {best, chosen};
    }

    Layout layout_;
    std::int32_t barriers_;
    std::vector<Place> places_;   // by number
    std::vector<Values> needed_;  // by barrier, from 1
    std::vector<std::vector<std::int64_t>> spans_;
};

std::int64_t bytes_of(const Program& program, const Keep& keep) {
    Values kept;
    for (std::size_t i = 0; i < keep.forward.size(); ++i) {
        if (keep.forward[i]) kept.push_back(static_cast<std::int32_t>(i));
    }
    return Layout(program).bytes(kept);
}

}  // namespace

Keep keep_all(const Program& program) {
    const Layout layout(program);
    Keep keep = keep_nothing(program);
    for (std::int32_t segment = 1; segment <= layout.barriers(); ++segment) mark(keep, layout.needed_by(segment));
    return keep;
}

Keep keep_least(const Program& program) {
    const Choice choice(program);
    const std::int32_t barriers = static_cast<std::int32_t>(program.barriers.size());
    Keep keep = keep_nothing(program);
    const auto [least_bytes, places] = choice.least();
    Keep all = keep_all(program);
    if (bytes_of(program, all) <= least_bytes) return all;
    for (std::size_t i = 0; i < places.size(); ++i) {
        const std::int32_t first = std::max(places[i], 1);
        const std::int32_t last = i + 1 < places.size() ? places[i + 1] - 1 : barriers;
        mark(keep, choice.place(places[i]).alive);
        if (last >= first) keep.before[static_cast<std::size_t>(last)] = choice.inside(places[i], first, last);
    }
    return keep;
}

KeepPlans keep_plans_of(const Program& program) {
    return {keep_all(program), keep_least(program)};
}

}  // namespace microbatch
