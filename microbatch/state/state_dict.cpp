#include "microbatch/state/state_dict.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "microbatch/core/error.h"
#include "microbatch/runtime/device.h"

namespace microbatch {
namespace {

// In a sorted map, the names with a common prefix are one range.
template <class Map>
auto range_of(Map& map, std::string_view prefix) {
    const auto begin = map.lower_bound(prefix);
    auto end = begin;
    while (end != map.end() && std::string_view(end->first).starts_with(prefix)) ++end;
    return std::pair(begin, end);
}

template <class Map>
void move_names(Map& map, std::string_view from, std::string_view to) {
    const auto [begin, end] = range_of(map, from);
    std::vector<typename Map::node_type> moved;
    for (auto one = begin; one != end;) moved.push_back(map.extract(one++));
    for (auto& node : moved) {
        node.key() = str_cat(to, node.key().substr(from.size()));
        map.erase(node.key());
        map.insert(std::move(node));
    }
}

}  // namespace

void StateDict::put(std::string name, StoredTensor tensor) {
    require_that(tensors_.emplace(name, std::move(tensor)).second, "two values of the state are named ", name);
}

void StateDict::put(std::string name, StateScalar scalar) {
    require_that(scalars_.emplace(name, std::move(scalar)).second, "two values of the state are named ", name);
}

bool StateDict::has(std::string_view section) const {
    const auto any = [section](const auto& map) {
        const auto [begin, end] = range_of(map, section);
        return begin != end;
    };
    return any(tensors_) || any(scalars_);
}

void StateDict::erase(std::string_view section) {
    const auto drop = [section](auto& map) {
        const auto [begin, end] = range_of(map, section);
        map.erase(begin, end);
    };
    drop(tensors_);
    drop(scalars_);
}

void StateDict::move(std::string_view from, std::string_view to) {
    move_names(tensors_, from, to);
    move_names(scalars_, from, to);
}

void StateDict::merge(std::string_view section, const StateDict& other) {
    for (const auto& [name, tensor] : other.tensors_) put(str_cat(section, name), tensor);
    for (const auto& [name, scalar] : other.scalars_) put(str_cat(section, name), scalar);
}

std::int64_t StateDict::bytes(std::string_view section) const {
    std::int64_t bytes = 0;
    const auto [begin, end] = range_of(tensors_, section);
    for (auto one = begin; one != end; ++one) bytes += one->second.bytes();
    return bytes;
}

void StateDict::own(std::string_view section) {
    Tensors owned = tensors_;
    const auto [begin, end] = range_of(owned, section);
    for (auto one = begin; one != end; ++one) one->second = StoredTensor(one->second.get_own());
    tensors_ = std::move(owned);
}

void StateDict::own_on_host() {
    Tensors owned = tensors_;
    std::vector<at::Device> devices;
    for (auto& [name, one] : owned) {
        const at::Device from = one.is_resident() ? one.shape().device() : at::Device(at::kCPU);
        if (std::find(devices.begin(), devices.end(), from) == devices.end()) devices.push_back(from);
        one = StoredTensor(one.get_own_on_host());
    }
    for (const at::Device& device : devices) wait_for(device);
    tensors_ = std::move(owned);
}

bool StateDict::reads_files(std::string_view section) const {
    const auto [begin, end] = range_of(tensors_, section);
    return std::any_of(begin, end, [](const auto& one) { return !one.second.is_resident(); });
}

void StateDict::require_readable() const {
    for (const auto& [name, tensor] : tensors_) {
        if (!tensor.is_resident()) tensor.get();
    }
}

StateWriter StateWriter::section(std::string_view name) const {
    return StateWriter(*dict_, str_cat(prefix_, name, "/"));
}

void StateWriter::put(std::string_view name, const at::Tensor& tensor) const {
    dict_->put(str_cat(prefix_, name), StoredTensor(tensor));
}

void StateWriter::put(const NamedTensors& tensors) const {
    for (const NamedTensor& one : tensors) put(one.name, one.tensor);
}

void StateWriter::add(std::string_view name, StateScalar value) const {
    dict_->put(str_cat(prefix_, name), std::move(value));
}

StateReader StateReader::section(std::string_view name) const {
    return StateReader(*dict_, str_cat(prefix_, name, "/"));
}

bool StateReader::has(std::string_view name) const {
    const std::string whole = str_cat(prefix_, name);
    return dict_->scalars().contains(whole) || dict_->tensors().contains(whole);
}

const StateScalar& StateReader::scalar(std::string_view name) const {
    const auto found = dict_->scalars().find(str_cat(prefix_, name));
    if (found == dict_->scalars().end()) refuse(name, "it is missing");
    return found->second;
}

template <class Value>
const Value& StateReader::get(std::string_view name, const char* kind) const {
    const auto* value = std::get_if<Value>(&scalar(name));
    if (value == nullptr) refuse(name, str_cat("it must be ", kind));
    return *value;
}

bool StateReader::flag(std::string_view name) const {
    return get<bool>(name, "true or false");
}

std::int64_t StateReader::count(std::string_view name, std::int64_t least, std::int64_t most) const {
    // An unsigned value, such as a size, reads back from a file as signed.
    const auto* size = std::get_if<std::uint64_t>(&scalar(name));
    const bool fits = size != nullptr && *size <= static_cast<std::uint64_t>(most);
    const std::int64_t value = fits ? static_cast<std::int64_t>(*size) : get<std::int64_t>(name, "a whole number");
    if (value < least || value > most) refuse(name, str_cat("it is ", value, ", outside ", least, " to ", most));
    return value;
}

std::uint64_t StateReader::seed(std::string_view name) const {
    const StateScalar& value = scalar(name);
    if (const auto* seed = std::get_if<std::uint64_t>(&value)) return *seed;
    return static_cast<std::uint64_t>(count(name));
}

double StateReader::number(std::string_view name) const {
    const StateScalar& value = scalar(name);
    if (const auto* whole = std::get_if<std::int64_t>(&value)) return static_cast<double>(*whole);
    // JSON has no such numbers.
    if (const auto* word = std::get_if<std::string>(&value)) {
        if (*word == "nan") return std::numeric_limits<double>::quiet_NaN();
        if (*word == "inf") return std::numeric_limits<double>::infinity();
        if (*word == "-inf") return -std::numeric_limits<double>::infinity();
    }
    return get<double>(name, "a number");
}

double StateReader::positive(std::string_view name) const {
    const double value = number(name);
    if (!std::isfinite(value) || value < 0.0)
        refuse(name, str_cat("it is ", value, "; it must be finite and at least 0"));
    return value;
}

std::string StateReader::word(std::string_view name) const {
    return get<std::string>(name, "text");
}

std::vector<std::int64_t> StateReader::counts(std::string_view name) const {
    const auto& values = get<std::vector<std::int64_t>>(name, "a list of whole numbers");
    for (const std::int64_t value : values) {
        if (value < 0) refuse(name, str_cat("it has ", value, ", which is below 0"));
    }
    return values;
}

std::vector<double> StateReader::numbers(std::string_view name) const {
    const StateScalar& value = scalar(name);
    // An empty list, or one of whole numbers, reads back as such.
    if (const auto* whole = std::get_if<std::vector<std::int64_t>>(&value)) return {whole->begin(), whole->end()};
    return get<std::vector<double>>(name, "a list of numbers");
}

const StoredTensor& StateReader::tensor(std::string_view name) const {
    const auto found = dict_->tensors().find(str_cat(prefix_, name));
    if (found == dict_->tensors().end()) refuse(name, "the tensor is missing");
    return found->second;
}

std::vector<std::pair<std::string, const StoredTensor*>> StateReader::tensors() const {
    std::vector<std::pair<std::string, const StoredTensor*>> found;
    const auto [begin, end] = range_of(dict_->tensors(), prefix_);
    for (auto one = begin; one != end; ++one) found.emplace_back(one->first.substr(prefix_.size()), &one->second);
    return found;
}

StateDict StateReader::copy() const {
    StateDict result;
    for (const auto& [name, tensor] : tensors()) result.put(name, *tensor);
    const auto [begin, end] = range_of(dict_->scalars(), prefix_);
    for (auto one = begin; one != end; ++one) result.put(one->first.substr(prefix_.size()), one->second);
    return result;
}

void StateReader::refuse(std::string_view name, const std::string& why) const {
    throw Error(ErrorKind::bad_data, "the state's ", prefix_, name, ": ", why);
}

}  // namespace microbatch
