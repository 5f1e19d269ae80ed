// Where the numbers of many tensors lie: a Python list of tensors costs the dispatcher 0.2 us an entry each time it is
// passed, which for a thousand gradients is longer than reading them. Torch (from 2.11 on) offers the C functions of
// DLPack's exchange protocol, which take 20 ns. The structures are that protocol's, version 1: a fixed binary interface.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "stablekern/finite.h"
#include "stablekern/pool.h"
#include "stablekern/spans.h"

namespace stablekern {

struct DlpackTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlpackExchange {
  uint32_t major, minor;
  DlpackExchange* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DlpackTensor* out);  // borrowed: valid while the object lives
  void* current_stream;
};

constexpr int32_t kDlpackCpu = 1;
enum DlpackCode : uint8_t { kDlpackFloat = 2, kDlpackBfloat = 4, kDlpackComplex = 5 };

// Torch's functions, or null if this torch has none of that version.
inline const DlpackExchange* exchange_of(PyObject* tensor_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* found = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the type keeps it
  if (found == nullptr) PyErr_Clear();
  while (found != nullptr && found->major != 1) found = found->older;
  return found != nullptr && found->tensor_from_object != nullptr ? found : nullptr;
}

inline bool is_consecutive(const DlpackTensor& tensor) {
  int64_t stride = 1;
  for (int dim = tensor.dims - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] == 0) return true;
    if (tensor.shape[dim] != 1 && tensor.strides != nullptr && tensor.strides[dim] != stride) return false;
    stride *= tensor.shape[dim];
  }
  return true;
}

// One row, from a plain tensor of consecutive floating-point or complex numbers in the memory of the CPU; else false.
inline bool span_row(const DlpackTensor& tensor, int64_t* row) {
  if (tensor.device_type != kDlpackCpu || tensor.lanes != 1 || !is_consecutive(tensor)) return false;
  const bool pairs = tensor.code == kDlpackComplex;
  const int bits = pairs ? tensor.bits / 2 : tensor.bits;
  SpanType type;
  if (tensor.code == kDlpackBfloat && bits == 16)
    type = SpanType::kBfloat16;
  else if (tensor.code == kDlpackFloat && bits == 16)
    type = SpanType::kHalf;
  else if ((tensor.code == kDlpackFloat || pairs) && bits == 32)
    type = SpanType::kFloat;
  else if ((tensor.code == kDlpackFloat || pairs) && bits == 64)
    type = SpanType::kDouble;
  else
    return false;
  int64_t count = pairs ? 2 : 1;
  for (int dim = 0; dim < tensor.dims; ++dim) count *= tensor.shape[dim];
  row[0] = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.data) + static_cast<intptr_t>(tensor.byte_offset));
  row[1] = count;
  row[2] = static_cast<int64_t>(type);
  return true;
}

// A tensor that gives its memory back to the pool when it dies, as the capsule that `torch.from_dlpack` takes; null with
// Python's MemoryError set if there is none.
struct DlpackManaged {
  DlpackTensor tensor;
  void* context;
  void (*deleter)(DlpackManaged*);
};

