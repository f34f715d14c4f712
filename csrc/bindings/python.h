// A C++ function as a Python function: arguments and result by its signature, exceptions, and the GIL.
// No binding library: pybind11's headers took a quarter of the build.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace embedfuse::python {

// Thrown where a call of Python's C API has set the error.
struct ErrorIsSet {};

// A reference that we own.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw ErrorIsSet{};
  }
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

template <class T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>, "no conversion from Python for this type");

  static T of(PyObject* x) {
    if constexpr (std::is_same_v<T, bool>) {
      const int value = PyObject_IsTrue(x);
      if (value < 0) throw ErrorIsSet{};
      return value;
    } else {
      T value;
      if constexpr (std::is_floating_point_v<T>) {
        value = T(PyFloat_AsDouble(x));
      } else {
        value = T(PyLong_AsLongLong(x));  // addresses too: those of a process are below 2^63
      }
      if (PyErr_Occurred()) throw ErrorIsSet{};
      return value;
    }
  }
};

template <>
struct Argument<PyObject*> {
  static PyObject* of(PyObject* x) { return x; }
};

template <>
struct Argument<std::string> {
  static std::string of(PyObject* x) {
    const char* text = PyUnicode_AsUTF8(x);
    if (!text) throw ErrorIsSet{};
    return text;
  }
};

template <class T>
struct Argument<std::vector<T>> {
  static std::vector<T> of(PyObject* x) {
    const Owned sequence(PySequence_Fast(x, "accepted are lists and tuples"));
    std::vector<T> values;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.get()); ++i) {
      values.push_back(Argument<T>::of(PySequence_Fast_GET_ITEM(sequence.get(), i)));
    }
    return values;
  }
};

template <class... Ts>
struct Argument<std::tuple<Ts...>> {
  static std::tuple<Ts...> of(PyObject* x) { return of(x, std::index_sequence_for<Ts...>()); }

  template <size_t... I>
  static std::tuple<Ts...> of(PyObject* x, std::index_sequence<I...>) {
    if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != sizeof...(Ts)) {
      PyErr_Format(PyExc_TypeError, "%R: accepted is a tuple of %zu", x, sizeof...(Ts));
      throw ErrorIsSet{};
    }
    return {Argument<Ts>::of(PyTuple_GET_ITEM(x, I))...};
  }
};

inline PyObject* result(bool x) { return PyBool_FromLong(x); }
inline PyObject* result(PyObject* x) { return x; }
inline PyObject* result(const std::string& x) {
  return PyUnicode_FromStringAndSize(x.data(), Py_ssize_t(x.size()));
}
inline PyObject* result(const std::vector<std::string>& x) {
  Owned list(PyList_New(Py_ssize_t(x.size())));
  for (size_t i = 0; i < x.size(); ++i) {
    PyList_SET_ITEM(list.get(), Py_ssize_t(i), Owned(result(x[i])).release());
  }
  return list.release();
}

class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

template <class R, class... Args, size_t... I>
PyObject* call(R (*function)(Args...), PyObject* const* given, std::index_sequence<I...>) {
  std::tuple<std::decay_t<Args>...> args{Argument<std::decay_t<Args>>::of(given[I])...};
  if constexpr (std::is_void_v<R>) {
    const GilReleased released;
    function(std::get<I>(args)...);
  } else {
    return result(function(std::get<I>(args)...));
  }
  Py_RETURN_NONE;
}

template <class R, class... Args>
PyObject* checked_call(R (*function)(Args...), PyObject* const* given, Py_ssize_t count) {
  try {
    if (count == sizeof...(Args)) return call(function, given, std::index_sequence_for<Args...>());
    PyErr_Format(PyExc_TypeError, "%zd arguments; accepted are %zu", count, sizeof...(Args));
  } catch (const ErrorIsSet&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// One entry of a module's table. The GIL is released around functions that return nothing: they touch no
// Python object. Those with a result keep it.
template <auto function>
PyMethodDef method(const char* name) {
  PyObject* (*entry)(PyObject*, PyObject* const*,
                     Py_ssize_t) = [](PyObject*, PyObject* const* given, Py_ssize_t count) {
    return checked_call(function, given, count);
  };
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry)), METH_FASTCALL,
          nullptr};
}

}  // namespace embedfuse::python
