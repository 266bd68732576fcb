// Module::to() puts a tensor of the device into a parameter of the CPU. torch allows that for the devices that it lists
// in a private table, which has CUDA, XPU and others, and no PrivateUse1. This definition comes before torch's where the
// library is linked or preloaded before it.
#include <ATen/core/Tensor.h>
#include <ATen/core/VariableHooksInterface.h>

void at::TensorBase::set_data(const TensorBase& new_data) const {
    if (!new_data.is_privateuseone() && !is_privateuseone()) {
        at::impl::GetVariableHooks()->set_data(*this, new_data);
        return;
    }
    unsafeGetTensorImpl()->shallow_copy_from(new_data.getIntrusivePtr());
}
