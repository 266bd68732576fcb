# Installs the build into a prefix of its own, builds a foreign project against it, and runs that.
# Needs: BUILD, SOURCE, WORK, GENERATOR, TORCH (the folder of TorchConfig.cmake).
function(run)
    execute_process(COMMAND ${ARGN} RESULT_VARIABLE code)
    if(NOT code EQUAL 0)
        message(FATAL_ERROR "failed (${code}): ${ARGN}")
    endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE}/tests/install/project -B ${WORK}/build -G ${GENERATOR}
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${WORK}/prefix -DTorch_DIR=${TORCH})
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/ten_steps)
run(${WORK}/prefix/bin/microbatch --version)
