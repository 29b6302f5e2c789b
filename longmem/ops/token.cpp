// What a token asks of a bank on a CPU, in one call instead of some hundred: a search of lists (longmem/ivf.py, where
// the same is written in NumPy) and joint attention over what was found (longmem/attention.py, in PyTorch).
// For processors with AVX-512 VNNI; `longmem/ops/native.py` compiles it.
//
// Names as in those modules: q queries asked together, E head size, S coordinates (P = 2 S), L lists, M places for
// keys.

#include <immintrin.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr long ROWS = 16;  // longmem.ivf.ROWS: rows that are scored at a time
constexpr long BYTES = 64; // of a register
constexpr long LINE = 64;  // of the cache
// How long before it is read something is fetched: bytes of what lies in order, and blocks of `ROWS` keys of what does
// not. (A processor fetches by itself what lies in order, but no further than a page.)
constexpr long AHEAD = 4096;
constexpr long BLOCKS_AHEAD = 16;

long registers(long bytes) { return (bytes + BYTES - 1) / BYTES; }

void fetch(const void* from, long bytes) {
    const char* begin = static_cast<const char*>(from);
    for (long at = 0; at < bytes; at += LINE) _mm_prefetch(begin + at, _MM_HINT_T0);
}

// The sum of each of 16 registers.
__m512i sums(const __m512i* of) {
    __m512i pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(of[2 * i], of[2 * i + 1]),
                                    _mm512_unpackhi_epi32(of[2 * i], of[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                    _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        eights[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                     _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(eights[0], eights[1], 0x88),
                            _mm512_shuffle_i32x4(eights[0], eights[1], 0xdd));
}

// Products of 16 rows of int8 with each query's codes, all of a query off by the same number: the instruction takes one
// side without sign, so rows are read as if they were 128 more. Codes fill whole registers.
void score_rows(const int8_t* row, long size, const int8_t* code_q, long queries, int32_t* score_q, long stride) {
    const long parts = registers(size);
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (long q = 0; q < queries; q++) {
        __m512i product[ROWS] = {};
        for (long part = 0; part < parts; part++) {
            const long left = std::min(size - part * BYTES, BYTES);
            const __mmask64 mask = left == BYTES ? ~0ull : (1ull << left) - 1;
            const __m512i code = _mm512_loadu_si512(code_q + (q * parts + part) * BYTES);
            const int8_t* from = row + part * BYTES;
#pragma GCC unroll 16
            for (long r = 0; r < ROWS; r++) {
                const __m512i some = _mm512_maskz_loadu_epi8(mask, from + r * size);
                product[r] = _mm512_dpbusd_epi32(product[r], _mm512_xor_si512(some, flip), code);
            }
        }
        _mm512_storeu_si512(score_q + q * stride, sums(product));
    }
}

// int8 codes of a row of numbers, the largest of which becomes 127; the rest of the last register is 0.
void encode(const float* number, long size, int8_t* code) {
    float most = 1e-30f;
    for (long s = 0; s < size; s++) most = std::max(most, std::fabs(number[s]));
    const float unit = most / 127;
    for (long s = 0; s < size; s++) code[s] = static_cast<int8_t>(std::nearbyint(number[s] / unit));
    std::fill(code + size, code + registers(size) * BYTES, 0);
}

// Where the `count` largest of n scores (whole registers of them) are, each in the lower half of a number.
void largest(const int32_t* score, long n, long count, std::vector<int32_t>& place, std::vector<int64_t>& best) {
    // The largest of some groups say how much is enough: few scores are that much.
    const long rows = n / ROWS, depth = std::max(4 * rows / count, 1L);
    std::vector<int32_t>& most = place;
    most.resize((rows + depth - 1) / depth * ROWS);
    for (long first = 0, group = 0; first < rows; first += depth, group += ROWS) {
        __m512i largest = _mm512_set1_epi32(INT_MIN);
        for (long at = first; at < std::min(first + depth, rows); at++)
            largest = _mm512_max_epi32(largest, _mm512_loadu_si512(score + at * ROWS));
        _mm512_storeu_si512(most.data() + group, largest);
    }
    int32_t enough = INT_MIN + 1; // nothing scores less
    if (count < static_cast<long>(most.size())) {
        std::nth_element(most.begin(), most.begin() + (count - 1), most.end(), std::greater<int32_t>());
        enough = std::max(enough, most[count - 1]);
    }
    place.resize(n + ROWS);
    long found = 0;
    const __m512i least = _mm512_set1_epi32(enough);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (long first = 0; first < n; first += ROWS, at = _mm512_add_epi32(at, _mm512_set1_epi32(ROWS))) {
        const __mmask16 mask = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(score + first), least);
        if (!mask) continue;
        _mm512_storeu_si512(place.data() + found, _mm512_maskz_compress_epi32(mask, at));
        found += __builtin_popcount(mask);
    }
    best.resize(found);
    for (long i = 0; i < found; i++)
        best[i] = static_cast<int64_t>(score[place[i]]) * (int64_t(1) << 32) + place[i];
    if (found <= count) return;
    std::nth_element(best.begin(), best.begin() + (count - 1), best.end(), std::greater<int64_t>());
    best.resize(count);
}

long place_of(int64_t best) { return best & 0xffffffff; }

// A row in bfloat16 times one in float32.
float product(const uint16_t* row, const float* query, long size) {
    __m512 sum = _mm512_setzero_ps();
    for (long e = 0; e < size; e += ROWS) {
        const __mmask16 mask = size - e < ROWS ? (1 << (size - e)) - 1 : 0xffff;
        const __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(half, 16)), _mm512_maskz_loadu_ps(mask, query + e),
                              sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// Adds a row in bfloat16, times a number.
void add(float* total, const uint16_t* row, float factor, long size) {
    for (long e = 0; e < size; e += ROWS) {
        const __mmask16 mask = size - e < ROWS ? (1 << (size - e)) - 1 : 0xffff;
        const __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + e));
        const __m512 sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(half, 16)), _mm512_set1_ps(factor),
                                           _mm512_maskz_loadu_ps(mask, total + e));
        _mm512_mask_storeu_ps(total + e, mask, sum);
    }
}

