// The fused op on the CPU: torch's own matrix product on tiles that stay in cache, and a vectorised pass over each tile
// while it is there. Meaning, equations and arithmetic: docs/fused_op.md.
//
// A tile is up to `block` frames x `tile` tokens. Work is handed out tile by tile to whichever thread is free; every sum
// is nevertheless taken in one fixed order, so results do not depend on the threads' timing.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <numeric>
#include <thread>

#include "align.h"
#include "recursion.h"
#include "rows.h"

namespace soundwave {
namespace {

using at::Tensor;

// Frames of one product. Measured: 256 rows reach 95 % of the AVX2 peak in float32. Native bfloat16 products pack the
// weight tile first, which more rows pay back.
int64_t block_frames(bool bf16) { return bf16 ? 1024 : 256; }

// The frames that exist, of all utterances, in order.
struct Frames {
  Tensor matrix;               // [B * T, D], contiguous rows
  std::vector<int64_t> index;  // row of `matrix`
  Tensor index_tensor;
  bool all;

  Frames(const Tensor& hidden, const std::vector<int64_t>& lengths) : matrix(hidden.reshape({-1, hidden.size(2)})) {
    const int64_t length = hidden.size(1);
    for (size_t b = 0; b < lengths.size(); ++b)
      for (int64_t t = 0; t < lengths[b]; ++t) index.push_back(int64_t(b) * length + t);
    index_tensor = at::from_blob(index.data(), {int64_t(index.size())}, at::kLong);
    all = int64_t(index.size()) == matrix.size(0);
  }
  Frames(const Frames&) = delete;  // index_tensor looks into index
  int64_t size() const { return int64_t(index.size()); }
};

std::vector<int64_t> to_vector(const Tensor& tensor) {
  const Tensor t = tensor.to(at::kLong).contiguous();
  return std::vector<int64_t>(t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel());
}

// One thread's buffers, allocated when first needed and kept for all its tiles.
struct Workspace {
  at::ScalarType type;
  Tensor flat[8];

  Tensor matrix(int slot, int64_t rows, int64_t columns, at::ScalarType as) {
    Tensor& buffer = flat[slot];
    if (!buffer.defined() || buffer.numel() < rows * columns) buffer = at::empty({rows * columns}, at::dtype(as));
    return buffer.narrow(0, 0, rows * columns).view({rows, columns});
  }
  // Rows first .. first + n of `source` in the type of the products: themselves where they have it, a converted copy otherwise.
  Tensor rows(int slot, const Tensor& source, int64_t first, int64_t n) {
    Tensor part = source.narrow(0, first, n);
    if (part.scalar_type() == type) return part;
    return matrix(slot, n, source.size(1), type).copy_(part);
  }
  Tensor gathered(int slot, int other, const Tensor& source, const Tensor& index) {
    Tensor picked = matrix(slot, index.size(0), source.size(1), source.scalar_type());
    at::index_select_out(picked, source, 0, index);
    return picked.scalar_type() == type ? picked : matrix(other, picked.size(0), picked.size(1), type).copy_(picked);
  }
};

// Calls work(item, workspace) for items 0 .. n - 1, claimed in rising order. An exception in one thread stops all.
void share_out(int64_t n, at::ScalarType type, std::atomic<bool>& failed,
               const std::function<void(int64_t, Workspace&)>& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowAutograd guard;
    for (int64_t seat = begin; seat < end; ++seat) {
      Workspace workspace{type, {}};
      try {
        for (int64_t item = next++; item < n && !failed; item = next++) work(item, workspace);
      } catch (...) {
        failed = true;
        throw;
      }
    }
  });
}

at::ScalarType product_type(const Tensor& hidden, bool native_bf16) {
  return hidden.scalar_type() == at::kBFloat16 && native_bf16 ? at::kBFloat16 : at::kFloat;
}

// fn(pointer) for a tile of logits in either type
template <typename Fn>
void on_elements(const Tensor& tile, const Fn& fn) {
  if (tile.scalar_type() == at::kBFloat16)
    fn(tile.mutable_data_ptr<at::BFloat16>());
  else
    fn(tile.mutable_data_ptr<float>());
}

