#include "microbatch/distributed/liveness.h"

#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds between_beats{250};

std::string beat_of(int rank) {
    return str_cat("alive/", rank);
}

std::string farewell_of(int rank) {
    return str_cat("left/", rank);
}

}  // namespace

Liveness::Liveness(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds silence)
    : store_(store->clone()),  // a connection of its own: another one may be waiting
      rank_(rank),
      size_(size),
      silence_(silence),
      beats_(static_cast<std::size_t>(size), 0),
      seen_(static_cast<std::size_t>(size), Clock::now()) {
    store_->setTimeout(silence_);
    thread_ = std::thread([this] { run(); });
}

Liveness::~Liveness() {
    {
        const std::lock_guard lock(mutex_);
        ends_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

void Liveness::run() {
    std::unique_lock lock(mutex_);
    while (!ends_ && lost_.empty()) {
        lock.unlock();
        std::string failure;
        try {
            store_->add(beat_of(rank_), 1);
            look();
        } catch (const std::exception&) {
            // The store is the first rank's, or the launcher's.
            failure = "the process that holds the store has ended: rank 0, or what started the run";
        }
        lock.lock();
        if (!failure.empty() && lost_.empty()) lost_ = failure;
        if (!lost_.empty()) changed_.notify_all();
        changed_.wait_for(lock, between_beats, [this] { return ends_; });
    }
}

void Liveness::look() {
    for (int other = 0; other < size_; ++other) {
        if (other == rank_) continue;
        std::string found;
        const auto i = static_cast<std::size_t>(other);
        const std::int64_t beat = store_->add(beat_of(other), 0);
        if (store_->check({farewell_of(other)})) {
            const std::vector<std::uint8_t> why = store_->get(farewell_of(other));
            found = str_cat("rank ", other, " has ended: ", std::string(why.begin(), why.end()));
        } else if (beat != beats_[i]) {
            beats_[i] = beat;
            seen_[i] = Clock::now();
        } else if (Clock::now() - seen_[i] > silence_) {
            found = str_cat("rank ", other, " has ended or hangs: it has shown no sign of life for ",
                            std::chrono::duration_cast<std::chrono::seconds>(silence_).count(), " s");
        }
        if (found.empty()) continue;
        const std::lock_guard lock(mutex_);
        if (lost_.empty()) lost_ = found;
        return;
    }
}

std::string Liveness::lost() const {
    const std::lock_guard lock(mutex_);
    return lost_;
}

std::string Liveness::wait_for_lost() const {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, silence_ + 4 * between_beats, [this] { return !lost_.empty(); });
    return lost_;
}

void Liveness::leave(const std::string& why) noexcept {
    try {
        store_->set(farewell_of(rank_), std::vector<std::uint8_t>(why.begin(), why.end()));
    } catch (const std::exception&) {  // then nobody is told
    }
}

}  // namespace microbatch
