// Whether Python objects are unchanged. Only pointers are compared; no Python code runs.
#pragma once
#include <pybind11/pybind11.h>

namespace embedfuse {

// True if each object still has its class, each dict its length, and each (dict, key) its value. The caller
// guarantees that keys are str, and owners and dicts are dict.
inline bool unchanged(const pybind11::tuple& objects, const pybind11::tuple& classes,
                      const pybind11::tuple& dicts, const pybind11::tuple& lengths,
                      const pybind11::tuple& owners, const pybind11::tuple& keys,
                      const pybind11::tuple& values) {
  const auto at = [](const pybind11::tuple& t, size_t i) { return PyTuple_GET_ITEM(t.ptr(), i); };
  for (size_t i = 0; i < objects.size(); ++i) {
    if ((PyObject*)Py_TYPE(at(objects, i)) != at(classes, i)) return false;
  }
  for (size_t i = 0; i < dicts.size(); ++i) {
    if (PyDict_GET_SIZE(at(dicts, i)) != PyLong_AsSsize_t(at(lengths, i))) return false;
  }
  for (size_t i = 0; i < owners.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(at(owners, i), at(keys, i));
    if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    if (value != at(values, i)) return false;
  }
  return true;
}

}  // namespace embedfuse