// A token that an utterance's recursion uses: the first place of each label, and the blank, whose slot is the last.
struct Column {
  int64_t utterance, slot, column;  // column: within the token's tile
};

// Those tokens, by tile. The blank's own row beside the weight lies in no tile.
std::vector<std::vector<Column>> columns_by_tile(const std::vector<int64_t>& first_place, const std::vector<int64_t>& target,
                                                 const std::vector<int64_t>& labels, int64_t slots, int64_t blank, int64_t tile,
                                                 int64_t vocabulary) {
  std::vector<std::vector<Column>> columns((vocabulary + tile - 1) / tile);
  for (int64_t b = 0; b < int64_t(labels.size()); ++b) {
    for (int64_t u = 0; u <= labels[b]; ++u) {
      if (u < labels[b] && first_place[b * slots + u] != u) continue;
      const int64_t token = u < labels[b] ? target[b * (slots - 1) + u] : blank;
      if (token < vocabulary) columns[token / tile].push_back({b, u < labels[b] ? u : slots - 1, token % tile});
    }
  }
  return columns;
}

// [B * slots]: where in its utterance each label stands first.
std::vector<int64_t> first_places(const std::vector<int64_t>& target, const std::vector<int64_t>& labels, int64_t slots) {
  std::vector<int64_t> first(labels.size() * slots, 0);
  for (size_t b = 0; b < labels.size(); ++b) {
    const int64_t* own = target.data() + b * (slots - 1);
    for (int64_t u = 0; u < labels[b]; ++u) first[b * slots + u] = std::find(own, own + u, own[u]) - own;
  }
  return first;
}

struct Sweep {
  Tensor log_mass;              // [B * T, tiles] log of the sum of exp(logit) over each tile's tokens
  std::vector<double> lse;      // [N], over the frames that exist
  std::vector<float> largest;   // [N]
  std::vector<int64_t> argmax;  // [N]
};

