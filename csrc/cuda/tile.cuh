// A matrix [d, d] with d <= D spread over the registers of a *team* of threads, and the products that need it.
//
// A team is a warp, or a block where one problem takes more than a warp. Each thread holds a tile of rows x columns, so
// that the 16-byte reads of a product's argument and the sums over the threads of a row are few beside its FMAs:
//
//     D                     1 ... 8    16     32     64     128        (float64: 64 as 8 x 8, without 128)
//     tile                  d x d      4x16   8x8    8x16   8x16
//     threads of a row      1          1      4      4      8          c = 0 ... column_threads-1
//     threads of a column   1          4      4      8      16         r = 0 ... row_threads-1
//     problems of a team    32         8      2      1      1
//     warps of a team       1          1      1      1      4
//
// A thread keeps its rows in the order i ^ (c own_rows), and its groups of four columns in the order g ^ group_mask: what
// it is to hold at the end of a sum over threads then lies in the lower half at each halving, and nothing is selected.
// Vectors are held by their owners, in one of two layouts: `own_rows` entries from `row` on are what M x leaves in a
// thread, `own_columns` entries from `column` on what M'x does.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace unrolled_kernels::cuda {

// thin: tiles half as large, but for D = 4, 5 and 128, where a thread holds twice as much beside them
template <typename Storage, int D_, bool thin = false>
struct Tile {
  using C = compute_type<Storage>;
  static constexpr int D = D_;
  static constexpr bool wide = sizeof(C) == 8;
  static constexpr int rows = D < 8 ? D : thin ? (D <= 32 ? 4 : 8) : D == 16 ? 4 : 8;
  static constexpr int columns = D <= 8 ? D : thin ? (D == 128 ? 16 : 8) : D == 16 || (D >= 64 && !wide) ? 16 : 8;
  static constexpr int column_threads = D / columns, row_threads = D / rows;
  static constexpr int threads = column_threads * row_threads;
  static constexpr int team = threads < 32 ? 32 : threads;
  static constexpr int problems = team / threads, warps = team / 32;
  static constexpr int block = team < 64 ? 64 : team;
  // blocks that a multiprocessor is to hold, which bounds the registers of a thread: to 255 for 8 warps, 168 for 12, 128
  // for 16, 96 for 20; a proximal map and a test for stopping take some of their own
  static constexpr int registers = rows * columns * static_cast<int>(sizeof(C)) / 4;
  static constexpr int forward_blocks(bool proximal = false, bool stops = false) {
    const bool more = D == 8 || (D == 16 && proximal) || (D <= 32 && stops);
    return (registers > 64 || (D == 8 && stops) ? 8 : more ? 12 : registers > 32 ? 16 : 20) * 32 / block;
  }
  static constexpr int backward_blocks(bool proximal = false) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int with_a_map = 32;  // its compiler spills what fits on the GPUs after it
#else
    constexpr int with_a_map = 16;
#endif
    return (registers > 64 || D == 8 || (D >= 16 && D <= with_a_map && proximal) ? 8 : 12) * 32 / block;
  }
  static constexpr int second_order_blocks = (D < 8 ? 12 : 8) * 32 / block;
  static constexpr int warp_row_threads = row_threads / warps;
  static constexpr int own_rows = rows / column_threads;
  static constexpr int held_columns = columns / warp_row_threads;
  static constexpr int own_columns = warps == 1 ? held_columns : D / team;
  static constexpr int group = columns % 4 == 0 ? 4 : 1, groups = columns / group;  // of columns
  static constexpr int free_row_stages = log2_of(column_threads);
  static constexpr int free_column_stages =
      log2_of(groups) < log2_of(warp_row_threads) ? log2_of(groups) : log2_of(warp_row_threads);
  // bytes between the matrices of a team in shared memory, so that its threads read different banks
  static constexpr int skew = D == 16 ? 64 : D % 4 == 0 && D <= 8 ? 16 : 0;

  const int rank = threadIdx.x % team;
  const int problem = rank / threads;
  const int c = rank % threads % column_threads, r = rank % threads / column_threads;
  const int row_mask = c * own_rows, row = r * rows + row_mask;
  const int position = r % warp_row_threads;
  const int group_mask = threads == 1 ? 0 : position * groups / warp_row_threads;
  const int held =
      threads == 1 ? 0 : first_column(0) + position % (warp_row_threads / (1 << free_column_stages)) * held_columns;
  const int column = warps == 1 ? held : rank;

  // the first column of the g-th group of a thread
  __device__ __forceinline__ int first_column(int g) const { return ((g ^ group_mask) * column_threads + c) * group; }

  static __device__ __forceinline__ void sync() {
    if constexpr (warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Shared memory of a team, or its size.
  struct Memory {
    C* vectors;       // [2, problems, D]: two take turns, so that one barrier for each exchange is enough
    C* partials;      // [warps, D]
    C* across_warps;  // [2, warps, 4], for ScheduleGradient
    __host__ __device__ explicit Memory(Arena& arena)
        : vectors(arena.take<C>(threads == 1 ? 0 : 2 * problems * D)),
          partials(arena.take<C>(warps > 1 ? warps * D : 0)),
          across_warps(arena.take<C>(warps > 1 ? 2 * warps * 4 : 0)) {}
  };

  // q = the tile of m [d, d], which is in shared memory; zero where there is none
  template <typename T>
  __device__ __forceinline__ void load(const T* m, int d, bool exists, C (&q)[rows][columns]) const {
    const bool packs = d % group == 0 && is_pack_aligned<group>(m);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int e = r * rows + (i ^ row_mask);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const int f = first_column(g);
        Pack<T, group> pack{};
        if (exists && e < d) {
          if (packs) {
            if (f < d) pack = load_pack<group>(m + e * d + f);
          } else {
#pragma unroll
            for (int j = 0; j < group; ++j) {
              if (f + j < d) pack.at[j] = m[e * d + f + j];
            }
          }
        }
#pragma unroll
        for (int j = 0; j < group; ++j) q[i][group * g + j] = to_compute(pack.at[j]);
      }
    }
  }
  // The same where d = D, the matrix is aligned, and all of the team's problems exist.
  template <typename T>
  __device__ __forceinline__ void load_whole(const T* m, C (&q)[rows][columns]) const {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const Pack<T, group> pack = load_pack<group>(m + (r * rows + (i ^ row_mask)) * D + first_column(g));
#pragma unroll
        for (int j = 0; j < group; ++j) q[i][group * g + j] = to_compute(pack.at[j]);
      }
    }
  }
  // Row i of it. first: first_whole(), as the entries of a thread lie at that ^ (the same for all threads), D being a power
  // of two or a problem's threads one.
  __device__ __forceinline__ int first_whole() const { return (r * rows + row_mask) * D + first_column(0); }
  static __device__ __forceinline__ void load_whole_row(const C* m, int first, int i, C (&q)[columns]) {
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      const Pack<C, group> pack = load_pack<group>(m + (first ^ (i * D + g * column_threads * group)));
#pragma unroll
      for (int j = 0; j < group; ++j) q[group * g + j] = pack.at[j];
    }
  }

  // out = M x for the rows that this thread owns; x: its tile's columns
  __device__ __forceinline__ void product(const C (&m)[rows][columns], const C (&x)[columns],
                                          C (&out)[own_rows]) const {
    C sum[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      sum[i] = m[i][0] * x[0];
#pragma unroll
      for (int j = 1; j < columns; ++j) sum[i] += m[i][j] * x[j];
    }
    sum_over_columns(sum, out);
  }
  // of more than one matrix, in two halves: sum += M x over the columns of the tile alone
  __device__ __forceinline__ void multiply(const C (&m)[rows][columns], const C (&x)[columns], C (&sum)[rows]) const {
#pragma unroll
    for (int i = 0; i < rows; ++i) multiply_row(m[i], x, sum[i]);
  }
  __device__ __forceinline__ void multiply_row(const C (&m)[columns], const C (&x)[columns], C& sum) const {
#pragma unroll
    for (int j = 0; j < columns; ++j) sum += m[j] * x[j];
  }
  // and over the other threads of a row
  __device__ __forceinline__ void sum_over_columns(C (&sum)[rows], C (&out)[own_rows]) const {
    reduce_scatter<rows, column_threads, 1, free_row_stages>(sum, c);
#pragma unroll
    for (int i = 0; i < own_rows; ++i) out[i] = sum[i];
  }

  // out = M'a for the columns that this thread owns; a: its tile's rows. A block has to synchronise between two calls.
  __device__ __forceinline__ void transposed_product(const C (&m)[rows][columns], const C (&a)[rows],
                                                     const Memory& memory, C (&out)[own_columns]) const {
    C sum[columns];
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      sum[j] = m[0][j] * a[0];
#pragma unroll
      for (int i = 1; i < rows; ++i) sum[j] += m[i][j] * a[i];
    }
    sum_over_rows(sum, memory, out);
  }
  // in halves as well
  __device__ __forceinline__ void multiply_transposed(const C (&m)[rows][columns], const C (&a)[rows],
                                                      C (&sum)[columns]) const {
#pragma unroll
    for (int i = 0; i < rows; ++i) multiply_transposed_row(m[i], a[i], sum);
  }
  __device__ __forceinline__ void multiply_transposed_row(const C (&m)[columns], C a, C (&sum)[columns]) const {
#pragma unroll
    for (int j = 0; j < columns; ++j) sum[j] += m[j] * a;
  }
  __device__ __forceinline__ void sum_over_rows(C (&sum)[columns], const Memory& memory, C (&out)[own_columns]) const {
    reduce_scatter<columns, warp_row_threads, column_threads, free_column_stages>(sum, position);
    if constexpr (warps == 1) {
#pragma unroll
      for (int j = 0; j < own_columns; ++j) out[j] = sum[j];
    } else {
      C mine[held_columns];
#pragma unroll
      for (int j = 0; j < held_columns; ++j) mine[j] = sum[j];
      write(mine, memory.partials + rank / 32 * D + held);
      __syncthreads();
      C total = memory.partials[column];
#pragma unroll
      for (int n = 1; n < warps; ++n) total += memory.partials[n * D + column];
      out[0] = total;
    }
  }

  // `vector`: entries of this thread's problem in memory, [D]. x = the tile's columns of it
  __device__ __forceinline__ void read_columns(const C* vector, C (&x)[columns]) const {
#pragma unroll
    for (int g = 0; g < groups; ++g) read_group(vector + first_column(g), x, group * g);
  }
  // a = the tile's rows of it, in their order
  __device__ __forceinline__ void read_rows(const C* vector, C (&a)[rows]) const {
    constexpr int pack = pack_of(own_rows);
#pragma unroll
    for (int i = 0; i < rows; i += pack) {
      const Pack<C, pack> v = load_pack<pack>(vector + r * rows + (i ^ row_mask));
#pragma unroll
      for (int j = 0; j < pack; ++j) a[i + j] = v.at[j];
    }
  }

  // x = the tile's columns of the vector whose rows y the threads own; buffer: of memory.vectors
  __device__ __forceinline__ void rows_to_columns(const C (&y)[own_rows], C* buffer, C (&x)[columns]) const {
    if constexpr (threads == 1) {
#pragma unroll
      for (int j = 0; j < columns; ++j) x[j] = y[j];
    } else {
      C* vector = buffer + problem * D;
      write(y, vector + row);
      sync();
      read_columns(vector, x);
    }
  }
  // x = the tile's columns of the vector whose columns z the threads own
  __device__ __forceinline__ void columns_to_columns(const C (&z)[own_columns], C* buffer, C (&x)[columns]) const {
    if constexpr (threads == 1) {
#pragma unroll
      for (int j = 0; j < columns; ++j) x[j] = z[j];
    } else {
      C* vector = buffer + problem * D;
      write(z, vector + column);
      sync();
      read_columns(vector, x);
    }
  }

  // a = the tile's rows of the vector whose columns w the threads own
  __device__ __forceinline__ void columns_to_rows(const C (&w)[own_columns], C* buffer, C (&a)[rows]) const {
    if constexpr (threads == 1) {
#pragma unroll
      for (int i = 0; i < rows; ++i) a[i] = w[i];
    } else {
      C* vector = buffer + problem * D;
      write(w, vector + column);
      sync();
      read_rows(vector, a);
    }
  }

  // to [n] = v, in as few accesses as the multiple of n that `to` is allows
  template <int n>
  static __device__ __forceinline__ void write(const C (&v)[n], C* to) {
    constexpr int pack = pack_of(n);
#pragma unroll
    for (int i = 0; i < n; i += pack) {
      Pack<C, pack> out;
#pragma unroll
      for (int j = 0; j < pack; ++j) out.at[j] = v[i + j];
      store_pack<pack>(to + i, out);
    }
  }
  template <int n>
  static __device__ __forceinline__ void read(const C* from, C (&v)[n]) {
    constexpr int pack = pack_of(n);
#pragma unroll
    for (int i = 0; i < n; i += pack) {
      const Pack<C, pack> in = load_pack<pack>(from + i);
#pragma unroll
      for (int j = 0; j < pack; ++j) v[i + j] = in.at[j];
    }
  }

 private:
  static __device__ __forceinline__ void read_group(const C* from, C (&x)[columns], int at) {
    const Pack<C, group> pack = load_pack<group>(from);
#pragma unroll
    for (int j = 0; j < group; ++j) x[at + j] = pack.at[j];
  }
};

