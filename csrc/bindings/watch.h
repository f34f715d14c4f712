// Whether Python objects are unchanged. Only pointers are compared; no Python code runs.
#pragma once
#include "bindings/python.h"

namespace embedfuse {

// True if each object still has its class, each dict its length, and each (dict, key) its value. The caller
// guarantees that all arguments are tuples, keys are str, and owners and dicts are dict.
inline bool unchanged(PyObject* objects, PyObject* classes, PyObject* dicts, PyObject* lengths,
                      PyObject* owners, PyObject* keys, PyObject* values) {
  const auto at = [](PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); ++i) {
    if ((PyObject*)Py_TYPE(at(objects, i)) != at(classes, i)) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); ++i) {
    if (PyDict_GET_SIZE(at(dicts, i)) != PyLong_AsSsize_t(at(lengths, i))) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(owners); ++i) {
    PyObject* value = PyDict_GetItemWithError(at(owners, i), at(keys, i));
    if (value == nullptr && PyErr_Occurred()) throw python::ErrorIsSet{};
    if (value != at(values, i)) return false;
  }
  return true;
}

}  // namespace embedfuse
