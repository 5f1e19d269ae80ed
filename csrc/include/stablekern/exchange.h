// Where the numbers of many tensors lie: a Python list of tensors costs the dispatcher 0.2 us an entry each time it is
// passed, which for a thousand gradients is longer than reading them. Torch (from 2.11 on) offers the C functions of
// DLPack's exchange protocol, which take 20 ns. The structures are that protocol's, version 1: a fixed binary interface.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "stablekern/adamw_rows.h"
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

// Torch's tensor types, methods of the former and functions; torch keeps them.
struct Exchange {
  PyObject *tensor_type, *parameter_type;
  PyObject *is_conj, *is_neg;
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

// Numbers of a plain dense tensor.
struct Numbers {
  void* data;
  int64_t count;  // of real numbers
  SpanType type;
  bool pairs;
};

inline bool numbers_of(const Exchange& exchange, PyObject* object, Numbers* out) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  DlpackTensor tensor;
  int64_t row[kSpanColumns];
  const bool plain = (type == exchange.tensor_type || type == exchange.parameter_type) &&
                     exchange.functions->tensor_from_object(object, &tensor) == 0 && span_row(tensor, row);
  if (!plain) {
    PyErr_Clear();
    return false;
  }
  const Span span = span_of(row);
  *out = {span.data, span.size, span.type, tensor.code == kDlpackComplex};
  return span.data != nullptr || span.size == 0;
}

// Whether a tensor is negated or conjugated only when it is read.
inline bool is_lazy(const Exchange& exchange, PyObject* tensor, bool complex) {
  const Owned negated(PyObject_Vectorcall(exchange.is_neg, &tensor, 1, nullptr));
  const Owned conjugated(complex ? PyObject_Vectorcall(exchange.is_conj, &tensor, 1, nullptr) : nullptr);
  PyErr_Clear();
  return negated.get() != Py_False || (complex && conjugated.get() != Py_False);
}

// One row of the table for each parameter of a list that has a gradient, its moments taken from the optimizer's `state`
// and its number, which counts from `first`, for its stream. Returned are those parameters and their gradients, which
// the caller keeps alive. None, with no error set, if any is not plain or has no state yet.
inline PyObject* gather_adamw(PyObject* parameters, PyObject* state, int64_t first, bool coupled, bool amsgrad,
                              AdamwRow* row, const Exchange& exchange) {
  const auto interned = [](const char* name) { return PyUnicode_InternFromString(name); };
  static PyObject* const grad_name = interned("grad");
  static PyObject* const names[] = {interned("exp_avg"), interned("exp_avg_sq"), interned("step"),
                                    interned("max_exp_avg_sq")};
  if (exchange.functions == nullptr || !PyList_Check(parameters) || !PyDict_Check(state)) Py_RETURN_NONE;
  const Owned stepped(PyList_New(0)), gradients(PyList_New(0));
  if (stepped == nullptr || gradients == nullptr) return nullptr;
  const int count = amsgrad ? 6 : 5;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parameters); ++i) {
    PyObject* parameter = PyList_GET_ITEM(parameters, i);
    const Owned grad(PyObject_GetAttr(parameter, grad_name));
    if (grad == nullptr) return nullptr;
    if (grad.get() == Py_None) continue;
    PyObject* own = PyDict_GetItemWithError(state, parameter);
    if (own == nullptr || !PyDict_Check(own)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    PyObject* tensors[6] = {parameter, grad.get()};
    Numbers numbers[6];
    for (int k = 0; k < count; ++k) {
      if (k >= 2) tensors[k] = PyDict_GetItemWithError(own, names[k - 2]);
      if (tensors[k] == nullptr || !numbers_of(exchange, tensors[k], &numbers[k])) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
    }
    const auto& [value, gradient, average, square, step, largest] = numbers;
    const bool shared = coupled && value.pairs;  // one second moment for re and im
    const auto is_like_value = [&](const Numbers& x, bool halved) {
      const int64_t size = halved ? value.count / 2 : value.count;
      return x.type == value.type && x.pairs == (value.pairs && !halved) && x.count == size;
    };
    if ((value.type != SpanType::kFloat && value.type != SpanType::kDouble) || !is_like_value(gradient, false) ||
        !is_like_value(average, false) || !is_like_value(square, shared) ||
        (amsgrad && !is_like_value(largest, shared)) || step.type != SpanType::kDouble || step.pairs ||
        step.count != 1 || is_lazy(exchange, parameter, value.pairs) || is_lazy(exchange, grad.get(), value.pairs))
      Py_RETURN_NONE;
    *row = AdamwRow{};
    row->kind = shared ? UnitKind::kComplex : UnitKind::kReal;
    row->size = square.count;
    row->parameter = first + i;
    row->value_type = row->grad_type = value.type;
    row->value[0] = value.data;
    row->grad[0] = gradient.data;
    row->exp_avg[0] = average.data;
    row->step[0] = static_cast<double*>(step.data);
    row->square = square.data;
    if (amsgrad) row->largest = largest.data;
    ++row;
    if (PyList_Append(stepped.get(), parameter) != 0 || PyList_Append(gradients.get(), grad.get()) != 0) return nullptr;
  }
  return PyTuple_Pack(2, stepped.get(), gradients.get());
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
