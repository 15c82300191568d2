// Rows of a matrix [d, d] with d <= D, held by a block: as many as its registers take there, the others in shared memory.
//
// The block goes over its rows in *passes*, of which the first is the one in registers. In a pass each thread has a tile of
// rows x columns, as in tile.cuh:
//
//     D                     256     512     1024
//     tile                  8x16    8x16    4x32
//     threads of a row      16      32      32       c = 0 ... column_threads-1
//     rows of a pass        128     64      32
//
// More threads share a row than a tile has rows, so that after a sum over them `copies` threads have each of the sums: the
// n-th of these keeps that of pass n. A thread thus owns one row of the block, and its entry of every vector.
#pragma once

#include "cuda/launch.cuh"

namespace unrolled_kernels::cuda {

template <typename Storage_, int D_>
struct Slab {
  using Storage = Storage_;
  using C = compute_type<Storage>;
  static constexpr int D = D_;
  static constexpr int block = 256, warps = block / 32;
  static constexpr int columns = D > 512 ? 32 : 16, rows = 128 / columns, groups = columns / 4;
  static constexpr int column_threads = D / columns, row_threads = 32 / column_threads;
  static constexpr int warp_rows = rows * row_threads, pass_rows = warps * warp_rows;
  static constexpr int copies = column_threads / rows;
  static constexpr int most_rows = copies * pass_rows;  // of a block
  static constexpr int held_columns = columns / row_threads;
  static constexpr int stride = D + 16 / static_cast<int>(sizeof(Storage));  // the rows of a warp in different banks
  static_assert(most_rows == block);

  const int d, count;  // rows that there are
  const int ahead;     // of these, fetched while the problem before is worked on: those of some warps in the first pass
  Storage* const rest;    // the rows from pass_rows on, in shared memory, each [stride]
  Storage* const staged;  // the rows fetched ahead, likewise. Both are zero where there are none
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int lane = thread % 32, warp = thread / 32;
  const int c = lane % column_threads, r = lane / column_threads;
  const int row_mask = c / copies;
  const int first_row = warp * warp_rows + r * rows;  // of the tile in a pass
  const int own = c % copies * pass_rows + first_row + row_mask;

  __device__ __forceinline__ int column(int g) const { return (g * column_threads + c) * 4; }
  __device__ __forceinline__ bool owns() const { return own < count; }
  // whether any of the warp's rows of a pass, or of a tile's g-th columns, are there
  __device__ __forceinline__ bool has_rows(int pass) const { return pass * pass_rows + warp * warp_rows < count; }
  __device__ __forceinline__ bool has_columns(int g) const { return g * column_threads * 4 < d; }

  // the rows of the block of the next problem, from m on, that are fetched ahead
  __device__ __forceinline__ void fetch(const Storage* m) const {
    copy_rows(m, 0, ahead < count ? ahead : count, staged);
  }

  // The rows from m on, of which those ahead have been fetched. Synchronises the block.
  __device__ __forceinline__ void take(const Storage* m, C (&q)[rows][columns]) const {
    copy_rows(m, pass_rows, count, rest);
    const bool is_ahead = warp * warp_rows < ahead;
    if (!is_ahead) {
      const bool packs = d % 4 == 0 && is_pack_aligned<4>(m);
      read_tile(q, [&](int row, int e, Pack<Storage, 4>& v) {
        const Storage* from = m + static_cast<int64_t>(row) * d + e;
        if (packs) {
          if (row < count && e < d) v = load_pack<4>(from);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (row < count && e + j < d) v.at[j] = from[j];
          }
        }
      });
    } else {
      // or the compiler would keep what q was for those warps
      read_tile(q, [](int, int, Pack<Storage, 4>&) {});
    }
    wait_for_copies();
    __syncthreads();
    if (is_ahead) {
      read_tile(q, [&](int row, int e, Pack<Storage, 4>& v) { v = load_pack<4>(staged + row * stride + e); });
    }
    if (ahead) __syncthreads();
  }

  // x [D], in shared memory, zero from d on: the entry of M x that this thread owns
  __device__ __forceinline__ C product(const C (&q)[rows][columns], const C* x_at) const {
    C x[columns], mine = 0;
#pragma unroll
    for (int g = 0; g < groups; ++g) read_pack(x_at + column(g), x, g);
    {
      C sum[rows] = {};
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        if (!has_columns(g)) continue;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
#pragma unroll
          for (int j = 4 * g; j < 4 * g + 4; ++j) sum[i] += q[i][j] * x[j];
        }
      }
      keep_own(sum, 0, mine);
    }
#pragma unroll 1
    for (int pass = 1; pass < copies && has_rows(pass); ++pass) {
      C sum[rows] = {};
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        if (!has_columns(g)) continue;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          C m[4];
          read_rest(pass, i ^ row_mask, g, m);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i] += m[j] * x[4 * g + j];
        }
      }
      keep_own(sum, pass, mine);
    }
    return mine;
  }

  // a [most_rows], in shared memory, of which this warp's are written; zero from `count` on. out [D]: this warp's share of
  // M'a.
  __device__ __forceinline__ void transposed_product(const C (&q)[rows][columns], const C* a_at, C* out) const {
    C sum[columns] = {};
    {
      C a[rows];
#pragma unroll
      for (int i = 0; i < rows; ++i) a[i] = a_at[first_row + (i ^ row_mask)];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int j = 0; j < columns; ++j) sum[j] += q[i][j] * a[i];
      }
    }
