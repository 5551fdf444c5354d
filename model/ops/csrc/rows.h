// One row of logits at a time, while the tile is in cache: largest value, sum of exponentials, probabilities.
//
// GCC/Clang vector types: 16 lanes where the compiler may use AVX-512, 8 otherwise; the same source on every machine.
// NaN is carried through everywhere, so that a broken step shows as a NaN loss.
#pragma once

#include <ATen/ATen.h>
#include <cstdint>
#include <cstring>
#include <limits>

namespace soundwave {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// exp(x) below this is taken as zero: 1.6e-28, far below what a float32 sum with a term of 1 can hold, and far enough above
// the denormals, which are slow in a product.
constexpr float LOG_SMALLEST = -64.0f;

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline Floats load(const at::BFloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  Words wide = __builtin_convertvector(bits, Words) << 16;
  Floats value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline void store(at::BFloat16* to, Floats value) {
  Words wide;
  std::memcpy(&wide, &value, sizeof(wide));
  Words rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // nearest, ties to even
  rounded = value == value ? rounded : Words{} + 0x7fc0;
  Halves bits = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &bits, sizeof(bits));
}

// The last, partial vector of a row: lanes past n hold `fill`.
template <typename Element>
inline Floats load_part(const Element* from, int64_t n, float fill) {
  Element part[LANES];
  for (int64_t i = 0; i < LANES; ++i) part[i] = i < n ? from[i] : Element(fill);
  return load(part);
}

// exp(x) for x <= about 0 (any x up to 88), relative error below 2e-7. Range reduction and polynomial of the Cephes
// library's expf (S. Moshier).
inline Floats exponential(Floats x) {
  const Floats zero = {};
  const Ints tiny = x < LOG_SMALLEST;  // false for NaN
  x = tiny ? zero : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stays in the low bits
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats power = shifted - magic;
  Floats rest = x - power * 0.693359375f;
  rest = rest + power * 2.12194440e-4f;
  Floats poly = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * rest + 8.3334519073e-3f;
  poly = poly * rest + 4.1665795894e-2f;
  poly = poly * rest + 1.6666665459e-1f;
  poly = poly * rest + 5.0000001201e-1f;
  poly = poly * (rest * rest) + rest + 1.0f;
  Ints exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + 127) << 23;  // the magic number's own bits are shifted out
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return tiny ? zero : poly * scale;
}

template <typename Element>
inline float row_max(const Element* row, int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Floats best[4] = {Floats{} + lowest, Floats{} + lowest, Floats{} + lowest, Floats{} + lowest};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int64_t j = 0; j < 4; ++j) {
      const Floats value = load(row + i + j * LANES);
      best[j] = value > best[j] ? value : best[j];
    }
  }
  for (; i < n; i += LANES) {
    const Floats value = i + LANES <= n ? load(row + i) : load_part(row + i, n - i, lowest);
    best[0] = value > best[0] ? value : best[0];
  }
  float top = lowest;
  for (const Floats& lanes : best)
    for (int64_t j = 0; j < LANES; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

// sum over the row of exp(value - shift). Added up in double: beside a 1, float32 would lose what is below 6e-8, and the
// gradient of a frame that is nearly certain is made of just that.
template <typename Element>
inline double row_exp_sum(const Element* row, int64_t n, float shift) {
  typedef float Half __attribute__((vector_size(LANES * 2)));
  typedef double Doubles __attribute__((vector_size(LANES * 4)));
  Doubles total[2] = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats value = i + LANES <= n ? load(row + i) : load_part(row + i, n - i, -std::numeric_limits<float>::infinity());
    const Floats term = exponential(value - shift);
    Half parts[2];
    std::memcpy(parts, &term, sizeof(term));
    total[0] += __builtin_convertvector(parts[0], Doubles);
    total[1] += __builtin_convertvector(parts[1], Doubles);
  }
  const Doubles both = total[0] + total[1];
  double sum = 0;
  for (int64_t i = 0; i < LANES / 2; ++i) sum += both[i];
  return sum;
}

// row <- exp(row - lse) * scale
template <typename Element>
inline void row_probabilities(Element* row, int64_t n, float lse, float scale) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(row + i, exponential(load(row + i) - lse) * scale);
  if (i < n) {
    Element part[LANES];
    store(part, exponential(load_part(row + i, n - i, 0.0f) - lse) * scale);
    for (int64_t j = 0; i + j < n; ++j) row[i + j] = part[j];
  }
}

template <typename Element>
inline int64_t row_find(const Element* row, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i)
    if (float(row[i]) == value) return i;
  return 0;  // a row of NaN
}

}  // namespace soundwave