// The entries [first, first + n) of a row [d] in memory, zero where there are none.
template <int n, typename Storage>
__device__ __forceinline__ void load_entries(const Storage* row, int first, int d, bool exists,
                                             compute_type<Storage> (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = exists && first + i < d ? to_compute(row[first + i]) : compute_type<Storage>(0);
}
template <int n, typename Storage>
__device__ __forceinline__ void store_entries(const compute_type<Storage> (&x)[n], int first, int d, bool exists,
                                              Storage* row) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (exists && first + i < d) row[first + i] = to_storage<Storage>(x[i]);
  }
}

// The tile's rows of a row [d] in memory, in their order.
template <typename T, typename Storage>
__device__ __forceinline__ void load_rows(const T& tile, const Storage* row, int d, bool exists,
                                          typename T::C (&a)[T::rows]) {
#pragma unroll
  for (int i = 0; i < T::rows; ++i) {
    const int e = tile.r * T::rows + (i ^ tile.row_mask);
    a[i] = exists && e < d ? to_compute(row[e]) : typename T::C(0);
  }
}

// f(t, buffer) for t = first ... last-1, where the buffers of the exchange take turns.
template <typename C, typename F>
__device__ __forceinline__ void for_steps(int first, int last, C* buffer, int buffer_size, F f) {
  int t = first;
#pragma unroll 1
  for (; t + 1 < last; t += 2) {
    f(t, buffer);
    f(t + 1, buffer + buffer_size);
  }
  if (t < last) f(t, buffer);
}

