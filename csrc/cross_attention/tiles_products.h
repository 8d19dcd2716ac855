// Products and copies for the tiles of one lane. Included by tiles_lane.h, once per lane, inside that lane's namespace;
// no include guard on purpose.

// ---- products --------------------------------------------------------------------------------------------------------

// Computes kRows rows by kCount vectors of c[r][j] = c[r][j] factor[j] + sum_k a(r, k) b[k][j]. Without kAdd the first
// term is 0; without factor it is c[r][j]. a(r, k) = a[r a_stride + k], or a[k a_stride + r] with kAcross. Rows of b
// are b_stride apart.
template <bool kAcross, bool kAdd, int kCount>
LANE void tile(
    float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
    const float* factor) {
  V acc[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      acc[r][j] = kAdd ? load(c + r * c_stride + j * kWidth) : set1(0.0f);
      if (kAdd && factor) acc[r][j] = mul(acc[r][j], load(factor + j * kWidth));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V x[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) x[j] = load(b + k * b_stride + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V y = set1(kAcross ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) acc[r][j] = fused(y, x[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) store(c + r * c_stride + j * kWidth, acc[r][j]);
  }
}

// Computes rows [0, rows) of c, where rows is a multiple of kRows, for `vectors` vectors of a panel.
template <bool kAcross, bool kAdd>
LANE void product(
    int vectors, int64_t rows, float* c, const float* a, int64_t a_stride, const float* b, int64_t depth,
    const float* factor) {
  for (int64_t r = 0; r < rows; r += kRows) {
    float* to = c + r * kPanel;
    const float* from = a + (kAcross ? r : r * a_stride);
    if (vectors == 3) {
      tile<kAcross, kAdd, 3>(to, kPanel, from, a_stride, b, kPanel, depth, factor);
    } else if (vectors == 2) {
      tile<kAcross, kAdd, 2>(to, kPanel, from, a_stride, b, kPanel, depth, factor);
    } else {
      tile<kAcross, kAdd, 1>(to, kPanel, from, a_stride, b, kPanel, depth, factor);
    }
  }
}

// Adds a panel's part of dk or dv: c (rows, width) += weights (rows, queries) x (queries, width).
LANE void add_to_keys(float* c, const float* weights, const float* x, int64_t rows, int64_t queries, int64_t width) {
  for (int64_t r = 0; r < rows; r += kRows) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= width; i += 2 * kWidth) {
      tile<false, true, 2>(c + r * width + i, width, weights + r * kPanel, kPanel, x + i, width, queries, nullptr);
    }
    for (; i < width; i += kWidth) {
      tile<false, true, 1>(c + r * width + i, width, weights + r * kPanel, kPanel, x + i, width, queries, nullptr);
    }
  }
}

// ---- copies ----------------------------------------------------------------------------------------------------------

// Copies (rows, d) of any dtype to float32 (rows, width), with zeros on the right.
template <class T>
LANE void widen(float* to, const T* from, int64_t stride, int64_t rows, int64_t d, int64_t width) {
  for (int64_t j = 0; j < rows; ++j, from += stride, to += width) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(to, from, static_cast<size_t>(d) * sizeof(float));
      i = d;
    }
#if CALM_FAST_X86
    if constexpr (kWidth == 16) {
      for (; i + 16 <= d; i += 16) _mm512_storeu_ps(to + i, load16(from + i));
    } else if constexpr (kWidth == 8) {
      for (; i + 8 <= d; i += 8) _mm256_storeu_ps(to + i, load8(from + i));
    }
#endif
    for (; i < d; ++i) to[i] = to_float(from[i]);
    for (; i < width; ++i) to[i] = 0.0f;
  }
}

// Stores d float32 numbers, multiplied by `factor`, in dtype T.
template <class T>
LANE void narrow(T* to, const float* from, float factor, int64_t d) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kWidth <= d; i += kWidth) store(to + i, mul(load(from + i), set1(factor)));
  }
#if CALM_FAST_X86
  if constexpr (kWidth == 16) {
    for (; i + 16 <= d; i += 16) store16(to + i, mul(load(from + i), set1(factor)));
  } else if constexpr (kWidth == 8 && !std::is_same_v<T, float>) {
    for (; i + 8 <= d; i += 8) store8(to + i, mul(load(from + i), set1(factor)));
  }
#endif
  for (; i < d; ++i) to[i] = from_float<T>(from[i] * factor);
}

// Writes to[j * to_stride + i] = from[i * from_stride + j]; rows and columns are multiples of 4.
LANE void transpose(
    float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < columns; j += 4) {
      const float* x = from + i * from_stride + j;
      float* y = to + j * to_stride + i;
#if CALM_FAST_X86
      __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + from_stride), c = _mm_loadu_ps(x + 2 * from_stride),
             d = _mm_loadu_ps(x + 3 * from_stride);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(y, a);
      _mm_storeu_ps(y + to_stride, b);
      _mm_storeu_ps(y + 2 * to_stride, c);
      _mm_storeu_ps(y + 3 * to_stride, d);
#else
      for (int r = 0; r < 4; ++r) {
        for (int s = 0; s < 4; ++s) y[s * to_stride + r] = x[r * from_stride + s];
      }
#endif
    }
  }
}
