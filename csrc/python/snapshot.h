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
  // `modules` are nn.Modules, with their submodules among them; `dictionaries` are others besides.
  Snapshot(const pybind11::list& modules, const pybind11::list& dictionaries);

  // Whether all is as it was. Of parameters, the values are not compared.
  bool holds() const;

  // For Python's garbage collector: modules can hold, in their dictionaries, who holds this.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // All pointers here and below are borrowed from `kept_`.
  struct Dictionary {
    PyObject* dictionary;
    std::vector<std::pair<PyObject*, PyObject*>> entries;  // in the dictionary's order
  };
  struct Module {
    PyObject* module;
    PyTypeObject* type;
    PyObject* dictionary;
  };
  struct Class {
    PyObject* type;
    PyObject* forward;
  };
  struct Tensor {
    PyObject* tensor;
    PyTypeObject* type;
    PyObject* dtype;
    PyObject* shape;
    bool on_cpu, contiguous;
  };

  PyObject* keep(pybind11::object object);
  void add_dictionary(const pybind11::object& dictionary);
  void add_class(const pybind11::object& type);
  void add_tensor(const pybind11::object& tensor);

  std::vector<Module> modules_;
  std::vector<Dictionary> dictionaries_;
  std::vector<Class> classes_;
  std::vector<Tensor> tensors_;
  std::vector<pybind11::object> kept_;
};

}  // namespace evit
