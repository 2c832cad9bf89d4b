#ifndef RKV_HASH_H
#define RKV_HASH_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define RKV_MULTIPLIER 0x9fb21c651e98df25ull
#define RKV_MIXER 0xd6e8feb86659fd93ull

static inline uint64_t rkv_leaf_mix(uint64_t x)
{
    x ^= x >> 32;
    x *= RKV_MIXER;
    x ^= x >> 32;
    x *= RKV_MIXER;
    return x ^ (x >> 32);
}

/* Hash of (parent node, first page) for the child table. Four lanes, so that a page of 16 tokens costs two dependent multiplications and
 * not eight. Keyed: who does not know the seed can't send pages that all fall into one place. Never leaves the process. */
static inline uint32_t rkv_leaf_child_hash(uint64_t seed, uint32_t parent, const int32_t *tokens, size_t page_size)
{
    uint64_t lane[4] = {seed ^ parent * 0x9e3779b97f4a7c15ull, seed * 0x8ebc6af09c88c6e3ull, ~seed * 0x589965cc75374cc3ull,
                        (seed >> 32 | seed << 32) * 0x1d8e4e27c47d124full};
    size_t i = 0;
    uint64_t word;
    for (; i + 8 <= page_size; i += 8) {
        for (int j = 0; j < 4; j++) {
            memcpy(&word, tokens + i + 2 * j, 8);
            lane[j] = (lane[j] ^ word) * RKV_MULTIPLIER;
            lane[j] ^= lane[j] >> 29;
        }
    }
    for (; i + 2 <= page_size; i += 2) {
        memcpy(&word, tokens + i, 8);
        lane[0] = (lane[0] ^ word) * RKV_MULTIPLIER;
        lane[0] ^= lane[0] >> 29;
    }
    if (i < page_size) {
        lane[1] = (lane[1] ^ (uint32_t)tokens[i]) * RKV_MULTIPLIER;
    }
    lane[0] = (lane[0] ^ lane[1]) * RKV_MIXER;
    lane[2] = (lane[2] ^ lane[3]) * RKV_MULTIPLIER;
    return (uint32_t)(rkv_leaf_mix(lane[0] + (lane[2] ^ (lane[2] >> 31))) >> 16);
}

/* The default page digest: one 64-bit chain, specified in radixkv/tree/base.py (page_digests). */
static inline uint64_t rkv_leaf_namespace_seed(const uint8_t *bytes, size_t n)
{
    uint64_t h = 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ bytes[i]) * 0x100000001b3ull;
    }
    return rkv_leaf_mix(h);
}

static inline uint64_t rkv_leaf_page_chain(uint64_t parent, const int32_t *tokens, size_t page_size)
{
    uint64_t h = parent;
    for (size_t i = 0; i < page_size; i += 2) {
        uint64_t low = (uint32_t)tokens[i];
        uint64_t high = i + 1 < page_size ? (uint32_t)tokens[i + 1] : 0;
        h = (h ^ (low | high << 32)) * RKV_MULTIPLIER;
        h ^= h >> 29;
    }
    return rkv_leaf_mix(h);
}

static inline void rkv_leaf_store_be64(uint8_t *out, uint64_t x)
{
    x = __builtin_bswap64(x);
    memcpy(out, &x, 8);
}

static inline uint64_t rkv_leaf_load_be64(const uint8_t *in)
{
    uint64_t x;
    memcpy(&x, in, 8);
    return __builtin_bswap64(x);
}

#endif
