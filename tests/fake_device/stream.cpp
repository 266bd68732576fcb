#include "fake_device/stream.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "fake_device/fake_device.h"
#include "fake_device/memory.h"

namespace fake {
namespace {

struct Upload {
    at::Tensor from, to;  // from pinned memory, read when the next kernel starts
};
struct Download {
    at::Tensor values, to;  // what was on the device when it was asked for, and pinned memory
};

struct Stream {
    std::mutex mutex;
    std::vector<Upload> uploads;
    std::vector<Download> downloads;
    Counts counts;
};

Stream& stream() {
    static auto& one = *new Stream;
    return one;
}

thread_local int depth = 0;

bool is_plain_copy(const at::Tensor& from, const at::Tensor& to) {
    return from.scalar_type() == to.scalar_type() && from.sizes() == to.sizes() && from.is_contiguous() &&
           to.is_contiguous() && from.numel() > 0;
}

void upload(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    const bool later = non_blocking && is_plain_copy(from, to) && is_pinned(from.const_data_ptr());
    {
        Stream& queue = stream();
        const std::lock_guard lock(queue.mutex);
        if (!OnDevice::now()) {
            ++queue.counts.uploads;
            if (!later) ++queue.counts.blocking_uploads;
        }
        if (later) {
            queue.uploads.push_back({from, to});
            return;
        }
    }
    begin_kernel();
    as_cpu(to).copy_(from);
}

void download(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    begin_kernel();
    const bool later = non_blocking && is_plain_copy(from, to) && is_pinned(to.const_data_ptr());
    if (!later) {
        if (!OnDevice::now()) {
            wait();
            const std::lock_guard lock(stream().mutex);
            ++stream().counts.downloads;
        }
        at::Tensor(to).copy_(as_cpu(from));
        return;
    }
    const at::Tensor values = as_cpu(from).clone();
    std::memset(to.mutable_data_ptr(), 0xff, to.nbytes());
    const std::lock_guard lock(stream().mutex);
    stream().downloads.push_back({values, to});
}

}  // namespace

OnDevice::OnDevice() {
    ++depth;
}
OnDevice::~OnDevice() {
    --depth;
}
bool OnDevice::now() {
    return depth > 0;
}

at::Tensor as_cpu(const at::Tensor& of) {
    if (!of.is_privateuseone()) return of;
    return at::from_blob(behind(of.const_data_ptr()), of.sizes(), of.strides(), of.options().device(at::kCPU));
}

void begin_kernel() {
    std::vector<Upload> due;
    {
        const std::lock_guard lock(stream().mutex);
        due = std::exchange(stream().uploads, {});
    }
    const OnDevice now;
    for (const Upload& one : due) as_cpu(one.to).copy_(one.from);
}

void wait() {
    begin_kernel();
    std::vector<Download> due;
    {
        const std::lock_guard lock(stream().mutex);
        due = std::exchange(stream().downloads, {});
    }
    for (const Download& one : due) at::Tensor(one.to).copy_(one.values);
}

void copy(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    const at::NoGradGuard no_grad;
    if (from.is_cpu()) {
        upload(from, to, non_blocking);
    } else if (to.is_cpu()) {
        download(from, to, non_blocking);
    } else {
        begin_kernel();
        as_cpu(to).copy_(as_cpu(from));
    }
}

void count_scalar() {
    if (OnDevice::now()) return;
    wait();
    const std::lock_guard lock(stream().mutex);
    ++stream().counts.scalars;
}

Counts counts() {
    const std::lock_guard lock(stream().mutex);
    return stream().counts;
}

void reset_counts() {
    const std::lock_guard lock(stream().mutex);
    stream().counts = {};
}

}  // namespace fake