// `picked` [N, slots] takes the logits of each utterance's columns; starts[b] is its first frame.
Sweep sweep(const Frames& frames, const Tensor& weight, const float* extra_logit, int64_t tile, at::ScalarType type,
            const std::vector<std::vector<Column>>& columns_of, const std::vector<int64_t>& starts, float* picked, int64_t slots) {
  const int64_t n = frames.size(), vocabulary = weight.size(0), tiles = (vocabulary + tile - 1) / tile;
  const int64_t block = block_frames(type == at::kBFloat16), blocks = (n + block - 1) / block;
  Sweep out;
  // First the largest logit of each (frame, tile), with the sum of exponentials below it in `sums`; at the end the log mass.
  // Apart they lose nothing: where one token has nearly all mass, log p = -log(1 + the rest), not a difference of two large.
  out.log_mass = at::empty({frames.matrix.size(0), tiles}, at::kFloat);
  float* log_mass = out.log_mass.mutable_data_ptr<float>();
  const Tensor sum_tensor = at::empty({n, tiles}, at::kDouble);
  double* sums = sum_tensor.mutable_data_ptr<double>();

  // Each seat keeps the best token it has seen of every frame; the smallest index wins among equals, in any order.
  struct Best {
    std::vector<float> value;
    std::vector<int64_t> token;
  };
  std::vector<Best> bests(at::get_num_threads());
  std::atomic<bool> failed{false};
  share_out(tiles * blocks, type, failed, [&](int64_t item, Workspace& space) {
    const int64_t j = item / blocks, first = item % blocks * block;
    const int64_t rows = std::min(block, n - first), v0 = j * tile, columns = std::min(tile, vocabulary - v0);
    Best& best = bests[at::get_thread_num()];
    if (best.value.empty()) {
      best.value.assign(n, -std::numeric_limits<float>::infinity());
      best.token.assign(n, 0);
    }
    const Tensor h = frames.all ? space.rows(0, frames.matrix, first, rows)
                                : space.gathered(1, 0, frames.matrix, frames.index_tensor.narrow(0, first, rows));
    const Tensor w = space.rows(2, weight, v0, columns);
    Tensor logits = space.matrix(3, rows, columns, type);
    at::mm_out(logits, h, w.t());
    on_elements(logits, [&](auto* data) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* row = data + r * columns;
        const float top = row_max(row, columns);
        log_mass[frames.index[first + r] * tiles + j] = top;
        sums[(first + r) * tiles + j] = row_exp_sum(row, columns, top);
        float& value = best.value[first + r];
        if (top > value || (top == value && v0 < best.token[first + r])) {
          value = top;
          best.token[first + r] = v0 + row_find(row, columns, top);
        }
      }
      for (const Column& c : columns_of[j])
        for (int64_t i = std::max(first, starts[c.utterance]); i < std::min(first + rows, starts[c.utterance + 1]); ++i)
          picked[i * slots + c.slot] = data[(i - first) * columns + c.column];
    });
  });

  out.lse.resize(n);
  out.largest.assign(n, -std::numeric_limits<float>::infinity());
  out.argmax.assign(n, 0);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const Best& best : bests) {
        if (best.value.empty()) continue;
        const bool better = best.value[i] > out.largest[i] || (best.value[i] == out.largest[i] && best.token[i] < out.argmax[i]);
        if (better) out.largest[i] = best.value[i], out.argmax[i] = best.token[i];
      }
      if (extra_logit && extra_logit[i] > out.largest[i]) out.largest[i] = extra_logit[i], out.argmax[i] = vocabulary;
      float* mass = log_mass + frames.index[i] * tiles;
      const double* sum = sums + i * tiles;
      const double top = out.largest[i];
      double total = extra_logit ? std::exp(extra_logit[i] - top) : 0.0;
      for (int64_t j = 0; j < tiles; ++j) {
        total += std::exp(mass[j] - top) * sum[j];
        mass[j] += float(std::log(sum[j]));
      }
      out.lse[i] = top + std::log(total);
    }
  });
  return out;
}

// loss [B]; argmax, lse, largest logit, blank's logit [B, T]; log mass [B * T, tiles]; and, `with_gradient`, the gradient of
// each loss for the logits of its labels and its blank, [B, T, U + 1] (a label that stands several times: at its first place).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& extra_row, const Tensor& input_lengths,
    const Tensor& targets, const Tensor& target_lengths, int64_t blank, int64_t tile, bool with_gradient, bool native_bf16) {
  at::AutoDispatchBelowAutograd guard;
  const int64_t batch = hidden.size(0), length = hidden.size(1), slots = targets.size(1) + 1;
  const std::vector<int64_t> lengths = to_vector(input_lengths), labels = to_vector(target_lengths), target = to_vector(targets);
  const at::ScalarType type = product_type(hidden, native_bf16);
  const Frames frames(hidden, lengths);
  const int64_t n = frames.size();
  std::vector<int64_t> starts(batch + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), starts.begin() + 1);

  std::vector<float> extra_logit;
  if (extra_row) {
    const Tensor row = extra_row->to(type);
    extra_logit.resize(n);
    for (int64_t first = 0; first < n; first += 1024) {
      const Tensor index = frames.index_tensor.narrow(0, first, std::min<int64_t>(1024, n - first));
      const Tensor product = at::mv(frames.matrix.index_select(0, index).to(type), row).to(at::kFloat);
      std::copy_n(product.const_data_ptr<float>(), product.numel(), extra_logit.begin() + first);
    }
  }
  const std::vector<int64_t> first_place = first_places(target, labels, slots);
  const auto columns = columns_by_tile(first_place, target, labels, slots, blank, tile, weight.size(0));
  std::vector<float> picked(n * slots, 0.0f);
  const Sweep swept = sweep(frames, weight, extra_row ? extra_logit.data() : nullptr, tile, type, columns, starts, picked.data(), slots);
  if (extra_row)
    for (int64_t i = 0; i < n; ++i) picked[i * slots + slots - 1] = extra_logit[i];

  const auto options = at::TensorOptions(at::kFloat);
  Tensor argmax = at::full({batch, length}, blank, at::kLong), lse = at::zeros({batch, length}, options);
  Tensor largest = at::zeros({batch, length}, options), blank_logit = at::zeros({batch, length}, options);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = frames.index[i];
    argmax.mutable_data_ptr<int64_t>()[at] = swept.argmax[i];
    lse.mutable_data_ptr<float>()[at] = float(swept.lse[i]);
    largest.mutable_data_ptr<float>()[at] = swept.largest[i];
    blank_logit.mutable_data_ptr<float>()[at] = picked[i * slots + slots - 1];
  }

  Tensor loss = at::empty({batch}, options);
  Tensor label_gradient = at::zeros(with_gradient ? at::IntArrayRef{batch, length, slots} : at::IntArrayRef{0, 0, 0}, options);
  float* losses = loss.mutable_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* logits = picked.data() + starts[b] * slots;
      const int64_t* first = first_place.data() + b * slots;
      for (int64_t u = 0; u < labels[b]; ++u)
        if (first[u] != u)
          for (int64_t t = 0; t < lengths[b]; ++t) logits[t * slots + u] = logits[t * slots + first[u]];
      float* share = with_gradient ? label_gradient.mutable_data_ptr<float>() + b * length * slots : nullptr;
      losses[b] = float(ctc(logits, swept.lse.data() + starts[b], target.data() + b * (slots - 1), first, lengths[b], labels[b],
                            share, slots));
    }
  });
  return {loss, argmax, lse, largest, blank_logit, swept.log_mass, label_gradient};
}