float product(const float* one, const float* other, long size) {
    float sum = 0;
    for (long e = 0; e < size; e++) sum += one[e] * other[e];
    return sum;
}

} // namespace

extern "C" void search_lists(
    // Q queries (Q, E), of which `together` at a time read what any of them chose.
    const float* query_QE, long queries, long together, long head_dim,
    // Coordinates of a query: its product with S columns of a matrix of `columns` columns.
    const float* matrix_ES, long columns, long size,
    // The lists (`longmem.ivf.ListedKeys`), and how many a query chooses.
    const int8_t* promise_LP, const float* promise_scale_P, const int64_t* first_L, const int64_t* blocks_L, long lists,
    const int8_t* codes_MS, const int32_t* row_M, const float* scale_S, long probes,
    // The keys themselves, in bfloat16: so many candidates are scored again.
    const uint16_t* keys_NE, long candidates, long top_k,
    // What was found, best first; what is missing is left as it is.
    int64_t* index_QR, float* score_QR, long threads) {
    const long whole = lists / ROWS * ROWS, places_L = (lists + ROWS - 1) / ROWS * ROWS;
    const long parts = registers(size) * BYTES, promise_parts = registers(2 * size) * BYTES;
    std::vector<int8_t> last_LP(ROWS * 2 * size); // what whole groups of lists leave over, filled up
    std::copy(promise_LP + whole * 2 * size, promise_LP + lists * 2 * size, last_LP.begin());
    std::vector<float> coordinate_S(size), scaled_P(2 * size);
    std::vector<int8_t> code_qS(together * parts), towards_qP(together * promise_parts);
    std::vector<int32_t> promise_qL(together * places_L), score_qM, place;
    std::vector<int64_t> best, block_B, row_C;
    std::vector<std::pair<float, int64_t>> scored_C;
    std::vector<uint8_t> chosen_L(lists);
    std::vector<long> list_l, ends_q;
    for (long first = 0; first < queries; first += together) {
        const long asked = std::min(together, queries - first);
        for (long q = 0; q < asked; q++) {
            const float* query_E = query_QE + (first + q) * head_dim;
            std::fill(coordinate_S.begin(), coordinate_S.end(), 0.0f);
            for (long e = 0; e < head_dim; e++)
#pragma omp simd
                for (long s = 0; s < size; s++) coordinate_S[s] += query_E[e] * matrix_ES[e * columns + s];
            for (long s = 0; s < size; s++) {
                scaled_P[s] = coordinate_S[s] * promise_scale_P[s];
                scaled_P[size + s] = std::fabs(coordinate_S[s]) * promise_scale_P[size + s];
            }
            encode(scaled_P.data(), 2 * size, towards_qP.data() + q * promise_parts);
            for (long s = 0; s < size; s++) scaled_P[s] = coordinate_S[s] * scale_S[s];
            encode(scaled_P.data(), size, code_qS.data() + q * parts);
        }
        // Lists that promise most to any of the queries.
#pragma omp parallel for num_threads(threads)
        for (long list = 0; list < whole; list += ROWS) {
            fetch(promise_LP + list * 2 * size + AHEAD, ROWS * 2 * size);
            score_rows(promise_LP + list * 2 * size, 2 * size, towards_qP.data(), asked, promise_qL.data() + list,
                       places_L);
        }
        if (whole < lists) {
            score_rows(last_LP.data(), 2 * size, towards_qP.data(), asked, promise_qL.data() + whole, places_L);
            for (long q = 0; q < asked; q++)
                std::fill_n(promise_qL.data() + q * places_L + lists, places_L - lists, INT_MIN);
        }
        std::fill(chosen_L.begin(), chosen_L.end(), 0);
        list_l.clear();
        for (long q = 0; q < asked; q++) {
            largest(promise_qL.data() + q * places_L, places_L, probes, place, best);
            for (int64_t one : best) {
                const long list = place_of(one);
                if (chosen_L[list]) continue;
                chosen_L[list] = 1;
                list_l.push_back(list);
                fetch(first_L + list, sizeof(int64_t));
                fetch(blocks_L + list, sizeof(int64_t));
            }
        }
        // Their keys.
        block_B.clear();
        for (long list : list_l)
            for (long block = 0; block < blocks_L[list]; block++) block_B.push_back((first_L[list] + block) * ROWS);
        const long blocks = block_B.size(), places = blocks * ROWS;
        score_qM.resize(asked * places);
#pragma omp parallel for num_threads(threads)
        for (long b = 0; b < blocks; b++) {
            if (b + BLOCKS_AHEAD < blocks) fetch(codes_MS + block_B[b + BLOCKS_AHEAD] * size, ROWS * size);
            score_rows(codes_MS + block_B[b] * size, size, code_qS.data(), asked, score_qM.data() + b * ROWS, places);
        }
        // The best of them, scored again. All that is read at random is asked for before it is waited for.
        row_C.clear();
        ends_q.clear();
        for (long q = 0; q < asked; q++) {
            largest(score_qM.data() + q * places, places, std::min(candidates, places), place, best);
            for (int64_t one : best) {
                const long at = block_B[place_of(one) / ROWS] + place_of(one) % ROWS;
                _mm_prefetch(reinterpret_cast<const char*>(row_M + at), _MM_HINT_T0);
                row_C.push_back(at);
            }
            ends_q.push_back(row_C.size());
        }
        for (int64_t& one : row_C) {
            one = row_M[one];
            if (one >= 0) fetch(keys_NE + one * head_dim, head_dim * sizeof(uint16_t));
        }
        for (long q = 0, begin = 0; q < asked; begin = ends_q[q++]) {
            scored_C.clear();
            for (long c = begin; c < ends_q[q]; c++)
                if (row_C[c] >= 0) {
                    const float* query_E = query_QE + (first + q) * head_dim;
                    const float score = product(keys_NE + row_C[c] * head_dim, query_E, head_dim);
                    if (!std::isnan(score)) scored_C.emplace_back(score, row_C[c]); // NaN has no order
                }
            const long kept = std::min<long>(top_k, scored_C.size());
            std::nth_element(scored_C.begin(), scored_C.begin() + kept, scored_C.end(), std::greater<>());
            std::sort(scored_C.begin(), scored_C.begin() + kept, std::greater<>());
            for (long r = 0; r < kept; r++) {
                index_QR[(first + q) * top_k + r] = scored_C[r].second;
                score_QR[(first + q) * top_k + r] = scored_C[r].first;
            }
        }
    }
}

