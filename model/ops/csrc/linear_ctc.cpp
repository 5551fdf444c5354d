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

struct Sweep {
  Tensor log_mass;              // [B * T, tiles] log of the sum of exp(logit) over each tile's tokens
  std::vector<double> lse;      // [N], over the frames that exist
  std::vector<float> largest;   // [N]
  std::vector<int64_t> argmax;  // [N]
};

Sweep sweep(const Frames& frames, const Tensor& weight, const float* extra_logit, int64_t tile, at::ScalarType type) {
  const int64_t n = frames.size(), vocabulary = weight.size(0), tiles = (vocabulary + tile - 1) / tile;
  const int64_t block = block_frames(type == at::kBFloat16), blocks = (n + block - 1) / block;
  Sweep out;
  out.log_mass = at::empty({frames.matrix.size(0), tiles}, at::kFloat);
  float* log_mass = out.log_mass.mutable_data_ptr<float>();

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
        log_mass[frames.index[first + r] * tiles + j] = top + std::log(row_exp_sum(row, columns, top));
        float& value = best.value[first + r];
        if (top > value || (top == value && v0 < best.token[first + r])) {
          value = top;
          best.token[first + r] = v0 + row_find(row, columns, top);
        }
      }
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
      const float* mass = log_mass + frames.index[i] * tiles;
      const double top = out.largest[i];
      double total = extra_logit ? std::exp(extra_logit[i] - top) : 0.0;
      for (int64_t j = 0; j < tiles; ++j) total += std::exp(double(mass[j]) - top);
      out.lse[i] = top + std::log(total);
    }
  });
  return out;
}

// loss [B]; argmax, lse, largest logit, blank's logit [B, T]; log mass [B * T, tiles]; occupancy [B, T, U + 1] (its last
// column is the blank's), empty unless `with_gradient`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& extra_row, const Tensor& input_lengths,
    const Tensor& targets, const Tensor& target_lengths, int64_t blank, int64_t tile, bool with_gradient, bool native_bf16) {
  at::AutoDispatchBelowAutograd guard;
  const int64_t batch = hidden.size(0), length = hidden.size(1), width = targets.size(1);
  const std::vector<int64_t> lengths = to_vector(input_lengths), labels = to_vector(target_lengths);
  const Tensor target = targets.to(at::kLong).contiguous();
  const at::ScalarType type = product_type(hidden, native_bf16);
  const Frames frames(hidden, lengths);
  std::vector<int64_t> starts(batch + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), starts.begin() + 1);

  // Logits of each utterance's labels and of the blank.
  std::vector<Tensor> columns(batch);
  std::vector<float> blank_logit(frames.size());
  for (int64_t b = 0; b < batch; ++b) {
    Tensor rows = weight.index_select(0, target[b].narrow(0, 0, labels[b])).to(type);
    const Tensor blank_row = extra_row ? *extra_row : weight.select(0, blank);
    rows = at::cat({rows, blank_row.to(type).unsqueeze(0)});
    columns[b] = at::mm(frames.matrix.narrow(0, b * length, lengths[b]).to(type), rows.t()).to(at::kFloat).contiguous();
    const float* from = columns[b].const_data_ptr<float>();
    for (int64_t t = 0; t < lengths[b]; ++t) blank_logit[starts[b] + t] = from[t * (labels[b] + 1) + labels[b]];
  }

  const Sweep swept = sweep(frames, weight, extra_row ? blank_logit.data() : nullptr, tile, type);

  const auto options = at::TensorOptions(at::kFloat);
  Tensor argmax = at::full({batch, length}, blank, at::kLong), lse = at::zeros({batch, length}, options);
  Tensor largest = at::zeros({batch, length}, options), blanks = at::zeros({batch, length}, options);
  for (int64_t i = 0; i < frames.size(); ++i) {
    const int64_t at = frames.index[i];
    argmax.mutable_data_ptr<int64_t>()[at] = swept.argmax[i];
    lse.mutable_data_ptr<float>()[at] = float(swept.lse[i]);
    largest.mutable_data_ptr<float>()[at] = swept.largest[i];
    blanks.mutable_data_ptr<float>()[at] = blank_logit[i];
  }

  Tensor loss = at::empty({batch}, options);
  Tensor occupancy = at::zeros(with_gradient ? at::IntArrayRef{batch, length, width + 1} : at::IntArrayRef{0, 0, 0}, options);
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* out = with_gradient ? occupancy.mutable_data_ptr<float>() + b * length * (width + 1) : nullptr;
      loss.mutable_data_ptr<float>()[b] =
          float(ctc(columns[b].const_data_ptr<float>(), swept.lse.data() + starts[b], target.const_data_ptr<int64_t>() + b * width,
                    lengths[b], labels[b], out, width + 1));
    }
  });
  return {loss, argmax, lse, largest, blanks, swept.log_mass, occupancy};
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

// The columns of one tile that some utterance's recursion uses.
struct Column {
  int64_t utterance, position, column;  // position in the occupancy's last dimension; column within the tile
};

