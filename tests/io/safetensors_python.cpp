// Writes a checkpoint of every kind of tensor for safetensors_python.py to read: safetensors_python FOLDER.
#include <ATen/ATen.h>

#include <cstdio>
#include <string>

#include "microbatch/core/error.h"
#include "microbatch/io/checkpoint.h"

namespace {

using namespace microbatch;

// Element i in row-major order, whatever the memory layout: exact in every dtype. The Python code has the same formula.
at::Tensor numbers(at::IntArrayRef shape, at::ScalarType type) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    const at::Tensor digits = (at::arange(count, at::kLong) * 37).remainder(101);
    if (type == at::kBool) return digits.remainder(3).eq(0).reshape(shape);
    if (type == at::kByte) return digits.to(type).reshape(shape);
    if (!at::isFloatingType(type)) return (digits - 50).to(type).reshape(shape);
    return ((digits - 50).to(at::kDouble) / 8).to(type).reshape(shape);
}

NamedTensors every_dtype() {
    NamedTensors all;
    for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                            at::kChar, at::kByte, at::kBool}) {
        all.push_back({std::string("dtype.") + c10::toString(type), numbers({3, 5}, type)});
    }
    all.push_back({"scalar", numbers({}, at::kFloat)});
    all.push_back({"empty", numbers({0, 4}, at::kFloat)});
    all.push_back({"columns", numbers({4, 6}, at::kFloat).t().contiguous().t()});
    all.push_back({"channels.last", numbers({2, 3, 4, 5}, at::kFloat).contiguous(at::MemoryFormat::ChannelsLast)});
    all.push_back({"strided", numbers({9}, at::kFloat).repeat_interleave(2).slice(0, 0, 18, 2)});
    all.push_back({"naïve \"name\"\n\\", numbers({2}, at::kFloat)});
    return all;
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return 2;
    StateDict state;
    const StateWriter writer(state);
    for (const char* name : {"steps", "samples", "tokens"}) writer.section("data").put(name, 3);
    writer.section("model").put(every_dtype());
    writer.section("model").put("buffer", numbers({7}, at::kFloat));
    writer.section("optimizer").section("weight").put("0", numbers({4, 6}, at::kFloat).t().contiguous().t());
    writer.section("optimizer").section("weight").put("1", numbers({}, at::kFloat));
    writer.section("rng").put("cpu", numbers({5056}, at::kByte));
    writer.section("recovery").section("0").section("model").put(every_dtype());
    writer.section("batch").section("gradient").put("weight", numbers({4, 6}, at::kFloat));
    try {
        write_checkpoint(system_files(), words[1], state);
    } catch (const Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
