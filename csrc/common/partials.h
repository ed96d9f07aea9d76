// What the backward sums over queries, split so that every part has one owner, and the fixed order
// in which the parts are added up.
#pragma once

namespace attn::ATTN_ISA {

// A task of the backward: part `part` of the blocks of queries of all its heads. Heads (batches)
// that share a slice of the gradient of bias belong to one task.
struct Schedule {
  int64_t batches, kv_heads;  // per task
  int64_t batch_sets, head_sets;
  int64_t block_size, blocks;  // of queries, per head
  int64_t parts;

  Schedule(const AttentionProblem& p, const AttentionGradients& g, int64_t bytes_per_part) {
    const bool bias = static_cast<bool>(g.bias);
    batches = bias && g.sum_over_batch ? p.B : std::min<int64_t>(p.B, 1);
    kv_heads = bias && g.sum_over_heads ? p.Hk : std::min<int64_t>(p.Hk, 1);
    batch_sets = batches == 0 ? 0 : p.B / batches;
    head_sets = kv_heads == 0 ? 0 : p.Hk / kv_heads;
    block_size = query_block_size(p);
    blocks = (p.M + block_size - 1) / block_size;
    const int64_t sets = std::max<int64_t>(batch_sets * head_sets, 1);
    const int64_t threads = num_threads();
    // Whole heads where they divide evenly, else about four tasks per thread.
    parts = sets % threads == 0 || sets >= 8 * threads ? 1 : (4 * threads + sets - 1) / sets;
    constexpr int64_t most_bytes = int64_t{1} << 29;
    parts = std::min(parts, most_bytes / std::max<int64_t>(bytes_per_part, 1));
    parts = std::max<int64_t>(std::min(parts, blocks), 1);
  }

  int64_t tasks() const { return batch_sets * head_sets * parts; }
};

template <class T>
struct Partials {
  const AttentionProblem& p;
  const AttentionGradients& grads;
  Schedule schedule;
  int64_t key_rows;  // of an accumulator: the last tile may reach beyond the last key
  int64_t key_size, value_size;
  int64_t bias_parts;
  Scratch<T> keys, values;   // [B*Hk, parts] x [panel][key_rows][kPanel]
  Scratch<T> relative_bias;  // [B*H, parts, M+N-1]
  Scratch<T> bias;           // [parts, bias_size]
  Scratch<T> sink;           // [B*H, blocks]

  Partials(const AttentionProblem& p, const AttentionGradients& g, bool want_keys)
      : p(p),
        grads(g),
        schedule(p, g, p.B * p.Hk * p.N * (p.D + p.E) * static_cast<int64_t>(sizeof(T))),
        key_rows(round_up(p.N, kPanel<T>) + kTileRows),
        key_size(want_keys ? key_rows * round_up(p.D, kPanel<T>) : 0),
        value_size(g.value ? key_rows * round_up(p.E, kPanel<T>) : 0),
        bias_parts(g.sum_over_queries && schedule.parts > 1 ? schedule.parts : 0),
        keys(p.B * p.Hk * schedule.parts * key_size),
        values(p.B * p.Hk * schedule.parts * value_size),
        relative_bias(g.relative_bias ? p.B * p.H * schedule.parts * (p.M + p.N) : 0),
        bias(bias_parts * g.bias_size),
        sink(g.sink ? p.B * p.H * schedule.blocks : 0) {
    std::fill(bias.get(), bias.get() + bias_parts * g.bias_size, T(0));
  }

  T* key_sum(int64_t kv_head, int64_t part) const {
    return keys.get() + (kv_head * schedule.parts + part) * key_size;
  }
  T* value_sum(int64_t kv_head, int64_t part) const {
    return values.get() + (kv_head * schedule.parts + part) * value_size;
  }
  T* relative_bias_sum(int64_t head, int64_t part) const {
    return relative_bias.get() + (head * schedule.parts + part) * (p.M + p.N);
  }
  T* bias_sum(int64_t part) const {
    return bias_parts > 0 ? bias.get() + part * grads.bias_size : static_cast<T*>(grads.bias.data);
  }
  int64_t block(const QueryBlock& q) const {
    return (q.batch * p.H + q.head) * schedule.blocks + q.first / schedule.block_size;
  }

