#include "snapshot.h"

#include <algorithm>

namespace py = pybind11;

namespace evit {
namespace {

// Attribute names, made once: pybind11 would make a string for each question.
struct Names {
  py::str dtype{"dtype"}, forward{"forward"}, is_cpu{"is_cpu"}, is_contiguous{"is_contiguous"},
      shape{"shape"};
};

const Names& names() {
  static const Names* const kNames = new Names();  // never destroyed: Python may end first
  return *kNames;
}

py::object attribute(PyObject* of, const py::str& name) {
  PyObject* const value = PyObject_GetAttr(of, name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

bool is_on_cpu(PyObject* tensor) { return attribute(tensor, names().is_cpu).ptr() == Py_True; }

bool is_contiguous(PyObject* tensor) { return attribute(tensor, names().is_contiguous)().ptr() == Py_True; }

}  // namespace

Snapshot::Snapshot(const py::list& modules, const py::list& dictionaries) {
  for (const py::handle other : dictionaries) add_dictionary(py::reinterpret_borrow<py::object>(other));
  for (const py::handle handle : modules) {
    const py::object module = py::reinterpret_borrow<py::object>(handle);
    const py::object dictionary = module.attr("__dict__");
    modules_.push_back({keep(module), Py_TYPE(module.ptr()), dictionary.ptr()});
    add_class(py::type::of(module));
    add_dictionary(dictionary);
    for (const auto& entry : py::reinterpret_borrow<py::dict>(dictionary))
      if (PyDict_Check(entry.second.ptr())) add_dictionary(py::reinterpret_borrow<py::object>(entry.second));
    for (const auto& entry : py::reinterpret_borrow<py::dict>(module.attr("_parameters")))
      if (!entry.second.is_none()) add_tensor(py::reinterpret_borrow<py::object>(entry.second));
  }
}

PyObject* Snapshot::keep(py::object object) {
  kept_.push_back(std::move(object));
  return kept_.back().ptr();
}

void Snapshot::add_dictionary(const py::object& dictionary) {
  Dictionary seen{keep(dictionary), {}};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dictionary.ptr(), &position, &key, &value);) {
    keep(py::reinterpret_borrow<py::object>(key));
    keep(py::reinterpret_borrow<py::object>(value));
    seen.entries.emplace_back(key, value);
  }
  dictionaries_.push_back(std::move(seen));
}

void Snapshot::add_class(const py::object& type) {
  const auto known = [&](const Class& one) { return one.type == type.ptr(); };
  if (std::none_of(classes_.begin(), classes_.end(), known))
    classes_.push_back({keep(type), keep(attribute(type.ptr(), names().forward))});
}

void Snapshot::add_tensor(const py::object& tensor) {
  PyObject* const own = keep(tensor);
  keep(py::type::of(tensor));
  PyObject* const dtype = keep(attribute(own, names().dtype));
  PyObject* const shape = keep(attribute(own, names().shape));
  tensors_.push_back({own, Py_TYPE(own), dtype, shape, is_on_cpu(own), is_contiguous(own)});
}

bool Snapshot::holds() const {
  if (kept_.empty()) return false;
  for (const Module& one : modules_) {
    if (Py_TYPE(one.module) != one.type) return false;
    PyObject* const dictionary = PyObject_GenericGetDict(one.module, nullptr);
    if (dictionary == nullptr) throw py::error_already_set();
    Py_DECREF(dictionary);  // the module holds it
    if (dictionary != one.dictionary) return false;
  }
  for (const Dictionary& one : dictionaries_) {
    if (PyDict_GET_SIZE(one.dictionary) != static_cast<Py_ssize_t>(one.entries.size())) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    for (const auto& entry : one.entries)
      if (!PyDict_Next(one.dictionary, &position, &key, &value) || key != entry.first ||
          value != entry.second)
        return false;
  }
  for (const Class& one : classes_)
    if (attribute(one.type, names().forward).ptr() != one.forward) return false;
  return std::all_of(tensors_.begin(), tensors_.end(), [](const Tensor& one) {
    return Py_TYPE(one.tensor) == one.type && attribute(one.tensor, names().dtype).ptr() == one.dtype &&
           attribute(one.tensor, names().shape).equal(py::handle(one.shape)) &&
           is_on_cpu(one.tensor) == one.on_cpu && is_contiguous(one.tensor) == one.contiguous;
  });
}

int Snapshot::traverse(visitproc visit, void* arg) const {
  for (const py::object& object : kept_) Py_VISIT(object.ptr());
  return 0;
}

void Snapshot::clear() {
  std::vector<py::object> kept;
  kept.swap(kept_);  // what is let go may ask this in turn
}

}  // namespace evit
