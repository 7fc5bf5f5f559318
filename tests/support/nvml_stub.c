/* A libnvidia-ml.so.1 with one GPU, for the real binding to load where there is no driver. Its one Xid event is the
   last thing heard of it. */
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10, GPU_IS_LOST = 15, TEMPERATURE_GPU = 0, XID = 8 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { void *device; unsigned long long type, data; unsigned int gpu_instance, compute_instance; } Event;

static int gpu = 1, slice = 2, events, waits;

int nvmlInitWithFlags(unsigned int flags) { return SUCCESS; }
const char *nvmlErrorString(int error) { return error == NOT_FOUND ? "Not Found" : "an error"; }

/* The slice of a GPU has memory only. */
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = !strcmp(uuid, "GPU-1c4a7ac3-0000") ? &gpu : !strcmp(uuid, "MIG-2d5b8bd4-0000") ? &slice : 0;
    return *handle ? SUCCESS : NOT_FOUND;
}
int nvmlDeviceGetMemoryInfo(int *handle, Memory *memory) {
    *memory = (Memory){.total = 1000, .free = 400, .used = 600};
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(int *handle, Utilization *utilization) {
    *utilization = (Utilization){.gpu = 75, .memory = 10};
    return *handle == 1 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetPowerUsage(int *handle, unsigned int *milliwatts) {
    *milliwatts = 312500;
    return *handle == 1 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetTemperature(int *handle, int sensor, unsigned int *celsius) {
    *celsius = 61;
    return *handle == 1 && sensor == TEMPERATURE_GPU ? SUCCESS : NOT_SUPPORTED;
}
int nvmlEventSetCreate(void **set) {
    *set = &events;
    return SUCCESS;
}
int nvmlDeviceRegisterEvents(int *handle, unsigned long long types, void *set) {
    return *handle == 1 && types == XID && set == &events ? SUCCESS : NOT_SUPPORTED;
}
int nvmlEventSetWait_v2(void *set, Event *event, unsigned int timeout_ms) {
    *event = (Event){.device = &gpu, .type = XID, .data = 79};
    waits++;
    return waits == 1 ? TIMEOUT : waits == 2 ? SUCCESS : GPU_IS_LOST;
}
