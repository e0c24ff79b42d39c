#include "snapshot.h"

#include <algorithm>

namespace py = pybind11;

namespace evit {
namespace {

// Attribute names, made once: pybind11 would make a string for each question.
struct Names {
  py::str dtype{"dtype"}, forward{"forward"}, is_cpu{"is_cpu"}, is_contiguous{"is_contiguous"};
};

const Names& names() {
  static const Names* const kNames = new Names();  // never destroyed: Python may end first
  return *kNames;
}

py::object attribute(const py::object& of, const py::str& name) {
  PyObject* const value = PyObject_GetAttr(of.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

bool lies_as_expected(const py::object& tensor) {
  if (attribute(tensor, names().is_cpu).ptr() != Py_True) return false;
  return attribute(tensor, names().is_contiguous)().ptr() == Py_True;
}

}  // namespace

Snapshot::Snapshot(const py::list& modules, const py::list& others) {
  for (const py::handle other : others) add_dictionary(py::reinterpret_borrow<py::object>(other));
  for (const py::handle handle : modules) {
    const py::object module = py::reinterpret_borrow<py::object>(handle);
    const py::object dictionary = module.attr("__dict__");
    modules_.push_back({module, Py_TYPE(module.ptr()), dictionary.ptr()});
    add_class(py::type::of(module));
    add_dictionary(dictionary);
    for (const auto& entry : py::reinterpret_borrow<py::dict>(dictionary))
      if (PyDict_Check(entry.second.ptr())) add_dictionary(py::reinterpret_borrow<py::object>(entry.second));
    for (const auto& entry : py::reinterpret_borrow<py::dict>(module.attr("_parameters")))
      if (!entry.second.is_none()) add_tensor(py::reinterpret_borrow<py::object>(entry.second));
  }
}

void Snapshot::add_dictionary(const py::object& dictionary) {
  Dictionary seen{dictionary, {}};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dictionary.ptr(), &position, &key, &value);) {
    kept_.push_back(py::reinterpret_borrow<py::object>(key));
    kept_.push_back(py::reinterpret_borrow<py::object>(value));
    seen.entries.emplace_back(key, value);
  }
  dictionaries_.push_back(std::move(seen));
}

void Snapshot::add_class(const py::object& type) {
  const auto known = [&](const Class& one) { return one.type.is(type); };
  if (std::none_of(classes_.begin(), classes_.end(), known))
    classes_.push_back({type, attribute(type, names().forward)});
}

void Snapshot::add_tensor(const py::object& tensor) {
  possible_ = possible_ && lies_as_expected(tensor);
  tensors_.push_back({tensor, attribute(tensor, names().dtype)});
}

bool Snapshot::holds() const {
  if (!possible_) return false;
  for (const Module& one : modules_) {
    if (Py_TYPE(one.module.ptr()) != one.type) return false;
    PyObject* const dictionary = PyObject_GenericGetDict(one.module.ptr(), nullptr);
    if (dictionary == nullptr) throw py::error_already_set();
    Py_DECREF(dictionary);  // the module holds it
    if (dictionary != one.dictionary) return false;
  }
  for (const Dictionary& one : dictionaries_) {
    PyObject* const dictionary = one.dictionary.ptr();
    if (PyDict_GET_SIZE(dictionary) != static_cast<Py_ssize_t>(one.entries.size())) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    for (const auto& entry : one.entries)
      if (!PyDict_Next(dictionary, &position, &key, &value) || key != entry.first || value != entry.second)
        return false;
  }
  for (const Class& one : classes_)
    if (!attribute(one.type, names().forward).is(one.forward)) return false;
  return std::all_of(tensors_.begin(), tensors_.end(), [](const Tensor& one) {
    return attribute(one.tensor, names().dtype).is(one.dtype) && lies_as_expected(one.tensor);
  });
}

}  // namespace evit
