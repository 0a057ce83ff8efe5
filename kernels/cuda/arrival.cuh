// One signal for the writes of a whole launch, and why no reader can see the signal before the data.
//
//     every thread        st  peer blocks            (1)
//                         bar.sync                   (2)
//     thread 0 of each    fence.sys                  (3)
//     thread block        atomicAdd(done, 1)         (4)
//     the last of them    fence.sys                  (5)
//                         done = 0                   (6)
//                         st.release.sys [word]      (7)
//
// (1) happens before (3), as the barrier orders all writes of a thread block before what its thread 0 does next.
// (3) followed by the atomic (4) is a release, and (4) of the last thread block, followed by (5), an acquire: it
// has read a value to which every other (4) has contributed, as atomic additions form one chain. So the writes
// of ALL thread blocks happen before (7). Happens-before is transitive across threads, which is why one thread
// per block may fence for the others, and the fences are of system scope, so it holds for a reader on another
// device or in another process. (7) is a release: who reads the word by an acquire of system scope (a stream's
// wait for the value, or ld.acquire.sys) and finds `value` sees all of (1).
//
// A plain store at (7) would not do, nor fences of device scope; nor would a kernel boundary without a fence,
// where the reader is in another process: nothing then orders the word after the blocks.
//
// (6) makes the counter ready for the next launch, which must be ordered after this one: ONE COUNTER PER STREAM.
// A launch that dies leaves it at any value, but the context is lost with it.
#pragma once

__device__ __forceinline__ void arrive(
    unsigned int* done, unsigned int num_thread_blocks, unsigned long long* word, unsigned long long value
) {
    __syncthreads();
    if (threadIdx.x != 0 || threadIdx.y != 0) return;
    __threadfence_system();
    if (atomicAdd(done, 1u) != num_thread_blocks - 1) return;
    __threadfence_system();
    *done = 0;
    asm volatile(
        "st.release.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "l"(value) : "memory"
    );
}