// Gradients of sum(loss_gradient * loss) for hidden, weight and extra_row; empty where not wanted.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& extra_row, const Tensor& input_lengths,
    const Tensor& targets, const Tensor& target_lengths, int64_t blank, const Tensor& loss, const Tensor& lse_in,
    const Tensor& blank_logit_in, const Tensor& log_mass_in, const Tensor& occupancy_in, const Tensor& loss_gradient, int64_t tile,
    double skip_below, bool want_hidden, bool want_weight, bool want_extra, bool native_bf16) {
  at::AutoDispatchBelowAutograd guard;
  const int64_t batch = hidden.size(0), length = hidden.size(1), depth = hidden.size(2), vocabulary = weight.size(0);
  const int64_t tiles = (vocabulary + tile - 1) / tile, slots = occupancy_in.size(2);
  const std::vector<int64_t> labels = to_vector(target_lengths), target = to_vector(targets);
  const at::ScalarType type = product_type(hidden, native_bf16);
  const Tensor lse_tensor = lse_in.contiguous(), mass_tensor = log_mass_in.contiguous(), occupancy_tensor = occupancy_in.contiguous();
  const Tensor blank_tensor = blank_logit_in.contiguous();
  const float* lse = lse_tensor.const_data_ptr<float>();
  const float* log_mass = mass_tensor.const_data_ptr<float>();
  const float* occupancy = occupancy_tensor.const_data_ptr<float>();
  const float* blank_logit = blank_tensor.const_data_ptr<float>();

  // Utterances whose loss has no gradient (an impossible alignment, a zero from above) are left out like padding.
  std::vector<int64_t> lengths = to_vector(input_lengths);
  const Tensor scale_tensor = at::where(at::isinf(loss), at::zeros_like(loss), loss_gradient.to(at::kFloat)).contiguous();
  const float* scale = scale_tensor.const_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b)
    if (scale[b] == 0) lengths[b] = 0;
  const Frames frames(hidden, lengths);
  const int64_t n = frames.size(), block = block_frames(type == at::kBFloat16), blocks = (n + block - 1) / block;

  std::vector<std::vector<Column>> columns(tiles);
  for (int64_t b = 0; b < batch; ++b) {
    if (!lengths[b]) continue;
    for (int64_t u = 0; u <= labels[b]; ++u) {
      const int64_t token = u < labels[b] ? target[b * (slots - 1) + u] : blank;
      if (token < vocabulary) columns[token / tile].push_back({b, u < labels[b] ? u : slots - 1, token % tile});
    }
  }

  Tensor grad_hidden, grad_weight, grad_extra;
  if (want_hidden) grad_hidden = at::zeros({batch * length, depth}, at::kFloat);
  if (want_weight) grad_weight = at::empty({vocabulary, depth}, weight.options());
  float* hidden_out = want_hidden ? grad_hidden.mutable_data_ptr<float>() : nullptr;

  const float threshold = std::log(skip_below);  // -inf for 0
  const float smallest = float(skip_below);
  std::atomic<bool> failed{false};
  Turns turns(blocks, failed);
  share_out(want_hidden || want_weight ? tiles : 0, type, failed, [&](int64_t j, Workspace& space) {
    const int64_t v0 = j * tile, width = std::min(tile, vocabulary - v0);
    // Rows to compute: enough softmax mass in this tile, or a label (or the blank) of this tile is occupied.
    std::vector<char> wanted(batch * length, 0);
    for (const int64_t row : frames.index) wanted[row] = !(log_mass[row * tiles + j] - lse[row] < threshold);
    for (const Column& c : columns[j])
      for (int64_t t = 0; t < lengths[c.utterance]; ++t) {
        const int64_t row = c.utterance * length + t;
        if (occupancy[row * slots + c.position] > smallest) wanted[row] = 1;
      }
    std::vector<int64_t> active, order;  // row, and its place among the frames
    for (int64_t i = 0; i < n; ++i)
      if (wanted[frames.index[i]]) active.push_back(frames.index[i]), order.push_back(i);

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
            if (local[row] < 0) continue;
            auto& element = data[local[row] * width + c.column];
            element = float(element) - occupancy[row * slots + c.position] * scale[c.utterance];
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
    for (const int64_t i : frames.index)
      share[i] = (std::exp(blank_logit[i] - lse[i]) - occupancy[i * slots + slots - 1]) * scale[i / length];
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

}  // namespace
}  // namespace soundwave

TORCH_LIBRARY(soundwave_cpu, library) {
  library.def(
      "forward(Tensor hidden, Tensor weight, Tensor? extra_row, Tensor input_lengths, Tensor targets, Tensor target_lengths, "
      "int blank, int tile, bool with_gradient, bool native_bf16) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &soundwave::forward);
  library.def(
      "backward(Tensor hidden, Tensor weight, Tensor? extra_row, Tensor input_lengths, Tensor targets, Tensor target_lengths, "
      "int blank, Tensor loss, Tensor lse, Tensor blank_logit, Tensor log_mass, Tensor occupancy, Tensor loss_gradient, "
      "int tile, float skip_below, bool want_hidden, bool want_weight, bool want_extra, bool native_bf16) "
      "-> (Tensor, Tensor, Tensor)",
      &soundwave::backward);
}
