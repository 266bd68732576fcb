#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <cstddef>

namespace fake {

c10::DeviceAllocator& allocator();

/// Moves what is in the storage into `bytes` of new memory.
void resize_storage(const c10::Storage& storage, std::size_t bytes);
c10::Allocator& pinned_allocator();

/// Where the kernels find the memory that a tensor's pointer stands for.
void* behind(const void* pointer);

bool is_pinned(const void* pointer);

}  // namespace fake
