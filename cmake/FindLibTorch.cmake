# Finds LibTorch: MICROBATCH_TORCH, then CMAKE_PREFIX_PATH, then the project's own .venv.
file(GLOB venv_torch "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch/share/cmake")
if(MICROBATCH_TORCH)
    list(PREPEND CMAKE_PREFIX_PATH "${MICROBATCH_TORCH}")
elseif(venv_torch)
    list(APPEND CMAKE_PREFIX_PATH ${venv_torch})
endif()
# The wheel's package file looks for a profiler library that the wheel does not ship, and warns.
set(kineto_LIBRARY c10 CACHE STRING "Silences the wheel's search for kineto")
find_package(Torch REQUIRED)
