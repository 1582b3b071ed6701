// Stands in for NVIDIA's header: runs CUDA kernels on the CPU, compiled by the host's compiler from the same source.
//
// Blocks run in turn and the threads of a block as fibers, each until it waits. What a GPU leaves undefined is an error
// here: shared memory read before it was written, read or written by two threads with no barrier between them, or out
// of bounds; a shuffle that its mask does not cover; a barrier that some thread never reaches; an access that is not
// aligned to its type's size; a launch beyond what every GPU takes.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs now
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
template <typename T>
void __stwb(T* p, T value) {
  *p = value;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024, kMaxBlocks = 0x7fffffff;  // of a launch

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("emulator: " + what); }
inline std::string name(int thread) { return "thread " + std::to_string(thread); }

constexpr size_t kOfferBytes = 24;  // the words of a product of matrices

struct Offer {  // what a lane brings to the shuffles of one mask
  int turn = 0;
  char value[2][kOfferBytes] = {};  // of this turn and of the one before, which slower lanes still read
};

// A place to go on from. Entering and leaving a fiber this way takes no system call, as swapcontext does.
using Jump = void*[5];
[[noreturn]] __attribute__((noipa)) inline void go_on(Jump& at) { __builtin_longjmp(at, 1); }

struct Thread {
  int id = 0;
  ucontext_t context;  // its start
  Jump jump;
  bool started = false;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool finished = false, at_barrier = false;
  int warp_syncs = 0;  // since the last barrier of the block
  std::map<unsigned, Offer> offers;
};

// The device: one block at a time, its threads as fibers that run until they wait.
struct Machine {
  std::vector<Thread> threads;
  Thread* current = nullptr;  // the one that runs now; null on the host
  Jump scheduler;
  std::function<void()> kernel;
  std::string error;
  int64_t launches = 0, block = 0, barriers = 0, progress = 0;  // counters that only grow

  __attribute__((noipa)) void wait() {
    if (__builtin_setjmp(current->jump) == 0) go_on(scheduler);
  }

  __attribute__((noipa)) void resume(Thread& thread) {
    current = &thread;
    threadIdx.x = static_cast<unsigned>(thread.id);
    if (__builtin_setjmp(scheduler) != 0) {
      current = nullptr;
      return;
    }
    if (std::exchange(thread.started, true)) go_on(thread.jump);
    setcontext(&thread.context);
  }

  static void enter_thread();

  void start_threads() {
    threads.clear();
    threads.resize(blockDim.x);
    for (size_t i = 0; i < threads.size(); ++i) {
      Thread& thread = threads[i];
      thread.id = static_cast<int>(i);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, enter_thread, 0);
    }
  }

  void run_block() {
    ++block, ++barriers;
    start_threads();
    while (true) {
      const int64_t before = progress;
      size_t finished = 0, waiting = 0;
      for (Thread& thread : threads) {
        if (!thread.finished && !thread.at_barrier) resume(thread);
        if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
        finished += thread.finished, waiting += thread.at_barrier;
      }
      if (finished == threads.size()) return;
      if (waiting == threads.size()) {
        ++barriers;
        for (Thread& thread : threads) thread.at_barrier = false, thread.warp_syncs = 0;
      } else if (finished + waiting == threads.size()) {
        fail("some threads of a block end while others wait at __syncthreads");
      } else if (progress == before) {
        fail("a warp waits for ever: a mask names lanes that do not come");
      }
    }
  }
};

inline Machine machine;

inline void Machine::enter_thread() {
  try {
    machine.kernel();
  } catch (const std::exception& error) {
    machine.error = error.what();
  }
  machine.current->finished = true;
  ++machine.progress;
  machine.wait();
}

// What the compiler calls at a misaligned access (-fsanitize=alignment), and what it then knows.
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment;
};

inline void refuse(const Misaligned& access) {
  if (machine.current == nullptr) return;  // the host takes any
  machine.error = "emulator: " + name(machine.current->id) + ": an access in line " + std::to_string(access.line) +
                  " of " + access.file + " is not aligned to " + std::to_string(1 << access.log_alignment) + " bytes";
  machine.wait();  // for ever
}

inline void sync_threads() {
  machine.current->at_barrier = true;
  ++machine.progress;
  machine.wait();
}

// Lets every lane of the mask bring a value, and waits for all of them. Returns the first lane and the turn.
template <typename T>
std::pair<Thread*, int> meet(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= kOfferBytes);
  Thread& self = *machine.current;
  const int lane = self.id % kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(machine.threads.size()) - (self.id - lane));
  Thread* warp = &self - lane;
  if (!(mask >> lane & 1)) fail(name(self.id) + " is not in the mask of its own shuffle");
  Offer& offer = self.offers[mask];
  const int turn = ++offer.turn;
  std::memcpy(offer.value[turn % 2], &value, sizeof(T));
  ++machine.progress;
  for (int other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1)) continue;
    if (other >= lanes) fail("a mask names lane " + std::to_string(other) + " of " + std::to_string(lanes));
    while (warp[other].offers[mask].turn < turn) machine.wait();
  }
  return {warp, turn};
}

