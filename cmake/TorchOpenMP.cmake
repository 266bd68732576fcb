# microbatch::openmp: the OpenMP that torch itself runs on, which at::parallel_for needs where it is compiled. A second
# one in the process would keep threads of its own. Also installed, for whoever links the library.
if(NOT TARGET microbatch::openmp)
    add_library(microbatch::openmp INTERFACE IMPORTED)
    file(GLOB microbatch_torch_gomp "${TORCH_INSTALL_PREFIX}/lib/libgomp*.so*" "${TORCH_INSTALL_PREFIX}/../torch.libs/libgomp*.so*")
    if(microbatch_torch_gomp AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        list(GET microbatch_torch_gomp 0 microbatch_torch_gomp)
        set_target_properties(microbatch::openmp PROPERTIES INTERFACE_LINK_LIBRARIES "${microbatch_torch_gomp}")
    else()
        find_package(OpenMP REQUIRED COMPONENTS CXX)
        set_target_properties(microbatch::openmp PROPERTIES INTERFACE_LINK_LIBRARIES OpenMP::OpenMP_CXX)
    endif()
endif()
