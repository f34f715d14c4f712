// Where tensors are in memory and what they hold, read through DLPack's C interface (dlpack.h, version 1): as
// torch's Python attributes, in a tenth of the time. The structs are those of its ABI.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <string>

namespace embedfuse {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeApi {
  uint32_t major, minor;
  void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
};

inline bool describes(const DLPackExchangeApi& api, PyObject* tensor, DLTensor* out) {
  try {
    if (api.tensor_from_object(tensor, out) == 0) return true;
    PyErr_Clear();
  } catch (
      const std::exception&) {  // of a sparse tensor: torch's own passes through its C function
  }
  return false;
}

// Address, device, dtype, shape and strides of each tensor, to be compared. Of one without an address (on the meta
// device, sparse) it is the object that counts.
inline pybind11::bytes layouts(const pybind11::capsule& exchange_api,
                               const pybind11::list& tensors) {
  const auto* api =
      (const DLPackExchangeApi*)PyCapsule_GetPointer(exchange_api.ptr(), exchange_api.name());
  if (api->major != 1 || !api->tensor_from_object) {
    throw pybind11::value_error("exchange_api: not that of DLPack 1");
  }
  std::string all;
  for (size_t i = 0; i < tensors.size(); ++i) {
    DLTensor x;
    PyObject* object = PyList_GET_ITEM(tensors.ptr(), i);
    if (!describes(*api, object, &x)) {
      all.append((const char*)&object, sizeof(object));
      continue;
    }
    const int64_t fixed[] = {int64_t(uintptr_t(x.data) + x.byte_offset),
                             x.device_type,
                             x.device_id,
                             x.dtype_code,
                             x.dtype_bits,
                             x.dtype_lanes,
                             x.dimensions};
    all.append((const char*)fixed, sizeof(fixed));
    all.append((const char*)x.shape, x.dimensions * sizeof(int64_t));
    all.append((const char*)x.strides, x.dimensions * sizeof(int64_t));
  }
  return all;
}

}  // namespace embedfuse
