# Torch's headers are parsed once, in the library's target; whoever compiles against it afterwards takes them from there.
# They are not needed for a source to compile: clang, which cannot read GCC's, parses them anew.
set(precompiled_headers <algorithm> <cmath> <filesystem> <functional> <memory> <optional> <string> <variant> <vector>
                        <ATen/core/Tensor.h> <torch/csrc/autograd/custom_function.h> <torch/nn/module.h>)

# Executables would be -fPIE otherwise, and GCC takes a header only for code that is compiled alike.
set(CMAKE_CXX_COMPILE_OPTIONS_PIE -fPIC)

# Lets ccache see which one it was.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(-fpch-preprocess)
endif()

function(use_precompiled_headers target)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        target_precompile_headers(${target} REUSE_FROM microbatch)
    endif()
endfunction()