extern "C" void joint_rows(
    // A row of E for each of X searches' Q queries, Q being G heads of T tokens; x counts K heads of each batch row.
    const float* query_XQE, const float* local_XQE, const float* local_logsumexp_XQ, long searches, long kv_heads,
    long group, long tokens, long head_dim,
    // What was found: where each search's keys and values lie, and which rows.
    const int64_t* keys_X, const int64_t* values_X, const int64_t* slot_XQR, const float* found_XQR,
    const int64_t* order_XQR, long top_k, const float* bank_size_B,
    // What heads have learned; the last two may be missing.
    const float* scale_KG, const float* bias_KG, const float* size_bias_KG, const float* null_key_KGE,
    const float* null_bias_KG, const float* newest_KG, const float* newest_query_KGE, float scaling,
    float reference_size,
    // What is added to scores; may be missing.
    const float* bias_XQR,
    // joint − local attention, mass, log of each row's share.
    float* difference_XQE, float* mass_XQ, float* log_weight_XQR) {
    std::vector<float> score_R(top_k), weight_R(top_k), newer_R(top_k), asked_E(head_dim), memory_E(head_dim);
    std::vector<std::pair<int64_t, long>> newest_first;
    for (long i = 0; i < searches * group * tokens; i++) {
        const long x = i / (group * tokens), head = x % kv_heads * group + i / tokens % group;
        const float size = bank_size_B[x / kv_heads];
        const float* query_E = query_XQE + i * head_dim;
        const float* local_E = local_XQE + i * head_dim;
        const uint16_t* keys_NE = reinterpret_cast<const uint16_t*>(keys_X[x]);
        const uint16_t* values_NE = reinterpret_cast<const uint16_t*>(values_X[x]);
        const int64_t* slot_R = slot_XQR + i * top_k;
        const int64_t* order_R = order_XQR + i * top_k;
        for (long e = 0; e < head_dim; e++) asked_E[e] = query_E[e] * scale_KG[head];
        for (long r = 0; r < top_k; r++) fetch(values_NE + slot_R[r] * head_dim, head_dim * sizeof(uint16_t));
        float most = -INFINITY;
        for (long r = 0; r < top_k; r++) {
            const bool valid = found_XQR[i * top_k + r] > -INFINITY;
            const uint16_t* key_E = keys_NE + slot_R[r] * head_dim;
            score_R[r] = valid ? product(key_E, asked_E.data(), head_dim) * scaling : -INFINITY;
            if (bias_XQR) score_R[r] += bias_XQR[i * top_k + r];
            most = std::max(most, score_R[r]);
        }
        float* log_weight_R = log_weight_XQR + i * top_k;
        float* difference_E = difference_XQE + i * head_dim;
        if (most == -INFINITY) {
            std::fill(log_weight_R, log_weight_R + top_k, -std::log(static_cast<float>(top_k)));
            std::fill(difference_E, difference_E + head_dim, 0.0f);
            mass_XQ[i] = 0;
            continue;
        }
        // Twice where being older costs something: it costs by how much attention what is newer gets.
        float total = 0;
        for (bool discounted = newest_KG == nullptr;; discounted = true) {
            total = 0;
            for (long r = 0; r < top_k; r++) total += weight_R[r] = std::exp(score_R[r] - most);
            if (discounted) break;
            const float* newest_query_E = newest_query_KGE + head * head_dim;
            const float asked = newest_KG[head] + product(query_E, newest_query_E, head_dim) * scaling;
            newest_first.clear();
            for (long r = 0; r < top_k; r++) newest_first.emplace_back(-order_R[r], r);
            std::sort(newest_first.begin(), newest_first.end());
            float newer = 0;
            for (const auto& [order, r] : newest_first) {
                newer_R[r] = newer;
                newer += weight_R[r] / total;
            }
            most = -INFINITY;
            for (long r = 0; r < top_k; r++) most = std::max(most, score_R[r] -= asked * newer_R[r]);
        }
        const float logsumexp = most + std::log(total);
        std::fill(memory_E.begin(), memory_E.end(), 0.0f);
        for (long r = 0; r < top_k; r++) {
            log_weight_R[r] = score_R[r] - logsumexp;
            if (weight_R[r] > 0) add(memory_E.data(), values_NE + slot_R[r] * head_dim, weight_R[r] / total, head_dim);
        }
        const float null = product(query_E, null_key_KGE + head * head_dim, head_dim) * scaling + null_bias_KG[head];
        const float memory =
            logsumexp + bias_KG[head] + size_bias_KG[head] * std::log(std::max(size, 1.0f) / reference_size);
        const float local = local_logsumexp_XQ[i], larger = std::max(local, null);
        const float rest = larger + std::log1p(std::exp(std::min(local, null) - larger));
        mass_XQ[i] = 1 / (1 + std::exp(rest - memory));
        for (long e = 0; e < head_dim; e++) difference_E[e] = mass_XQ[i] * (memory_E[e] - local_E[e]);
    }
}