// f(std::integral_constant<int, D>) for the smallest D that holds d, D = 0 if none does. float32 has every size; for the
// others some are left out to keep the build short, and for float64 the largest, which does not fit into registers.
template <typename Storage, typename F>
const char* with_tile(int64_t d, F f) {
  constexpr bool is_float = std::is_same<Storage, float>::value;
  if (d <= 4) return f(std::integral_constant<int, 4>());
  if constexpr (is_float) {
    if (d == 5) return f(std::integral_constant<int, 5>());
  }
  if (d <= 8) return f(std::integral_constant<int, 8>());
  if (d <= 16) return f(std::integral_constant<int, 16>());
  if (d <= 32) return f(std::integral_constant<int, 32>());
  if (d <= 64) return f(std::integral_constant<int, 64>());
  if constexpr (!std::is_same<Storage, double>::value) {
    if (d <= 128) return f(std::integral_constant<int, 128>());
  }
  return f(std::integral_constant<int, 0>());
}

// Feeds a team with matrices: while one is worked on, the next is on its way to shared memory.
template <typename T, typename Storage>
class MatrixStream {
 public:
  // room for the matrices of one item
  static __host__ __device__ unsigned char* buffer(Arena& arena, int64_t d) {
    return arena.take<unsigned char>(T::problems * (d * d * static_cast<int64_t>(sizeof(Storage)) + T::skew) + 16);
  }

