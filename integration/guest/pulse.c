/*
 * The pulse: what a program in the guest notices of its disk. Writes, errors and stalls, counted and told as they go.
 *
 *   pulse DEVICE FROM SIZE RATE SEED   write 4 KiB at a time, one after the other, at random within SIZE bytes at FROM of a
 *                                      whole disk (O_DIRECT, both multiples of 4096), RATE a second at most (0: as fast as
 *                                      it goes); every 16th write is followed by fdatasync, every 8th is read back. Goes on
 *                                      after an error, until it is killed.
 *
 * Prints "P <writes> <errors> <longest>" every 16 writes and after every error: so many since the start, failed reads and
 * flushes among the errors, and the longest single operation since the line before, in microseconds of the guest's clock.
 * That clock stands still while the VM is stopped; the host sees those times by when the lines come.
 * Contents that are not what was written are an error too.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <stdalign.h>

enum { BLOCK = 4096, TOLD = 16, READ_BACK = 8 };

static alignas(BLOCK) unsigned char written[BLOCK], found[BLOCK];
static uint64_t writes, errors, longest;

static void timed(uint64_t since, int ok)
{
    uint64_t took = (now_ns() - since) / 1000;
    if (took > longest)
        longest = took;
    errors += !ok;
}

static void tell(void)
{
    printf("P %llu %llu %llu\n", (unsigned long long)writes, (unsigned long long)errors, (unsigned long long)longest);
    fflush(stdout);
    longest = 0;
}

static void beat(int device, uint64_t offset, uint64_t *seed)
{
    uint64_t before = errors;
    for (int at = 0; at < BLOCK; at += 8)
        put64(written + at, mix(seed));
    writes++;
    uint64_t start = now_ns();
    timed(start, pwrite(device, written, BLOCK, offset) == BLOCK);
    if (writes % READ_BACK == 0 && errors == before) {
        start = now_ns();
        timed(start, pread(device, found, BLOCK, offset) == BLOCK && memcmp(found, written, BLOCK) == 0);
    }
    if (writes % TOLD == 0) {
        start = now_ns();
        timed(start, fdatasync(device) == 0);
    }
    if (writes % TOLD == 0 || errors != before)
        tell();
}

int main(int count, char **words)
{
    if (count != 6) {
        fprintf(stderr, "usage: pulse DEVICE FROM SIZE RATE SEED\n");
        return 2;
    }
    int device = open(words[1], O_RDWR | O_DIRECT);
    if (device < 0)
        die(words[1]);
    uint64_t from = strtoull(words[2], NULL, 0), blocks = strtoull(words[3], NULL, 0) / BLOCK;
    double rate = atof(words[4]);
    uint64_t seed = strtoull(words[5], NULL, 0), due = now_ns(), gap = rate > 0 ? (uint64_t)(1e9 / rate) : 0;
    if (from % BLOCK || !blocks) {
        fprintf(stderr, "FROM and SIZE must be multiples of %d\n", BLOCK);
        return 2;
    }
    for (;;) {
        beat(device, from + mix(&seed) % blocks * BLOCK, &seed);
        /* what was missed while an operation took long is not made up for */
        due = due + gap < now_ns() ? now_ns() : due + gap;
        if (gap)
            sleep_until_ns(due);
    }
}
