#pragma once

/// Before a function whose loops the compiler vectorises: it is compiled twice, for processors with AVX2 and for all,
/// and the loader takes one. Without FMA: the bits are the same. The function must not be a template, nor local to its
/// file.
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define MICROBATCH_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MICROBATCH_CLONES
#endif
