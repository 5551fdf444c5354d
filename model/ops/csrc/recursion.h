// CTC's forward-backward recursion over the states blank, y1, blank, y2, ..., blank, in log space and double precision.
// Graves et al., "Connectionist Temporal Classification", ICML 2006, equations 6 to 14.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace soundwave {

constexpr double LOG_ZERO = -1e30;

// out[s] = log(exp(a[s]) + exp(b[s]) + exp(c[s] + penalty[s])) + add[s]
inline void log_add(const double* a, const double* b, const double* c, const double* penalty, const double* add, double* out,
                    int64_t n) {
#pragma omp simd
  for (int64_t s = 0; s < n; ++s) {
    const double third = c[s] + penalty[s];
    const double two = a[s] > b[s] ? a[s] : b[s];
    const double top = two > third ? two : third;
    // exp(-700) is still a normal number; a NaN passes through the comparisons.
    const double da = a[s] - top < -700.0 ? -700.0 : a[s] - top;
    const double db = b[s] - top < -700.0 ? -700.0 : b[s] - top;
    const double dc = third - top < -700.0 ? -700.0 : third - top;
    out[s] = top + std::log(std::exp(da) + std::exp(db) + std::exp(dc)) + add[s];
  }
}

// One utterance. logits [frames, labels + 1] (the label at each position of the target, then the blank), lse [frames].
// Returns the negative log likelihood, inf where no path exists. occupancy [frames, row] (may be null): the probability,
// given the target, of being at each position, and in its last column (row - 1) of being at a blank; zero where no path exists.
inline double ctc(const float* logits, const double* lse, const int64_t* target, int64_t frames, int64_t labels,
                  float* occupancy, int64_t row) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (occupancy) std::fill(occupancy, occupancy + frames * row, 0.0f);
  if (frames == 0) return labels == 0 ? 0.0 : infinity;
  const int64_t states = 2 * labels + 1;
  const int64_t width = states + 4;  // two impossible states on either side
  std::vector<double> enter(width, LOG_ZERO), zero(width, 0.0), emission(width, 0.0);
  for (int64_t u = 1; u < labels; ++u)
    if (target[u] != target[u - 1]) enter[2 + 2 * u + 1] = 0.0;  // from the label before, past the blank between
  auto emit = [&](int64_t t) {
    const float* from = logits + t * (labels + 1);
    for (int64_t s = 0; s < states; ++s) emission[2 + s] = double(s % 2 ? from[s / 2] : from[labels]) - lse[t];
  };

  std::vector<double> alpha((occupancy ? frames : 2) * width, LOG_ZERO);
  auto alpha_at = [&](int64_t t) { return alpha.data() + (occupancy ? t : t % 2) * width; };
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
  if (!occupancy) return -total;

  // beta without the emission of its own frame; `next` is beta of frame t + 1 with it.
  std::vector<double> beta(width, LOG_ZERO), next(width, LOG_ZERO), leave(width, LOG_ZERO), share(width, 0.0);
  for (int64_t s = 0; s + 2 < states; ++s) leave[2 + s] = enter[2 + s + 2];
  beta[2 + states - 1] = 0.0;
  if (labels) beta[2 + states - 2] = 0.0;
  for (int64_t t = frames - 1; t >= 0; --t) {
    if (t < frames - 1) log_add(next.data() + 2, next.data() + 3, next.data() + 4, leave.data() + 2, zero.data() + 2, beta.data() + 2, states);
    const double* now = alpha_at(t);
#pragma omp simd
    for (int64_t s = 2; s < 2 + states; ++s) {
      const double path = now[s] + beta[s] - total;
      share[s] = std::exp(path < -700.0 ? -700.0 : path);
    }
    float* out = occupancy + t * row;
    double blank = 0;
    for (int64_t s = 0; s < states; s += 2) blank += share[2 + s];
    for (int64_t u = 0; u < labels; ++u) out[u] = float(share[2 + 2 * u + 1]);
    out[row - 1] = float(blank);
    emit(t);
    for (int64_t s = 2; s < 2 + states; ++s) next[s] = beta[s] + emission[s];
  }
  return -total;
}

}  // namespace soundwave
