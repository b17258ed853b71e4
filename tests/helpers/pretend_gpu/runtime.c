/* A CUDA runtime without a GPU, put before libcudart by LD_PRELOAD.

Device memory is host memory, copies copy, and kernels do nothing: PyTorch's dispatch, allocator and autograd are the
real ones and their values are not. Every launch, copy, fill and wait is counted and told to a watcher. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

typedef cudaError_t Error;

enum Kind { LAUNCH, COPY, FILL, WAIT, ALLOCATION, KINDS };
typedef void (*Watcher)(int kind, const char *name, size_t bytes, int device);

static long counts[KINDS];
static Watcher watcher;
static __thread int current_device;

void pretend_count(int kind, const char *name, size_t bytes) {
    __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED);
    if (watcher) watcher(kind, name, bytes, current_device);
}
void pretend_launch(const char *name) { pretend_count(LAUNCH, name, 0); }
void pretend_watch(Watcher new_watcher) { watcher = new_watcher; }
long pretend_total(int kind) { return counts[kind]; }
int pretend_device(void) { return current_device; }

static int num_devices(void) {
    const char *text = getenv("PRETEND_GPUS");
    return text ? atoi(text) : 1;
}

/* Kernels: their names come with the registration of the binaries that hold them. */
#define SLOTS (1 << 21)
static const void *kernel_of[SLOTS];
static const char *name_of[SLOTS];
static unsigned slot_of(const void *kernel) {
    unsigned slot = ((unsigned long)kernel * 0x9E3779B97F4A7C15ul) >> 43;
    while (kernel_of[slot] && kernel_of[slot] != kernel) slot = (slot + 1) % SLOTS;
    return slot;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *var, char *address, const char *name, int e, size_t size, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *kernel, char *fun, const char *name, int limit, void *tid, void *bid,
                            void *block, void *grid, int *warp) {
    unsigned slot = slot_of(kernel);
    kernel_of[slot] = kernel;
    name_of[slot] = name;
}
static Error launch(const void *kernel) {
    const char *name = name_of[slot_of(kernel)];
    pretend_launch(name ? name : "unnamed kernel");
    return cudaSuccess;
}
struct Configuration { dim3 grid, block; size_t shared; void *stream; };
static __thread struct Configuration stack[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    stack[depth++] = (struct Configuration){grid, block, shared, stream};
    return 0;
}
Error __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    struct Configuration *top = &stack[--depth];
    *grid = top->grid, *block = top->block, *shared = top->shared, *(void **)stream = top->stream;
    return cudaSuccess;
}
Error __cudaGetKernel(cudaKernel_t *handle, const void *kernel) { *handle = (cudaKernel_t)kernel; return cudaSuccess; }
Error __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launch(k); }
Error cudaLaunchKernel(const void *k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launch(k); }
Error cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *kernel, void **a) { return launch(kernel); }
Error cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }

/* Devices: H100s. */
#define SMS 132
#define MEMORY (80ul << 30)
Error cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
Error cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
Error cudaGetDeviceCount(int *count) { *count = num_devices(); return *count ? cudaSuccess : cudaErrorNoDevice; }
Error cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 1; return cudaSuccess; }
Error cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
Error cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
Error cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
Error cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:0%d:00.0", device);
    return cudaSuccess;
}
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
Error cudaMemGetInfo(size_t *available, size_t *total) {
    *available = MEMORY - (1ul << 30), *total = MEMORY;
    return cudaSuccess;
}
Error cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "pretend H100");
    p->major = 9, p->multiProcessorCount = SMS, p->totalGlobalMem = MEMORY, p->warpSize = 32;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->canMapHostMemory = p->unifiedAddressing = 1;
    return cudaSuccess;
}
Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = SMS; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 1;
    }
    return cudaSuccess;
}
Error cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
Error cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *kernel) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
    a->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                             size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
