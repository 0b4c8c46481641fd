# SPDX-License-Identifier: Apache-2.0
"""The C program that the memory engine is measured against: a hash table of rows, as one would write it by hand for speed.

    index, form 0   buckets of one cache line: 5 keys, 5 slots, how many are held; bucket = high half of the mix * buckets
    index, form 1   16-byte entries key | slot + 1, linear probing, a power of two of them, at most 3/4 full
    rows            weights in one array, optimizer state in another, both by slot, in huge pages where there are any

Invariant: it compares whole 64-bit keys and gives the rows that Oarlock gives, up to the order of additions. A request goes
through in stages of 64 keys, so that the lines of a stage are asked for while the stage before is worked on. No growth, no
erase, no locks: threads may read together, and push together if their keys differ and exist.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* DIM and COLUMNS, the weights and state values of a row, are given to the compiler. */
#define INLINE static inline __attribute__((always_inline))
#define HUGE_PAGE ((size_t)2 << 20)
#define NONE UINT32_MAX
#define PER 5        /* keys in a bucket */
#define HELD 255     /* bits of meta: how many are held */
#define OVERFLOWED 256
#define STAGE 64     /* keys that are looked up together */
#define AHEAD 64     /* rows asked for before they are used, in a gather */

typedef struct { uint64_t key[PER]; uint32_t slot[PER]; uint32_t meta; } bucket;
typedef struct { uint64_t key, word; } entry;

typedef struct {
    uint64_t salt, room, rows, buckets, mask;
    uint32_t linear;
    char *index;
    float *weights, *state;
    size_t index_bytes, weight_bytes, state_bytes;
} table;

typedef struct { uint64_t at[STAGE]; uint32_t slot[STAGE], late[STAGE], lates; } stage;

static void *pages(size_t *bytes) {
    *bytes = (*bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char *p = mmap(NULL, *bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    char *q = (char *)(((uintptr_t)p + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (q > p) munmap(p, q - p);
    if (p + HUGE_PAGE > q) munmap(q + *bytes, p + HUGE_PAGE - q);
    madvise(q, *bytes, MADV_HUGEPAGE);
    return q;
}

void twin_free(table *t) {
    if (!t) return;
    if (t->index) munmap(t->index, t->index_bytes);
    if (t->weights) munmap(t->weights, t->weight_bytes);
    if (t->state) munmap(t->state, t->state_bytes);
    free(t);
}

table *twin_make(uint64_t salt, uint64_t room, uint32_t linear, double load) {
    table *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->salt = salt, t->room = room, t->linear = linear;
    uint64_t capacity = 16;
    while (capacity * 3 / 4 < room) capacity *= 2;
    t->mask = capacity - 1;
    t->buckets = (uint64_t)((double)room / (PER * load)) + 1024;
    t->index_bytes = linear ? capacity * sizeof(entry) : t->buckets * sizeof(bucket);
    t->weight_bytes = room * DIM * 4 + 64;
    t->state_bytes = room * COLUMNS * 4 + 64;
    t->index = pages(&t->index_bytes);
    t->weights = pages(&t->weight_bytes);
    t->state = pages(&t->state_bytes);
    if (!t->index || !t->weights || !t->state) {
        twin_free(t);
        return NULL;
    }
    return t;
}

size_t twin_bytes(const table *t) { return t->index_bytes + t->weight_bytes + t->state_bytes; }

/* The index */

INLINE uint64_t mix(const table *t, uint64_t key) {
    uint64_t x = key ^ t->salt;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
INLINE uint64_t place(const table *t, uint64_t key, const int linear) {
    return linear ? mix(t, key) & t->mask : (mix(t, key) >> 32) * t->buckets >> 32;
}
INLINE const void *line(const table *t, uint64_t at, const int linear) {
    return t->index + at * (linear ? sizeof(entry) : sizeof(bucket));
}
/* Where a key goes next that its bucket has no place for: no neighbour, so that full buckets do not make long rows. */
INLINE uint64_t beyond(const table *t, uint64_t at, uint64_t key) {
    at += 1 + (mix(t, key) & 1023);
    return at < t->buckets ? at : at - t->buckets;
}
INLINE uint32_t in_bucket(const bucket *b, uint64_t key) {
    uint32_t held = (1u << (b->meta & HELD)) - 1;
#ifdef __AVX512F__
    return _mm512_cmpeq_epi64_mask(_mm512_load_si512(b), _mm512_set1_epi64((long long)key)) & held;
#else
    uint32_t hit = 0;
    for (int k = 0; k < PER; k++) hit |= (uint32_t)(b->key[k] == key) << k;
    return hit & held;
#endif
}
INLINE uint32_t find(const table *t, uint64_t at, uint64_t key, const int linear) {
    if (linear)
        for (;; at = (at + 1) & t->mask) {
            const entry *e = (const entry *)t->index + at;
            if (!e->word) return NONE;
            if (e->key == key) return (uint32_t)e->word - 1;
        }
    for (;; at = beyond(t, at, key)) {
        const bucket *b = (const bucket *)t->index + at;
        uint32_t hit = in_bucket(b, key);
        if (hit) return b->slot[__builtin_ctz(hit)];
        if (!(b->meta & OVERFLOWED)) return NONE;
    }
}
static uint32_t enter(table *t, uint64_t key) {
    if (t->rows == t->room) return NONE;
    uint32_t slot = (uint32_t)t->rows++;
    uint64_t at = place(t, key, (int)t->linear);
    if (t->linear) {
        entry *e = (entry *)t->index;
        while (e[at].word) at = (at + 1) & t->mask;
        e[at] = (entry){key, (uint64_t)slot + 1};
    } else {
        bucket *b = (bucket *)t->index;
        for (; (b[at].meta & HELD) == PER; at = beyond(t, at, key)) b[at].meta |= OVERFLOWED;
        uint32_t k = b[at].meta++ & HELD;
        b[at].key[k] = key, b[at].slot[k] = slot;
    }
    return slot;
}

/* Stages: ask for index lines; look, ask for rows and for the lines of keys beyond; look for those; use the rows. */

INLINE void ask(const table *t, size_t slot, const int writes) {
    const char *w = (const char *)(t->weights + slot * DIM), *s = (const char *)(t->state + slot * COLUMNS);
    for (size_t b = 0; b < DIM * 4 && b < 512; b += 64)
        if (writes) __builtin_prefetch(w + b, 1, 3);
        else __builtin_prefetch(w + b, 0, 3);
    if (writes)
        for (size_t b = 0; b < COLUMNS * 4 && b < 512; b += 64) __builtin_prefetch(s + b, 1, 3);
}
INLINE void aim(const table *t, const uint64_t *keys, size_t n, stage *s, const int linear) {
    for (size_t i = 0; i < n; i++) {
        s->at[i] = place(t, keys[i], linear);
        __builtin_prefetch(line(t, s->at[i], linear), 0, 3);
    }
}
INLINE void look(const table *t, const uint64_t *keys, size_t n, stage *s, const int writes,
                 const int linear) {
    uint32_t m = 0;
    for (size_t i = 0; i < n; i++) {
        s->late[m] = (uint32_t)i;
        if (linear) {
            uint32_t found = s->slot[i] = find(t, s->at[i], keys[i], 1);
            m += found == NONE;
            if (found != NONE) ask(t, found, writes);
        } else {
            const bucket *b = (const bucket *)t->index + s->at[i];
            uint32_t hit = in_bucket(b, keys[i]);
            m += !hit;
            s->slot[i] = b->slot[__builtin_ctz(hit | 1u << (PER - 1))];
            ask(t, s->slot[i], writes);
        }
    }
    s->lates = m;
    if (!linear)
        for (size_t k = 0; k < m; k++)
            __builtin_prefetch(line(t, beyond(t, s->at[s->late[k]], keys[s->late[k]]), 0), 0, 3);
}
INLINE void late(const table *t, const uint64_t *keys, stage *s, const int writes,
                 const int linear) {
    for (size_t k = 0; k < s->lates; k++) {
        size_t i = s->late[k];
        s->slot[i] = NONE;
        if (linear || !(((const bucket *)t->index)[s->at[i]].meta & OVERFLOWED)) continue;
        uint32_t found = s->slot[i] = find(t, beyond(t, s->at[i], keys[i]), keys[i], 0);
        if (found != NONE) ask(t, found, writes);
    }
}
#define LENGTH(c) ((c) * STAGE >= n ? 0 : n - (c) * STAGE < STAGE ? n - (c) * STAGE : STAGE)

INLINE void pull(const table *t, const uint64_t *keys, size_t n, float *out, const int linear) {
    stage stages[4];
    for (size_t c = 0; c < (n + STAGE - 1) / STAGE + 3; c++) {
        aim(t, keys + c * STAGE, LENGTH(c), &stages[c % 4], linear);
        if (c >= 1) look(t, keys + (c - 1) * STAGE, LENGTH(c - 1), &stages[(c - 1) % 4], 0, linear);
        if (c >= 2 && LENGTH(c - 2)) late(t, keys + (c - 2) * STAGE, &stages[(c - 2) % 4], 0, linear);
        if (c >= 3) {
            const stage *s = &stages[(c - 3) % 4];
            float *o = out + (c - 3) * STAGE * DIM;
            for (size_t i = 0, m = LENGTH(c - 3); i < m; i++) {
                if (s->slot[i] != NONE) memcpy(o + i * DIM, t->weights + (size_t)s->slot[i] * DIM, DIM * 4);
                else memset(o + i * DIM, 0, DIM * 4);
            }
        }
    }
}

/* Optimizers: a row's weights, its state, its gradient */

INLINE void rowwise_adagrad(float *w, float *a, const float *g, float rate, float epsilon) {
    float sum = 0;
    uint32_t k = 0;
#ifdef __AVX512F__
    __m512 squares = _mm512_setzero_ps();
    for (; k + 16 <= DIM; k += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(g + k), _mm512_loadu_ps(g + k), squares);
    sum = _mm512_reduce_add_ps(squares);
#endif
    for (; k < DIM; k++) sum += g[k] * g[k];
    *a += sum / (float)DIM;
    float step = rate / (sqrtf(*a) + epsilon);
    for (k = 0; k < DIM; k++) w[k] -= step * g[k];
}
INLINE void adagrad(float *restrict w, float *restrict a, const float *restrict g, float rate, float epsilon) {
    for (uint32_t k = 0; k < DIM; k++) {
        a[k] += g[k] * g[k];
        w[k] -= rate * g[k] / (sqrtf(a[k]) + epsilon);
    }
}

INLINE int64_t push(table *t, const uint64_t *keys, size_t n, const float *gradients, float rate, float epsilon,
                    const int linear) {
    stage stages[4];
    for (size_t c = 0; c < (n + STAGE - 1) / STAGE + 3; c++) {
        aim(t, keys + c * STAGE, LENGTH(c), &stages[c % 4], linear);
        if (c >= 1) look(t, keys + (c - 1) * STAGE, LENGTH(c - 1), &stages[(c - 1) % 4], 1, linear);
        if (c >= 2 && LENGTH(c - 2)) {
            stage *s = &stages[(c - 2) % 4];
            const uint64_t *k = keys + (c - 2) * STAGE;
            late(t, k, s, 1, linear);
            for (size_t m = 0; m < s->lates; m++) {
                size_t i = s->late[m];
                if (s->slot[i] == NONE) s->slot[i] = find(t, s->at[i], k[i], linear);
                if (s->slot[i] == NONE) s->slot[i] = enter(t, k[i]);
                if (s->slot[i] == NONE) return -1;
            }
        }
        if (c >= 3) {
            const stage *s = &stages[(c - 3) % 4];
            const float *g = gradients + (c - 3) * STAGE * DIM;
            for (size_t i = 0, m = LENGTH(c - 3); i < m; i++) {
                float *w = t->weights + (size_t)s->slot[i] * DIM, *a = t->state + s->slot[i] * COLUMNS;
                if (COLUMNS == 1) rowwise_adagrad(w, a, g + i * DIM, rate, epsilon);
                else adagrad(w, a, g + i * DIM, rate, epsilon);
            }
        }
    }
    return (int64_t)t->rows;
}

/* The raw limit: rows by slot, without a key or an index. */
void twin_gather(const table *t, const uint32_t *slots, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) ask(t, slots[i + AHEAD], 0);
        memcpy(out + i * DIM, t->weights + (size_t)slots[i] * DIM, DIM * 4);
    }
}

/* What is called */

void twin_pull(const table *t, const uint64_t *keys, size_t n, float *out) {
    if (t->linear) pull(t, keys, n, out, 1);
    else pull(t, keys, n, out, 0);
}
int64_t twin_push(table *t, const uint64_t *keys, size_t n, const float *gradients, float rate, float epsilon) {
    return t->linear ? push(t, keys, n, gradients, rate, epsilon, 1) : push(t, keys, n, gradients, rate, epsilon, 0);
}
/* Every page is made the table's own: a page that was only read is the zero page, which is always in the cache. */
void twin_touch(table *t) {
    for (size_t b = 0; b < t->weight_bytes; b += 4096) ((volatile char *)t->weights)[b] = 0;
    for (size_t b = 0; b < t->state_bytes; b += 4096) ((volatile char *)t->state)[b] = 0;
}
int64_t twin_build(table *t, const uint64_t *keys, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int linear = (int)t->linear;
        if (i + 16 < n) __builtin_prefetch(line(t, place(t, keys[i + 16], linear), linear), 1, 3);
        if (find(t, place(t, keys[i], linear), keys[i], linear) == NONE && enter(t, keys[i]) == NONE) return -1;
    }
    twin_touch(t);
    return (int64_t)t->rows;
}
void twin_slots(const table *t, const uint64_t *keys, size_t n, uint32_t *out) {
    for (size_t i = 0; i < n; i++) out[i] = find(t, place(t, keys[i], (int)t->linear), keys[i], (int)t->linear);
}
"""
