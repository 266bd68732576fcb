# Flags of our own targets; the interface target is not installed, so a user's build never sees them.
add_library(microbatch_warnings INTERFACE)
target_compile_options(microbatch_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Werror)
# NaN and infinity are cases here: no fast-math, whatever the user's defaults are.
target_compile_options(microbatch_warnings INTERFACE -fno-fast-math)
if(MICROBATCH_SANITIZE)
    # What the checks are compiled into makes GCC see what is not so in torch's own headers.
    target_compile_options(microbatch_warnings INTERFACE -Wno-maybe-uninitialized)
endif()
if(MICROBATCH_SANITIZE STREQUAL "memory")
    add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
    add_link_options(-fsanitize=address,undefined)
elseif(MICROBATCH_SANITIZE STREQUAL "threads")
    add_compile_options(-fsanitize=thread -fno-omit-frame-pointer)
    add_link_options(-fsanitize=thread)
elseif(MICROBATCH_SANITIZE)
    message(FATAL_ERROR "MICROBATCH_SANITIZE is ${MICROBATCH_SANITIZE}: choose memory (addresses and undefined behaviour) or "
                        "threads, which do not go together")
endif()