  __device__ MatrixStream(const MomentumInputs<Storage>& p, unsigned char* buffer) : p_(p), buffer_(buffer) {}

  __device__ __forceinline__ void fetch(const T& tile, int64_t item) {
    const int size = static_cast<int>(p_.d * p_.d);
    const int64_t first = item * T::problems, left = p_.B - first;
    const int count = p_.matrix_stride == 0 ? 1 : left < T::problems ? static_cast<int>(left) : T::problems;
    const Storage* from = p_.matrix + first * p_.matrix_stride;
    const bool contiguous = count == 1 || p_.matrix_stride == size;
    whole_ = packs && p_.d == T::D && count == T::problems && contiguous && misalignment(from) == 0;
    if (whole_) {
      fetch_whole(tile, from);
    } else if (contiguous) {
      staged_ = copy_to_shared<T::team>(from, count * size, buffer_, tile.rank);
    } else {
      staged_ = reinterpret_cast<Storage*>(buffer_);
#pragma unroll 1
      for (int i = tile.rank; i < count * size; i += T::team) staged_[i] = from[i / size * p_.matrix_stride + i % size];
    }
  }

  // The matrices of an item padded with zeros to [D, D], to be read where they are: from after wait() on, row i of a tile
  // is T::load_whole_row of padded(). The buffer has to be one for D.
  __device__ __forceinline__ void fetch_padded(const T& tile, int64_t item) {
    const int d = static_cast<int>(p_.d);
    const int64_t first = item * T::problems;
    const Storage* from = p_.matrix + first * p_.matrix_stride;
    const bool contiguous = T::problems == 1 || (p_.matrix_stride == d * d && first + T::problems <= p_.B);
    if (packs && d == T::D && contiguous && misalignment(from) == 0) return fetch_whole(tile, from);
#pragma unroll 1
    for (int i = tile.rank; i < T::problems * T::D * T::D; i += T::team) {
      const int problem = i / (T::D * T::D), e = i / T::D % T::D, f = i % T::D;
      const bool exists = first + problem < p_.B && e < d && f < d;
      padded(problem)[e * T::D + f] = exists ? from[problem * p_.matrix_stride + e * d + f] : Storage(0);
    }
  }
  static __device__ __forceinline__ void wait() {
    wait_for_copies();
    T::sync();
  }
  __device__ __forceinline__ Storage* padded(int problem) const {
    return reinterpret_cast<Storage*>(buffer_ + problem * (matrix_bytes + T::skew));
  }

