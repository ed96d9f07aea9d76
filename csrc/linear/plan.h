// How one call is cut into tasks. Tokens form runs (all of them, or one packed sequence) that know
// nothing of each other. A run is one segment, walked from its start with a carried state; or
// several, where there are fewer heads than threads. Then the states at the starts of segments come
// from sums over parts of the run that are computed first. The cut depends on shapes, offsets and
// the number of threads only: results are the same every time.
#pragma once

#include <algorithm>
#include <vector>

#include "linear/problem.h"

namespace attn::linear {

struct Interval {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Piece i of an interval cut into pieces of one length, the last ones shorter or empty.
inline Interval piece(Interval all, int64_t length, int64_t i) {
  const int64_t begin = std::min(all.begin + i * length, all.end);
  return {begin, std::min(begin + length, all.end)};
}

struct Run {
  Interval queries, keys;
  int64_t segments;          // 1: no parts
  int64_t parts_in_segment;  // causal: segment s consists of these parts of the run
  int64_t query_part, key_part;
  int64_t first_part;  // counts the parts of the runs before

  int64_t parts() const { return segments == 1 ? 0 : segments * parts_in_segment; }
};

struct Segment {
  const Run* run;
  int64_t index;

  Interval queries() const {
    return piece(run->queries, run->query_part * run->parts_in_segment, index);
  }
  Interval keys() const { return piece(run->keys, run->key_part * run->parts_in_segment, index); }
  bool is_first() const { return index == 0; }
  bool is_last() const { return index == run->segments - 1; }
};

class Plan {
 public:
  // chunk: tokens that are processed at a time; heads: how many there are to share the work.
  Plan(const Problem& p, int64_t heads, int64_t chunk) : hidden{p.M, p.M} {
    const int64_t length = std::max(p.M, p.N);
    const int64_t wanted = segments_per_head(heads, length / (kShortest * chunk));
    if (p.offsets) {
      add_sequences(p, wanted, chunk);
    } else {
      add_run({0, p.M}, {0, p.N}, wanted, chunk);
    }
    for (const Run& run : runs_) {
      for (int64_t i = 0; i < run.segments; ++i) segments.push_back({&run, i});
      for (int64_t i = 0; i < run.parts(); ++i) parts.push_back({&run, i});
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  std::vector<Segment> segments;
  std::vector<Segment> parts;  // index: which part of its run
  Interval hidden;             // the tokens after the last offset

 private:
  static constexpr int64_t kShortest = 4;  // chunks in a segment

  // Segments cost a third more than a run that is walked at once.
  static int64_t segments_per_head(int64_t heads, int64_t most) {
    const int64_t threads = num_threads();
    int64_t best = 1;
    double best_cost = static_cast<double>((heads + threads - 1) / threads);
    for (int64_t count = 2; count <= std::min(threads, most); ++count) {
      const double rounds = static_cast<double>((heads * count + threads - 1) / threads);
      const double cost = 1.3 * rounds / static_cast<double>(count);
      if (cost < best_cost) {
        best = count;
        best_cost = cost;
      }
    }
    return best;
  }

  void add_run(Interval queries, Interval keys, int64_t segments, int64_t chunk) {
    // The sums go before everything else: where segments are few, finer parts keep threads busy.
    const int64_t finer = segments <= 4 ? segments : 1;
    const int64_t parts = segments * finer;
    const auto part_length = [&](Interval all) {
      const int64_t length = (all.size() + parts - 1) / parts;
      return std::max<int64_t>((length + chunk - 1) / chunk, 1) * chunk;
    };
    const int64_t first = runs_.empty() ? 0 : runs_.back().first_part + runs_.back().parts();
    runs_.push_back(
        {queries, keys, segments, finer, part_length(queries), part_length(keys), first});
  }

  // Offsets that do not increase would be an error of the caller; nothing is read out of bounds.
  void add_sequences(const Problem& p, int64_t wanted, int64_t chunk) {
    const int32_t* offsets = static_cast<const int32_t*>(p.offsets.data);
    int64_t begin = 0;
    for (int64_t i = 1; i <= p.num_sequences; ++i) {
      const int64_t end = std::min<int64_t>(offsets[i * p.offsets.stride[0]], p.N);
      if (end <= begin) continue;
      const int64_t segments = std::max<int64_t>((end - begin) * wanted / p.N, 1);
      add_run({begin, end}, {begin, end}, segments, chunk);
      begin = end;
    }
    hidden = {begin, p.N};
  }

  std::vector<Run> runs_;
};

}  // namespace attn::linear
