/* libcuda.so.1 of the pretend GPU: what Triton's launcher and PyTorch's run-time compiler ask of a driver. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cuDeviceGetAttribute

typedef CUresult Result;

static long loads;
static CUcontext context = (CUcontext)1;

long pretend_loads(void) { return loads; }

/* Of the runtime's stand-in, which is loaded in the same process. */
static void count_launch(const char *name) {
    void (*launch)(const char *) = dlsym(RTLD_DEFAULT, "pretend_launch");
    if (launch) launch(name);
}
static int device_of_runtime(void) {
    int (*device)(void) = dlsym(RTLD_DEFAULT, "pretend_device");
    return device ? device() : 0;
}

Result cuInit(unsigned flags) { return CUDA_SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
Result cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
Result cuDeviceGetCount(int *count) {
    const char *text = getenv("PRETEND_GPUS");
    *count = text ? atoi(text) : 1;
    return CUDA_SUCCESS;
}
Result cuDeviceGetName(char *text, int size, CUdevice device) { snprintf(text, size, "pretend H100"); return CUDA_SUCCESS; }
Result cuGetErrorString(Result error, const char **text) { *text = "an error of the pretend GPU"; return CUDA_SUCCESS; }
Result cuGetErrorName(Result error, const char **text) { *text = "pretend"; return CUDA_SUCCESS; }
Result cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}
Result cuCtxGetCurrent(CUcontext *current) { *current = context; return CUDA_SUCCESS; }
Result cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
Result cuCtxGetDevice(CUdevice *device) { *device = device_of_runtime(); return CUDA_SUCCESS; }
Result cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) { *current = context; return CUDA_SUCCESS; }
Result cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}
Result cuModuleLoadData(CUmodule *module, const void *image) {
    __atomic_add_fetch(&loads, 1, __ATOMIC_RELAXED);
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}
Result cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
Result cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
Result cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
Result cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 32;
    return CUDA_SUCCESS;
}
Result cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
Result cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
Result cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    char name[256];
    snprintf(name, sizeof name, "triton %s %ux%ux%u", (char *)function, config->gridDimX, config->gridDimY,
             config->gridDimZ);
    count_launch(name);
    return CUDA_SUCCESS;
}
Result cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, CUstream stream, void **parameters, void **extra) {
    count_launch((char *)function);
    return CUDA_SUCCESS;
}
Result cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                 unsigned bz, unsigned shared, CUstream stream, void **parameters) {
    count_launch((char *)function);
    return CUDA_SUCCESS;
}
Result cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data = pointer;
    else *(int *)data = 0;
    return CUDA_SUCCESS;
}
Result cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(data[i], attributes[i], pointer);
    return CUDA_SUCCESS;
}
Result cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}
/* Looked up by name and never called here: they fail. Aliases, since the header declares their arguments. */
Result pretend_missing(void) { return CUDA_ERROR_NOT_SUPPORTED; }
#define MISSING(name) __asm__(".globl " #name "\n.set " #name ", pretend_missing");
MISSING(cuCtxGetLimit) MISSING(cuCtxSetLimit) MISSING(cuLinkAddData_v2) MISSING(cuLinkComplete) MISSING(cuLinkCreate_v2)
MISSING(cuModuleLoad) MISSING(cuTensorMapEncodeIm2col) MISSING(cuTensorMapEncodeTiled)
