# Finds LibTorch: MICROBATCH_TORCH, then CMAKE_PREFIX_PATH, then the project's own .venv.
# Looked for anew in every configuration: a folder found before must not win over one that is named now.
unset(Torch_DIR CACHE)
# The wheel's package file looks for a profiler library that the wheel does not ship, and warns.
set(kineto_LIBRARY c10 CACHE STRING "Silences the wheel's search for kineto")

if(DEFINED ENV{MICROBATCH_TORCH} AND NOT "$ENV{MICROBATCH_TORCH}" STREQUAL "")
    set(MICROBATCH_TORCH "$ENV{MICROBATCH_TORCH}" CACHE PATH "An existing LibTorch" FORCE)
endif()
# A wheel is for the torch of the Python that builds it.
if(SKBUILD AND NOT MICROBATCH_TORCH)
    find_package(Python REQUIRED COMPONENTS Interpreter)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.utils.cmake_prefix_path)"
                    OUTPUT_VARIABLE MICROBATCH_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
    if(failed)
        message(FATAL_ERROR "The Python that builds the wheel has no torch: pip install torch==2.13.0, then "
                            "pip install --no-build-isolation .")
    endif()
endif()
include(${CMAKE_CURRENT_LIST_DIR}/ImportTorch.cmake)
if(MICROBATCH_TORCH)
    import_torch_with_cuda(${MICROBATCH_TORCH})
    if(NOT TARGET torch)
        find_package(Torch REQUIRED PATHS "${MICROBATCH_TORCH}" NO_DEFAULT_PATH)
    endif()
else()
    import_torch_with_cuda(${CMAKE_PREFIX_PATH} $ENV{CMAKE_PREFIX_PATH})
    if(NOT TARGET torch)
        find_package(Torch QUIET)
    endif()
    if(NOT Torch_FOUND)
        file(GLOB venv_torch "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
        import_torch_with_cuda(${venv_torch})
        if(NOT TARGET torch)
            find_package(Torch REQUIRED PATHS ${venv_torch} NO_DEFAULT_PATH)
        endif()
    endif()
endif()
