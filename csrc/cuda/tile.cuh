// A matrix [d, d] with d <= D spread over the registers of a *team* of threads, and the products that need it.
//
// A team is a warp, or a block where one problem takes more than a warp. Each thread holds a tile of 8 rows and 4 columns
// (4 x 4 for D = 4), so that a product reads one 16-byte pack of its argument for 32 FMAs, and the 8 partial sums are
// added over the threads of a row by reduce_scatter, 7 shuffles for 8 threads:
//
//     D                     4    8    16   32   64   128
//     threads of a row      1    2    4    8    16   32     c = 0 ... column_threads-1
//     threads of a column   1    1    2    4    8    16     r = 0 ... row_threads-1
//     problems of a team    32   16   4    1    1    1
//     warps of a team       1    1    1    1    4    16
//
// Vectors are held by their owners, in one of two layouts: `own_rows` entries from `row` on are what M x leaves in a
// thread, `own_columns` entries from `column` on what M'x does.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace unrolled_kernels::cuda {

template <typename Storage, int D_>
struct Tile {
  using C = compute_type<Storage>;
  static constexpr int D = D_, rows = D < 8 ? D : 8, columns = 4;
  static constexpr int column_threads = D / columns, row_threads = D / rows;
  static constexpr int threads = column_threads * row_threads;
  static constexpr int team = threads < 32 ? 32 : threads;
  static constexpr int problems = team / threads, warps = team / 32;
  static constexpr int block = team < 128 ? 128 : team, teams = block / team;
  // n float32 blocks of 128 threads on a multiprocessor at least: left alone, the compiler saves registers where it need
  // not, and spills
  static constexpr int blocks(int n) { return block > 128 ? 1 : sizeof(C) == 4 ? n : 2; }
  static constexpr int warp_row_threads = row_threads / warps;
  static constexpr int own_rows = rows > column_threads ? rows / column_threads : 1;
  static constexpr int own_columns = warps == 1 ? columns / row_threads : 1;
  static constexpr int column_copies = warps == 1 ? 1 : team / D;

  const int rank = threadIdx.x % team;
  const int lane = threadIdx.x % 32;
  const int problem = rank / threads;
  const int c = rank % threads % column_threads, r = rank % threads / column_threads;
  const int row = r * rows + scattered_index<rows, column_threads>(c);
  const int column = warps == 1 ? c * columns + r * own_columns : rank / column_copies;
  const bool first_row_copy = holds_first_copy<rows, column_threads>(c);
  const bool first_column_copy = rank % column_copies == 0;