// Lets each tile add to a block of frames only after the tile before it has: sums in one order, whatever the threads do.
struct Turns {
  std::vector<std::atomic<int64_t>> done;  // tiles that have finished with each block
  const std::atomic<bool>& failed;

  Turns(int64_t blocks, const std::atomic<bool>& failed) : done(blocks), failed(failed) {}
  void wait(int64_t block, int64_t item) {
    while (done[block].load(std::memory_order_acquire) != item && !failed) std::this_thread::yield();
  }
  void pass(int64_t block, int64_t item) {
    wait(block, item);
    done[block].store(item + 1, std::memory_order_release);
  }
};

// Gradients of sum(loss_gradient * loss) for hidden, weight and extra_row; empty where not wanted. Only those pairs of a
// frame and a tile contribute for which `computed` [B * T, tiles] is true.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& extra_row, const Tensor& input_lengths,
    const Tensor& targets, const Tensor& target_lengths, int64_t blank, const Tensor& loss, const Tensor& lse_in,
    const Tensor& label_gradient_in, const Tensor& loss_gradient, const Tensor& computed_in, int64_t tile, bool want_hidden,
    bool want_weight, bool want_extra, bool native_bf16) {
  at::AutoDispatchBelowAutograd guard;
  const int64_t batch = hidden.size(0), length = hidden.size(1), depth = hidden.size(2), vocabulary = weight.size(0);
  const int64_t tiles = (vocabulary + tile - 1) / tile, slots = label_gradient_in.size(2);
  const std::vector<int64_t> labels = to_vector(target_lengths), target = to_vector(targets);
  const at::ScalarType type = product_type(hidden, native_bf16);
  const Tensor lse_tensor = lse_in.contiguous(), label_tensor = label_gradient_in.contiguous(), pairs = computed_in.contiguous();
  const float* lse = lse_tensor.const_data_ptr<float>();
  const bool* computed = pairs.const_data_ptr<bool>();
  const float* label_gradient = label_tensor.const_data_ptr<float>();

  // Utterances whose loss has no gradient (an impossible alignment, a zero from above) are left out like padding.
  std::vector<int64_t> lengths = to_vector(input_lengths);
  const Tensor scale_tensor = at::where(at::isinf(loss), at::zeros_like(loss), loss_gradient.to(at::kFloat)).contiguous();
  const float* scale = scale_tensor.const_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b)
    if (scale[b] == 0) lengths[b] = 0;
  const Frames frames(hidden, lengths);
  const int64_t n = frames.size(), block = block_frames(type == at::kBFloat16), blocks = (n + block - 1) / block;

  const auto columns = columns_by_tile(first_places(target, labels, slots), target, labels, slots, blank, tile, vocabulary);

  Tensor grad_hidden, grad_weight, grad_extra;
  if (want_hidden) grad_hidden = at::zeros({batch * length, depth}, at::kFloat);
  if (want_weight) grad_weight = at::empty({vocabulary, depth}, weight.options());
  float* hidden_out = want_hidden ? grad_hidden.mutable_data_ptr<float>() : nullptr;

  std::atomic<bool> failed{false};
  Turns turns(blocks, failed);
  share_out(want_hidden || want_weight ? tiles : 0, type, failed, [&](int64_t j, Workspace& space) {
    const int64_t v0 = j * tile, width = std::min(tile, vocabulary - v0);
    std::vector<int64_t> active, order;  // row, and its place among the frames
    for (int64_t i = 0; i < n; ++i)
      if (computed[frames.index[i] * tiles + j]) active.push_back(frames.index[i]), order.push_back(i);

    Tensor w = active.empty() ? Tensor() : space.rows(2, weight, v0, width);
    Tensor sum;  // of the weight's gradient, in float32
    int64_t passed = 0;
    std::vector<int64_t> local(columns[j].empty() ? 0 : batch * length, -1);
    for (int64_t first = 0; first < int64_t(active.size()); first += block) {
      const int64_t rows = std::min<int64_t>(block, int64_t(active.size()) - first);
      const bool run = active[first + rows - 1] - active[first] == rows - 1;
      const Tensor h = run ? space.rows(0, frames.matrix, active[first], rows)
                           : space.gathered(1, 0, frames.matrix, at::from_blob(active.data() + first, {rows}, at::kLong));
      Tensor gradient = space.matrix(3, rows, width, type);  // logits, then gradient of the logits, in place
      at::mm_out(gradient, h, w.t());
      on_elements(gradient, [&](auto* data) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = active[first + r];
          row_probabilities(data + r * width, width, lse[row], scale[row / length]);
          if (!local.empty()) local[row] = r;
        }
        for (const Column& c : columns[j])
          for (int64_t t = 0; t < lengths[c.utterance]; ++t) {
            const int64_t row = c.utterance * length + t;
            if (local[row] >= 0) data[local[row] * width + c.column] = label_gradient[row * slots + c.slot] * scale[c.utterance];
          }
        if (!local.empty())
          for (int64_t r = 0; r < rows; ++r) local[active[first + r]] = -1;
      });
      if (want_weight) {
        if (type == at::kFloat) {
          if (!first) sum = space.matrix(4, width, depth, at::kFloat);
          at::addmm_out(sum, sum, gradient.t(), h, first ? 1 : 0, 1);
        } else {
          Tensor part = space.matrix(5, width, depth, type);
          at::mm_out(part, gradient.t(), h);
          sum = first ? sum.add_(part) : space.matrix(4, width, depth, at::kFloat).copy_(part);
        }
      }
      if (want_hidden) {
        Tensor part = space.matrix(6, rows, depth, type);
        at::mm_out(part, gradient, w);
        on_elements(part, [&](auto* data) {
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t its_block = order[first + r] / block;
            while (passed < its_block) turns.pass(passed++, j);
            turns.wait(its_block, j);
            float* out = hidden_out + active[first + r] * depth;
            const auto* in = data + r * depth;
            for (int64_t d = 0; d < depth; ++d) out[d] += float(in[d]);
          }
        });
      }
    }
    if (want_weight) {
      Tensor out = grad_weight.narrow(0, v0, width);
      if (active.empty())
        out.zero_();
      else
        out.copy_(sum);
    }
    while (want_hidden && passed < blocks) turns.pass(passed++, j);
  });

  // The blank's own row: one more token, whose gradient is a column.
  if (extra_row && (want_hidden || want_extra)) {
    const Tensor row_values = extra_row->to(at::kFloat).contiguous();
    const float* row = row_values.const_data_ptr<float>();
    std::vector<double> sum(depth, 0.0);
    const Tensor column = at::zeros({batch * length}, at::kFloat);
    float* share = column.mutable_data_ptr<float>();
    for (const int64_t i : frames.index) share[i] = label_gradient[i * slots + slots - 1] * scale[i / length];
    if (want_hidden)
      at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          for (int64_t d = 0, i = frames.index[k]; d < depth; ++d) hidden_out[i * depth + d] += share[i] * row[d];
      });
    if (want_extra) {
      grad_extra = at::zeros({depth}, at::kFloat);
      for (int64_t first = 0; first < n; first += 1024) {
        const Tensor index = frames.index_tensor.narrow(0, first, std::min<int64_t>(1024, n - first));
        grad_extra += at::mv(frames.matrix.index_select(0, index).to(at::kFloat).t(), column.index_select(0, index));
      }
      grad_extra = grad_extra.to(extra_row->scalar_type());
    }
  }
  const auto none = [&](const Tensor& tensor) { return tensor.defined() ? tensor : at::empty({0}, at::kFloat); };
  if (want_hidden) grad_hidden = grad_hidden.view({batch, length, depth}).to(hidden.scalar_type());
  return {none(grad_hidden), none(grad_weight), none(grad_extra)};
}

