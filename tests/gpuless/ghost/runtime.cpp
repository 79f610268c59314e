// A fake CUDA runtime: torch's real CUDA code runs on it, on a machine without a GPU.
//
// The library is loaded before NVIDIA's own (LD_PRELOAD), so that these functions take the place of
// those of the CUDA runtime, cuBLAS, cuDNN and NCCL. All of torch above them is the real thing:
// the dispatcher, autocast, the caching allocator, streams, pinned memory, DDP and the mode in
// which torch refuses every call that makes the host wait for the device.
//
// Kernels compute nothing, so every value is garbage. Nothing takes time and nothing runs
// concurrently, so this shows neither a duration nor a race.
//
// This file holds the functions that return something or count something. For every other function
// that torch's libraries import, build.py generates one that does nothing and returns 0, which is
// "success" in all of these interfaces.
//
// Environment variables:
//   GHOST_N    number of devices, 1 unless set, 16 at most
//   GHOST_GIB  memory of each device in GiB, 31.75 unless set, which is what a V100 of 32 GB has
//
// Counters, which a Python program reads through ctypes.CDLL(None):
//   ghost_count(0)  kernels, including those of cuBLAS and cuDNN
//   ghost_count(1)  copies
//   ghost_count(2)  explicit waits for a stream or a device
//   ghost_count(3)  recorded events
//   ghost_nccl(0)   all-reduces
//   ghost_nccl(1)   bytes that they reduced
//   ghost_reset()   sets all of them to zero

#include <cuda_runtime_api.h>
#include <cudnn_version.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr int MAX_DEVICES = 16;
constexpr int ON_HOST = -1;
// A V100's compute capability, or the lowest one that CUDA 13 has kernels for.
constexpr int COMPUTE_MAJOR = 7, COMPUTE_MINOR = CUDART_VERSION < 13000 ? 0 : 5;
constexpr int MULTIPROCESSORS = 80;
constexpr int WARP_SIZE = 32;
constexpr int THREADS_PER_BLOCK = 1024, THREADS_PER_MULTIPROCESSOR = 2048;
constexpr int REGISTERS = 65536;
constexpr int GRID_SIZE_X = 2147483647;
constexpr int SHARED_BYTES = 48 << 10, SHARED_BYTES_OPT_IN = 96 << 10;
constexpr size_t PAGE_BYTES = 4096;

std::atomic<long> kernels{0}, copies{0}, waits{0}, events{0}, all_reduces{0}, reduced_bytes{0};

struct Block {
  size_t bytes;
  int device;  // ON_HOST for pinned memory
};

std::mutex memory_lock;
std::map<const char*, Block> blocks;  // by their first address
size_t used_bytes[MAX_DEVICES];

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

int device_count() {
  const char* setting = getenv("GHOST_N");
  return setting ? std::clamp(atoi(setting), 0, MAX_DEVICES) : 1;
}

size_t device_bytes() {
  const char* setting = getenv("GHOST_GIB");
  return static_cast<size_t>((setting ? atof(setting) : 31.75) * (1ull << 30));
}

// A value for a handle that nobody follows: a stream, an event, a descriptor.
template <class Handle>
cudaError_t create(Handle* handle) {
  static std::atomic<size_t> created{0};
  *handle = reinterpret_cast<Handle>(0x1000 + 16 * created++);
  return cudaSuccess;
}

}  // namespace

