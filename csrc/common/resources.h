// What the launched CUDA kernels need: launch() notes them, csrc/cuda/resources.cu asks CUDA, csrc/info tells Python.
#pragma once

#include <mutex>
#include <set>
#include <utility>

namespace vidkern::cuda {

struct Launches {  // of this process
  std::mutex mutex;
  std::set<std::pair<const void*, int>> seen;  // kernel, threads a block
};

inline Launches launches;

template <typename... Parameters>
void note_launch(void (*kernel)(Parameters...), int threads) {
  const std::lock_guard lock(launches.mutex);
  launches.seen.emplace(reinterpret_cast<const void*>(kernel), threads);
}

struct KernelResources {
  const char* name;  // mangled
  int threads, registers, shared_bytes, local_bytes, blocks_per_sm;  // local: the stack and the spills of a thread
};

// The signature of vidkern_report_launches, which calls add(list, ...) for each launch on the current device. Returns
// null, or CUDA's error.
using ReportLaunches = const char*(void (*add)(void* list, const KernelResources&), void* list);

}  // namespace vidkern::cuda
