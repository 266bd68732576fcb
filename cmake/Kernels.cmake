# The kernels are compiled once for each kind of vector; which runs is decided on the processor that runs them.
# A product and the sum that follows are one instruction where there is one, on every compiler.
set(kernels ${PROJECT_SOURCE_DIR}/microbatch/ops/kernels)
set_source_files_properties(${kernels}/generic.cpp PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_definitions(microbatch PRIVATE MICROBATCH_X86_KERNELS)
    set_source_files_properties(${kernels}/avx2.cpp PROPERTIES COMPILE_OPTIONS
                                "-O3;-ffp-contract=fast;-mavx2;-mfma")
    set_source_files_properties(${kernels}/avx512.cpp PROPERTIES COMPILE_OPTIONS
                                "-O3;-ffp-contract=fast;-mavx512f;-mavx512dq;-mavx512vl;-mavx512bw;-mfma")
else()
    set_source_files_properties(${kernels}/avx2.cpp ${kernels}/avx512.cpp PROPERTIES HEADER_FILE_ONLY ON)
endif()
set_source_files_properties(${kernels}/generic.cpp ${kernels}/avx2.cpp ${kernels}/avx512.cpp
                            PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
