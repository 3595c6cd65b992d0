/* What the guest's programs share: CRC-32, little-endian numbers, full writes, a clock. No state. */
#ifndef COMMON_H
#define COMMON_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* CRC-32 as in IEEE 802.3 (the one of zlib), bit by bit into a table on first use. */
static inline uint32_t crc32(const unsigned char *data, size_t length)
{
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++)
                c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            table[i] = c;
        }
    uint32_t crc = ~0u;
    while (length--)
        crc = table[(crc ^ *data++) & 255] ^ (crc >> 8);
    return ~crc;
}

static inline uint64_t get64(const unsigned char *at)
{
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | at[i];
    return value;
}

static inline void put64(unsigned char *at, uint64_t value)
{
    for (int i = 0; i < 8; i++, value >>= 8)
        at[i] = value & 255;
}

/* splitmix64: contents that neither compress nor repeat, from a number alone. */
static inline uint64_t mix(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline void write_at(int fd, const unsigned char *data, size_t length, off_t offset, const char *what)
{
    while (length) {
        ssize_t done = pwrite(fd, data, length, offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            die(what);
        data += done;
        length -= done;
        offset += done;
    }
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static inline void sleep_until_ns(uint64_t when)
{
    struct timespec t = {.tv_sec = when / 1000000000u, .tv_nsec = when % 1000000000u};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

#endif
