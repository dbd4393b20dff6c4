// The backward pass of causal attention in bf16, block by block, on a CPU that multiplies bf16 (AVX-512 bf16, AMX).
//
//   P = exp(scale Q K' - logsumexp)       dS = scale P * (dY V' - delta)       delta = the rows of dY * Y, summed
//   dV = P' dY                            dK = dS' Q                           dQ = dS K
//
// Blocks of keys x queries are computed transposed (keys are rows), so that P' and dS' are there as dV and dK want them;
// dQ is added up transposed. All sums are fp32; P and dS are rounded to bf16 for the products, as torch's own pass does.
// Queries that share keys come one after another, and add to one dK and dV. Arithmetic and order depend on nothing but
// the shape: any number of threads gives the same bits.

#pragma GCC optimize("tree-loop-vectorize")
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

using at::BFloat16;
using Floats = at::vec::Vectorized<float>;

namespace {

constexpr int64_t BLOCK = 128;  // keys, and queries, of a block: its scores stay in a core's second cache
constexpr int64_t ALIGNMENT = 2 * Floats::size();  // rows are padded with zeros to a multiple

// C [M, N] = A [M, K] B, or += with `add`; B's rows lie in pairs, as `pair_rows` leaves them.
void product(int64_t M, int64_t N, int64_t K, const BFloat16* A, int64_t A_stride, const BFloat16* B, float* C, bool add) {
  at::native::cpublas::brgemm(M, N, K, A_stride, N, N, add, A, B, C);
}

// From [rows, columns] to [rows / 2, columns, 2].
void pair_rows(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += 2)
    for (int64_t column = 0; column < columns; ++column) {
      to[row * columns + 2 * column] = from[row * columns + column];
      to[row * columns + 2 * column + 1] = from[(row + 1) * columns + column];
    }
}

// The same of the transposed: from [rows, columns] to [columns / 2, rows, 2].
void pair_columns(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(from);
  auto* paired = reinterpret_cast<uint32_t*>(to);
  for (int64_t column = 0; column < columns / 2; ++column)
    for (int64_t row = 0; row < rows; ++row) paired[column * rows + row] = pairs[row * (columns / 2) + column];
}

// The operands of one head, padded and laid out for the products; made once by each thread.
struct Head {
  const int64_t T, E, padded;
  std::vector<BFloat16> rows, keys, values, keys_transposed;    // keys_transposed [E, padded]
  std::vector<BFloat16> q_columns, q_rows, dy_columns, dy_rows;  // block by block: columns or rows in pairs
  std::vector<float> logsumexp, delta, dk, dv, dq_transposed;    // dq_transposed block by block [E, queries]
  std::vector<float> scores, dp;                                 // of one block, [keys, queries]
  std::vector<BFloat16> p, ds, ds_paired;

  Head(int64_t T, int64_t E)
      : T(T), E(E), padded((T + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT),
        rows(padded * E), keys(padded * E), values(padded * E), keys_transposed(padded * E),
        q_columns(padded * E), q_rows(padded * E), dy_columns(padded * E), dy_rows(padded * E),
        logsumexp(padded), delta(padded), dk(padded * E), dv(padded * E), dq_transposed(padded * E),
        scores(BLOCK * BLOCK), dp(BLOCK * BLOCK), p(BLOCK * BLOCK), ds(BLOCK * BLOCK), ds_paired(BLOCK * BLOCK) {}

  int64_t block_size(int64_t begin) const { return std::min(BLOCK, padded - begin); }

  void take_keys(const BFloat16* k, const BFloat16* v) {
    std::copy(k, k + T * E, keys.begin());  // behind them the zeros of the padding stay
    std::copy(v, v + T * E, values.begin());
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t e = 0; e < E; ++e) keys_transposed[e * padded + t] = keys[t * E + e];
    std::fill(dk.begin(), dk.end(), 0.f);
    std::fill(dv.begin(), dv.end(), 0.f);
  }

  void take_rows(const BFloat16* from, std::vector<BFloat16>& columns_paired, std::vector<BFloat16>& rows_paired) {
    std::copy(from, from + T * E, rows.begin());
    for (int64_t i = 0; i < padded; i += BLOCK) {
      pair_columns(&rows[i * E], block_size(i), E, &columns_paired[i * E]);
      pair_rows(&rows[i * E], block_size(i), E, &rows_paired[i * E]);
    }
  }