inline PyObject* pooled_capsule(std::vector<int64_t> shape, uint8_t code, uint8_t bits, size_t limit) {
  struct Owner {
    DlpackManaged managed;
    std::vector<int64_t> shape;
  };
  size_t bytes = bits / 8;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  void* data = pool().acquire(bytes, limit);
  if (data == nullptr) return PyErr_NoMemory();
  auto* owner = new Owner{{}, std::move(shape)};
  owner->managed = {{data, kDlpackCpu, 0, static_cast<int32_t>(owner->shape.size()), code, bits, 1,
                     owner->shape.data(), nullptr, 0},
                    owner, [](DlpackManaged* self) {
                      pool().release(self->tensor.data);
                      delete static_cast<Owner*>(self->context);
                    }};
  return PyCapsule_New(&owner->managed, "dltensor", [](PyObject* capsule) {
    // Whoever takes the tensor renames the capsule and calls the deleter himself.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DlpackManaged*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

// Torch's tensor type and functions.
struct Exchange {
  PyObject* tensor_type;
  const DlpackExchange* functions;
};

// The row of a plain tensor; false, with no error set, for a subclass, another device or layout, an unusual dtype.
inline bool row_of(const Exchange& exchange, PyObject* object, int64_t* row) {
  DlpackTensor tensor;
  const bool plain = reinterpret_cast<PyObject*>(Py_TYPE(object)) == exchange.tensor_type &&
                     exchange.functions->tensor_from_object(object, &tensor) == 0 && span_row(tensor, row);
  if (!plain) PyErr_Clear();
  return plain;
}

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// The gradients of `parameters` that are not None as a new list, and their rows in `table`; None, with no error set, if
// any is no plain tensor, which then need the slow way.
inline PyObject* gather_gradients(PyObject* parameters, int64_t* table, const Exchange& exchange) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  if (exchange.functions == nullptr || !PyList_Check(parameters)) Py_RETURN_NONE;
  Owned gradients(PyList_New(0));
  if (gradients == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parameters); ++i) {
    const Owned gradient(PyObject_GetAttr(PyList_GET_ITEM(parameters, i), name));
    if (gradient == nullptr) return nullptr;
    if (gradient.get() == Py_None) continue;
    if (!row_of(exchange, gradient.get(), table)) Py_RETURN_NONE;
    if (PyList_Append(gradients.get(), gradient.get()) != 0) return nullptr;
    table += kSpanColumns;
  }
  return gradients.release();
}

// Whether all of a list of tensors are finite throughout: True or False; None if any is no plain tensor.
inline PyObject* all_finite(PyObject* tensors, const Exchange& exchange) {
  if (exchange.functions == nullptr || !PyList_Check(tensors)) Py_RETURN_NONE;
  std::vector<Span> spans(PyList_GET_SIZE(tensors));
  for (size_t i = 0; i < spans.size(); ++i) {
    int64_t row[kSpanColumns];
    if (!row_of(exchange, PyList_GET_ITEM(tensors, i), row)) Py_RETURN_NONE;
    spans[i] = span_of(row);
  }
  return PyBool_FromLong(finite_throughout(spans));
}

// The same of the gradients of `parameters`. What they are known by, (object, version) of each behind a first row that
// holds their number, goes to `seen` if all are finite. With `unless_seen` they are not read if it is there already.
inline PyObject* gradients_finite(PyObject* parameters, int64_t* seen, bool unless_seen, const Exchange& exchange) {
  static PyObject* const version_name = PyUnicode_InternFromString("_version");
  std::vector<int64_t> rows(PyList_Check(parameters) ? PyList_GET_SIZE(parameters) * kSpanColumns : 0);
  const Owned gradients(gather_gradients(parameters, rows.data(), exchange));
  if (gradients == nullptr) return nullptr;
  if (gradients.get() == Py_None) Py_RETURN_NONE;
  const Py_ssize_t count = PyList_GET_SIZE(gradients.get());
  std::vector<int64_t> known{count, 0};
  std::vector<Span> spans(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* gradient = PyList_GET_ITEM(gradients.get(), i);
    const Owned version(PyObject_GetAttr(gradient, version_name));
    if (version == nullptr) return nullptr;
    known.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(gradient)));
    known.push_back(PyLong_AsLongLong(version.get()));
    spans[i] = span_of(rows.data() + i * kSpanColumns);
  }
  if (unless_seen && std::equal(known.begin(), known.end(), seen)) Py_RETURN_TRUE;
  if (!finite_throughout(spans)) Py_RETURN_FALSE;
  std::copy(known.begin(), known.end(), seen);
  Py_RETURN_TRUE;
}

}  // namespace stablekern
