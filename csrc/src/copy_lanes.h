/* One streaming copier, included by copy.c for each instruction set with
 *   LANES_NAME(x)  the function's name          LANES_TARGET   its target attribute
 *   LANES_VECTOR   the type of one register     LANES_LOAD(p)  LANES_STREAM(p, v)  LANES_WIDTH its bytes
 * No include guard on purpose. */

/* One cache line, dst on a 64-byte boundary. */
LANES_TARGET static inline void LANES_NAME(line)(char *dst, const char *src)
{
    LANES_VECTOR v[64 / LANES_WIDTH];
    for (int i = 0; i < 64 / LANES_WIDTH; i++) {
        v[i] = LANES_LOAD(src + i * LANES_WIDTH);
    }
    for (int i = 0; i < 64 / LANES_WIDTH; i++) {
        LANES_STREAM(dst + i * LANES_WIDTH, v[i]);
    }
}

/* Copy runs[0 .. num) and prefetch those ``ahead`` of each, up to runs[known). */
LANES_TARGET static void LANES_NAME(stream)(const struct run *runs, size_t num, size_t known, size_t ahead)
{
    for (size_t i = 0; i < num; i++) {
        if (i + ahead < known) {
            prefetch_run(&runs[i + ahead]);
        }
        const char *src = runs[i].src;
        char *dst = runs[i].dst;
        size_t left = runs[i].bytes;
        size_t head = (size_t)(-(uintptr_t)dst & 63);
        if (head) {
            head = head < left ? head : left;
            memcpy(dst, src, head);
            dst += head, src += head, left -= head;
        }
        for (; left >= 256; left -= 256, src += 256, dst += 256) {
            LANES_NAME(line)(dst, src);
            LANES_NAME(line)(dst + 64, src + 64);
            LANES_NAME(line)(dst + 128, src + 128);
            LANES_NAME(line)(dst + 192, src + 192);
        }
        for (; left >= 64; left -= 64, src += 64, dst += 64) {
            LANES_NAME(line)(dst, src);
        }
        if (left) {
            memcpy(dst, src, left);
        }
    }
}

#undef LANES_NAME
#undef LANES_TARGET
#undef LANES_VECTOR
#undef LANES_LOAD
#undef LANES_STREAM
#undef LANES_WIDTH
