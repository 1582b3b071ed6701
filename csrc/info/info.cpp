// vidkern._C_info: tells Python what the CUDA kernels that this process launched need.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "common/resources.h"

namespace {

namespace py = pybind11;
using namespace py::literals;
using vidkern::cuda::KernelResources, vidkern::cuda::ReportLaunches;

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> readable(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return status == 0 ? readable.get() : name;
}

void add_dict(void* list, const KernelResources& k) {
  static_cast<py::list*>(list)->append(
      py::dict("kernel"_a = demangled(k.name), "threads"_a = k.threads, "registers"_a = k.registers,
               "shared_bytes"_a = k.shared_bytes, "local_bytes"_a = k.local_bytes,
               "blocks_per_sm"_a = k.blocks_per_sm));
}

py::list launched(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) throw std::runtime_error(library + " is not loaded");
  auto* report = reinterpret_cast<ReportLaunches*>(dlsym(handle, "vidkern_report_launches"));
  if (report == nullptr) throw std::runtime_error(library + " does not report its launches");
  py::list found;
  const char* error = report(add_dict, &found);
  dlclose(handle);
  if (error != nullptr) throw std::runtime_error(error);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C_info, m) {
  m.def("launched", &launched, "library"_a,
        "Return a dict for each kernel and number of threads that this process launched from a loaded library.");
}
