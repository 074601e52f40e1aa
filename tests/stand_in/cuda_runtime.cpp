// SPDX-License-Identifier: Apache-2.0
// CUDA's runtime. Handles are pointers to what they stand for.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "stand_in/machine.hpp"

using namespace cohort::test::stand_in;

namespace {

struct Event {
  Stream* stream = nullptr;
  std::uint64_t position = 0;  ///< Of the stream's work, how much comes before.
  std::weak_ptr<Capture> capture = {};
  bool captured = false;
};

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
/// Begun by this thread, and not relaxed.
thread_local int strict_captures = 0;

constexpr int kMultiprocessors = 132;

template <class Type, class Handle>
Type* of(Handle handle) {
  return reinterpret_cast<Type*>(handle);
}

/// Whether the call may make a capture of this thread invalid; that is a misuse.
bool is_unsafe(const char* function) {
  if (strict_captures == 0 || capture_mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  misuse(std::string(function) + " in a capture");
  return true;
}

cudaStreamCaptureStatus capture_status(const Stream& stream) {
  if (!stream.capture) {
    return cudaStreamCaptureStatusNone;
  }
  return stream.capture->invalid ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
}

cudaError_t enqueue_on(cudaStream_t handle, Work work) {
  return enqueue(stream_of(handle), std::move(work)) ? cudaSuccess
                                                     : cudaErrorStreamCaptureInvalidated;
}

/// Until all streams of the current device are empty.
void wait_for_device() {
  Machine& all = machine();
  const int device = current_device();
  const bool ended = wait_until(kLongestWait, [&] {
    bool empty = advance(all.default_streams[static_cast<std::size_t>(device)]);
    for (auto& [handle, stream] : all.streams) {
      empty = (stream->device != device || advance(*stream)) && empty;
    }
    return empty;
  });
  if (!ended) {
    misuse("a wait for a device that stays busy");
  }
}

void retain(Graph& graph) {
  for (UserObject* object : graph.objects) {
    ++object->references;
  }
}

void let_go(UserObject* object) {
  if (--object->references == 0) {
    object->destroy(object->object);
    delete object;
    count("user object", -1);
  }
}

void destroy(Graph* graph, const char* kind) {
  for (UserObject* object : graph->objects) {
    let_go(object);
  }
  delete graph;
  count(kind, -1);
}

}  // namespace

extern "C" {

// --- devices ------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* devices) {
  return call("cudaGetDeviceCount", cudaErrorUnknown, [&] { *devices = kDevices; });
}

cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", cudaErrorUnknown, [&] { *device = current_device(); });
}

cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", cudaErrorUnknown, [&] { current_device() = device; });
}

