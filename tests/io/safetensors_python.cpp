// Writes a checkpoint of every kind of tensor for safetensors_python.py to read: safetensors_python FOLDER.
#include <ATen/ATen.h>

#include <cstdio>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/io/safetensors.h"
#include "microbatch/io/checkpoint.h"

namespace {

using namespace microbatch;

// Element i in row-major order, whatever order it lies in: exact in every dtype. The same formula is in the Python.
at::Tensor numbers(at::IntArrayRef shape, at::ScalarType type) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    const at::Tensor digits = (at::arange(count, at::kLong) * 37).remainder(101);
    if (type == at::kBool) return digits.remainder(3).eq(0).reshape(shape);
    if (type == at::kByte) return digits.to(type).reshape(shape);
    if (!at::isFloatingType(type)) return (digits - 50).to(type).reshape(shape);
    return ((digits - 50).to(at::kDouble) / 8).to(type).reshape(shape);
}

StoredTensors every_dtype() {
    StoredTensors all;
    for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                            at::kChar, at::kByte, at::kBool}) {
        all.push_back(stored(std::string("dtype.") + c10::toString(type), numbers({3, 5}, type)));
    }
    all.push_back(stored("scalar", numbers({}, at::kFloat)));
    all.push_back(stored("empty", numbers({0, 4}, at::kFloat)));
    all.push_back(stored("columns", numbers({4, 6}, at::kFloat).t().contiguous().t()));
    all.push_back(
        stored("channels.last", numbers({2, 3, 4, 5}, at::kFloat).contiguous(at::MemoryFormat::ChannelsLast)));
    all.push_back(stored("strided", numbers({9}, at::kFloat).repeat_interleave(2).slice(0, 0, 18, 2)));
    all.push_back(stored("naïve \"name\"\n\\", numbers({2}, at::kFloat)));
    return all;
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return 2;
    TrainerState state;
    state.parameters = every_dtype();
    state.buffers = {stored("buffer", numbers({7}, at::kFloat))};
    state.optimizer_counts = {2};
    state.optimizer = {stored("weight.0", numbers({4, 6}, at::kFloat).t().contiguous().t()),
                       stored("weight.1", numbers({}, at::kFloat))};
    state.generators = {stored("generator.0", numbers({5056}, at::kByte))};
    state.recovery.emplace();
    state.recovery->points = {{.steps = 3, .tensors = every_dtype()}};
    state.open.emplace();
    state.open->gradients = {stored("weight", numbers({4, 6}, at::kFloat))};
    state.open->buffers = {stored("buffer.0", numbers({7}, at::kFloat))};
    state.open->generators = {stored("generator.0", numbers({5056}, at::kByte))};
    try {
        write_checkpoint(system_files(), words[1], {state});
    } catch (const Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