  void take_queries(const BFloat16* q, const BFloat16* dy, const float* lse, const float* dy_y) {
    take_rows(q, q_columns, q_rows);
    take_rows(dy, dy_columns, dy_rows);
    std::copy(lse, lse + T, logsumexp.begin());
    std::fill(logsumexp.begin() + T, logsumexp.end(), std::numeric_limits<float>::infinity());  // there P is 0
    std::copy(dy_y, dy_y + T, delta.begin());
    std::fill(dq_transposed.begin(), dq_transposed.end(), 0.f);
  }

  // P and dS of the block of keys from j and queries from i, in bf16.
  void probabilities(int64_t j, int64_t i, float scale) {
    const int64_t N = block_size(j), M = block_size(i);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t m = 0; m < M; m += 2 * Floats::size()) {
        Floats p_pair[2], ds_pair[2];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = m + half * Floats::size(), at = n * M + first;
          Floats one = (Floats::loadu(&scores[at]) * Floats(scale) - Floats::loadu(&logsumexp[i + first])).exp_u20();
          if (i == j && first < n)  // no query sees a later key
            one = Floats::blendv(one, Floats(0.f), Floats::arange(float(first), 1.f) < Floats(float(n)));
          p_pair[half] = one;
          ds_pair[half] = one * (Floats::loadu(&dp[at]) - Floats::loadu(&delta[i + first])) * Floats(scale);
        }
        at::vec::convert_from_float<BFloat16>(p_pair[0], p_pair[1]).store(&p[n * M + m]);
        at::vec::convert_from_float<BFloat16>(ds_pair[0], ds_pair[1]).store(&ds[n * M + m]);
      }
    pair_rows(ds.data(), N, M, ds_paired.data());
  }

  // Add what this head's queries give to dk, dv and dq_transposed.
  void add_gradients(float scale) {
    for (int64_t j = 0; j < padded; j += BLOCK)
      for (int64_t i = j; i < padded; i += BLOCK) {
        const int64_t N = block_size(j), M = block_size(i);
        product(N, M, E, &keys[j * E], E, &q_columns[i * E], scores.data(), false);
        product(N, M, E, &values[j * E], E, &dy_columns[i * E], dp.data(), false);
        probabilities(j, i, scale);
        product(N, E, M, p.data(), M, &dy_rows[i * E], &dv[j * E], true);
        product(N, E, M, ds.data(), M, &q_rows[i * E], &dk[j * E], true);
        product(E, M, N, &keys_transposed[j], padded, ds_paired.data(), &dq_transposed[i * E], true);
      }
  }

  void write_dq(BFloat16* dq) const {
    for (int64_t i = 0; i < padded; i += BLOCK) {
      const int64_t M = block_size(i);
      for (int64_t m = 0; m < M && i + m < T; ++m)
        for (int64_t e = 0; e < E; ++e) dq[(i + m) * E + e] = dq_transposed[i * E + e * M + m];
    }
  }
};

}  // namespace

// Whether this CPU, and this build of torch, have the products.
extern "C" bool supported() try {
  std::vector<BFloat16> A(ALIGNMENT * ALIGNMENT), B(ALIGNMENT * ALIGNMENT);
  std::vector<float> C(ALIGNMENT * ALIGNMENT);
  product(ALIGNMENT, ALIGNMENT, ALIGNMENT, A.data(), ALIGNMENT, B.data(), C.data(), false);
  at::native::cpublas::brgemm_release();
  return true;
} catch (const c10::Error&) {
  return false;
}

// q, y's gradient dy, dq: [B, H, T, E]; k, v, dk, dv: [B, K, T, E]; logsumexp, delta: [B, H, T]; all contiguous.
// False where a thread finds no memory for its buffers.
extern "C" bool backward(
    const BFloat16* q, const BFloat16* k, const BFloat16* v, const BFloat16* dy, const float* logsumexp,
    const float* delta, BFloat16* dq, BFloat16* dk, BFloat16* dv, int64_t B, int64_t H, int64_t K, int64_t T, int64_t E,
    double scale) try {
  const int64_t shared = H / K, size = T * E;
  at::parallel_for(0, B * K, 1, [&](int64_t begin, int64_t end) {
    Head head(T, E);
    for (int64_t key = begin; key < end; ++key) {
      head.take_keys(k + key * size, v + key * size);
      for (int64_t query = key * shared; query < (key + 1) * shared; ++query) {
        head.take_queries(q + query * size, dy + query * size, logsumexp + query * T, delta + query * T);
        head.add_gradients(float(scale));
        head.write_dq(dq + query * size);
      }
      for (int64_t at = 0; at < size; ++at) {
        dk[key * size + at] = head.dk[at];
        dv[key * size + at] = head.dv[at];
      }
    }
    at::native::cpublas::brgemm_release();  // the tiles: other products lay them out anew
  });
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