#pragma unroll 1
    for (int pass = 1; pass < copies && has_rows(pass); ++pass) {
      const C* const factors = a_at + pass * pass_rows + first_row;
      // as many rows at once as there are registers left for
#pragma unroll 2
      for (int i = 0; i < rows; ++i) {
        const C factor = factors[i];
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          if (!has_columns(g)) continue;
          C m[4];
          read_rest(pass, i, g, m);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[4 * g + j] += m[j] * factor;
        }
      }
    }
    if constexpr (row_threads > 1) {
      reduce_scatter<columns, row_threads, column_threads>(sum, r);
    }
#pragma unroll
    for (int g = 0; g < held_columns / 4; ++g) {
      Pack<C, 4> v;
#pragma unroll
      for (int j = 0; j < 4; ++j) v.at[j] = sum[4 * g + j];
      store_pack<4>(out + column(r * (held_columns / 4) + g), v);
    }
  }

  // out [count, d] = sum over t of left_t right_t'. left: from the block's first row on, right: [D], both `step` apart and
  // in global memory; what they have beyond d may be anything
  __device__ void outer_products(const C* left, const C* right, int steps, int step, Storage* out) const {
    const bool packs = d % 4 == 0 && is_pack_aligned<4>(out);
#pragma unroll 1
    for (int pass = 0; pass < copies && has_rows(pass); ++pass) {
      const int first = pass * pass_rows + first_row;
      const C *a_at = left + (first < count ? first : 0), *x_at = right;
      C sum[rows][columns] = {};
#pragma unroll 1
      for (int t = 0; t < steps; ++t, a_at += step, x_at += step) {
        C a[rows];
#pragma unroll
        for (int i = 0; i < rows; i += 4) read_pack(a_at + i, a, i / 4);
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          if (!has_columns(g)) continue;
          C x[4];
          read_pack(x_at + column(g), x, 0);
#pragma unroll
          for (int i = 0; i < rows; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][4 * g + j] += a[i] * x[j];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        Storage* const to = out + static_cast<int64_t>(first + i) * d;
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          const int e = column(g);
          if (first + i >= count || e >= d) continue;
          Pack<Storage, 4> v;
#pragma unroll
          for (int j = 0; j < 4; ++j) v.at[j] = to_storage<Storage>(sum[i][4 * g + j]);
          if (packs) {
            stream_pack<4>(to + e, v);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (e + j < d) to[e + j] = v.at[j];
            }
          }
        }
      }
    }
  }

 private:
  template <int n>
  static __device__ __forceinline__ void read_pack(const C* from, C (&v)[n], int g) {
    const Pack<C, 4> pack = load_pack<4>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[4 * g + j] = pack.at[j];
  }
  // rows [first, last) from m on, to shared memory
  __device__ __forceinline__ void copy_rows(const Storage* m, int first, int last, Storage* to) const {
    constexpr int pack = 16 / sizeof(Storage);
    const bool whole = d % pack == 0 && misalignment(m) == 0;
#pragma unroll 1
    for (int row = first + warp; row < last; row += warps) {
      const Storage* const from = m + static_cast<int64_t>(row) * d;
      Storage* const at = to + (row - first) * stride;
      if (whole) {
#pragma unroll 1
        for (int e = pack * lane; e < d; e += pack * 32) copy_async_16(at + e, from + e);
      } else {
#pragma unroll 1
        for (int e = lane; e < d; e += 32) at[e] = from[e];
      }
    }
  }
  // read(row, column, v): four entries, which are zero where they are left alone
  template <typename F>
  __device__ __forceinline__ void read_tile(C (&q)[rows][columns], F read) const {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        Pack<Storage, 4> v{};
        read(first_row + (i ^ row_mask), column(g), v);
#pragma unroll
        for (int j = 0; j < 4; ++j) q[i][4 * g + j] = to_compute(v.at[j]);
      }
    }
  }
  // four columns of row i of the tile in a pass that is in shared memory
  __device__ __forceinline__ void read_rest(int pass, int i, int g, C (&m)[4]) const {
    const Pack<Storage, 4> v = load_pack<4>(rest + ((pass - 1) * pass_rows + first_row + i) * stride + column(g));
#pragma unroll
    for (int j = 0; j < 4; ++j) m[j] = to_compute(v.at[j]);
  }
  __device__ __forceinline__ void keep_own(C (&sum)[rows], int pass, C& mine) const {
    reduce_scatter<rows, column_threads, 1, log2_of(rows)>(sum, c);
    mine = c % copies == pass ? sum[0] : mine;
  }
};

// f(std::integral_constant<int, D>) for the smallest D that holds d
template <typename F>
auto with_slab(int64_t d, F f) {
  if (d <= 256) return f(std::integral_constant<int, 256>());
  if (d <= 512) return f(std::integral_constant<int, 512>());
  return f(std::integral_constant<int, 1024>());
}

}  // namespace unrolled_kernels::cuda
