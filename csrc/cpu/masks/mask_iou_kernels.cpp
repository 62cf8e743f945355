// Sums of products of masks over some rows.
//
// Hard masks are bits, 64 pixels a word: a pair takes an AND and a count of bits. Soft ones are floats, of which four
// masks by four are multiplied at a time. Pixels are made for a chunk of a row of every mask and appended until there
// are enough for products, whatever the width. A mask that is empty in all of them takes part in none: few are not.
#include "mask_iou.h"

#include "pixels.h"

namespace segvit::SEGVIT_ISA {

namespace {

struct Work {
  const MaskIou& args;
  const IouScratch& scratch;
  int64_t image;
};

// Values of pixels x0...x1 of a row of one mask, whole registers of them.
template <class T, class F>
void each(const Work& work, const IouMasks& masks, int64_t mask, int64_t y, int64_t x0, int64_t x1, const F& f) {
  const T* data = reinterpret_cast<const T*>(masks.data) + work.image * masks.image_stride + mask * masks.mask_stride;
  if (!masks.resize) {
    const T* row = data + y * masks.row_stride;
    for (int64_t x = x0; x < x1; x += kWidth) f(x - x0, finite(load_up_to(row + x, x1 - x)));
    return;
  }
  int64_t first = masks.x.cells[x0], end = min_of<int64_t>(masks.x.cells[x1 - 1] + 2, masks.width);
  int64_t upper = masks.y.cells[y], lower = min_of<int64_t>(upper + 1, masks.height - 1);
  Vec share = splat(masks.y.shares[y]);
  float* line = work.scratch.line;
  for (int64_t i = first; i < end; i += kWidth) {
    Vec a = finite(load_up_to(data + upper * masks.row_stride + i, end - i));
    Vec b = finite(load_up_to(data + lower * masks.row_stride + i, end - i));
    store(line + i - first, a + share * (b - a));
  }
  for (int64_t i = end - first; i < end - first + 16; ++i) line[i] = line[end - first - 1];
  for (int64_t x = x0; x < x1; x += kWidth) {
    IVec left = load_ints(masks.x.cells + x) - static_cast<int32_t>(first);
    Vec a, b;
    if (left[kWidth - 1] + 1 - left[0] < kWidth) {
      Vec cells = load(line + left[0]);
      a = permute(cells, left - left[0]), b = permute(cells, left - left[0] + 1);
    } else {
      a = gather(line, left), b = gather(line, left + 1);
    }
    f(x - x0, a + load(masks.x.shares + x) * (b - a));
  }
}

template <class F>
void each_of(const Work& work, const IouMasks& masks, int64_t mask, int64_t y, int64_t x0, int64_t x1, const F& f) {
  if (masks.type == Type::f32) each<float>(work, masks, mask, y, x0, x1, f);
  else if (masks.type == Type::f16) each<f16>(work, masks, mask, y, x0, x1, f);
  else each<bf16>(work, masks, mask, y, x0, x1, f);
}

const uint8_t* booleans(const Work& work, const IouMasks& masks, int64_t mask, int64_t y) {
  return reinterpret_cast<const uint8_t*>(masks.data) + work.image * masks.image_stride +
         mask * masks.mask_stride + y * masks.row_stride;
}

// Which of 64 bytes are not zero, a bit each.
SEGVIT_INLINE uint64_t set_of(const uint8_t* bytes) {
#if defined(__AVX512F__)
  __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
  uint64_t unset = 0;
  for (int i = 0; i < 64; i += 32) {
    __m256i v = _mm256_loadu_si256((const __m256i*)(bytes + i));
    v = _mm256_cmpeq_epi8(v, _mm256_setzero_si256());
    unset |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(v))) << i;
  }
  return ~unset;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, bytes + i, 8);
    eight |= eight >> 4, eight |= eight >> 2, eight |= eight >> 1;
    // Bit 8 k to bit 56 + k.
    bits |= (eight & 0x0101010101010101ull) * 0x0102040810204080ull >> 56 << i;
  }
  return bits;
