/* A libcuda.so.1 without a GPU, for tests of the calls that cuda_driver.py makes.
 *
 * Compiled with NVIDIA's cuda.h, which declares every function here: one that is defined otherwise than the
 * driver's does not compile. Device memory is a memfd, streams do their work at once, and an event is seen
 * done when asked for the second time, or once its stream was synchronised. Addresses that it gives carry a
 * tag, and a thread needs a context.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEVICE (1ULL << 56)
#define REGISTERED (1ULL << 57)
#define TAGS (DEVICE | REGISTERED)
#define MAX 4096
#define NEED(condition) if (!(condition)) return CUDA_ERROR_INVALID_VALUE
#define NEED_CONTEXT if (!current) return CUDA_ERROR_INVALID_CONTEXT

static __thread CUcontext current;
static struct { char *at; size_t nbytes; int fd; } memories[MAX];
static struct { char *at; size_t nbytes; } registered[MAX];
static int asked[MAX], num_events;
struct handle { uint64_t pid, fd, nbytes; };

static char *reach(CUdeviceptr address, size_t nbytes) {
    char *at = (char *)(address & ~TAGS);
    if (address & DEVICE) {
        for (int i = 0; i < MAX; i++)
            if (memories[i].at && memories[i].at <= at && at + nbytes <= memories[i].at + memories[i].nbytes) return at;
        return NULL;
    }
    if (address & REGISTERED) {
        for (int i = 0; i < MAX; i++)
            if (registered[i].at && registered[i].at <= at && at + nbytes <= registered[i].at + registered[i].nbytes) return at;
        return NULL;
    }
    return at;
}

static CUresult map(int fd, size_t nbytes, CUdeviceptr *address) {
    for (int i = 0; i < MAX; i++)
        if (!memories[i].at) {
            memories[i].at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            memories[i].nbytes = nbytes;
            memories[i].fd = fd;
            *address = (CUdeviceptr)memories[i].at | DEVICE;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult unmap(CUdeviceptr address) {
    for (int i = 0; i < MAX; i++)
        if (memories[i].at && ((CUdeviceptr)memories[i].at | DEVICE) == address) {
            munmap(memories[i].at, memories[i].nbytes);
            close(memories[i].fd);
            memories[i].at = NULL;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuInit(unsigned int flags) { NEED(flags == 0); return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal > 1) return CUDA_ERROR_INVALID_DEVICE;
    *device = 40 + ordinal;
    return CUDA_SUCCESS;
}
/* Device 1 cannot write in stream order. */
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    NEED(attribute == CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS);
    *value = device == 40;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    NEED(device >= 40);
    *context = (CUcontext)0x77;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { NEED(context == (CUcontext)0x77); current = context; return CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxSynchronize(void) { NEED_CONTEXT; return CUDA_SUCCESS; }
CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "something else";
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr *address, size_t nbytes) {
    NEED_CONTEXT;
    if (nbytes >= 1ULL << 40) return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = memfd_create("microserve-device", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, nbytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = map(fd, nbytes, address);
    memset((char *)(*address & ~TAGS), 0x5A, nbytes);
    return result;
}
CUresult CUDAAPI cuMemFree(CUdeviceptr address) { NEED_CONTEXT; return unmap(address); }
CUresult CUDAAPI cuMemsetD8(CUdeviceptr address, unsigned char value, size_t nbytes) {
    NEED_CONTEXT;
    char *at = reach(address, nbytes);
    NEED(at);
    memset(at, value, nbytes);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t nbytes, CUstream stream) {
    NEED_CONTEXT;
    char *to = reach(target, nbytes), *since = reach(source, nbytes);
    NEED(to && since && stream);
    memmove(to, since, nbytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    NEED_CONTEXT;
    for (int i = 0; i < MAX; i++)
        if (memories[i].at && ((CUdeviceptr)memories[i].at | DEVICE) == address) {
            struct handle packed = {getpid(), memories[i].fd, memories[i].nbytes};
            memset(handle, 0xA5, sizeof *handle);
            memcpy(handle->reserved + sizeof handle->reserved - sizeof packed, &packed, sizeof packed);
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    NEED_CONTEXT;
    struct handle packed;
    char path[64];
    memcpy(&packed, handle.reserved + sizeof handle.reserved - sizeof packed, sizeof packed);
    NEED(flags == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS && packed.pid != (uint64_t)getpid());
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)packed.pid, (int)packed.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return CUDA_ERROR_INVALID_CONTEXT;
    return map(fd, packed.nbytes, address);
}
CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr address) { NEED_CONTEXT; return unmap(address); }

CUresult CUDAAPI cuMemHostRegister(void *at, size_t nbytes, unsigned int flags) {
    NEED_CONTEXT;
    NEED(flags == (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP));
    NEED((uintptr_t)at % 4096 == 0 && nbytes % 4096 == 0);
    for (int i = 0; i < MAX; i++)
        if (!registered[i].at) {
            registered[i].at = at;
            registered[i].nbytes = nbytes;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult CUDAAPI cuMemHostUnregister(void *at) {
    NEED_CONTEXT;
    for (int i = 0; i < MAX; i++)
        if (registered[i].at == at) {
            registered[i].at = NULL;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}
CUresult CUDAAPI cuMemHostGetDevicePointer(CUdeviceptr *address, void *at, unsigned int flags) {
    NEED_CONTEXT;
    NEED(flags == 0);
    *address = (CUdeviceptr)at | REGISTERED;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int flags) {
    NEED_CONTEXT;
    NEED(flags == CU_STREAM_NON_BLOCKING);
    *stream = (CUstream)0x1234567890ULL;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamDestroy(CUstream stream) { NEED_CONTEXT; NEED(stream == (CUstream)0x1234567890ULL); return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    NEED_CONTEXT;
    NEED(stream == (CUstream)0x1234567890ULL);
    for (int i = 0; i < MAX; i++) asked[i] = 1;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamBatchMemOp(CUstream stream, unsigned int count, CUstreamBatchMemOpParams *batch, unsigned int flags) {
    NEED_CONTEXT;
    NEED(stream == (CUstream)0x1234567890ULL && count < 256 && flags == 0);
    for (unsigned int i = 0; i < count; i++) {
        NEED(batch[i].operation == CU_STREAM_MEM_OP_WRITE_VALUE_64);
        NEED(batch[i].writeValue.flags == CU_STREAM_WRITE_VALUE_DEFAULT);
        uint64_t *word = (uint64_t *)reach(batch[i].writeValue.address, 8);
        NEED(word && (uintptr_t)word % 8 == 0);
        __atomic_store_n(word, batch[i].writeValue.value64, __ATOMIC_RELEASE);
    }
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamWaitValue64(CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned int flags) {
    NEED_CONTEXT;
    uint64_t *word = (uint64_t *)reach(address, 8);
    NEED(stream && word && flags == CU_STREAM_WAIT_VALUE_GEQ);
    return (int64_t)(*word - value) >= 0 ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_TIMEOUT;
}

CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    NEED_CONTEXT;
    NEED(flags == CU_EVENT_DISABLE_TIMING);
    *event = (CUevent)(uintptr_t)(0x100000000ULL + num_events);
    asked[num_events] = 0;
    num_events = (num_events + 1) % MAX;
    return CUDA_SUCCESS;
}
static int *event_of(CUevent event) { return &asked[(uintptr_t)event - 0x100000000ULL]; }
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) { NEED_CONTEXT; NEED(event && stream); return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) { NEED_CONTEXT; NEED(event && stream && flags == 0); return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventQuery(CUevent event) { NEED_CONTEXT; return (*event_of(event))++ ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY; }
CUresult CUDAAPI cuEventDestroy(CUevent event) { NEED_CONTEXT; NEED(*event_of(event) >= 0); return CUDA_SUCCESS; }
