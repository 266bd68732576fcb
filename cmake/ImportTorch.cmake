# Torch's own package file gives the target `torch`, but one that was built for CUDA asks for the CUDA toolkit, which
# nothing here needs. import_torch_with_cuda(HINTS) makes the target of the libraries instead, if a hint is a LibTorch for
# CUDA: its folder (.../site-packages/torch), or share/cmake in it.
macro(import_torch_with_cuda)
    foreach(hint ${ARGN})
        foreach(root ${hint} ${hint}/../.. ${hint}/../../..)
            if(TARGET torch OR NOT EXISTS ${root}/lib/libc10_cuda.so OR NOT EXISTS ${root}/include/torch)
                continue()
            endif()
            get_filename_component(root ${root} ABSOLUTE)
            set(libraries ${root}/lib)
            add_library(torch INTERFACE IMPORTED)
            set_target_properties(torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                  "${root}/include;${root}/include/torch/csrc/api/include")
            # The linker would leave out the libraries of which no symbol is named, and the device with them.
            set_target_properties(torch PROPERTIES INTERFACE_LINK_LIBRARIES
                "-Wl,--push-state,--no-as-needed;${libraries}/libtorch.so;${libraries}/libtorch_cuda.so;${libraries}/libc10_cuda.so;-Wl,--pop-state;${libraries}/libtorch_cpu.so;${libraries}/libc10.so;-Wl,--allow-shlib-undefined")
            set(TORCH_LIBRARY ${libraries}/libtorch.so)
            set(Torch_DIR ${root}/share/cmake/Torch)
            set(Torch_FOUND TRUE)
        endforeach()
    endforeach()
endmacro()