#endif
}

// Pixels x0...x1 of a row as words; what is past the last pixel is 0.
void make_bits(const Work& work, const IouMasks& masks, int64_t mask, int64_t y, int64_t x0, int64_t x1,
               uint64_t* words) {
  int64_t count = x1 - x0;
  __builtin_memset(words, 0, (count + 63) / 64 * sizeof(uint64_t));
  if (masks.boolean) {
    const uint8_t* row = booleans(work, masks, mask, y) + x0;
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) words[i / 64] = set_of(row + i);
    for (; i < count; ++i) words[i / 64] |= static_cast<uint64_t>(row[i] != 0) << (i % 64);
    return;
  }
  Vec threshold = splat(work.args.threshold);
  each_of(work, masks, mask, y, x0, x1, [&](int64_t i, Vec v) {
    IVec above = (v > threshold) & (iota() < static_cast<int32_t>(min_of<int64_t>(kWidth, count - i)));
    words[i / 64] |= uint64_t{bits_of(above)} << (i % 64);
  });
}

// Pixels x0...x1 of a row as floats, up to a whole register with zeros.
void make_values(const Work& work, const IouMasks& masks, int64_t mask, int64_t y, int64_t x0, int64_t x1,
                 float* values) {
  int64_t count = x1 - x0;
  if (masks.boolean) {
    const uint8_t* row = booleans(work, masks, mask, y) + x0;
    for (int64_t i = 0; i < count; ++i) values[i] = row[i] != 0;
    for (int64_t i = count; i % kWidth; ++i) values[i] = 0;
    return;
  }
  each_of(work, masks, mask, y, x0, x1, [&](int64_t i, Vec v) {
    IVec there = iota() < static_cast<int32_t>(min_of<int64_t>(kWidth, count - i));
    store(values + i, there ? sigmoid(v) : splat(0));
  });
}

#if defined(__AVX512F__)
// Bits of every byte are looked up by halves; sums of eight bytes at a time.
SEGVIT_INLINE __m512i count_bytes(__m512i v) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  __m512i halves = _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                                   _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
  return _mm512_sad_epu8(halves, _mm512_setzero_si512());
}
#endif

// Bits that are in both; `words` is a multiple of 8.
SEGVIT_INLINE int32_t common(const uint64_t* a, const uint64_t* b, int64_t words) {
#if defined(__AVX512F__)
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < words; i += 8)
    total = _mm512_add_epi64(
        total, count_bytes(_mm512_and_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i))));
  return static_cast<int32_t>(_mm512_reduce_add_epi64(total));
#elif defined(SEGVIT_NEON)
  uint32x4_t total = vdupq_n_u32(0);
  for (int64_t i = 0; i < words; i += 2) {
    uint8x16_t both = vandq_u8(vld1q_u8((const uint8_t*)(a + i)), vld1q_u8((const uint8_t*)(b + i)));
    total = vpadalq_u16(total, vpaddlq_u8(vcntq_u8(both)));
  }
  return static_cast<int32_t>(vaddvq_u32(total));
#else
  int64_t total[4] = {};
  for (int64_t i = 0; i < words; i += 4)
    for (int j = 0; j < 4; ++j) total[j] += __builtin_popcountll(a[i + j] & b[i + j]);
  return static_cast<int32_t>(total[0] + total[1] + total[2] + total[3]);
#endif
}

void add_counts(const Work& work, int64_t words) {
  int64_t n = work.args.sides[0].count, m = work.args.sides[1].count;
  const uint64_t* bits = work.scratch.bits;
  int32_t *pairs = work.scratch.counts, *areas = pairs + n * m;
  auto add = [](int32_t* to, int32_t count) {
    if (count) __atomic_fetch_add(to, count, __ATOMIC_RELAXED);
  };
  for (int64_t j = 0; j < m; ++j) {
    const uint64_t* b = bits + (n + j) * kIouWords;
    int32_t area = common(b, b, words);
    add(areas + n + j, area);
    if (!area) continue;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t* a = bits + i * kIouWords;
      uint64_t any = 0;
      for (int64_t k = 0; k < words; ++k) any |= a[k];
      if (any) add(pairs + i * m + j, common(a, b, words));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t* a = bits + i * kIouWords;
    add(areas + i, common(a, a, words));
  }
}

