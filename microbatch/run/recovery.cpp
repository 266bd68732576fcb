#include "microbatch/run/recovery.h"

#include <algorithm>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"
#include "microbatch/io/safetensors.h"

namespace microbatch {
namespace {

constexpr std::int64_t most_points = 2;

void validate(const RecoveryOptions& options) {
    const auto require = [](bool good, const char* name, auto value, const char* rule) {
        if (!good) throw Error(ErrorKind::usage, "recovery: ", name, " is ", value, "; it must be ", rule);
    };
    require(options.most >= 0, "most", options.most, "at least 0");
    require(options.every >= 1, "every", options.every, "at least 1 step");
    require(options.margin >= 0, "margin", options.margin, "at least 0 steps");
    require(options.warmup >= 0, "warmup", options.warmup, "at least 0 steps");
    require(options.rate_factor > 0.0 && options.rate_factor <= 1.0, "rate_factor", options.rate_factor,
            "above 0 and at most 1");
    require(options.memory_bytes >= 0, "memory_bytes", options.memory_bytes, "at least 0");
}

// Each process knows how many tensors it has.
std::string count_of_rank(int rank) {
    return str_cat("tensors.", rank);
}

void put_count(const Accumulator& accumulator, StateDict& snapshot) {
    const auto tensors = StateReader(snapshot).section("optimizer").tensors().size();
    const StateWriter writer(snapshot, "optimizer/");
    if (accumulator.is_sharded()) writer.put("parts", accumulator.reducer().size());
    writer.put(accumulator.is_sharded() ? count_of_rank(accumulator.reducer().rank()) : "tensors", tensors);
}

// An optimizer that lacks some of its tensors would continue as if it had not created them yet.
void require_all_tensors(const StateReader& saved) {
    if (!saved.exists()) return;
    std::int64_t counted = 0;
    if (!saved.has("parts")) {
        counted = saved.count("tensors");
    } else {
        const std::int64_t parts = saved.count("parts", 2, INT32_MAX);
        std::int64_t found = 0;
        for (int rank = 0; rank < parts; ++rank) {
            if (!saved.has(count_of_rank(rank))) continue;
            ++found;
            counted += saved.count(count_of_rank(rank));
        }
        if (found != 1 && found != parts) saved.refuse("parts", str_cat("there are ", found));
    }
    const auto tensors = static_cast<std::int64_t>(saved.tensors().size());
    if (counted != tensors) saved.refuse("tensors", str_cat("there are ", tensors));
}

// Makes a checkpoint's snapshot that of this process: leaves out what others have.
void make_own(const Accumulator& accumulator, StateDict& snapshot) {
    std::vector<std::string> others;
    const auto collect = [&](const auto& values) {
        constexpr std::string_view section = "optimizer/";
        for (const auto& [name, value] : values) {
            if (!name.starts_with(section)) continue;
            const std::string_view rest = std::string_view(name).substr(section.size());
            const bool counts = rest == "parts" || rest == "tensors" || rest.starts_with("tensors.");
            if (counts || !accumulator.optimizer().keeps(rest)) others.push_back(name);
        }
    };
    collect(snapshot.tensors());
    collect(snapshot.scalars());
    for (const std::string& name : others) snapshot.erase(name);
    put_count(accumulator, snapshot);
}

}  // namespace

NamedTensors weights_of(const Accumulator& accumulator) {
    NamedTensors weights = accumulator.parameters();
    for (NamedTensor& buffer : accumulator.model().buffers()) weights.push_back(std::move(buffer));
    return weights;
}

StateDict training_snapshot(const Accumulator& accumulator) {
    StateDict state;
    const StateWriter writer(state);
    writer.section("model").put(weights_of(accumulator));
    accumulator.optimizer().save(writer.section("optimizer"));
    put_count(accumulator, state);
    return state;
}

StateDict own_part(const StateDict& run) {
    StateDict own;
    const auto add = [&](const auto& values) {
        for (const auto& [name, value] : values) {
            const std::string_view rest =
                name.starts_with("recovery/") ? std::string_view(name).substr(name.find('/', 9) + 1) : name;
            if (rest.starts_with("optimizer/") && rest != "optimizer/parts") own.put(name, value);
        }
    };
    add(run.tensors());
    add(run.scalars());
    return own;
}

Commit prepare_snapshot(Accumulator& accumulator, const StateReader& reader) {
    Commit model = prepare_tensors(reader.section("model"), weights_of(accumulator), "parameter");
    const StateReader saved = reader.section("optimizer");
    require_all_tensors(saved);
    Commit optimizer = accumulator.optimizer().prepare(saved);
    return [model = std::move(model), optimizer = std::move(optimizer)] {
        model();
        optimizer();
    };
}

void forget_roll_backs(StateDict& run) {
    if (!run.has("recovery/")) return;
    const StateReader reader(run);
    if (reader.section("recovery").count("times") > 0) {
        run.set("run/learning_rate", reader.section("run").positive("own_rate"));
    }
    run.set("recovery/times", std::int64_t{0});
    run.set("recovery/rolled_back_at", std::int64_t{0});
}

Recovery::Recovery(Accumulator& accumulator, RecoveryOptions options)
    : accumulator_(&accumulator), options_(std::move(options)) {
    validate(options_);
}

std::string Recovery::keep(std::int64_t steps, const SpikeGate& gate, const Reclaimers& reclaimers) {
    if (steps > rolled_back_at_ && gate.guard().is_calm()) calm_rate_ = accumulator_->optimizer().learning_rate();
    const std::int64_t last = points_.empty() ? 0 : std::max(points_.back().steps, rolled_back_at_);
    const bool due = points_.empty() || (steps - last >= options_.every && gate.guard().is_calm());
    if (!due || failed_) return std::exchange(warning_, {});
    // Before the new one is taken, so that there are never three.
    if (std::ssize(points_) == most_points) points_.pop_front();
    Reclaimers all = reclaimers;
    all.push_back({[this] { return !options_.folder.empty() && std::exchange(options_.memory_bytes, 0) > 0; }});
    try {
        add(retry_on_oom(
            all, [&] { return make_point(steps, gate); }, [] {}, [](const Reclaimer&, const std::string&) {},
            [](const std::string&) { throw Error(ErrorKind::usage, "out of memory"); }));
    } catch (const Error& error) {
        fail(error.what());
    }
    return std::exchange(warning_, {});
}

// In memory if its share allows it, otherwise in a file.
Recovery::Point Recovery::make_point(std::int64_t steps, const SpikeGate& gate) {
    Point point{steps, training_snapshot(*accumulator_)};
    gate.save(StateWriter(point.state, "gate/"));
    if (point.state.bytes() <= options_.memory_bytes / most_points) {
        point.state.own_on_host();
    } else if (!options_.folder.empty()) {
        point.state = moved_to_file(point.state, new_file());
    } else {
        throw Error(ErrorKind::usage, "it does not fit in the remaining memory");
    }
    return point;
}

void Recovery::add(Point point) {
    std::erase_if(in_use_, [](const auto& one) { return one.first.expired(); });
    for (const auto& [name, tensor] : point.state.tensors()) {
        if (tensor.is_resident()) in_use_.emplace_back(tensor.shape().storage().getWeakStorageImpl(), tensor.bytes());
    }
    points_.push_back(std::move(point));
}

void Recovery::fail(const std::string& why) {
    failed_ = true;
    warning_ = str_cat("no more snapshots are taken: ", why);
}

std::string Recovery::give_up() {
    given_up_ = true;
    points_.clear();
    if (!failed_) fail("another rank could not take one, and the run can no longer be rolled back");
    return std::exchange(warning_, {});
}

std::optional<std::int64_t> Recovery::roll_back(std::int64_t steps, SpikeGate& gate) {
    const std::int64_t good = steps - gate.guard().refused_in_a_row();  // the last applied step
    if (points_.empty() || good <= points_.front().steps) return std::nullopt;
    auto point = points_.rbegin();
    while (point + 1 != points_.rend() && point->steps > good - options_.margin) ++point;
    const StateReader reader(point->state);
    point->state.require_readable();
    const Commit weights = prepare_snapshot(*accumulator_, reader);
    const StateReader memory = reader.section("gate");
    const Commit gate_as_it_was = memory.exists() ? gate.prepare(memory) : [&gate] { gate.reset(); };
    weights();
    gate_as_it_was();
    points_.erase(point.base(), points_.end());
    ++times_;
    rolled_back_at_ = steps;
    rate_limit_ = std::min(rate_limit_, options_.rate_factor * calm_rate_);
    return points_.back().steps;
}

bool Recovery::is_recovering(std::int64_t steps) const {
    return times_ > 0 && steps - rolled_back_at_ < options_.every;
}

double Recovery::limited(double scheduled, std::int64_t steps) const {
    const double rate = std::min(scheduled, rate_limit_);
    const std::int64_t since = steps - rolled_back_at_ + 1;
    if (times_ == 0 || since >= options_.warmup) return rate;
    return rate * static_cast<double>(since) / static_cast<double>(options_.warmup);
}

std::filesystem::path Recovery::new_file() {
    // An existing file of this name belongs to a killed process.
    const int rank = accumulator_->reducer().rank();  // several may share the folder
    std::filesystem::path file;
    do {
        file = options_.folder / str_cat("snapshot-", rank == 0 ? "" : str_cat(rank, "-"), files_++, ".bin");
    } while (std::filesystem::exists(std::filesystem::symlink_status(file)));
    return file;
}

bool Recovery::reclaim_memory() {
    const auto in_memory = [](const Point& point) { return !point.state.reads_files(); };
    if (std::none_of(points_.begin(), points_.end(), in_memory)) return false;
    options_.memory_bytes = 0;
    for (Point& point : points_) {
        if (!in_memory(point)) continue;
        try {
            if (options_.folder.empty()) throw Error(ErrorKind::usage, "there is no folder for them");
            point.state = moved_to_file(point.state, new_file());
        } catch (const Error& error) {
            fail(error.what());
        }
    }
    std::erase_if(points_, in_memory);
    return true;
}

void Recovery::save(const StateWriter& writer) const {
    writer.put("times", times_);
    writer.put("rolled_back_at", rolled_back_at_);
    writer.put("calm_rate", calm_rate_);
    if (times_ > 0) writer.put("rate_limit", rate_limit_);
    writer.put("in_files", options_.memory_bytes == 0);
    writer.put("failed", failed_);
    writer.put("points", points_.size());
    for (std::size_t i = 0; i < points_.size(); ++i) {
        const StateWriter one = writer.section(std::to_string(i));
        one.put("steps", points_[i].steps);
        one.merge(points_[i].state);
    }
}

Commit Recovery::prepare(const StateReader& reader) {
    Recovery restored = *this;
    restored.points_.clear();
    restored.times_ = reader.count("times");
    restored.rolled_back_at_ = reader.count("rolled_back_at");
    restored.calm_rate_ = reader.positive("calm_rate");
    if (restored.times_ > 0) restored.rate_limit_ = reader.positive("rate_limit");
    restored.failed_ = reader.flag("failed");
    if (reader.flag("in_files") && !options_.folder.empty()) restored.options_.memory_bytes = 0;
    const std::int64_t points = reader.count("points", 0, most_points);
    for (std::int64_t i = 0; i < points; ++i) {
        const StateReader one = reader.section(std::to_string(i));
        prepare_snapshot(*accumulator_, one);
        if (one.section("gate").exists()) SpikeGate({}).prepare(one.section("gate"));
        Point point{one.count("steps"), one.copy()};
        point.state.erase("steps");
        make_own(*accumulator_, point.state);
        restored.points_.push_back(std::move(point));
    }
    return [this, restored = std::move(restored)]() mutable {
        std::deque<Point> taken = std::exchange(restored.points_, {});
        *this = std::move(restored);
        for (Point& point : taken) take_over(std::move(point));
    };
}

// Turns a snapshot from a checkpoint into one of this run: in memory, or in a file of its own.
void Recovery::take_over(Point point) {
    const auto in_memory = [&] {
        if (!options_.folder.empty() && point.state.bytes() > options_.memory_bytes / most_points) return false;
        return unless_oom([&] { point.state.own_on_host(); }).has_value();
    };
    try {
        if (!in_memory()) {
            if (options_.folder.empty()) throw Error(ErrorKind::usage, "there is neither memory nor a folder for them");
            options_.memory_bytes = 0;
            point.state = moved_to_file(point.state, new_file());
        }
        add(std::move(point));
    } catch (const Error& error) {
        if (error.kind() == ErrorKind::bad_data) throw;
        fail(error.what());
    }
}

std::int64_t Recovery::memory_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [storage, size] : in_use_) bytes += storage.expired() ? 0 : size;
    return bytes;
}

}  // namespace microbatch