  static __device__ __forceinline__ void sync() {
    if constexpr (warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Shared memory of a team, or its size.
  struct Memory {
    C* vectors;       // [2, 2, problems, D], see gather
    C* partials;      // [warps, partial_stride]
    C* across_warps;  // [2, warps, 4], for ScheduleGradient
    __host__ __device__ explicit Memory(Arena& arena)
        : vectors(arena.take<C>(4 * problems * D)),
          partials(warps > 1 ? arena.take<C>(warps * partial_stride) : nullptr),
          across_warps(warps > 1 ? arena.take<C>(2 * warps * 4) : nullptr) {}
  };
  // between the rows of `partials`, so that the copies of a column are read from different banks
  static constexpr int partial_stride = D + 32 / column_copies;

  // q = the tile of m [d, d], which is in shared memory, zero where there is none
  template <typename T>
  __device__ __forceinline__ void load(const T* m, int d, bool exists, C (&q)[rows][columns]) const {
    const int column0 = c * columns;
    if (d % columns == 0 && is_pack_aligned<columns>(m)) {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        Pack<T, columns> pack{};
        if (exists && r * rows + i < d && column0 < d) pack = load_pack<columns>(m + (r * rows + i) * d + column0);
#pragma unroll
        for (int j = 0; j < columns; ++j) q[i][j] = to_compute(pack.at[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          const bool inside = exists && r * rows + i < d && column0 + j < d;
          q[i][j] = inside ? to_compute(m[(r * rows + i) * d + column0 + j]) : C(0);
        }
      }
    }
  }

  // The inverse, to shared or global memory.
  template <typename T>
  __device__ __forceinline__ void store(const C (&q)[rows][columns], int d, T* m) const {
    const int column0 = c * columns;
    if (d % columns == 0 && is_pack_aligned<columns>(m)) {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        Pack<T, columns> pack;
#pragma unroll
        for (int j = 0; j < columns; ++j) pack.at[j] = to_storage<T>(q[i][j]);
        if (r * rows + i < d && column0 < d) store_pack<columns>(m + (r * rows + i) * d + column0, pack);
      }
    } else {
#pragma unroll
      for (int i = 0; i < rows; ++i) {
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          if (r * rows + i < d && column0 + j < d) m[(r * rows + i) * d + column0 + j] = to_storage<T>(q[i][j]);
        }
      }
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
    reduce_scatter<rows, column_threads, 1>(sum, c);
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
    const int position = r % warp_row_threads;
    reduce_scatter<columns, warp_row_threads, column_threads>(sum, position);
    if constexpr (warps == 1) {
#pragma unroll
      for (int j = 0; j < own_columns; ++j) out[j] = sum[j];
    } else {
      constexpr int held = columns / warp_row_threads, parts = warps / column_copies;
      C* mine = memory.partials + rank / 32 * partial_stride + c * columns + position * held;
#pragma unroll
      for (int j = 0; j < held; ++j) mine[j] = sum[j];
      __syncthreads();
      const C* theirs = memory.partials + rank % column_copies * parts * partial_stride + column;
      C total = theirs[0];
#pragma unroll
      for (int n = 1; n < parts; ++n) total += theirs[n * partial_stride];
#pragma unroll
      for (int mask = 1; mask < column_copies; mask *= 2) total += __shfl_xor_sync(all_lanes, total, mask);
      out[0] = total;
    }
  }

  // Two buffers take turns, so that one barrier for each exchange is enough.
  __device__ __forceinline__ C* next_vectors(const Memory& memory, int& turn) const {
    turn ^= 1;
    return memory.vectors + turn * 2 * problems * D;
  }

  // x = the tile's columns of the vector whose rows y the threads own
  __device__ __forceinline__ void rows_to_columns(const C (&y)[own_rows], const Memory& memory, int& turn,
                                                  C (&x)[columns]) const {
    if constexpr (D <= 8) {
      // the same thread owns them
#pragma unroll
      for (int j = 0; j < columns; ++j) x[j] = y[j];
    } else {
      C* vector = next_vectors(memory, turn) + problem * D;
      if (first_row_copy) {
#pragma unroll
        for (int i = 0; i < own_rows; ++i) vector[row + i] = y[i];
      }
      sync();
      read(vector + c * columns, x);
    }
  }

  // x = the tile's columns of z, which is in the column layout
  __device__ __forceinline__ void columns_to_columns(const C (&z)[own_columns], const Memory& memory, int& turn,
                                                     C (&x)[columns]) const {
    if constexpr (own_columns == columns) {
#pragma unroll
      for (int j = 0; j < columns; ++j) x[j] = z[j];
    } else {
      C* vector = next_vectors(memory, turn) + problem * D;
      if (first_column_copy) {
#pragma unroll
        for (int j = 0; j < own_columns; ++j) vector[column + j] = z[j];
      }
      sync();
      read(vector + c * columns, x);
    }
  }

  // x, a = the tile's columns of z and its rows of w; z and w are in the column layout
  __device__ __forceinline__ void columns_to_tile(const C (&z)[own_columns], const C (&w)[own_columns],
                                                  const Memory& memory, int& turn, C (&x)[columns],
                                                  C (&a)[rows]) const {
    if constexpr (D <= 4) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        x[j] = z[j];
        a[j] = w[j];
      }
    } else {
      C* z_vector = next_vectors(memory, turn) + problem * D;
      C* w_vector = z_vector + problems * D;
      if (first_column_copy) {
#pragma unroll
        for (int j = 0; j < own_columns; ++j) {
          z_vector[column + j] = z[j];
          w_vector[column + j] = w[j];
        }
      }
      sync();
      read(z_vector + c * columns, x);
      read(w_vector + r * rows, a);
    }
  }

  template <int n>
  static __device__ __forceinline__ void read(const C* from, C (&to)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const Pack<C, 4> pack = load_pack<4>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = pack.at[j];
    }
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

