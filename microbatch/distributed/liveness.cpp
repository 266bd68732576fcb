#include "microbatch/distributed/liveness.h"

#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "microbatch/core/str_cat.h"

namespace microbatch {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds between_beats{250}, end_of_thread{1000};

std::vector<std::uint8_t> bytes_of(const std::string& text) {
    return {text.begin(), text.end()};
}

}  // namespace

struct Liveness::Watch {
    Watch(const c10::intrusive_ptr<c10d::Store>& given, int own_rank, int ranks, std::chrono::milliseconds most)
        : store(given->clone()),  // connections of their own: another one may be waiting
          farewells(given->clone()),
          rank(own_rank),
          size(ranks),
          silence(most),
          // Groups of the same ranks that follow each other share a store.
          generation(store->add(key_of(own_rank), 1)),
          others(static_cast<std::size_t>(ranks)) {}

    std::string key(const char* what, int of) const { return str_cat(what, "/", generation, "/", of); }

    void run() {
        std::unique_lock lock(mutex);
        while (!ends && lost.empty()) {
            lock.unlock();
            std::string found;
            try {
                store->add(key("alive", rank), 1);
                found = look();
            } catch (const std::exception&) {
                found = "the process that holds the store has ended: rank 0, or what started the run";
            }
            lock.lock();
            last_round = Clock::now();
            lost = found;
            changed.notify_all();
            if (!found.empty()) break;
            changed.wait_for(lock, between_beats, [this] { return ends; });
        }
        has_ended = true;
        changed.notify_all();
    }

    // After a pause of this process, of all or of the store, nobody has been heard of.
    void forgive_a_pause() {
        const auto now = Clock::now(), before = std::exchange(looked, now);
        if (now - before < 4 * between_beats) return;
        for (Other& other : others) {
            if (other.seen) other.seen = now;
        }
    }

    std::string look() {
        forgive_a_pause();
        for (int i = 0; i < size; ++i) {
            if (i == rank) continue;
            if (store->check({key("left", i)})) {
                const std::vector<std::uint8_t> why = store->get(key("left", i));
                return str_cat("rank ", i, " has ended: ", std::string(why.begin(), why.end()));
            }
            if (!store->check({key("alive", i)})) continue;  // not begun
            const std::vector<std::uint8_t> beat = store->get(key("alive", i));
            Other& other = others[static_cast<std::size_t>(i)];
            if (beat != other.beat || !other.seen) {
                other = {beat, Clock::now()};
            } else if (Clock::now() - *other.seen > silence) {
                return str_cat("rank ", i, " has ended or hangs: it has shown no sign of life for ",
                               std::chrono::duration_cast<std::chrono::seconds>(silence).count(), " s");
            }
        }
        return {};
    }

    struct Other {
        std::vector<std::uint8_t> beat;
        std::optional<Clock::time_point> seen;  // when the beat was last another one
    };

    c10::intrusive_ptr<c10d::Store> store, farewells;
    const int rank, size;
    const std::chrono::milliseconds silence;
    const std::int64_t generation;
    std::vector<Other> others;
    Clock::time_point looked = Clock::now();

    std::mutex mutex;
    std::condition_variable changed;
    Clock::time_point last_round = Clock::now();
    std::string lost;
    bool ends = false, has_ended = false;
};

std::string Liveness::key_of(int rank) {
    return str_cat("generation/", rank);
}

Liveness::Liveness(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds silence)
    : watch_(std::make_shared<Watch>(store, rank, size, silence)), thread_([watch = watch_] { watch->run(); }) {}

Liveness::~Liveness() {
    std::unique_lock lock(watch_->mutex);
    watch_->ends = true;
    watch_->changed.notify_all();
    const bool has_ended = watch_->changed.wait_for(lock, end_of_thread, [this] { return watch_->has_ended; });
    lock.unlock();
    has_ended ? thread_.join() : thread_.detach();
}

std::string Liveness::lost() const {
    const std::lock_guard lock(watch_->mutex);
    if (!watch_->lost.empty()) return watch_->lost;
    const auto quiet = Clock::now() - watch_->last_round;
    if (quiet <= watch_->silence + 4 * between_beats) return {};
    return "the process that holds the store does not answer: rank 0, or what started the run";
}

std::string Liveness::wait_for_lost() const {
    {
        std::unique_lock lock(watch_->mutex);
        watch_->changed.wait_for(lock, watch_->silence + 6 * between_beats, [this] { return !watch_->lost.empty(); });
    }
    return lost();
}

void Liveness::leave(const std::string& why) noexcept {
    try {
        watch_->farewells->set(watch_->key("left", watch_->rank), bytes_of(why));
    } catch (const std::exception&) {  // then nobody is told
    }
}

}  // namespace microbatch
