#include "microbatch/data/batch_source.h"

#include <ATen/ops/cat.h>

#include <algorithm>
#include <limits>

#include "microbatch/core/crc32c.h"
#include "microbatch/core/error.h"

namespace microbatch {
namespace {

std::uint32_t checksum(const void* data, std::size_t bytes, std::uint32_t before) {
    return crc32c({static_cast<const char*>(data), bytes}, before);
}

}  // namespace

std::int64_t as_many_tokens(std::int64_t samples, std::int64_t first, std::int64_t length) {
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    if (length <= 0 || samples > most / std::max<std::int64_t>(first, 1)) return samples;
    return std::max<std::int64_t>(1, samples * first / length);
}

Batch BatchSource::fetch_twice() const {
    Batch twice = fetch({0, size()});
    for (at::Tensor& field : twice.fields) field = at::cat({field, field});
    return twice;
}

std::uint32_t TensorBatch::fingerprint() const {
    std::uint32_t crc = 0;
    for (const at::Tensor& field : batch_.fields) {
        crc = checksum(field.sizes().data(), field.sizes().size() * sizeof(std::int64_t), crc);
        const at::Tensor values = field.detach().cpu().contiguous();
        crc = checksum(values.const_data_ptr(), values.nbytes(), crc);
    }
    return crc;
}

DatasetBatch DatasetBatch::longest(const Dataset& dataset, std::int64_t samples) {
    if (samples < 1) throw Error(ErrorKind::usage, "a batch of ", samples, " samples; it must have at least 1");
    return {dataset, std::vector<std::int64_t>(static_cast<std::size_t>(samples), dataset.longest_sample())};
}

Batch DatasetBatch::fetch(Slice slice) const {
    const auto begin = indices_.begin();
    Batch batch = dataset_.get(std::span(begin + slice.begin, begin + slice.end));
    if (batch.size() != slice.size()) {
        throw Error(ErrorKind::usage, "the dataset's get() was asked for ", slice.size(), " samples and returned ",
                    batch.size(), "; return one for each index");
    }
    return batch;
}

std::int64_t DatasetBatch::as_many_as(std::int64_t begin, std::int64_t samples) const {
    const auto length = [this](std::int64_t sample) {
        return dataset_.length(indices_[static_cast<std::size_t>(sample)]);
    };
    return as_many_tokens(samples, length(0), length(begin));
}

std::uint32_t DatasetBatch::fingerprint() const {
    return checksum(indices_.data(), indices_.size() * sizeof(std::int64_t), 0);
}

}  // namespace microbatch