  // the tile of what was fetched last; after it the buffer is free again
  __device__ __forceinline__ void take(const T& tile, bool exists, typename T::C (&q)[T::rows][T::columns]) {
    wait();
    if (packs && whole_) {
      tile.load_whole(padded(tile.problem), q);
    } else {
      const int d = static_cast<int>(p_.d);
      tile.load(staged_ + (p_.matrix_stride == 0 ? 0 : tile.problem * d * d), d, exists, q);
    }
    T::sync();
  }

 private:
  static constexpr int matrix_bytes = T::D * T::D * static_cast<int>(sizeof(Storage));
  static constexpr bool packs = T::group == 4 && matrix_bytes * T::problems % (16 * T::team) == 0;

  __device__ __forceinline__ void fetch_whole(const T& tile, const Storage* from) {
    constexpr int copies = packs ? matrix_bytes * T::problems / (16 * T::team) : 0;
    const unsigned char* source = reinterpret_cast<const unsigned char*>(from) + 16 * tile.rank;
    unsigned char* to = buffer_ + 16 * tile.rank + 16 * tile.rank / matrix_bytes * T::skew;
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      constexpr int step = 16 * T::team;
      // a warp's copies are of whole matrices, or parts of one
      copy_async_16(to + i * step + (T::skew ? i * step / matrix_bytes * T::skew : 0), source + i * step);
    }
  }

  const MomentumInputs<Storage>& p_;
  unsigned char* buffer_;
  Storage* staged_ = nullptr;
  bool whole_ = false;
};

// Shared memory of a team; the iterates if they are on chip. pads: whether matrices are padded in it.
template <typename T, typename Storage, bool pads = false>
struct TileMemory {
  typename T::Memory vectors;
  unsigned char* matrix;
  typename T::C* trajectory;

  __host__ __device__ TileMemory(Arena& arena, int64_t d, int64_t trajectory_size)
      : vectors(arena),
        matrix(MatrixStream<T, Storage>::buffer(arena, pads ? T::D : d)),
        trajectory(arena.template take<typename T::C>(trajectory_size)) {}
};

