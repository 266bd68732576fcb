# The kernels are compiled once for each kind of vector; which runs is decided on the processor that runs them. Each has
# two parts: one in which a product and the sum that follows are one instruction where there is one, and one in which
# they never are, so that its bits are the same everywhere.
set(generic_flags "")
set(vectors generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    # Of this source alone: the others share their precompiled headers with code outside the library.
    set_source_files_properties(ops/kernels/kernels.cpp PROPERTIES COMPILE_DEFINITIONS MICROBATCH_X86_KERNELS
                                                                   SKIP_PRECOMPILE_HEADERS ON)
    set(avx2_flags -mavx2 -mfma)
    set(avx512_flags -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma)
    list(APPEND vectors avx2 avx512)
endif()
# A square root that could set errno is not vectorised, nor a choice between numbers that could trap.
set(fused_flags -ffp-contract=fast)
set(exact_flags -ffp-contract=off -fno-math-errno -fno-trapping-math)
foreach(kind ${vectors})
    foreach(part fused exact)
        set(target kernels_${part}_${kind})
        add_library(${target} OBJECT ${CMAKE_CURRENT_SOURCE_DIR}/ops/kernels/${part}.cpp)
        target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR})
        target_link_libraries(${target} PRIVATE microbatch_warnings)
        target_compile_options(${target} PRIVATE -O3 ${${part}_flags} ${${kind}_flags})
        target_compile_definitions(${target} PRIVATE MICROBATCH_FUSED=${kind}_kernels MICROBATCH_EXACT=${kind}_exact
                                                     MICROBATCH_VECTORS="${kind}")
        target_sources(microbatch PRIVATE $<TARGET_OBJECTS:${target}>)
    endforeach()
endforeach()
