/*
 * Load on the guest's disks, until it is killed or COUNT operations are done (0: for ever).
 *
 *   load blocks DEVICE FROM SIZE RATE COUNT SEED   random operations within SIZE bytes at FROM of a whole disk, O_DIRECT:
 *                                                  writes of 512 bytes to 64 KiB, on 512-byte boundaries; discards
 *                                                  (BLKDISCARD); zero writes (BLKZEROOUT); and in the region's first
 *                                                  eighth a sequential witness, 4 KiB after 4 KiB, round and round
 *   load files DIRECTORY RATE COUNT SEED           files created, overwritten, appended to, truncated, renamed and
 *                                                  removed in a few directories: what a file system's journal has to bear
 *
 * RATE is operations a second at most (0: as fast as it goes). Equal seeds give equal operations. Prints "L <n>" every 256
 * operations.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdalign.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

enum { SECTOR = 512, LARGEST = 65536, WITNESS = 4096 };

static alignas(4096) unsigned char buffer[LARGEST];
static uint64_t seed;

static uint64_t below(uint64_t limit)
{
    return limit ? mix(&seed) % limit : 0;
}

static void fill(size_t length)
{
    for (size_t at = 0; at < length; at += 8)
        put64(buffer + at, mix(&seed));
}

/* ---- blocks ---- */

static int device;
static uint64_t from, size;

static void range_ioctl(unsigned long request, uint64_t offset, uint64_t length, const char *what)
{
    uint64_t range[2] = {offset, length};
    if (ioctl(device, request, range) && errno != EOPNOTSUPP)
        die(what);
}

static void block_operation(uint64_t number)
{
    uint64_t witness = size / 8 / WITNESS * WITNESS;
    uint64_t what = below(16);
    if (what < 4 && witness) {
        fill(WITNESS);
        put64(buffer, number);
        static uint64_t next;
        write_at(device, buffer, WITNESS, from + next, "witness");
        next = (next + WITNESS) % witness;
        return;
    }
    uint64_t length = (below(LARGEST / SECTOR) + 1) * SECTOR;
    if (below(2))
        length = (below(16) + 1) * SECTOR;
    uint64_t room = size - witness - length;
    uint64_t offset = from + witness + below(room / SECTOR + 1) * SECTOR;
    if (what == 4)
        range_ioctl(BLKDISCARD, offset, length, "discard");
    else if (what == 5)
        range_ioctl(BLKZEROOUT, offset, length, "zero");
    else {
        fill(length);
        put64(buffer, number);
        write_at(device, buffer, length, offset, "write");
    }
}

/* ---- files ---- */

static const char *directory;

static void path_of(char *path, size_t room, uint64_t number)
{
    snprintf(path, room, "%s/d%llu/f%llu", directory, (unsigned long long)(number % 4), (unsigned long long)number);
}

static void file_operation(uint64_t number)
{
    (void)number;
    char path[4096], other[4096];
    path_of(path, sizeof path, below(64));
    path_of(other, sizeof other, below(64));
    switch (below(8)) {
    case 0:
        if (unlink(path) && errno != ENOENT)
            die(path);
        return;
    case 1:
        if (rename(path, other) && errno != ENOENT)
            die(path);
        return;
    case 2:
        if (truncate(path, below(LARGEST)) && errno != ENOENT)
            die(path);
        return;
    default:
        break;
    }
    int fd = open(path, O_WRONLY | O_CREAT, 0644);
    if (fd < 0)
        die(path);
    size_t length = below(LARGEST) & ~7u;
    fill(length);
    write_at(fd, buffer, length, below(4 * LARGEST), path);
    if (below(4) == 0 && fsync(fd))
        die("fsync");
    close(fd);
}

static void run(void (*operation)(uint64_t), double rate, uint64_t count)
{
    uint64_t due = now_ns(), gap = rate > 0 ? (uint64_t)(1e9 / rate) : 0;
    for (uint64_t number = 1; count == 0 || number <= count; number++) {
        operation(number);
        if (number % 256 == 0 || number == count) {
            printf("L %llu\n", (unsigned long long)number);
            fflush(stdout);
        }
        due = due + gap < now_ns() ? now_ns() : due + gap;
        if (gap)
            sleep_until_ns(due);
    }
}

int main(int count, char **words)
{
    if (count == 8 && strcmp(words[1], "blocks") == 0) {
        device = open(words[2], O_RDWR | O_DIRECT);
        if (device < 0)
            die(words[2]);
        from = strtoull(words[3], NULL, 0);
        size = strtoull(words[4], NULL, 0);
        if (from % SECTOR || size % SECTOR || size < 4 * LARGEST) {
            fprintf(stderr, "FROM and SIZE must be multiples of %d, SIZE at least %d\n", SECTOR, 4 * LARGEST);
            return 2;
        }
        seed = strtoull(words[7], NULL, 0);
        run(block_operation, atof(words[5]), strtoull(words[6], NULL, 0));
        return 0;
    }
    if (count == 6 && strcmp(words[1], "files") == 0) {
        directory = words[2];
        for (int i = 0; i < 4; i++) {
            char path[4096];
            snprintf(path, sizeof path, "%s/d%d", directory, i);
            if (mkdir(path, 0755) && errno != EEXIST)
                die(path);
        }
        seed = strtoull(words[5], NULL, 0);
        run(file_operation, atof(words[3]), strtoull(words[4], NULL, 0));
        return 0;
    }
    fprintf(stderr, "usage: load blocks DEVICE FROM SIZE RATE COUNT SEED | load files DIRECTORY RATE COUNT SEED\n");
    return 2;
}