constexpr int kSide = 4;

// Products of kRows masks by kColumns, added to sums in double.
template <int kRows, int kColumns>
void multiply(const float* a, const float* b, int64_t pixels, double* sums, int64_t stride) {
  Vec total[kRows][kColumns] = {};
  for (int64_t p = 0; p < pixels; p += kWidth) {
    Vec v[kColumns];
    SEGVIT_UNROLL_8 for (int j = 0; j < kColumns; ++j) v[j] = load(b + j * kIouPixels + p);
    SEGVIT_UNROLL_8 for (int i = 0; i < kRows; ++i) {
      Vec u = load(a + i * kIouPixels + p);
      SEGVIT_UNROLL_8 for (int j = 0; j < kColumns; ++j) total[i][j] += u * v[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i * stride + j] += sum(total[i][j]);
}

void add_products(const Work& work, int64_t pixels) {
  int64_t n = work.args.sides[0].count, m = work.args.sides[1].count;
  const float *a = work.scratch.values, *b = a + n * kIouPixels;
  double* sums = work.scratch.sums;
  for (int64_t i = 0; i < n; i += kSide)
    for (int64_t j = 0; j < m; j += kSide) {
      const float *u = a + i * kIouPixels, *v = b + j * kIouPixels;
      double* to = sums + i * m + j;
      if (i + kSide <= n && j + kSide <= m) {
        multiply<kSide, kSide>(u, v, pixels, to, m);
        continue;
      }
      for (int64_t r = 0; r < min_of<int64_t>(kSide, n - i); ++r)
        for (int64_t c = 0; c < min_of<int64_t>(kSide, m - j); ++c)
          multiply<1, 1>(u + r * kIouPixels, v + c * kIouPixels, pixels, to + r * m + c, m);
    }
  for (int64_t i = 0; i < n + m; ++i) {
    Vec total{};
    for (int64_t p = 0; p < pixels; p += kWidth) total += load(a + i * kIouPixels + p);
    sums[n * m + i] += sum(total);
  }
}

}  // namespace

void mask_iou(const MaskIou& args, int64_t image, int64_t y0, int64_t y1, const IouScratch& s) {
  Work work{args, s, image};
  int64_t n = args.sides[0].count, total = n + args.sides[1].count, held = 0;
  int64_t most = args.soft ? kIouPixels : kIouWords;
  auto flush = [&] {
    if (!held) return;
    if (args.soft) {
      add_products(work, held);
    } else {
      // Up to a whole register of words.
      for (int64_t i = 0; i < total; ++i)
        for (int64_t k = held; k % 8; ++k) s.bits[i * kIouWords + k] = 0;
      add_counts(work, (held + 7) / 8 * 8);
    }
    held = 0;
  };
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x0 = 0; x0 < args.width; x0 += kIouChunk) {
      int64_t x1 = min_of<int64_t>(x0 + kIouChunk, args.width), count = x1 - x0;
      int64_t size = args.soft ? (count + kWidth - 1) / kWidth * kWidth : (count + 63) / 64;
      if (held + size > most) flush();
      for (int64_t i = 0; i < total; ++i) {
        const IouMasks& masks = args.sides[i >= n];
        int64_t mask = i < n ? i : i - n;
        if (args.soft) make_values(work, masks, mask, y, x0, x1, s.values + i * kIouPixels + held);
        else make_bits(work, masks, mask, y, x0, x1, s.bits + i * kIouWords + held);
      }
      held += size;
    }
  flush();
}

}  // namespace segvit::SEGVIT_ISA