extern "C" {

// Counters

long ghost_count(int which) {
  const std::atomic<long>* counters[] = {&kernels, &copies, &waits, &events};
  return *counters[which];
}

long ghost_nccl(int which) { return which == 0 ? all_reduces : reduced_bytes; }

void ghost_reset() { kernels = copies = waits = events = all_reduces = reduced_bytes = 0; }

// Devices
//
// Proves that the code addresses devices that exist and chooses what suits a V100. The first
// question after the number of devices is answered by a line on stderr as well: they are fake.

cudaError_t cudaGetDeviceCount(int* count) {
  static std::once_flag told;
  std::call_once(told, [] {
    fprintf(stderr, "ghost: these GPUs are fake, and every value computed on them is garbage\n");
  });
  *count = device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return last_error = cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  strcpy(properties->name, "Fake V100-SXM2-32GB");
  properties->major = COMPUTE_MAJOR;
  properties->minor = COMPUTE_MINOR;
  properties->totalGlobalMem = device_bytes();
  properties->multiProcessorCount = MULTIPROCESSORS;
  properties->warpSize = WARP_SIZE;
  properties->maxThreadsPerBlock = THREADS_PER_BLOCK;
  properties->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
  properties->maxBlocksPerMultiProcessor = 32;  // torch.topk divides by it
  properties->regsPerMultiprocessor = properties->regsPerBlock = REGISTERS;
  properties->sharedMemPerBlock = SHARED_BYTES;
  properties->sharedMemPerBlockOptin = SHARED_BYTES_OPT_IN;
  properties->sharedMemPerMultiprocessor = SHARED_BYTES_OPT_IN;
  properties->l2CacheSize = 6 << 20;
  properties->memoryBusWidth = 4096;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = THREADS_PER_BLOCK;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = GRID_SIZE_X;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->textureAlignment = 512;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrComputeCapabilityMajor, COMPUTE_MAJOR},
      {cudaDevAttrComputeCapabilityMinor, COMPUTE_MINOR},
      {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
      {cudaDevAttrWarpSize, WARP_SIZE},
      {cudaDevAttrMaxThreadsPerBlock, THREADS_PER_BLOCK},
      {cudaDevAttrMaxThreadsPerMultiProcessor, THREADS_PER_MULTIPROCESSOR},
      {cudaDevAttrMaxRegistersPerBlock, REGISTERS},
      {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_BYTES},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_BYTES_OPT_IN},
      {cudaDevAttrMaxGridDimX, GRID_SIZE_X},
  };
  auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

// Memory
//
// Device memory is host memory that the operating system provides page by page when it is first
// touched, so that the 22 GiB of a training step cost nothing while no kernel writes to them.
// Proves what torch's caching allocator asks for and when the device would be out of memory.
// The memory of the CUDA context, of cuDNN's workspaces and of NCCL's buffers is missing from it.

cudaError_t cudaMalloc(void** address, size_t bytes) {
  std::lock_guard<std::mutex> guard(memory_lock);
  *address = nullptr;
  if (used_bytes[current_device] + bytes > device_bytes()) {
    return last_error = cudaErrorMemoryAllocation;
  }
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (block == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  blocks[static_cast<char*>(block)] = {bytes, current_device};
  used_bytes[current_device] += bytes;
  *address = block;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto found = blocks.find(static_cast<char*>(address));
  if (found == blocks.end()) return cudaSuccess;
  munmap(address, found->second.bytes);
  used_bytes[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> guard(memory_lock);
  *total_bytes = device_bytes();
  *free_bytes = *total_bytes - used_bytes[current_device];
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  *address = aligned_alloc(PAGE_BYTES, (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
  std::lock_guard<std::mutex> guard(memory_lock);
  blocks[static_cast<char*>(*address)] = {bytes, ON_HOST};
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  std::lock_guard<std::mutex> guard(memory_lock);
  blocks.erase(static_cast<char*>(address));
  free(address);
  return cudaSuccess;
}

// torch asks here whether a tensor of the host is pinned.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = -1;
  std::lock_guard<std::mutex> guard(memory_lock);
  auto next = blocks.upper_bound(static_cast<const char*>(address));
  if (next == blocks.begin()) return cudaSuccess;
  auto [start, block] = *std::prev(next);
  if (address >= start + block.bytes) return cudaSuccess;
  bool on_host = block.device == ON_HOST;
  attributes->type = on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = on_host ? 0 : block.device;
  return cudaSuccess;
}

// Copies
//
// A copy moves its bytes at once, so that what no kernel changes comes back as it went: labels, a
// batch, a checkpoint. Nothing shows that the host left the memory alone until a copy was done.
//
// Large copies within the device, of whole batches of an ImageNet step, are only counted. Nothing
// but garbage is in them, and they would touch memory that the operating system need not provide.

constexpr size_t LARGE_BYTES = 64 << 20;

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  copies++;
  if (kind != cudaMemcpyDeviceToDevice || bytes < LARGE_BYTES) memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  waits++;
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes < LARGE_BYTES) memset(to, value, bytes);
  return cudaSuccess;
}

// Kernels
//
// Proves how many kernels torch launches. None runs, so none can show a wrong index or value.

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  kernels++;
  return cudaSuccess;
}

// What the compiler of CUDA 13 calls instead.
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  kernels++;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  kernels++;
  return cudaSuccess;
}

