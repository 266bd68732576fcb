#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "microbatch/state/stored_tensor.h"

namespace microbatch {

/// A scalar value of a state.
using StateScalar = std::variant<bool, std::int64_t, std::uint64_t, double, std::string, std::vector<std::int64_t>,
                                 std::vector<double>>;

/// State by name: tensors (in memory or in a file) and scalars. Names are paths, such as `optimizer/fc.weight/1`; the
/// part before a slash is a section. The sections of a run are `model/ optimizer/ gate/ data/ rng/ batch/ recovery/
/// run/`.
///
/// Threads: const calls may overlap.
class StateDict {
public:
    using Tensors = std::map<std::string, StoredTensor, std::less<>>;
    using Scalars = std::map<std::string, StateScalar, std::less<>>;

    /// Adds a tensor or a scalar. Errors: ErrorKind::usage if the name is taken.
    void put(std::string name, StoredTensor tensor);
    void put(std::string name, StateScalar scalar);

    /// Adds a scalar, or replaces the one of the same name.
    void set(std::string name, StateScalar scalar) { scalars_.insert_or_assign(std::move(name), std::move(scalar)); }

    const Tensors& tensors() const { return tensors_; }
    const Scalars& scalars() const { return scalars_; }

    /// True if a name starts with `section`.
    bool has(std::string_view section) const;

    /// Removes every name that starts with `section`.
    void erase(std::string_view section);

    /// Renames every name that starts with `from` so that it starts with `to`, replacing existing names.
    void move(std::string_view from, std::string_view to);

    /// Adds every name of `other`, prefixed with `section`. Errors: as put().
    void merge(std::string_view section, const StateDict& other);

    /// The size in bytes of the tensors whose names start with `section`, resident or not.
    std::int64_t bytes(std::string_view section = {}) const;

    /// Makes the tensors whose names start with `section` resident and owned by this dict: copies those in memory, so
    /// that later steps do not change them, and reads those in files.
    /// Errors: c10::OutOfMemoryError, or whatever reading throws; the state is unchanged then.
    void own(std::string_view section = {});

    /// own() of all tensors in the memory of the host, which a device's tensors leave alone. Waits for the device once.
    /// Errors: as own().
    void own_on_host();

    /// True if a tensor whose name starts with `section` is in a file.
    bool reads_files(std::string_view section = {}) const;

    /// Reads every tensor in a file once. Errors: whatever reading throws.
    void require_readable() const;

private:
    Tensors tensors_;
    Scalars scalars_;
};

/// Writes one section of a StateDict.
class StateWriter {
public:
    explicit StateWriter(StateDict& dict, std::string prefix = {}) : dict_(&dict), prefix_(std::move(prefix)) {}

    StateWriter section(std::string_view name) const;

    template <class Integer>
    requires std::is_integral_v<Integer>
    void put(std::string_view name, Integer value) const {
        if constexpr (std::is_same_v<Integer, bool> || std::is_same_v<Integer, std::uint64_t>) {
            add(name, value);
        } else {
            add(name, static_cast<std::int64_t>(value));
        }
    }
    void put(std::string_view name, double value) const { add(name, value); }
    void put(std::string_view name, std::string value) const { add(name, std::move(value)); }
    void put(std::string_view name, std::vector<std::int64_t> value) const { add(name, std::move(value)); }
    void put(std::string_view name, std::vector<double> value) const { add(name, std::move(value)); }
    void put(std::string_view name, const at::Tensor& tensor) const;
    void put(const NamedTensors& tensors) const;
    void merge(const StateDict& other) const { dict_->merge(prefix_, other); }

private:
    void add(std::string_view name, StateScalar value) const;

    StateDict* dict_;
    std::string prefix_;
};

/// Reads one section of a StateDict. The dict may come from an untrusted file: every read validates.
///
/// Errors: ErrorKind::bad_data, naming the value, if it is missing, has another type, or is out of range.
class StateReader {
public:
    explicit StateReader(const StateDict& dict, std::string prefix = {}) : dict_(&dict), prefix_(std::move(prefix)) {}

    StateReader section(std::string_view name) const;

    /// True if this section has any value.
    bool exists() const { return dict_->has(prefix_); }
    bool has(std::string_view name) const;

    bool flag(std::string_view name) const;
    std::int64_t count(std::string_view name, std::int64_t least = 0,
                       std::int64_t most = std::numeric_limits<std::int64_t>::max()) const;
    std::uint64_t seed(std::string_view name) const;
    double number(std::string_view name) const;    ///< NaN and infinity included
    double positive(std::string_view name) const;  ///< finite, at least 0
    std::string word(std::string_view name) const;
    std::vector<std::int64_t> counts(std::string_view name) const;
    std::vector<double> numbers(std::string_view name) const;
    const StoredTensor& tensor(std::string_view name) const;

    /// The section's tensors, without its prefix, in the order of their names.
    std::vector<std::pair<std::string, const StoredTensor*>> tensors() const;

    /// This section as its own dict, with names without the prefix; tensors are shared.
    StateDict copy() const;

    /// Throws ErrorKind::bad_data about this section, or about `name` in it.
    [[noreturn]] void refuse(std::string_view name, const std::string& why) const;

private:
    const StateScalar& scalar(std::string_view name) const;
    template <class Value>
    const Value& get(std::string_view name, const char* kind) const;

    const StateDict* dict_;
    std::string prefix_;
};

}  // namespace microbatch