// What passage evidence adds to the scores of one token a row (longmem/evidence.py); its attention by plain match counts
// in the sums from now on.
extern "C" void raise_rows(
    // A query for each of H heads (K of them, G queries each) of every batch row.
    const float* query_BHE, const float* local_logsumexp_BH, long batch, long heads, long head_dim, long top_k,
    const float* found_BHR, const int64_t* index_BHR, const float* bank_size_B,
    // What heads have learned.
    const float* scale_H, const float* bias_H, const float* size_bias_H, const float* null_key_HE,
    const float* null_bias_H, const float* gain_H, const float* gain_query_HE, const float* from_H, float scaling,
    float reference_size,
    // The sums: of this layer up to the last token, and of the layers below up to this one, if there are any.
    float* kept_BP, float* below_BP, const bool* takes_B, long lowest, long passage, long places, float fading,
    float* raised_BHR) {
    std::vector<float> before_P(places), drawn_P(places);
    for (long b = 0; b < batch; b++) {
        float *kept_P = kept_BP + b * places, *below_P = below_BP + b * places;
        for (long p = 0; p < places; p++) before_P[p] = fading * kept_P[p] + (lowest ? 0.0f : below_P[p]);
        std::fill(drawn_P.begin(), drawn_P.end(), 0.0f);
        const float size = std::log(std::max(bank_size_B[b], 1.0f) / reference_size);
        for (long h = 0; h < heads; h++) {
            const long i = b * heads + h;
            const float* query_E = query_BHE + i * head_dim;
            const float* found_R = found_BHR + i * top_k;
            const int64_t* index_R = index_BHR + i * top_k;
            const float asked = product(query_E, gain_query_HE + h * head_dim, head_dim) * scaling;
            const float gain = std::max(gain_H[h] + asked, 0.0f);
            const float null = null_bias_H[h] + product(query_E, null_key_HE + h * head_dim, head_dim) * scaling;
            const float local = local_logsumexp_BH[i], larger = std::max(local, null);
            const float rest = larger + std::log1p(std::exp(std::min(local, null) - larger)) - bias_H[h] -
                               size_bias_H[h] * size;
            const float scale = scale_H[h] * scaling, from = std::exp(-from_H[h]);
            float most = rest;
            for (long r = 0; r < top_k; r++)
                if (found_R[r] > -INFINITY) most = std::max(most, found_R[r] * scale);
            float total = std::exp(rest - most);
            for (long r = 0; r < top_k; r++)
                if (found_R[r] > -INFINITY) total += std::exp(found_R[r] * scale - most);
            for (long r = 0; r < top_k; r++) {
                const long place = index_R[r] / passage % places;
                const float sum = before_P[(place + places - 1) % places] + before_P[place] +
                                  before_P[(place + 1) % places];
                raised_BHR[i * top_k + r] = gain * std::log1p(sum * from);
                if (found_R[r] > -INFINITY) drawn_P[place] += std::exp(found_R[r] * scale - most) / total;
            }
        }
        for (long p = 0; p < places; p++) {
            below_P[p] = before_P[p] + drawn_P[p];
            if (takes_B[b]) kept_P[p] = fading * kept_P[p] + drawn_P[p];
        }
    }
}
