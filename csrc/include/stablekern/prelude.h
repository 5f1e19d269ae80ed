// What nearly every source includes and takes longest to read: compiled once, before the others (`_build.py`). Sources
// include what they use all the same, and build without this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stablekern/complex_simd.h"
#include "stablekern/simd.h"
