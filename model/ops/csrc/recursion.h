// CTC's forward-backward recursion over the states blank, y1, blank, y2, ..., blank, in log space and double precision.
// Graves et al., "Connectionist Temporal Classification", ICML 2006, equations 6 to 14.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace soundwave {

constexpr double LOG_ZERO = -1e30;

#if defined(__AVX512F__)
constexpr int64_t WIDE = 8;
#else
constexpr int64_t WIDE = 4;
#endif
typedef double Doubles __attribute__((vector_size(WIDE * 8)));
typedef int64_t Longs __attribute__((vector_size(WIDE * 8)));

inline Doubles load(const double* from) {
  Doubles value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(double* to, Doubles value) { std::memcpy(to, &value, sizeof(value)); }

// exp(x) for x <= 0, relative error below 1e-12: x = k log 2 + r, Taylor series of exp(r) to the 10th power.
inline Doubles exponential(Doubles x) {
  x = x < -700.0 ? Doubles{} - 700.0 : x;  // still a normal number; false for NaN, which passes through
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, which stays in the low bits
  const Doubles shifted = x * 1.4426950408889634 + magic;
  const Doubles power = shifted - magic;
  const Doubles r = (x - power * 0.693147180369123816490) - power * 1.90821492927058770002e-10;  // log 2 in two parts
  Doubles sum = Doubles{} + 1.0;
  for (int k = 10; k > 0; --k) sum = sum * r * (1.0 / k) + 1.0;
  Longs exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + 1023) << 52;
  Doubles scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return sum * scale;
}

// log(x) for 1 <= x <= 3, error below 1e-12: log x = log sqrt(3) + 2 artanh((x - sqrt 3) / (x + sqrt 3)), by its series.
inline Doubles logarithm(Doubles x) {
  const Doubles z = (x - 1.7320508075688772) / (x + 1.7320508075688772), square = z * z;
  Doubles sum = {};
  for (int k = 21; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return 0.54930614433405485 + 2.0 * z * sum;
}

// out[s] = log(exp(a[s]) + exp(b[s]) + exp(c[s] + penalty[s])) + add[s] for s < n, and beyond up to a full vector.
inline void log_add(const double* a, const double* b, const double* c, const double* penalty, const double* add, double* out,
                    int64_t n) {
  for (int64_t s = 0; s < n; s += WIDE) {
    const Doubles first = load(a + s), second = load(b + s), third = load(c + s) + load(penalty + s);
    Doubles top = first > second ? first : second;
    top = third > top ? third : top;
    const Doubles sum = exponential(first - top) + exponential(second - top) + exponential(third - top);
    store(out + s, top + logarithm(sum) + load(add + s));
  }
}

// One utterance. logits [frames, row]: of the label at each position of the target, and in the last column (row - 1) of the
// blank; lse [frames]; first[u]: where the label of position u stands first. Returns the negative log likelihood, inf where
// no path exists. gradient [frames, row], in the same columns (may be null), is the loss's for those logits: the softmax
// minus the probability, given the target, of being at the label (all its positions together) or at a blank. It is taken in
// double, since the two are nearly equal where training has succeeded. Zero where no path exists.
inline double ctc(const float* logits, const double* lse, const int64_t* target, const int64_t* first, int64_t frames,
                  int64_t labels, float* gradient, int64_t row) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (gradient) std::fill(gradient, gradient + frames * row, 0.0f);
  if (frames == 0) return labels == 0 ? 0.0 : infinity;
  const int64_t states = 2 * labels + 1;
  // Two impossible states on either side, and room for the last vector. What lies past the states is kept impossible: an
  // emission of LOG_ZERO there.
  const int64_t width = states + 4 + WIDE;
  std::vector<double> enter(width, LOG_ZERO), past(width, LOG_ZERO), emission(width, LOG_ZERO);
  std::fill(past.begin() + 2, past.begin() + 2 + states, 0.0);
  for (int64_t u = 1; u < labels; ++u)
    if (target[u] != target[u - 1]) enter[2 + 2 * u + 1] = 0.0;  // from the label before, past the blank between
  auto emit = [&](int64_t t) {
    const float* from = logits + t * row;
    for (int64_t s = 0; s < states; ++s) emission[2 + s] = double(s % 2 ? from[s / 2] : from[row - 1]) - lse[t];
  };

  std::vector<double> alpha((gradient ? frames : 2) * width, LOG_ZERO);
  auto alpha_at = [&](int64_t t) { return alpha.data() + (gradient ? t : t % 2) * width; };
  for (int64_t t = 0; t < frames; ++t) {
    emit(t);
    double* now = alpha_at(t);
    if (t == 0) {
      for (int64_t s = 0; s < std::min<int64_t>(states, 2); ++s) now[2 + s] = emission[2 + s];
    } else {
      const double* before = alpha_at(t - 1);
      log_add(before + 2, before + 1, before, enter.data() + 2, emission.data() + 2, now + 2, states);
    }
  }
  const double* last = alpha_at(frames - 1) + 2;
  double total = last[states - 1];
  if (labels) {
    const double top = std::max(total, last[states - 2]);
    total = top + std::log(std::exp(total - top) + std::exp(last[states - 2] - top));
  }
  if (total < LOG_ZERO / 2) return infinity;
  if (!gradient) return -total;

  // beta without the emission of its own frame; `next` is beta of frame t + 1 with it.
  std::vector<double> beta(width, LOG_ZERO), next(width, LOG_ZERO), leave(width, LOG_ZERO);
  std::vector<double> share(width, 0.0), softmax(width, 0.0), occupancy(labels, 0.0);
  for (int64_t s = 0; s + 2 < states; ++s) leave[2 + s] = enter[2 + s + 2];
  beta[2 + states - 1] = 0.0;
  if (labels) beta[2 + states - 2] = 0.0;
  for (int64_t t = frames - 1; t >= 0; --t) {
    if (t < frames - 1) log_add(next.data() + 2, next.data() + 3, next.data() + 4, leave.data() + 2, past.data() + 2,
                                beta.data() + 2, states);
    const double* now = alpha_at(t);
    emit(t);
    for (int64_t s = 2; s < 2 + states; s += WIDE) {
      store(&share[s], exponential(load(now + s) + load(&beta[s]) - total));
      store(&softmax[s], exponential(load(&emission[s])));
    }
    float* out = gradient + t * row;
    double blank = 0;
    for (int64_t s = 0; s < states; s += 2) blank += share[2 + s];
    out[row - 1] = float(softmax[2] - blank);
    std::fill(occupancy.begin(), occupancy.end(), 0.0);
    for (int64_t u = 0; u < labels; ++u) occupancy[first[u]] += share[2 + 2 * u + 1];
    for (int64_t u = 0; u < labels; ++u) out[u] = first[u] == u ? float(softmax[2 + 2 * u + 1] - occupancy[u]) : 0.0f;
    for (int64_t s = 2; s < 2 + states; ++s) next[s] = beta[s] + emission[s];
  }
  return -total;
}

}  // namespace soundwave
