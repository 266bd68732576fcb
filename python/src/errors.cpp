#include <exception>

#include "microbatch/core/error.h"
#include "microbatch/memory/reclaim.h"
#include "python/src/bindings.h"

namespace microbatch::python {
namespace {

// Classes of microbatch.errors; never freed, as an exception may come late.
struct Classes {
    py::object out_of_memory;  // torch's
    py::object usage, does_not_fit, stopped, bad_data, not_written, lost_rank;
};

Classes& classes() {
    static auto* all = new Classes();
    return *all;
}

const py::object& class_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::usage:
            return classes().usage;
        case ErrorKind::does_not_fit:
            return classes().does_not_fit;
        case ErrorKind::stopped:
            return classes().stopped;
        case ErrorKind::bad_data:
            return classes().bad_data;
        case ErrorKind::lost_rank:
            return classes().lost_rank;
        case ErrorKind::not_written:
            break;
    }
    return classes().not_written;
}

// torch.OutOfMemoryError, raised in Python code that C++ called.
bool is_python_oom(const std::exception_ptr& failure) {
    try {
        std::rethrow_exception(failure);
    } catch (const py::error_already_set& error) {
        const py::gil_scoped_acquire gil;
        return error.matches(classes().out_of_memory);
    } catch (...) {
        return false;
    }
}

}  // namespace

void bind_errors(py::module_&) {
    const py::module_ errors = py::module_::import("microbatch.errors");
    classes() = {.out_of_memory = py::module_::import("torch").attr("OutOfMemoryError"),
                 .usage = errors.attr("UsageError"),
                 .does_not_fit = errors.attr("DoesNotFit"),
                 .stopped = errors.attr("Stopped"),
                 .bad_data = errors.attr("BadData"),
                 .not_written = errors.attr("NotWritten"),
                 .lost_rank = errors.attr("LostRank")};
    register_oom_test(is_python_oom);
    py::register_local_exception_translator([](std::exception_ptr failure) {
        try {
            if (failure) std::rethrow_exception(failure);
        } catch (const Error& error) {
            py::set_error(class_of(error.kind()), error.what());
        }
    });
}

}  // namespace microbatch::python