// The most probable paths of targets, as in align.h: place [B, T] int64 (-1: blank, or past the utterance) and score [B].
std::tuple<Tensor, Tensor> ctc_align(const Tensor& label_logprob, const Tensor& blank_logprob, const Tensor& targets,
                                     const Tensor& input_lengths, const Tensor& target_lengths, bool open) {
  at::AutoDispatchBelowAutograd guard;
  const int64_t batch = blank_logprob.size(0), length = blank_logprob.size(1), slots = targets.size(1);
  const Tensor label_tensor = label_logprob.to(at::kFloat).contiguous(), blank_tensor = blank_logprob.to(at::kFloat).contiguous();
  const std::vector<int64_t> lengths = to_vector(input_lengths), counts = to_vector(target_lengths), target = to_vector(targets);
  Tensor place = at::full({batch, length}, -1, at::kLong), score = at::empty({batch}, at::kDouble);
  int64_t* places = place.mutable_data_ptr<int64_t>();
  double* scores = score.mutable_data_ptr<double>();
  const float* labels = label_tensor.const_data_ptr<float>();
  const float* blanks = blank_tensor.const_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      scores[b] = align(labels + b * length * slots, blanks + b * length, target.data() + b * slots, lengths[b], counts[b],
                        slots, open, places + b * length);
  });
  return {place, score};
}

}  // namespace
}  // namespace soundwave

TORCH_LIBRARY(soundwave_cpu, library) {
  library.def(
      "forward(Tensor hidden, Tensor weight, Tensor? extra_row, Tensor input_lengths, Tensor targets, Tensor target_lengths, "
      "int blank, int tile, bool with_gradient, bool native_bf16) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &soundwave::forward);
  library.def(
      "backward(Tensor hidden, Tensor weight, Tensor? extra_row, Tensor input_lengths, Tensor targets, Tensor target_lengths, "
      "int blank, Tensor loss, Tensor lse, Tensor label_gradient, Tensor loss_gradient, Tensor computed, "
      "int tile, bool want_hidden, bool want_weight, bool want_extra, bool native_bf16) "
      "-> (Tensor, Tensor, Tensor)",
      &soundwave::backward);
  library.def(
      "ctc_align(Tensor label_logprob, Tensor blank_logprob, Tensor targets, Tensor input_lengths, Tensor target_lengths, "
      "bool open) -> (Tensor, Tensor)",
      &soundwave::ctc_align);
}
