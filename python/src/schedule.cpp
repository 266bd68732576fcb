#include <string>

#include "microbatch/core/learning_rate.h"
#include "microbatch/core/noise_scale.h"
#include "microbatch/core/schedule.h"
#include "python/src/bindings.h"

namespace microbatch::python {
namespace {

Interval interval_of(const std::string& text) {
    return text.empty() ? Interval{} : parse_interval(text);
}

py::tuple scaled(double rate, double beta1, double beta2, double epsilon, const std::string& rule,
                 std::int64_t reference_batch, std::int64_t batch) {
    const RateConstants reference{.learning_rate = rate, .adam = RateConstants::Adam{beta1, beta2, epsilon}};
    const RateConstants found = scale_to_batch(reference, parse_rate_rule(rule), reference_batch, batch);
    return py::make_tuple(found.learning_rate, found.adam->beta1, found.adam->beta2, found.adam->epsilon);
}

}  // namespace

void bind_schedule(py::module_& module) {
    py::class_<Progress>(module, "Progress")
        .def(py::init([](std::int64_t steps, std::int64_t samples, std::int64_t tokens) {
                 return Progress{steps, samples, tokens};
             }),
             py::arg("steps"), py::arg("samples"), py::arg("tokens"))
        .def_readonly("steps", &Progress::steps)
        .def_readonly("samples", &Progress::samples)
        .def_readonly("tokens", &Progress::tokens);
    py::class_<Schedule>(module, "Schedule")
        .def(py::init([](const std::string& shape, double peak, double floor, const std::string& warmup,
                         const std::string& length, const std::string& decay, double power) {
                 Schedule schedule{.shape = parse_schedule(shape),
                                   .peak = peak,
                                   .floor = floor,
                                   .warmup = interval_of(warmup),
                                   .length = interval_of(length),
                                   .decay = interval_of(decay),
                                   .power = power};
                 if (warmup.empty()) schedule.warmup.unit = schedule.length.unit;
                 if (decay.empty()) schedule.decay.unit = schedule.length.unit;
                 validate(schedule);
                 return schedule;
             }),
             py::arg("shape"), py::arg("peak"), py::arg("floor"), py::arg("warmup"), py::arg("length"),
             py::arg("decay"), py::arg("power"))
        .def("rate", &learning_rate, py::arg("before"), py::arg("batch"));
    module.def(
        "interval",
        [](const std::string& text) {
            const Interval interval = parse_interval(text);
            return py::make_tuple(interval.count, to_string(interval.unit));
        },
        py::arg("text"));
    module.def(
        "convert",
        [](const std::string& text, const std::string& unit, std::int64_t samples_per_step,
           std::int64_t tokens_per_sample) {
            const Unit to = parse_interval("1 " + unit).unit;
            return to_string(convert(parse_interval(text), to, samples_per_step, tokens_per_sample));
        },
        py::arg("text"), py::arg("unit"), py::arg("samples_per_step"), py::arg("tokens_per_sample"));
    module.def("scale_to_batch", &scaled, py::arg("rate"), py::arg("beta1"), py::arg("beta2"), py::arg("epsilon"),
               py::arg("rule"), py::arg("reference_batch"), py::arg("batch"));
    py::class_<NoiseAverage>(module, "NoiseAverage")
        .def(py::init<double>(), py::arg("decay"))
        .def("add", &NoiseAverage::add, py::arg("measure"))
        .def("noise_batch", &NoiseAverage::noise_batch);
}

}  // namespace microbatch::python