// Each lane of the mask gets the value of lane `source`.
template <typename T>
T exchange(unsigned mask, T value, int source) {
  if (source >= kWarp || !(mask >> source & 1))
    fail(name(machine.current->id) + " reads a lane that its mask leaves out");
  const auto [warp, turn] = meet(mask, value);
  std::memcpy(&value, warp[source].offers[mask].value[turn % 2], sizeof(T));
  return value;
}

// Every lane of the whole warp gets the values of all.
template <typename T>
std::vector<T> gather(const T& value) {
  constexpr unsigned kAll = 0xffffffffu;
  const auto [warp, turn] = meet(kAll, value);
  std::vector<T> values(kWarp);
  for (int lane = 0; lane < kWarp; ++lane)
    std::memcpy(&values[lane], warp[lane].offers[kAll].value[turn % 2], sizeof(T));
  return values;
}

// A thread's, or several threads', use of a shared element between two barriers.
struct Use {
  static constexpr int kSeveral = -1;
  int64_t block = 0, barriers = 0;
  int thread = 0, warp = 0, warp_syncs = 0;

  static Use now() {
    const Thread& t = *machine.current;
    return {machine.block, machine.barriers, t.id, t.id / kWarp, t.warp_syncs};
  }

  bool comes_before(const Use& later) const {
    if (barriers != later.barriers || thread == later.thread) return true;
    return warp == later.warp && warp_syncs < later.warp_syncs;
  }

  void join(const Use& other) {
    const bool same = barriers == other.barriers;
    const int one_thread = same && thread != other.thread ? kSeveral : other.thread;
    const int one_warp = same && warp != other.warp ? kSeveral : other.warp;
    *this = {other.block, other.barriers, one_thread, one_warp, other.warp_syncs};
  }
};

template <typename T>
struct Cell {
  T value;
  Use written, read;

  T get(int i) {
    const Use now = Use::now();
    if (written.block != now.block) fail(at(i) + " is read before it is written");
    if (!written.comes_before(now)) fail(at(i) + " is read with no barrier after another thread's write");
    read.join(now);
    return value;
  }

  void set(int i, T next) {
    const Use now = Use::now();
    if (!written.comes_before(now)) fail(at(i) + " is written by two threads with no barrier between them");
    if (!read.comes_before(now)) fail(at(i) + " is overwritten with no barrier after another thread's read");
    written = now;
    value = next;
  }

  static std::string at(int i) { return name(machine.current->id) + ": shared element " + std::to_string(i); }
};

template <typename... Parameters>
int launch(dim3 grid, dim3 block, void (*kernel)(Parameters...), Parameters... arguments) {
  if (grid.x - 1 >= kMaxBlocks || block.x - 1 >= kMaxThreads)
    fail("a launch of " + std::to_string(grid.x) + " blocks of " + std::to_string(block.x) + " threads");
  gridDim = grid, blockDim = block;
  machine.kernel = [&] { kernel(arguments...); };
  ++machine.launches;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) machine.run_block();
  return 0;
}

}  // namespace emulator

inline void __syncthreads() { emulator::sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::exchange(mask, 0, emulator::machine.current->id % emulator::kWarp);
  ++emulator::machine.current->warp_syncs;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::exchange(mask, value, source % emulator::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int width) {
  return emulator::exchange(mask, value, (emulator::machine.current->id % emulator::kWarp) ^ width);
}

// Shared memory that checks every access; csrc/common/device.h has the real one.
namespace vidkern::cuda {

template <typename T, int kSize>
class Shared {
 public:
  class Element {
   public:
    Element(Shared& array, int i) : array_(array), i_(i) {}
    operator T() const { return array_.cells_[i_].get(i_); }
    Element& operator=(T value) { return array_.cells_[i_].set(i_, value), *this; }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
    Element& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

   private:
    Shared& array_;
    int i_;
  };

  Element operator[](int i) {
    if (i < 0 || i >= kSize) emulator::fail(emulator::Cell<T>::at(i) + " of " + std::to_string(kSize));
    return {*this, i};
  }

 private:
  emulator::Cell<T> cells_[kSize];
};

}  // namespace vidkern::cuda

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return emulator::launch(config->gridDim, config->blockDim, kernel, static_cast<Parameters>(arguments)...);
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes = 256, localSizeBytes = 16;
  int numRegs = 40;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetName(const char** name, const void*) {
  *name = "_ZN7vidkern4cuda6kernelEi";
  return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "unknown error"; }