const char *cudaGetErrorName(Error error) { return "pretend"; }
const char *cudaGetErrorString(Error error) { return "an error of the pretend GPU"; }
Error cudaGetLastError(void) { return cudaSuccess; }
Error cudaPeekAtLastError(void) { return cudaSuccess; }
Error cudaProfilerStart(void) { return cudaSuccess; }
Error cudaProfilerStop(void) { return cudaSuccess; }
Error cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                       enum cudaDriverEntryPointQueryResult *result) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver ? dlsym(driver, name) : NULL;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* Memory: zeros, which take no room before they are written to. What is page-locked is remembered. */
#define PINNED 4096
static struct { char *first, *end; } pinned[PINNED];
static void *allocate(size_t bytes) {
    char *block = calloc(1, bytes + 1024), *memory = (char *)(((size_t)block + 1024) & ~511ul);
    if (!block) return NULL;
    ((void **)memory)[-1] = block;
    return memory;
}
static void release(void *memory) { if (memory) free(((void **)memory)[-1]); }
Error cudaMalloc(void **memory, size_t bytes) {
    pretend_count(ALLOCATION, "cudaMalloc", bytes);
    *memory = allocate(bytes);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
Error cudaMallocAsync(void **memory, size_t bytes, cudaStream_t stream) { return cudaMalloc(memory, bytes); }
Error cudaFree(void *memory) { release(memory); return cudaSuccess; }
Error cudaFreeAsync(void *memory, cudaStream_t stream) { release(memory); return cudaSuccess; }
Error cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    *memory = allocate(bytes);
    for (int i = 0; i < PINNED; i++)
        if (!pinned[i].first) { pinned[i].first = *memory, pinned[i].end = (char *)*memory + bytes; break; }
    return cudaSuccess;
}
Error cudaFreeHost(void *memory) {
    for (int i = 0; i < PINNED; i++)
        if (pinned[i].first == memory) pinned[i].first = pinned[i].end = NULL;
    release(memory);
    return cudaSuccess;
}
Error cudaHostRegister(void *memory, size_t bytes, unsigned flags) { return cudaSuccess; }
Error cudaHostUnregister(void *memory) { return cudaSuccess; }
Error cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *memory) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered, a->device = current_device;
    for (int i = 0; i < PINNED; i++)
        if (pinned[i].first <= (char *)memory && (char *)memory < pinned[i].end) a->type = cudaMemoryTypeHost;
    return cudaSuccess;
}
static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    static const char *names[] = {"host to host", "host to device", "device to host", "device to device", "copy"};
    pretend_count(COPY, names[kind], bytes);
    memmove(to, from, bytes);
}
Error cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    copy(to, from, bytes, kind);
    pretend_count(WAIT, "cudaMemcpy", bytes);
    return cudaSuccess;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy(to, from, bytes, kind);
    return cudaSuccess;
}
Error cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t s) {
    copy(to, from, bytes, cudaMemcpyDeviceToDevice);
    return cudaSuccess;
}
Error cudaMemcpyToSymbol(const void *s, const void *from, size_t n, size_t o, enum cudaMemcpyKind k) { return cudaSuccess; }
Error cudaGetSymbolAddress(void **address, const void *symbol) { *address = allocate(64); return cudaSuccess; }
Error cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
    pretend_count(FILL, "cudaMemset", bytes);
    memset(memory, value, bytes);
    return cudaSuccess;
}
Error cudaMemset(void *memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes, NULL); }

/* Streams and events: all is done when it is asked for. */
static Error wait(const char *name) { pretend_count(WAIT, name, 0); return cudaSuccess; }
Error cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize"); }
Error cudaStreamSynchronize(cudaStream_t stream) { return wait("cudaStreamSynchronize"); }
Error cudaEventSynchronize(cudaEvent_t event) { return wait("cudaEventSynchronize"); }
Error cudaStreamCreate(cudaStream_t *stream) { *stream = malloc(8); return cudaSuccess; }
Error cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
Error cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int p) { return cudaStreamCreate(stream); }
Error cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
Error cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
Error cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
Error cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
Error cudaEventCreate(cudaEvent_t *event) { *event = malloc(8); return cudaSuccess; }
Error cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
Error cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
Error cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
Error cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
Error cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
Error cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return cudaSuccess; }

/* Graphs: captured launches are counted as they are captured, and replays as one launch each. */
static cudaStream_t captured;
static int capturing;
static unsigned long long capture;
Error cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    captured = stream, capturing = 1, capture++;
    return cudaSuccess;
}
Error cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = 0, *graph = malloc(8);
    return cudaSuccess;
}
Error cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
Error cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                               cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                               size_t *count) {
    if (id) *id = capture;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
Error cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
Error cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }
Error cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = malloc(8);
    return cudaSuccess;
}
Error cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    pretend_launch("CUDA graph");
    return cudaSuccess;
}
Error cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
Error cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaSuccess; }

/* cuBLAS: a product is one launch. */
typedef int Status;
Status cublasCreate_v2(void **handle) { *handle = malloc(64); return 0; }
Status cublasLtCreate(void **handle) { *handle = malloc(64); return 0; }
#define NOTHING(name) Status name() { return 0; }
#define PRODUCT(name) Status name() { pretend_launch(#name); return 0; }
#define MAKE(name) Status name(void **made) { *made = malloc(64); return 0; }
#define DROP(name) Status name(void *made) { free(made); return 0; }
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
Status cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
Status cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemm_v2) PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDdot_v2) PRODUCT(cublasDotEx) PRODUCT(cublasLtMatmul)
MAKE(cublasLtMatmulDescCreate) MAKE(cublasLtMatrixLayoutCreate) MAKE(cublasLtMatmulPreferenceCreate)
DROP(cublasLtMatmulDescDestroy) DROP(cublasLtMatrixLayoutDestroy) DROP(cublasLtMatmulPreferenceDestroy)
size_t cublasLtGetVersion(void) { return 130000; }
Status cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                      int wanted, void *results, int *found) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}

/* cuDNN finds out that there is no GPU. PyTorch is told that its user wants none: at::Context::userEnabledCuDNN() and
userEnabledCuDNNSDP(). */
_Bool _ZNK2at7Context16userEnabledCuDNNEv(const void *context) { return 0; }
_Bool _ZNK2at7Context19userEnabledCuDNNSDPEv(const void *context) { return 0; }
