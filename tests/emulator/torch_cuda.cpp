// Stands in for the few functions of torch's CUDA library that launchers call: no stream, no device to choose.
// The operator `launches` tells how many kernels the library has launched.
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;  // an emulated launch throws what it finds
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char*) {}

extern "C" void __ubsan_handle_type_mismatch_v1(const emulator::Misaligned* access, const void*) {
  emulator::refuse(*access);
}

static int64_t launches() { return emulator::machine.launches; }

STABLE_TORCH_LIBRARY_FRAGMENT(vidkern_cuda, m) { m.def("launches() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(vidkern_cuda, CompositeExplicitAutograd, m) { m.impl("launches", TORCH_BOX(&launches)); }
