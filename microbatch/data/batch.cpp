#include "microbatch/data/batch.h"

#include <ATen/ops/narrow.h>

#include "microbatch/core/error.h"

namespace microbatch {

std::int64_t Batch::size() const {
    if (fields.empty()) return 0;
    for (std::size_t i = 0; i < fields.size(); ++i) {
        const at::Tensor& field = fields[i];
        if (!field.defined()) throw Error(ErrorKind::usage, "field ", i, " of the batch is an undefined tensor");
        if (field.dim() == 0) {
            throw Error(ErrorKind::usage, "field ", i,
                        " of the batch has no dimension; dimension 0 must be the samples");
        }
        if (field.size(0) != fields[0].size(0)) {
            throw Error(ErrorKind::usage, "field ", i, " of the batch holds ", field.size(0),
                        " samples, field 0 holds ", fields[0].size(0));
        }
    }
    return fields[0].size(0);
}

Batch Batch::slice(std::int64_t begin, std::int64_t end) const {
    if (begin < 0 || begin > end || end > size()) {
        throw Error(ErrorKind::usage, "samples [", begin, ", ", end, ") are outside a batch of ", size(), " samples");
    }
    Batch result;
    result.fields.reserve(fields.size());
    for (const at::Tensor& field : fields) result.fields.push_back(field.narrow(0, begin, end - begin));
    return result;
}

}  // namespace microbatch