// f(std::integral_constant<int, D>) for the smallest D that holds d, D = 0 if none does. float32 has every size; for the
// others some are left out to keep the build short, and for float64 the largest, of which a thread cannot hold two tiles.
template <typename Storage, typename F>
const char* with_tile(int64_t d, F f) {
  constexpr bool is_float = std::is_same<Storage, float>::value;
  if constexpr (is_float) {
    if (d <= 4) return f(std::integral_constant<int, 4>());
  }
  if (d <= 8) return f(std::integral_constant<int, 8>());
  if constexpr (is_float) {
    if (d <= 16) return f(std::integral_constant<int, 16>());
  }
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
    return arena.take<unsigned char>(T::problems * d * d * static_cast<int64_t>(sizeof(Storage)) + 16);
  }

  __device__ MatrixStream(const MomentumInputs<Storage>& p, unsigned char* buffer) : p_(p), buffer_(buffer) {}

  __device__ __forceinline__ void fetch(const T& tile, int64_t item) {
    const int size = static_cast<int>(p_.d * p_.d);
    const int64_t first = item * T::problems, left = p_.B - first;
    const int count = p_.matrix_stride == 0 ? 1 : left < T::problems ? static_cast<int>(left) : T::problems;
    const Storage* from = p_.matrix + first * p_.matrix_stride;
    if (count == 1 || p_.matrix_stride == size) {
      staged_ = copy_to_shared<T::team>(from, count * size, buffer_, tile.rank);
    } else {
      staged_ = reinterpret_cast<Storage*>(buffer_);
#pragma unroll 1
      for (int i = tile.rank; i < count * size; i += T::team) staged_[i] = from[i / size * p_.matrix_stride + i % size];
    }
  }

  // the tile of what was fetched last; after it the buffer is free again
  __device__ __forceinline__ void take(const T& tile, bool exists, typename T::C (&q)[T::rows][T::columns]) {
    wait_for_copies();
    T::sync();
    const int d = static_cast<int>(p_.d);
    tile.load(staged_ + (p_.matrix_stride == 0 ? 0 : tile.problem * d * d), d, exists, q);
    T::sync();
  }

 private:
  const MomentumInputs<Storage>& p_;
  unsigned char* buffer_;
  Storage* staged_ = nullptr;
};

// Shared memory of a team. In backward also a place where the gradients of matrices are put together, so that they leave
// in whole lines for any d, and the iterates, if they are on chip.
template <typename T, typename Storage, bool backward>
struct TileMemory {
  static constexpr bool stages_gradient = backward && T::D <= 32;
  typename T::Memory vectors;
  unsigned char *matrix, *gradient;
  typename T::C* trajectory;

  __host__ __device__ TileMemory(Arena& arena, int64_t d, int64_t trajectory_size)
      : vectors(arena),
        matrix(MatrixStream<T, Storage>::buffer(arena, d)),
        gradient(stages_gradient ? MatrixStream<T, Storage>::buffer(arena, d) : nullptr),
        trajectory(arena.template take<typename T::C>(trajectory_size)) {}

  // the gradients dq of an item's matrices, to their place in d_matrix [B, d, d]
  static __device__ __forceinline__ void store_gradient(const T& tile, const MomentumBackward<Storage>& p, int64_t item,
                                                        bool exists, unsigned char* buffer,
                                                        const typename T::C (&dq)[T::rows][T::columns]) {
    const int d = static_cast<int>(p.d);
    Storage* target = p.d_matrix + item * T::problems * d * d;
    if constexpr (stages_gradient) {
      const int64_t left = p.B - item * T::problems;
      Storage* staged = reinterpret_cast<Storage*>(buffer + misalignment(target));
      if (exists) tile.store(dq, d, staged + tile.problem * d * d);
      T::sync();
      copy_from_shared<T::team>(staged, static_cast<int>(left < T::problems ? left : T::problems) * d * d, target,
                                tile.rank);
    } else {
      tile.store(dq, d, target);
    }
  }

  // dq summed over the team's problems, to a row of partial sums
  static __device__ __forceinline__ void store_partial(const T& tile, int d, typename T::C (&dq)[T::rows][T::columns],
                                                       typename T::C* partial) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i) {
#pragma unroll
      for (int j = 0; j < T::columns; ++j) {
#pragma unroll
        for (int mask = T::threads; mask < T::team; mask *= 2) dq[i][j] += __shfl_xor_sync(all_lanes, dq[i][j], mask);
      }
    }
    if (tile.problem == 0) tile.store(dq, d, partial);
  }
};

template <typename T>
__device__ __forceinline__ void clear(typename T::C (&q)[T::rows][T::columns]) {
#pragma unroll
  for (int i = 0; i < T::rows; ++i) {
#pragma unroll
    for (int j = 0; j < T::columns; ++j) q[i][j] = 0;
  }
}

// q += a x'
template <typename T>
__device__ __forceinline__ void add_outer_product(const typename T::C (&a)[T::rows],
                                                  const typename T::C (&x)[T::columns],
                                                  typename T::C (&q)[T::rows][T::columns]) {
#pragma unroll
  for (int i = 0; i < T::rows; ++i) {
#pragma unroll
    for (int j = 0; j < T::columns; ++j) q[i][j] += a[i] * x[j];
  }
}

}  // namespace unrolled_kernels::cuda
