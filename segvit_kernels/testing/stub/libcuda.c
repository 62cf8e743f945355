/* A CUDA driver without a GPU: modules are read, launches are counted and, if asked, recorded; nothing runs.
 *
 * Only what Triton's launcher calls. A record of a launch holds the bytes of the kernel's parameters: as the
 * real driver does, their sizes are read from the kernel's own description in the machine code. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { MOST_PARAMETERS = 256 };

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    void *attributes;
    unsigned num_attributes;
} Config; /* CUlaunchConfig */

typedef struct {
    char name[256];
    unsigned parameters, offset[MOST_PARAMETERS], size[MOST_PARAMETERS], bytes;
} Function;

typedef struct {
    const Function *function;
    unsigned grid, threads, shared;
    void *stream;
    unsigned char *parameters;
} Record;

/* Read and written from Python. */
int stub_capability[2] = {9, 0}, stub_multiprocessors = 132, stub_shared_memory = 232448, stub_recording = 0;
long stub_launches = 0;

static Record *records = NULL;
static long recorded = 0, room = 0;

static uint64_t number(const unsigned char *bytes, int size) {
    uint64_t value = 0;
    memcpy(&value, bytes, size);
    return value;
}

/* Parameters of a kernel from the section .nv.info.NAME of an ELF image: CUDA's EIATTR_KPARAM_INFO. */
static void describe(const unsigned char *image, Function *function) {
    char wanted[300] = ".nv.info.";
    if (memcmp(image, "\177ELF", 4)) return;
    strcat(wanted, function->name);
    const unsigned char *table = image + number(image + 0x28, 8);
    unsigned entry = number(image + 0x3a, 2), count = number(image + 0x3c, 2), names = number(image + 0x3e, 2);
    const char *strings = (const char *)image + number(table + names * entry + 24, 8);
    for (unsigned i = 0; i < count; i++) {
        const unsigned char *section = table + i * entry;
        if (strcmp(strings + number(section, 4), wanted)) continue;
        const unsigned char *at = image + number(section + 24, 8), *end = at + number(section + 32, 8);
        while (at + 4 <= end) {
            unsigned length = at[0] == 4 ? number(at + 2, 2) : 0;
            if (at[1] == 0x17 && length >= 12) {
                unsigned ordinal = number(at + 8, 2), size = number(at + 12, 4) >> 18;
                if (ordinal < MOST_PARAMETERS) {
                    function->offset[ordinal] = number(at + 10, 2);
                    function->size[ordinal] = size;
                    if (ordinal >= function->parameters) function->parameters = ordinal + 1;
                    if (function->offset[ordinal] + size > function->bytes)
                        function->bytes = function->offset[ordinal] + size;
                }
            }
            at += 4 + length;
        }
    }
}

CUresult cuModuleLoadData(const void **module, const void *image) {
    *module = image; /* Triton asks for the function before the image goes */
    return OK;
}

CUresult cuModuleGetFunction(Function **out, const void *module, const char *name) {
    Function *function = calloc(1, sizeof(Function));
    strncpy(function->name, name, sizeof(function->name) - 1);
    describe(module, function);
    *out = function;
    return OK;
}

CUresult cuLaunchKernelEx(const Config *config, const Function *function, void **parameters, void **extra) {
    (void)extra;
    __atomic_add_fetch(&stub_launches, 1, __ATOMIC_RELAXED);
    if (!stub_recording) return OK;
    if (recorded == room) records = realloc(records, (room = 2 * room + 64) * sizeof(Record));
    unsigned threads = config->block[0] * config->block[1] * config->block[2];
    Record record = {function, config->grid[0] * config->grid[1] * config->grid[2], threads, config->shared,
                     config->stream, calloc(1, function->bytes + 1)};
    for (unsigned i = 0; i < function->parameters; i++)
        memcpy(record.parameters + function->offset[i], parameters[i], function->size[i]);
    records[recorded++] = record;
    return OK;
}

long stub_recorded(void) { return recorded; }

void stub_forget(void) {
    for (long i = 0; i < recorded; i++) free(records[i].parameters);
    recorded = 0;
}

const char *stub_name(long i) { return records[i].function->name; }
unsigned stub_grid(long i) { return records[i].grid; }
unsigned stub_threads(long i) { return records[i].threads; }
unsigned stub_shared(long i) { return records[i].shared; }
uint64_t stub_stream(long i) { return (uint64_t)records[i].stream; }
unsigned stub_parameters(long i) { return records[i].function->parameters; }
unsigned stub_size(long i, unsigned k) { return records[i].function->size[k]; }
const unsigned char *stub_parameter(long i, unsigned k) {
    return records[i].parameters + records[i].function->offset[k];
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 8: *value = 49152; break;              /* MAX_SHARED_MEMORY_PER_BLOCK */
    case 10: *value = 32; break;                /* WARP_SIZE */
    case 12: *value = 65536; break;             /* MAX_REGISTERS_PER_BLOCK */
    case 16: *value = stub_multiprocessors; break;
    case 75: *value = stub_capability[0]; break;
    case 76: *value = stub_capability[1]; break;
    case 97: *value = stub_shared_memory; break; /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    default: *value = stub_shared_memory + 1024;
    }
    return OK;
}

CUresult cuFuncGetAttribute(int *value, int attribute, const Function *function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0; /* MAX_THREADS_PER_BLOCK; nothing else is known */
    return OK;
}

CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    (void)attribute;
    *(uint64_t *)data = pointer;
    return OK;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "the stub of libcuda cannot do this";
    return OK;
}

static char context;
CUresult cuCtxGetCurrent(void **out) { *out = &context; return OK; }
CUresult cuDevicePrimaryCtxRetain(void **out, int device) { (void)device; *out = &context; return OK; }
CUresult cuDeviceGet(int *out, int index) { *out = index; return OK; }
CUresult cuDriverGetVersion(int *out) { *out = 13000; return OK; }

/* torch's CUDA runtime, which comes by here, is to find no device. */
CUresult cuDeviceGetCount(int *out) { *out = 0; return OK; }
CUresult cuGetProcAddress_v2(void) { return NOT_SUPPORTED; }

/* Done with success and no effect. What the launcher looks up by name only if it needs it, is not here. */
#define NOTHING(name) \
    CUresult name(void) { return OK; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuFuncSetAttribute)
NOTHING(cuModuleUnload)
NOTHING(cuStreamIsCapturing)
