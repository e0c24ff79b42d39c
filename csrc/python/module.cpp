// evit_ext._C: importing it loads the operators (torch.ops.evit); it passes no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../evit/cpu/simd/simd_level.h"
#include "snapshot.h"
#ifdef USE_CUDA
#include "../evit/self_test.h"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  using namespace evit::cpu;
  std::vector<std::string> levels;
  for (const SimdLevel level :
       {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512, SimdLevel::avx512_bf16, SimdLevel::amx_bf16})
    if (simd_level_available(level)) levels.emplace_back(simd_level_name(level));
  pybind11::dict info;
  info["version"] = EVIT_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["built_with_torch"] = EVIT_TORCH_VERSION;
  info["minimum_torch"] = "2.10";
  info["cpu_capability"] = simd_level_name(simd_level());
  info["cpu_capabilities"] = levels;
#ifdef USE_CUDA
  info["cuda"] = EVIT_CUDA_VERSION;
  info["cuda_operators"] = true;
  info["cuda_architectures"] = EVIT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = pybind11::none();
  info["cuda_operators"] = false;
  info["cuda_architectures"] = "";
#endif
  return info;
}

std::string cuda_self_test(int device) {
#ifdef USE_CUDA
  pybind11::gil_scoped_release release;
  return evit::cuda::self_test(device);
#else
  (void)device;
  return "this build has no CUDA code";
#endif
}

// The snapshot in a Python object, null while that is being made.
evit::Snapshot* snapshot_in(PyObject* self) {
  const auto made = reinterpret_cast<pybind11::detail::instance*>(self)->get_value_and_holder();
  return made.holder_constructed() ? made.value_ptr<evit::Snapshot>() : nullptr;
}

// Lets Python's garbage collector see what a Snapshot holds.
void collect_snapshots(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const evit::Snapshot* const snapshot = snapshot_in(self);
    return snapshot == nullptr ? 0 : snapshot->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (evit::Snapshot* const snapshot = snapshot_in(self)) snapshot->clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of evit_ext. Importing it registers torch.ops.evit.";
  m.def("build_info", &build_info,
        "Facts about this build and machine, as a dict: version, compiler, cxx_standard, built_with_torch,\n"
        "minimum_torch, cpu_capability (the instruction level in use), cpu_capabilities (those that this\n"
        "processor runs), cuda (the toolkit's version or None), cuda_architectures and cuda_operators "
        "(whether\n"
        "the operators have CUDA kernels; where not, they run their PyTorch reference on CUDA tensors).");
  m.def("cuda_self_test", &cuda_self_test, pybind11::arg("device") = 0,
        "Run one small kernel on a CUDA device. Returns '' or what went wrong.");
  pybind11::class_<evit::Snapshot>(m, "Snapshot",
                                   "What modules consist of: classes and their forwards, dictionaries, hooks "
                                   "and the kind of\nparameters, but not their values.",
                                   pybind11::custom_type_setup(&collect_snapshots))
      .def(pybind11::init<const pybind11::list&, const pybind11::list&>(), pybind11::arg("modules"),
           pybind11::arg("dictionaries"),
           "Look at modules, a list with their submodules in it, and at dictionaries besides.")
      .def("holds", &evit::Snapshot::holds, "Return whether nothing has changed since.");
}
