#pragma once

#include "microbatch/model/model.h"
#include "python/src/bindings.h"

namespace microbatch::python {

/// A Python nn.Module, through an adapter of microbatch.model.
///
/// Threads: called without the GIL; takes it for every call into Python.
class PythonModel final : public Model {
public:
    explicit PythonModel(py::object adapter) : adapter_(std::move(adapter)) {}
    ~PythonModel() override;

    Parameters parameters() const override { return tensors("parameters"); }
    NamedTensors buffers() const override { return tensors("buffers"); }
    std::vector<std::int64_t> training_flags() const override;
    void set_training_flags(const std::vector<std::int64_t>& flags) override;
    NamedTensors generator_states() const override { return tensors("generator_states"); }
    void set_generator_states(const NamedTensors& states) override;
    bool offers_checkpointing() const override;
    void set_checkpointing(bool on) override;

    /// What Python code raises inside backward comes out as py::error_already_set, and no longer stands in the
    /// interpreter, where the next call would take it for its own.
    void backward(const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& gradients,
                  bool again) const override;

private:
    NamedTensors tensors(const char* method) const;

    py::object adapter_;
    bool checkpoints_ = false;  // as it was switched last
};

}  // namespace microbatch::python
