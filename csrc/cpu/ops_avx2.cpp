// The ops on 8 lanes: AVX2 with F16C.
#include <immintrin.h>

#include "float8_inl.h"
#include "ops_inl.h"

namespace pymerge {
namespace {

// For each mask of 8 lanes, the numbers of its lanes in order, one byte each.
struct CompressTable {
    uint8_t lanes[256][8];
};

constexpr CompressTable compress_table() {
    CompressTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int n = 0;
        for (int lane = 0; lane < 8; ++lane) {
            if (mask >> lane & 1) table.lanes[mask][n++] = static_cast<uint8_t>(lane);
        }
    }
    return table;
}

alignas(64) constexpr CompressTable kCompress = compress_table();

struct Avx2 {
    static constexpr size_t kLanes = 8;
    using F = __m256;
    using I = __m256i;
    // A comparison's result: all bits of a lane set or clear.
    using M = __m256i;
    static constexpr size_t kWideLanes = 4;
    using W = __m256i;
    using D = __m256d;

    static F get(const float* p) { return _mm256_load_ps(p); }
    static I get(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static void put(float* p, F x) { _mm256_store_ps(p, x); }
    static void put(int32_t* p, I x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }

    static F load_first(const float* p, size_t n) { return _mm256_maskload_ps(p, first(n)); }
    static I load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_ints(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
    static I gather(const int32_t* table, I at) { return _mm256_i32gather_epi32(table, at, 4); }
    static F gather(const float* table, I at) { return _mm256_i32gather_ps(table, at, 4); }

    static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static void store_128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

    static F load(Tag<Format::F64>, const void* p) {
        const double* src = static_cast<const double*>(p);
        return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(src + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(src)));
    }
    static F load(Tag<Format::F32>, const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
    static F load(Tag<Format::F16>, const void* p) { return _mm256_cvtph_ps(load_128(p)); }
    static F load(Tag<Format::BF16>, const void* p) {
        return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
    }
    static F load(Tag<Format::F8_E4M3>, const void* p) { return look_up(kE4M3, p); }
    static F load(Tag<Format::F8_E5M2>, const void* p) { return look_up(kE5M2, p); }
    static F look_up(const Float8Table& table, const void* p) {
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
        return floats(_mm256_i32gather_epi32(reinterpret_cast<const int*>(table.bits), codes, 4));
    }

    static void store(Tag<Format::F64>, void* p, F x) {
        double* dst = static_cast<double*>(p);
        _mm256_storeu_pd(dst, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
        _mm256_storeu_pd(dst + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    }
    static void store(Tag<Format::F32>, void* p, F x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
    static void store(Tag<Format::F16>, void* p, F x) {
        store_128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store(Tag<Format::BF16>, void* p, F x) {
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits(x), 16), set(1));
        const __m256i sum = _mm256_add_epi32(bits(x), _mm256_add_epi32(odd, set(0x7fff)));
        const __m256i rounded = _mm256_srli_epi32(sum, 16);
        store_128(p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
    }

    static F set(float x) { return _mm256_set1_ps(x); }
    static I set(int32_t x) { return _mm256_set1_epi32(x); }
    static I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
    static I bits(F x) { return _mm256_castps_si256(x); }
    static F floats(I x) { return _mm256_castsi256_ps(x); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
    static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
    static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
    static I min(I a, I b) { return _mm256_min_epi32(a, b); }
    static I shift_right(I a, int32_t n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }

    static I shift_left(I a, int32_t n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
    static I halve(I a) { return _mm256_srai_epi32(a, 1); }
    static I to_int(F x) { return _mm256_cvttps_epi32(x); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }

    static M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }
    static M equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
    static M below_unsigned(I a, I b) { return greater(bit_xor(b, set(INT32_MIN)), bit_xor(a, set(INT32_MIN))); }
    static M above(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static M at_least(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
    static M same(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
    static M is_nan(F a) { return bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
    static M both(M a, M b) { return _mm256_and_si256(a, b); }
    static M either(M a, M b) { return _mm256_or_si256(a, b); }
    static M negate(M a) { return _mm256_xor_si256(a, set(int32_t{-1})); }
    static M first(size_t n) { return greater(set(static_cast<int32_t>(n)), lanes()); }
    static uint32_t to_bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(floats(m))); }
    static M from_bits(uint32_t bits) {
        const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return equal(bit_and(set(static_cast<int32_t>(bits)), bit), bit);
    }

    static F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, floats(m)); }
    static I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
    static F zero_unless(M m, F x) { return floats(_mm256_and_si256(m, bits(x))); }
    // Sums start at +0 and so are never -0: adding +0 changes nothing.
    static F add_where(M m, F acc, F x) { return add(acc, zero_unless(m, x)); }
    static I count(I acc, M m) { return _mm256_sub_epi32(acc, m); }
    static uint64_t sum(I counts) {
        alignas(32) uint32_t lanes[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), counts);
        uint64_t total = 0;
        for (size_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
        return total;
    }
    static size_t compress(int32_t* dst, M m, I x) {
        const int mask = _mm256_movemask_ps(floats(m));
        const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                            _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(lanes)));
        return static_cast<size_t>(__builtin_popcount(static_cast<unsigned>(mask)));
    }

    static W set_wide(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
    static W wide_lanes() { return _mm256_setr_epi64x(0, 1, 2, 3); }
    static W add_wide(W a, W b) { return _mm256_add_epi64(a, b); }
    static W xor_wide(W a, W b) { return _mm256_xor_si256(a, b); }
    static W high_half(W a) { return _mm256_srli_epi64(a, 32); }
    static W multiply_low_halves(W a, W b) { return _mm256_mul_epu32(a, b); }
    static void put_words(int32_t* dst, const W words[4]) {
        const W low = _mm256_blend_epi32(words[0], _mm256_slli_epi64(words[1], 32), 0xaa);
        const W high = _mm256_blend_epi32(words[2], _mm256_slli_epi64(words[3], 32), 0xaa);
        const W even = _mm256_unpacklo_epi64(low, high);
        const W odd = _mm256_unpackhi_epi64(low, high);
        store_ints(dst, _mm256_permute2x128_si256(even, odd, 0x20));
        store_ints(dst + 8, _mm256_permute2x128_si256(even, odd, 0x31));
    }

    static D get_wide(const double* p) { return _mm256_loadu_pd(p); }
    static void put_wide(double* p, D x) { _mm256_storeu_pd(p, x); }
    static D to_doubles(const float* p) { return _mm256_cvtps_pd(_mm_load_ps(p)); }
    static D add_doubles(D a, D b) { return _mm256_add_pd(a, b); }
    static D add_product(D acc, D a, D b) { return _mm256_fmadd_pd(a, b, acc); }
};

}  // namespace

constexpr OpTable kOps = op_table<Avx2>("avx2");
const OpTable avx2_ops = kOps;

}  // namespace pymerge
