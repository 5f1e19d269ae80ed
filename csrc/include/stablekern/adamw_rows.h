// What one step of ComplexAdamW works on, as a table of int64 numbers: one row for each unit, that is, for what has one
// second moment per element. stablekern/optim/_adamw_step.py and exchange.h write rows, complex_adamw.cpp reads them.
#pragma once

#include <cstdint>

#include "stablekern/spans.h"

namespace stablekern {

// As stablekern/optim/_adamw_step.py numbers them.
enum class UnitKind : int64_t {
  kReal = 0,     // one number per element
  kComplex = 1,  // re and im side by side, one second moment for both
  kPair = 2,     // re and im in two tensors, one second moment for both
  kFirst = 3,    // re of a pair, a real parameter of its own; its normals are the even ones of the pair's stream
  kSecond = 4,   // im of a pair: the odd ones
};

// Whoever writes the addresses keeps the tensors alive.
struct AdamwRow {
  UnitKind kind;
  int64_t size;       // elements
  int64_t offset;     // of the first element within the whole parameter
  int64_t parameter;  // number of the stream of normals
  SpanType value_type, grad_type;  // of real numbers; the moments are like the values
  void* value[2];                  // of the members: a second one only for a pair
  const void* grad[2];
  void* exp_avg[2];
  double* step[2];
  void* rounded[2];   // the half-precision parameters behind float32 values
  void* square;
  void* largest;      // null: no amsgrad
  const void* given;  // normals drawn by the caller; null: draw them here
};
static_assert(sizeof(void*) == sizeof(int64_t) && sizeof(AdamwRow) == 19 * sizeof(int64_t));

}  // namespace stablekern
