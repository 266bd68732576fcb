#include "microbatch/distributed/group.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/distributed/backend.h"
#include "microbatch/distributed/liveness.h"
#include "microbatch/memory/reclaim.h"

namespace microbatch {
namespace {

using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

constexpr std::chrono::milliseconds glance{200};  // between looks at who is alive, while the others are waited for

// The destructor of a backend waits for calls that can no longer end.
void keep_forever(c10::intrusive_ptr<c10d::Backend> backend) {
    static auto& mutex = *new std::mutex;
    const std::lock_guard lock(mutex);
    static auto& kept = *new std::vector<c10::intrusive_ptr<c10d::Backend>>;
    kept.push_back(std::move(backend));
}

std::string first_line(const std::string& text) {
    return text.substr(0, text.find('\n'));
}

}  // namespace

/// The calls to c10d, until one of them fails.
struct Group::Calls {
    Calls(Backend backend, const Options& how) : c10d(std::move(backend.calls)), options(how) {
        if (backend.store && c10d->getSize() > 1) {
            liveness = std::make_unique<Liveness>(backend.store, c10d->getRank(), c10d->getSize(), options.silence);
        }
    }

    ~Calls() {
        if (!failure.empty()) keep_forever(std::move(c10d));
    }

    [[noreturn]] void fail(const std::string& what) {
        failure = what;
        throw Error(ErrorKind::lost_rank, failure);
    }

    void wait_for(const Works& works) {
        const auto started = std::chrono::steady_clock::now();
        for (const auto& work : works) {
            while (!work->isCompleted()) {
                try {
                    work->wait(glance);
                    break;
                } catch (const std::exception&) {
                    if (work->isCompleted()) break;  // it failed, and says so below
                }
                if (liveness && !liveness->lost().empty()) fail(liveness->lost());
                if (std::chrono::steady_clock::now() - started > options.timeout) {
                    fail(str_cat("a rank has not come for ",
                                 std::chrono::duration_cast<std::chrono::seconds>(options.timeout).count(), " s"));
                }
            }
            work->wait();
        }
    }

    /// Starts calls and waits for them. A connection ends before it is known which rank has.
    template <class Start>
    void make(const Start& start) {
        if (!failure.empty()) throw Error(ErrorKind::lost_rank, failure);
        const Works works = start();  // what is wrong with the tensors is no other rank's fault
        try {
            wait_for(works);
        } catch (const Error&) {
            throw;
        } catch (const std::exception&) {
            const std::string what = first_line(message_of(std::current_exception()));
            const std::string lost = liveness ? liveness->wait_for_lost() : "";
            fail(lost.empty() ? str_cat("another rank cannot be reached: ", what) : lost);
        }
    }

    c10::intrusive_ptr<c10d::Backend> c10d;
    Options options;
    std::unique_ptr<Liveness> liveness;
    std::string failure;
};

Group::Group(Backend backend, Options options) : calls_(std::make_unique<Calls>(std::move(backend), options)) {}

Group::~Group() = default;

int Group::rank() const {
    return calls_->c10d->getRank();
}

int Group::size() const {
    return calls_->c10d->getSize();
}

void Group::sum(const std::vector<at::Tensor>& tensors) {
    if (size() == 1) return;
    calls_->make([&] {
        Works works;
        for (const at::Tensor& tensor : tensors) {
            std::vector<at::Tensor> one{tensor};
            works.push_back(calls_->c10d->allreduce(one));
        }
        return works;
    });
}

std::vector<at::Tensor> Group::gather(const at::Tensor& mine) {
    if (size() == 1) return {mine};
    std::vector<std::vector<at::Tensor>> all(1);
    for (int i = 0; i < size(); ++i) all.front().push_back(at::empty_like(mine));
    std::vector<at::Tensor> one{mine};
    calls_->make([&] { return Works{calls_->c10d->allgather(all, one)}; });
    return all.front();
}

std::vector<std::string> Group::gather_bytes(const std::string& mine) {
    if (size() == 1) return {mine};
    const auto length = static_cast<std::int64_t>(mine.size());
    std::int64_t longest = 0;
    std::vector<std::int64_t> lengths;
    for (const at::Tensor& one : gather(at::full({1}, length, at::kLong))) {
        lengths.push_back(one.item<std::int64_t>());
        longest = std::max(longest, lengths.back());
    }
    std::vector<std::string> all(lengths.size());
    if (longest == 0) return all;
    const at::Tensor padded = at::full({longest}, 0, at::kByte);
    std::copy(mine.begin(), mine.end(), static_cast<char*>(padded.mutable_data_ptr()));
    const std::vector<at::Tensor> gathered = gather(padded);
    for (std::size_t i = 0; i < all.size(); ++i) {
        all[i].assign(static_cast<const char*>(gathered[i].const_data_ptr()), static_cast<std::size_t>(lengths[i]));
    }
    return all;
}

void Group::sum_to(const std::vector<at::Tensor>& tensors, const std::vector<int>& roots) {
    if (size() == 1) return;
    calls_->make([&] {
        Works works;
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            std::vector<at::Tensor> one{tensors[i]};
            c10d::ReduceOptions options;
            options.rootRank = roots[i];
            works.push_back(calls_->c10d->reduce(one, options));
        }
        return works;
    });
}

void Group::broadcast(const std::vector<at::Tensor>& tensors, const std::vector<int>& roots) {
    if (size() == 1) return;
    calls_->make([&] {
        Works works;
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            std::vector<at::Tensor> one{tensors[i]};
            c10d::BroadcastOptions options;
            options.rootRank = roots[i];
            works.push_back(calls_->c10d->broadcast(one, options));
        }
        return works;
    });
}

bool Group::any(bool mine) {
    const std::vector<at::Tensor> all = gather(at::full({1}, mine ? 1 : 0, at::kByte));
    return std::ranges::any_of(all, [](const at::Tensor& one) { return one.item<std::uint8_t>() != 0; });
}

void Group::fall_silent() {
    calls_->liveness.reset();
}

void Group::abandon(const std::string& why) noexcept {
    leave(why);
    if (calls_->failure.empty()) calls_->failure = "this rank has left the others: " + first_line(why);
}

void Group::leave(const std::string& why) noexcept {
    if (calls_->liveness) calls_->liveness->leave(first_line(why));
}

}  // namespace microbatch