cudaError_t cudaDeviceSynchronize() {
  return unlocked_call("cudaDeviceSynchronize", cudaErrorLaunchFailure, [] {
    if (is_unsafe("cudaDeviceSynchronize")) {
      return cudaErrorStreamCaptureUnsupported;
    }
    wait_for_device();
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return call("cudaGetDeviceProperties", cudaErrorUnknown, [&] {
    *properties = {};
    properties->multiProcessorCount = kMultiprocessors;
    properties->major = 9;
    properties->uuid.bytes[0] = static_cast<char>(device + 1);
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  return call("cudaDeviceGetPCIBusId", cudaErrorUnknown, [&] {
    std::snprintf(text, static_cast<std::size_t>(bytes), "0000:0%d:00.0", device);
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return call("cudaDeviceGetAttribute", cudaErrorUnknown, [&] {
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : kMultiprocessors;
  });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  return call("cudaDeviceCanAccessPeer", cudaErrorUnknown, [&] { *can = 1; });
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr, int, int) {
  return call("cudaDeviceGetP2PAttribute", cudaErrorUnknown, [&] { *value = 1; });
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// --- errors -------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "refused by the stand-in"; }

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfStandIn"; }

// --- memory -------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  return call("cudaMalloc", cudaErrorMemoryAllocation, [&] {
    if (is_unsafe("cudaMalloc")) {
      return cudaErrorStreamCaptureUnsupported;
    }
    *memory = allocate("cudaMalloc", bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaFree(void* memory) {
  return unlocked_call("cudaFree", cudaErrorUnknown, [&] {
    if (memory == nullptr) {
      return cudaSuccess;
    }
    if (is_unsafe("cudaFree")) {
      return cudaErrorStreamCaptureUnsupported;
    }
    wait_for_device();
    return release("cudaMalloc", memory) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  return call("cudaHostAlloc", cudaErrorMemoryAllocation,
              [&] { *memory = allocate("cudaHostAlloc", bytes); });
}

cudaError_t cudaFreeHost(void* memory) {
  return call("cudaFreeHost", cudaErrorUnknown, [&] {
    const bool known = memory == nullptr || release("cudaHostAlloc", memory);
    return known ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  return call("cudaHostGetDevicePointer", cudaErrorUnknown, [&] { *device = host; });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return call("cudaMemcpy", cudaErrorUnknown, [&] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return call("cudaMemcpyAsync", cudaErrorUnknown,
              [&] { return enqueue_on(stream, {.run = [=] { std::memmove(to, from, bytes); }}); });
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  return call("cudaMemsetAsync", cudaErrorUnknown, [&] {
    return enqueue_on(stream, {.run = [=] { std::memset(memory, value, bytes); }});
  });
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return call("cudaMemPoolCreate", cudaErrorMemoryAllocation,
              [&] { *pool = of<CUmemPoolHandle_st>(allocate("pool", 1)); });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return call("cudaMemPoolSetAttribute", cudaErrorUnknown, [] {});
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  return call("cudaMemPoolDestroy", cudaErrorUnknown,
              [&] { return release("pool", pool) ? cudaSuccess : cudaErrorInvalidValue; });
}

cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t, cudaStream_t) {
  return call("cudaMallocFromPoolAsync", cudaErrorMemoryAllocation,
              [&] { *memory = allocate("pool block", bytes); });
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  return call("cudaFreeAsync", cudaErrorUnknown, [&] {
    return enqueue_on(stream, {.run = [memory] { release("pool block", memory); }});
  });
}

// --- streams and events -------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return call("cudaStreamCreateWithFlags", cudaErrorMemoryAllocation, [&] {
    auto made = std::make_unique<Stream>(Stream{.device = current_device()});
    *stream = of<CUstream_st>(made.get());
    machine().streams.emplace(made.get(), std::move(made));
    count("stream", 1);
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call("cudaStreamDestroy", cudaErrorUnknown, [&] {
    advance(stream_of(stream));
    if (machine().destroyed_streams.insert(stream).second) {
      count("stream", -1);
    }
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return call("cudaStreamQuery", cudaErrorLaunchFailure, [&] {
    Stream& stream = stream_of(handle);
    if (stream.capture) {
      misuse("cudaStreamQuery of a captured stream");
      stream.capture->invalid = true;
      return cudaErrorStreamCaptureUnsupported;
    }
    return advance(stream) ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return unlocked_call("cudaStreamSynchronize", cudaErrorLaunchFailure, [&] {
    if (is_unsafe("cudaStreamSynchronize")) {
      return cudaErrorStreamCaptureUnsupported;
    }
    if (!wait_until(kLongestWait, [&] { return advance(stream_of(handle)); })) {
      misuse("a wait for a stream that stays busy");
    }
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return call("cudaEventCreateWithFlags", cudaErrorMemoryAllocation, [&] {
    *event = of<CUevent_st>(new Event);
    count("event", 1);
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call("cudaEventDestroy", cudaErrorUnknown, [&] {
    delete of<Event>(event);
    count("event", -1);
  });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return call("cudaEventRecord", cudaErrorUnknown, [&] {
    Stream& stream = stream_of(stream_handle);
    *of<Event>(handle) = {&stream, stream.enqueued, stream.capture, stream.capture != nullptr};
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  return call("cudaStreamWaitEvent", cudaErrorUnknown, [&] {
    Stream& stream = stream_of(handle);
    const Event event = *of<Event>(event_handle);
    if (event.captured) {  // the stream joins the capture
      const auto capture = event.capture.lock();
      if (capture && !stream.capture) {
        stream.capture = capture;
        capture->streams.push_back(&stream);
      }
      return cudaSuccess;
    }
    if (event.stream == nullptr || stream.capture) {
      return cudaSuccess;
    }
    return enqueue_on(handle, {.ready = [event] {
                        if (event.stream->done < event.position) {
                          advance(*event.stream);
                        }
                        return event.stream->done >= event.position;
                      }});
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  return call("cudaLaunchHostFunc", cudaErrorUnknown,
              [&] { return enqueue_on(stream, {.run = [=] { function(argument); }}); });
}

// --- captures and graphs ------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call("cudaThreadExchangeStreamCaptureMode", cudaErrorUnknown,
              [&] { std::swap(*mode, capture_mode); });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call("cudaStreamIsCapturing", cudaErrorUnknown,
              [&] { *status = capture_status(stream_of(stream)); });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                     std::size_t*) {
  return call("cudaStreamGetCaptureInfo", cudaErrorUnknown, [&] {
    const Stream& stream = stream_of(handle);
    *status = capture_status(stream);
    if (!stream.capture) {
      return;
    }
    *id = stream.capture->id;
    if (graph != nullptr) {
      *graph = of<CUgraph_st>(stream.capture->graph.get());
    }
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call("cudaStreamBeginCapture", cudaErrorUnknown, [&] {
    Stream& stream = stream_of(handle);
    if (stream.capture) {
      return cudaErrorIllegalState;
    }
    strict_captures += mode != cudaStreamCaptureModeRelaxed ? 1 : 0;
    stream.capture = std::make_shared<Capture>(Capture{
        .id = ++machine().captures, .graph = std::make_unique<Graph>(), .streams = {&stream}});
    count("graph", 1);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const bool refused = fails("cudaStreamEndCapture");  // which ends the capture all the same
  const std::lock_guard lock(machine().mutex);
  const std::shared_ptr<Capture> capture = stream_of(handle).capture;
  if (!capture) {
    return cudaErrorIllegalState;
  }
  strict_captures -= strict_captures > 0 ? 1 : 0;
  for (Stream* stream : capture->streams) {
    stream->capture = nullptr;
  }
  Graph* const made = capture->graph.release();
  *graph = nullptr;
  if (capture->invalid || refused) {
    destroy(made, "graph");
    return refused ? cudaErrorUnknown : cudaErrorStreamCaptureInvalidated;
  }
  *graph = of<CUgraph_st>(made);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  return call("cudaGraphInstantiate", cudaErrorMemoryAllocation, [&] {
    auto* const made = new Graph(*of<Graph>(graph));
    retain(*made);
    *executable = of<CUgraphExec_st>(made);
    count("executable graph", 1);
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return call("cudaGraphLaunch", cudaErrorLaunchFailure, [&] {
    for (const Work& work : of<Graph>(executable)->work) {
      const cudaError_t error = enqueue_on(stream, work);
      if (error != cudaSuccess) {
        return error;
      }
    }
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call("cudaGraphDestroy", cudaErrorUnknown, [&] { destroy(of<Graph>(graph), "graph"); });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return call("cudaGraphExecDestroy", cudaErrorUnknown,
              [&] { destroy(of<Graph>(executable), "executable graph"); });
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                 unsigned references, unsigned) {
  return call("cudaUserObjectCreate", cudaErrorMemoryAllocation, [&] {
    *object = of<CUuserObject_st>(new UserObject{pointer, destroy, static_cast<int>(references)});
    count("user object", 1);
  });
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  return call("cudaUserObjectRelease", cudaErrorUnknown, [&] { let_go(of<UserObject>(object)); });
}

/// The caller's reference moves to the graph, as the flag that the library gives says.
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned,
                                      unsigned) {
  return call("cudaGraphRetainUserObject", cudaErrorUnknown,
              [&] { of<Graph>(graph)->objects.push_back(of<UserObject>(object)); });
}

// --- kernels: their launches take a place in the stream, and nothing runs -----------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return call("cudaFuncGetAttributes", cudaErrorUnknown, [&] {
    *attributes = {};
    attributes->binaryVersion = 90;
    attributes->ptxVersion = 90;
  });
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return call("cudaOccupancyMaxActiveClusters", cudaErrorUnknown, [&] { *clusters = 16; });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   std::size_t, unsigned) {
  return call("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", cudaErrorUnknown,
              [&] { *blocks = 1; });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return call("cudaLaunchKernelExC", cudaErrorLaunchFailure,
              [&] { return enqueue_on(config->stream, {}); });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t stream) {
  return call("cudaLaunchKernel", cudaErrorLaunchFailure, [&] { return enqueue_on(stream, {}); });
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  *kernel = of<CUkern_st>(&machine());
  return cudaSuccess;
}

// --- what nvcc's host code calls ----------------------------------------------------------------

unsigned __cudaPushCallConfiguration(dim3, dim3, std::size_t, cudaStream_t) { return 0; }

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { return cudaSuccess; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}

void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

}  // extern "C"
