#include "microbatch/state/stateful.h"

#include <ATen/core/grad_mode.h>

#include <unordered_map>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/core/str_cat.h"

namespace microbatch {

Commit prepare_tensors(const StateReader& reader, const NamedTensors& live, const char* what, Fit fit) {
    const auto refuse = [](const auto&... why) { throw Error(ErrorKind::bad_data, str_cat(why...)); };
    std::unordered_map<std::string, at::Tensor> known;
    for (const NamedTensor& one : live) known.emplace(one.name, one.tensor);
    std::vector<std::pair<at::Tensor, StoredTensor>> pairs;
    for (const auto& [name, stored] : reader.tensors()) {
        const auto found = known.find(name);
        if (found == known.end()) refuse("this model has no ", what, " ", name);
        const at::Tensor& tensor = found->second;
        const at::Tensor& shape = stored->shape();
        const bool fits =
            tensor.scalar_type() == shape.scalar_type() && (fit == Fit::resize || tensor.sizes() == shape.sizes());
        if (!fits) {
            refuse(what, " ", name, " is ", shape.scalar_type(), " of shape ", shape.sizes(), ", but in this model ",
                   tensor.scalar_type(), " of shape ", tensor.sizes());
        }
        pairs.emplace_back(tensor, *stored);
        known.erase(found);
    }
    if (fit != Fit::partial && !known.empty()) refuse(what, " ", known.begin()->first, " is missing");
    return [pairs = std::move(pairs)] {
        const at::NoGradGuard no_grad;
        for (const auto& [tensor, stored] : pairs) {
            const at::Tensor saved = stored.get();
            if (tensor.sizes() != saved.sizes()) tensor.resize_(saved.sizes());
            tensor.copy_(saved);
        }
    };
}

}  // namespace microbatch
