/* The machine's own limit: the bytes that a prefix tree must compare and copy, and nothing else.
 *
 * A request's hit is a list of segments (offset in the token arena, pages); its new pages go to the end of the arena.
 * match  = memcmp of every hit segment + memcpy of the hit's page ids to the caller
 * insert = memcpy of the new tokens and page ids to the arenas
 * No look-up, no node, no eviction order, no call from Python: no tree can be faster on the same memory.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Run n requests. Segments of request r: first_segment[r] .. first_segment[r + 1]; each compares seg_pages pages of the request with
 * the arena from page seg_start on. Pages after the hit are appended at arena page tail_start[r].
 * match_ns, insert_ns: n entries out. Returns the number of segments that differed (0 if the caller's bookkeeping is right). */
int64_t floor_run(int64_t n, int64_t page_size, const int32_t **tokens, const int64_t *num_pages, const int64_t *first_segment,
                  const int64_t *seg_start, const int64_t *seg_pages, const int64_t *tail_start, int32_t *arena, int32_t *arena_ids,
                  const int32_t *ids_in, int32_t *ids_out, int64_t *match_ns, int64_t *insert_ns)
{
    int64_t differing = 0;
    for (int64_t r = 0; r < n; r++) {
        int64_t t0 = now_ns(), page = 0;
        for (int64_t s = first_segment[r]; s < first_segment[r + 1]; s++) {
            size_t bytes = (size_t)(seg_pages[s] * page_size) * sizeof(int32_t);
            differing += memcmp(tokens[r] + page * page_size, arena + seg_start[s] * page_size, bytes) != 0;
            memcpy(ids_out + page, arena_ids + seg_start[s], (size_t)seg_pages[s] * sizeof(int32_t));
            page += seg_pages[s];
        }
        int64_t t1 = now_ns(), tail = num_pages[r] - page;
        memcpy(arena + tail_start[r] * page_size, tokens[r] + page * page_size, (size_t)(tail * page_size) * sizeof(int32_t));
        memcpy(arena_ids + tail_start[r], ids_in + page, (size_t)tail * sizeof(int32_t));
        int64_t t2 = now_ns();
        match_ns[r] = t1 - t0;
        insert_ns[r] = t2 - t1;
    }
    return differing;
}

/* Mean ns of one memcmp (equal contents) or memcpy of ``bytes``, over ``count`` places ``stride`` bytes apart in a and b:
 * count 1 is hot, a stride that walks beyond the last-level cache is cold. */
double floor_memcmp_ns(const char *a, const char *b, int64_t bytes, int64_t stride, int64_t count, int64_t repeats)
{
    volatile int sink = 0;
    int64_t t0 = now_ns();
    for (int64_t i = 0; i < repeats; i++)
        for (int64_t j = 0; j < count; j++) {
            sink += memcmp(a + j * stride, b + j * stride, (size_t)bytes);
            __asm__ volatile("" ::: "memory");
        }
    return (double)(now_ns() - t0) / (double)(repeats * count);
}

double floor_memcpy_ns(char *a, const char *b, int64_t bytes, int64_t stride, int64_t count, int64_t repeats)
{
    int64_t t0 = now_ns();
    for (int64_t i = 0; i < repeats; i++)
        for (int64_t j = 0; j < count; j++) {
            memcpy(a + j * stride, b + j * stride, (size_t)bytes);
            __asm__ volatile("" ::: "memory");
        }
    return (double)(now_ns() - t0) / (double)(repeats * count);
}
