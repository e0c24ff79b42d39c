// A quick answer to "has anybody changed these modules?".
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace evit {

// What modules consist of: their classes, everything in their dictionaries and in the dictionaries of these
// (hooks, parameters, submodules), and the kind of their parameters.
//
// Checking this in Python takes as long as a small product, because what it reads is in no cache by the time
// that a block of a model comes again.
class Snapshot {
 public:
  // `modules` are nn.Modules, with their submodules among them; `others` are dictionaries besides.
  // Parameters that are not contiguous, or not all on the CPU, make a snapshot that never holds.
  Snapshot(const pybind11::list& modules, const pybind11::list& others);

  // Whether all is as it was. The state of tensors, but not their values, is compared too.
  bool holds() const;

 private:
  struct Dictionary {
    pybind11::object dictionary;
    // Borrowed from `kept_`, in the dictionary's order.
    std::vector<std::pair<PyObject*, PyObject*>> entries;
  };
  struct Module {
    pybind11::object module;
    PyTypeObject* type;
    PyObject* dictionary;
  };
  struct Class {
    pybind11::object type;
    pybind11::object forward;
  };
  struct Tensor {
    pybind11::object tensor;
    pybind11::object dtype;
  };

  void add_dictionary(const pybind11::object& dictionary);
  void add_class(const pybind11::object& type);
  void add_tensor(const pybind11::object& tensor);

  std::vector<Module> modules_;
  std::vector<Dictionary> dictionaries_;
  std::vector<Class> classes_;
  std::vector<Tensor> tensors_;
  std::vector<pybind11::object> kept_;
  bool possible_ = true;
};

}  // namespace evit