// The compiler makes a push, a pop and a launch of `kernel<<<grid, block, shared, stream>>>()`.
thread_local struct {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

// Every library with kernels registers its machine code when it is loaded, and keeps the handle.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 10 * COMPUTE_MAJOR + COMPUTE_MINOR;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}

// Streams and events
//
// Proves which events are recorded and where the host waits. Everything is done when its call
// returns, so a missing wait between two streams cannot be seen. Two events are always one
// millisecond apart: a sum of such times counts how often something was timed.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return create(stream);
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  waits++;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  waits++;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(event); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return create(event); }

cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  events++;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
  events++;
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1;
  return cudaSuccess;
}

// No stream is ever being captured into a CUDA graph.
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
#if CUDART_VERSION >= 13000
                                     const cudaGraphEdgeData**,
#endif
                                     size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Errors and the driver
//
// The only errors are those above: a device that does not exist, and no memory left.

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the fake CUDA runtime";
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheFakeRuntime"; }

// torch looks up the driver's functions by their names; each of them is one that does nothing.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  int (*nothing)() = [] { return 0; };
  *function = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, result);
}
#endif

// cuBLAS and cuDNN
//
// Proves that torch reaches them and how often. gpulint.py sees the types and layouts, one level
// higher. What the libraries would choose for a shape is not known: cuDNN offers one engine for
// every convolution, which needs no workspace, and cuBLASLt offers no algorithm, so that torch adds
// the bias of a linear layer by itself.
//
// Their headers are not included. A function is declared with the arguments up to the last one that
// it uses, and returns the status as an integer.

#define CREATES_A_HANDLE(name) \
  int name(void** handle) { return create(handle); }

#define LAUNCHES_A_KERNEL(name) \
  int name() {                  \
    kernels++;                  \
    return 0;                   \
  }

CREATES_A_HANDLE(cublasCreate_v2)

// The matrix products of fp32, and of fp16 and bf16.
LAUNCHES_A_KERNEL(cublasSgemm_v2)
LAUNCHES_A_KERNEL(cublasSgemmStridedBatched)
LAUNCHES_A_KERNEL(cublasGemmEx)
LAUNCHES_A_KERNEL(cublasGemmStridedBatchedEx)

int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}

int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}

size_t cudnnGetVersion() { return CUDNN_VERSION; }

CREATES_A_HANDLE(cudnnCreate)
CREATES_A_HANDLE(cudnnCreateTensorDescriptor)

LAUNCHES_A_KERNEL(cudnnBatchNormalizationForwardTrainingEx)
LAUNCHES_A_KERNEL(cudnnBatchNormalizationBackwardEx)

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                             void*, void*, size_t* bytes) {
  *bytes = 0;
  return 0;
}

int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*,
                                                      void*, void*, void*, size_t* bytes) {
  *bytes = 0;
  return 0;
}

int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                         size_t* bytes) {
  *bytes = 0;
  return 0;
}

// Convolutions go through cuDNN's graph interface: descriptors with typed lists of attributes.
int cudnnBackendCreateDescriptor(int, void** descriptor) { return create(descriptor); }

LAUNCHES_A_KERNEL(cudnnBackendExecute)

int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* count, void* values) {
  constexpr int INT64 = 3, DESCRIPTOR = 15;  // CUDNN_TYPE_INT64 and _BACKEND_DESCRIPTOR
  // A query for the length (nothing wanted), an engine configuration or a number is answered by
  // one element; every other list is empty. The only number that torch reads is a workspace's size.
  if (count) *count = wanted == 0 || type == INT64 || type == DESCRIPTOR;
  if (values && wanted > 0 && type == INT64) *static_cast<int64_t*>(values) = 0;
  return 0;
}

// NCCL
//
// One rank without its peers. Proves how many bytes it would reduce, and that DDP and SyncBN issue
// their collectives without a wait. Every collective leaves its tensors as they are, so nothing is
// shown of the sums, of the order of the ranks or of a rank that hangs.

int ncclGetVersion(int* version) {
  *version = 22705;  // 2.27.5
  return 0;
}

int ncclGetUniqueId(void* id) {
  memset(id, 7, 128);
  return 0;
}

int ncclCommInitRankConfig(void** communicator) { return create(communicator); }

int ncclCommGetAsyncError(void*, int* error) {
  *error = 0;
  return 0;
}

int ncclAllReduce(const void*, void*, size_t count, int type) {
  // By ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, fp16, fp32, fp64, bf16, two fp8
  constexpr int BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  all_reduces++;
  reduced_bytes += count * BYTES[type];
  return 0;
}

}  // extern "C"
