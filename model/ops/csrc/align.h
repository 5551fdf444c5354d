// The most probable CTC path of a target (Viterbi), in double precision, over the states blank, y1, blank, y2, ..., blank.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace soundwave {

// One utterance. labels [frames, stride]: log-probability of the label at each position of the target; blanks [frames].
// place [frames] receives the position of the label that each frame emits, -1 for the blank. open: the path may end after
// any label, not only after the last. Returns the path's log-probability, -inf where no path exists (place is -1 then).
// Ties go to the lower state of origin last: stay, one state below, two states below.
inline double align(const float* labels, const float* blanks, const int64_t* target, int64_t frames, int64_t count,
                    int64_t stride, bool open, int64_t* place) {
  const double impossible = -std::numeric_limits<double>::infinity();
  std::fill(place, place + frames, int64_t(-1));
  if (frames == 0) return count == 0 || open ? 0.0 : impossible;
  const int64_t states = 2 * count + 1;
  std::vector<double> before(states, impossible), now(states, impossible);
  std::vector<uint8_t> step(frames * states, 0);  // how many states below the path came from
  std::vector<char> skip(states, 0);              // whether a label may follow the label before it without a blank
  for (int64_t u = 1; u < count; ++u) skip[2 * u + 1] = target[u] != target[u - 1];
  for (int64_t t = 0; t < frames; ++t) {
    const float* row = labels + t * stride;
    const double blank = blanks[t];
    uint8_t* origin = step.data() + t * states;
    if (t == 0) {
      now[0] = blank;
      if (count) now[1] = row[0];
    } else {
      // State s is reached in s / 2 frames at the earliest.
      const int64_t reached = std::min(states, 2 * (t + 1));
      for (int64_t s = 0; s < reached; ++s) {
        double best = before[s];
        uint8_t from = 0;
        if (s > 0 && before[s - 1] > best) best = before[s - 1], from = 1;
        if (skip[s] && before[s - 2] > best) best = before[s - 2], from = 2;
        now[s] = best + (s % 2 ? double(row[s / 2]) : blank);
        origin[s] = from;
      }
    }
    std::swap(before, now);
  }
  int64_t state = states - 1;
  if (count && before[states - 2] > before[state]) state = states - 2;
  if (open)
    for (int64_t s = states - 1; s >= 0; --s)
      if (before[s] > before[state]) state = s;
  const double score = before[state];
  if (score == impossible) return impossible;
  for (int64_t t = frames - 1; t >= 0; --t) {
    if (state % 2) place[t] = state / 2;
    state -= step[t * states + state];
  }
  return score;
}

}  // namespace soundwave
