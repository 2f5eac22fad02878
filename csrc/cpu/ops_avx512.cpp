// The ops on 16 lanes: AVX-512 F, BW, DQ, VL. avx512_bf16 is not used: it flushes subnormals.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers build "undefined" vectors by self-assignment and then warn (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "float8_inl.h"
#include "ops_inl.h"

namespace pymerge {
namespace {

struct Avx512 {
    static constexpr size_t kLanes = 16;
    using F = __m512;
    using I = __m512i;
    using M = __mmask16;
    static constexpr size_t kWideLanes = 8;
    using W = __m512i;
    using D = __m512d;

    static F get(const float* p) { return _mm512_load_ps(p); }
    static I get(const int32_t* p) { return _mm512_load_si512(p); }
    static void put(float* p, F x) { _mm512_store_ps(p, x); }
    static void put(int32_t* p, I x) { _mm512_store_si512(p, x); }

    static F load_first(const float* p, size_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static I load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store_ints(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
    static I gather(const int32_t* table, I at) { return _mm512_i32gather_epi32(at, table, 4); }
    static F gather(const float* table, I at) { return _mm512_i32gather_ps(at, table, 4); }

    static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

    static F load(Tag<Format::F64>, const void* p) {
        const double* src = static_cast<const double*>(p);
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(src))),
                                  _mm512_cvtpd_ps(_mm512_loadu_pd(src + 8)), 1);
    }
    static F load(Tag<Format::F32>, const void* p) { return _mm512_loadu_ps(p); }
    static F load(Tag<Format::F16>, const void* p) { return _mm512_cvtph_ps(load_256(p)); }
    static F load(Tag<Format::BF16>, const void* p) {
        return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
    }
    static F load(Tag<Format::F8_E4M3>, const void* p) { return look_up(kE4M3, p); }
    static F load(Tag<Format::F8_E5M2>, const void* p) { return look_up(kE5M2, p); }
    static F look_up(const Float8Table& table, const void* p) {
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
        return floats(_mm512_i32gather_epi32(codes, table.bits, 4));
    }

    static void store(Tag<Format::F64>, void* p, F x) {
        double* dst = static_cast<double*>(p);
        _mm512_storeu_pd(dst, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
        _mm512_storeu_pd(dst + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    }
    static void store(Tag<Format::F32>, void* p, F x) { _mm512_storeu_ps(p, x); }
    static void store(Tag<Format::F16>, void* p, F x) {
        store_256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store(Tag<Format::BF16>, void* p, F x) {
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits(x), 16), set(1));
        const __m512i sum = _mm512_add_epi32(bits(x), _mm512_add_epi32(odd, set(0x7fff)));
        store_256(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
    }

    static F set(float x) { return _mm512_set1_ps(x); }
    static I set(int32_t x) { return _mm512_set1_epi32(x); }
    static I lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    static I bits(F x) { return _mm512_castps_si512(x); }
    static F floats(I x) { return _mm512_castsi512_ps(x); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
    static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
    static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
    static I min(I a, I b) { return _mm512_min_epi32(a, b); }
    static I shift_right(I a, int32_t n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

    static I shift_left(I a, int32_t n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
    static I halve(I a) { return _mm512_srai_epi32(a, 1); }
    static I to_int(F x) { return _mm512_cvttps_epi32(x); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

    static M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static M below_unsigned(I a, I b) { return _mm512_cmplt_epu32_mask(a, b); }
    static M above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static M same(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static M both(M a, M b) { return static_cast<M>(a & b); }
    static M either(M a, M b) { return static_cast<M>(a | b); }
    static M negate(M a) { return static_cast<M>(~a); }
    static uint32_t to_bits(M m) { return m; }
    static M from_bits(uint32_t bits) { return static_cast<M>(bits); }
    static M first(size_t n) { return static_cast<M>((1u << n) - 1); }

    static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
    static I select(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
    static F zero_unless(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
    static F add_where(M m, F acc, F x) { return _mm512_mask_add_ps(acc, m, acc, x); }
    static I count(I acc, M m) { return _mm512_mask_sub_epi32(acc, m, acc, set(-1)); }
    static uint64_t sum(I counts) { return static_cast<uint64_t>(_mm512_reduce_add_epi32(counts)); }
    static size_t compress(int32_t* dst, M m, I x) {
        // Compressing to memory is microcoded on some processors; a whole store into the slack is not.
        _mm512_storeu_si512(dst, _mm512_maskz_compress_epi32(m, x));
        return static_cast<size_t>(__builtin_popcount(m));
    }

    static W set_wide(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
    static W wide_lanes() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
    static W add_wide(W a, W b) { return _mm512_add_epi64(a, b); }
    static W xor_wide(W a, W b) { return _mm512_xor_si512(a, b); }
    static W high_half(W a) { return _mm512_srli_epi64(a, 32); }
    static W multiply_low_halves(W a, W b) { return _mm512_mul_epu32(a, b); }
    static void put_words(int32_t* dst, const W words[4]) {
        const W low = _mm512_mask_shuffle_epi32(words[0], 0xaaaa, words[1], _MM_PERM_CCAA);
        const W high = _mm512_mask_shuffle_epi32(words[2], 0xaaaa, words[3], _MM_PERM_CCAA);
        const W front = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
        const W back = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
        _mm512_storeu_si512(dst, _mm512_permutex2var_epi64(low, front, high));
        _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi64(low, back, high));
    }

    static D get_wide(const double* p) { return _mm512_loadu_pd(p); }
    static void put_wide(double* p, D x) { _mm512_storeu_pd(p, x); }
    static D to_doubles(const float* p) { return _mm512_cvtps_pd(_mm256_load_ps(p)); }
    static D add_doubles(D a, D b) { return _mm512_add_pd(a, b); }
    static D add_product(D acc, D a, D b) { return _mm512_fmadd_pd(a, b, acc); }
};

}  // namespace

constexpr OpTable kOps = op_table<Avx512>("avx512");
const OpTable avx512_ops = kOps;

}  // namespace pymerge
