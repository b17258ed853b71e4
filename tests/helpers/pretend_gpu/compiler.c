/* NVRTC of the pretend GPU: PyTorch builds some kernels as it goes; none is ever run, so nothing is compiled. */
#include <stdlib.h>

typedef int Result;

Result nvrtcVersion(int *major, int *minor) { *major = 13, *minor = 0; return 0; }
const char *nvrtcGetErrorString(Result result) { return "an error of the pretend GPU"; }
Result nvrtcCreateProgram(void **program, const char *source, const char *name, int count, void *h, void *i) {
    *program = malloc(8);
    return 0;
}
Result nvrtcDestroyProgram(void **program) { free(*program); return 0; }
Result nvrtcCompileProgram(void *program, int count, const char *const *options) { return 0; }
Result nvrtcAddNameExpression(void *program, const char *name) { return 0; }
Result nvrtcGetLoweredName(void *program, const char *name, const char **lowered) { *lowered = name; return 0; }
#define EMPTY(what) \
    Result nvrtcGet##what##Size(void *program, size_t *size) { *size = 1; return 0; } \
    Result nvrtcGet##what(void *program, char *text) { *text = 0; return 0; }
EMPTY(PTX) EMPTY(CUBIN) EMPTY(ProgramLog)