  // Called by the task that owns the part, before its first block.
  void clear(int64_t kv_head, int64_t part) const {
    std::fill(key_sum(kv_head, part), key_sum(kv_head, part) + key_size, T(0));
    std::fill(value_sum(kv_head, part), value_sum(kv_head, part) + value_size, T(0));
    if (!grads.relative_bias) return;
    const int64_t group = p.H / p.Hk;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      std::fill(relative_bias_sum(head, part), relative_bias_sum(head, part) + p.M + p.N, T(0));
    }
  }

  // target[head, i] += sum over batches and `parts` of source[batch, head, part, i].
  void add_up(const View& target, const T* source, int64_t heads, int64_t parts, int64_t count,
              int64_t pitch) const {
    if (!target) return;
    run_tasks(heads, [&](TaskQueue& queue) {
      for (int64_t head; (head = queue.next()) >= 0;) {
        T* sum = static_cast<T*>(target.data) + head * count;
        for (int64_t batch = 0; batch < p.B; ++batch) {
          const T* row = source + (batch * heads + head) * parts * pitch;
          for (int64_t part = 0; part < parts; ++part, row += pitch) {
            for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
          }
        }
      }
    });
  }

  // row = sum over the parts of row n of the accumulators, the first of which is `sums`.
  void add_parts(T* row, const T* sums, int64_t size, int64_t n, int64_t width) const {
    for (int64_t part = 0; part < schedule.parts; ++part, sums += size) {
      for (int64_t d = 0; d < width; ++d) {
        const T term = sums[(d / kPanel<T> * key_rows + n) * kPanel<T> + d % kPanel<T>];
        row[d] = part == 0 ? term : row[d] + term;
      }
    }
  }

  void finish_value(int64_t kv_head, int64_t n, T* row) const {
    add_parts(row, value_sum(kv_head, 0), value_size, n, p.E);
    store_row(grads.value, (kv_head * p.N + n) * p.E, row, p.E);
  }

  void finish_parameters() const {
    add_up(grads.sink, sink.get(), p.H, schedule.blocks, 1, 1);
    add_up(grads.relative_bias, relative_bias.get(), p.H, schedule.parts,
           std::max<int64_t>(p.M + p.N - 1, 0), p.M + p.N);
    T* sum = static_cast<T*>(grads.bias.data);
    for (int64_t part = 0; part < bias_parts; ++part) {
      for (int64_t i = 0; i < grads.bias_size; ++i) sum[i] += bias_sum(part)[i];
    }
  }
};

// worker.run(block, part) for every block of queries of a task.
template <class Worker, class T>
void run_backward_task(Worker& worker, const Partials<T>& partials, int64_t task) {
  const AttentionProblem& p = partials.p;
  const Schedule& s = partials.schedule;
  const int64_t part = task % s.parts;
  const int64_t head_set = task / s.parts % s.head_sets;
  const int64_t batch_set = task / s.parts / s.head_sets;
  const int64_t group = p.H / p.Hk;
  for (int64_t b = batch_set * s.batches; b < (batch_set + 1) * s.batches; ++b) {
    for (int64_t k = head_set * s.kv_heads; k < (head_set + 1) * s.kv_heads; ++k) {
      partials.clear(b * p.Hk + k, part);
      for (int64_t h = k * group; h < (k + 1) * group; ++h) {
        // Every parts-th block: parts of a causal head cost about the same.
        for (int64_t block = part; block < s.blocks; block += s.parts) {
          worker.run(QueryBlock(p, b, h, block * s.block_size, s.block_size), part);
        }
      }
    }
  }
}

}  // namespace attn::ATTN_ISA