// What a team works on: problems [first, first + T::problems) of the batch, one item after another.
template <typename T>
struct Items {
  int64_t first, count, step;
  template <typename Plan>
  __device__ __forceinline__ Items(const Plan& plan, int64_t B, int team)
      : first(static_cast<int64_t>(blockIdx.x) * plan.teams + team),
        count(ceil_div(B, T::problems)),
        step(static_cast<int64_t>(gridDim.x) * plan.teams) {}
};

// The gradient of a team's matrices: dq += a x' for each pair that backward has kept, then to memory, once. A thread has
// its rows and columns in their natural order here.
template <typename T>
class MatrixGradient {
 public:
  using C = typename T::C;

  // left: [d] in global memory, or [D] of this thread's problem, right: [D]
  template <typename Storage>
  __device__ __forceinline__ void add(const T& tile, const Storage* left, int d, bool exists, const C* right) {
    C a[T::rows];
    load_entries(left, tile.r * T::rows, d, exists, a);
    outer(tile, a, right);
  }
  __device__ __forceinline__ void add(const T& tile, C scale, const C* left, const C* right) {
    C a[T::rows];
    T::read(left + tile.r * T::rows, a);
#pragma unroll
    for (int i = 0; i < T::rows; ++i) a[i] *= scale;
    outer(tile, a, right);
  }

  // to m [d, d], in global memory
  template <typename Storage>
  __device__ __forceinline__ void store(const T& tile, int d, Storage* m) const {
    const bool packs = d % T::group == 0 && is_pack_aligned<T::group>(m);
    if (packs && d == T::D) {
      m += tile.r * T::rows * T::D + tile.c * T::group;
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
#pragma unroll
        for (int g = 0; g < T::groups; ++g) {
          stream_pack<T::group>(m + i * T::D + g * T::column_threads * T::group, group_of<Storage>(i, g));
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < T::rows; ++i) {
      const int e = tile.r * T::rows + i;
#pragma unroll
      for (int g = 0; g < T::groups; ++g) {
        const int f = (g * T::column_threads + tile.c) * T::group;
        const Pack<Storage, T::group> pack = group_of<Storage>(i, g);
        if (e >= d) continue;
        if (packs) {
          if (f < d) store_pack<T::group>(m + e * d + f, pack);
        } else {
#pragma unroll
          for (int j = 0; j < T::group; ++j) {
            if (f + j < d) m[e * d + f + j] = pack.at[j];
          }
        }
      }
    }
  }

  // the partial [d, d] of a team that has no items
  static __device__ __forceinline__ void clear_partial(const T& tile, int d, C* partial) {
#pragma unroll 1
    for (int i = tile.rank; i < d * d; i += T::team) partial[i] = 0;
  }
  // the sum over the team's problems, added to the team's partial [d, d] in memory, or put there first
  __device__ __forceinline__ void add_to_partial(const T& tile, int d, bool first, C* partial) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i) {
      const int e = tile.r * T::rows + i;
#pragma unroll
      for (int j = 0; j < T::columns; ++j) {
        const int f = (j / T::group * T::column_threads + tile.c) * T::group + j % T::group;
        C sum = dq_[i][j];
#pragma unroll
        for (int mask = T::threads; mask < T::team; mask *= 2) sum += __shfl_xor_sync(all_lanes, sum, mask);
        if (tile.problem == 0 && e < d && f < d) partial[e * d + f] = first ? sum : partial[e * d + f] + sum;
      }
    }
  }

 private:
  __device__ __forceinline__ void outer(const T& tile, const C (&a)[T::rows], const C* right) {
#pragma unroll
    for (int g = 0; g < T::groups; ++g) {
      const Pack<C, T::group> x = load_pack<T::group>(right + (g * T::column_threads + tile.c) * T::group);
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
#pragma unroll
        for (int j = 0; j < T::group; ++j) dq_[i][T::group * g + j] += a[i] * x.at[j];
      }
    }
  }
  template <typename Storage>
  __device__ __forceinline__ Pack<Storage, T::group> group_of(int i, int g) const {
    Pack<Storage, T::group> pack;
#pragma unroll
    for (int j = 0; j < T::group; ++j) pack.at[j] = to_storage<Storage>(dq_[i][T::group * g + j]);
    return pack;
  }

  C dq_[T::rows][T::columns] = {};
};

}  // namespace unrolled_kernels::cuda
