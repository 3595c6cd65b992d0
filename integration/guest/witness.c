/*
 * The witness: a process that knows what both disks must hold, and goes on looking. It lives through a failover in the
 * VM's memory, and so it is itself the proof that memory and both disks are of one checkpoint.
 *
 *   witness DISK0 DISK1 OUTPUT [RATE [MIB]]   RATE records a second at most (0: as fast as it goes), MIB of table
 *
 * OUTPUT is a character device, such as a virtio port, or - for standard output. It gets lines, each in one write:
 *   S <boot id> <run>     first of all: the kernel's boot id, and a number that no other run of the witness has
 *   W <number> <crc>      record <number> is on both disks; <crc> follows from the run and all records so far, so that
 *                         a record has the same one on whichever host it is printed
 *   FAULT <text>          something is not as it must be; nothing follows. Standard error gets it too
 *
 * In memory are the last record's number, a copy of the ring that each disk must hold, and a table. For every record:
 *   1. both rings are read, with O_DIRECT, and compared whole with the copies: a disk that is behind, ahead, of another
 *      run, or in part one checkpoint and in part another, differs in at least one slot;
 *   2. pages of the table are compared with what they must hold: the newest, the oldest and some in turn, all of them
 *      within PAGES / IN_TURN records; memory that is in part another checkpoint's shows there;
 *   3. the table's oldest page is written anew;
 *   4. the record goes to its slot on DISK0, and when that is done, to DISK1;
 *   5. its line is printed.
 *
 * The ring is a disk's first SLOTS * RECORD bytes; record n is in slot (n - 1) modulo SLOTS, as page n modulo PAGES is
 * the table's. The rings are zeroed at the start. Nothing is flushed: what matters is what the VM's disk holds, not what
 * a power failure would leave of it. A record:
 *   0     8     magic "WITNESS1"
 *   8     8     its number, from 1
 *   16    8     the run
 *   24    8     0 or 1, the disk
 *   32    4056  contents that follow from number, run and disk
 *   4088  8     CRC-32 of the 4,088 bytes before
 * All numbers are little-endian.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <stdalign.h>
#include <stdarg.h>

enum { RECORD = 4096, SLOTS = 64, PAGE = 4096, IN_TURN = 16, DISKS = 2 };

static const char MAGIC[8] = {'W', 'I', 'T', 'N', 'E', 'S', 'S', '1'};

static struct {
    const char *name;
    int fd;
    unsigned char ring[SLOTS][RECORD];
} disks[DISKS];
static alignas(RECORD) unsigned char buffer[SLOTS][RECORD];
static unsigned char *table;
static uint64_t pages, run, number;
static int output;

static __attribute__((format(printf, 1, 2))) void print(const char *format, ...)
{
    char line[256];
    va_list words;
    va_start(words, format);
    int length = vsnprintf(line, sizeof line, format, words);
    va_end(words);
    if (write(output, line, length) != length)
        die("output");
}

static __attribute__((format(printf, 1, 2), noreturn)) void fault(const char *format, ...)
{
    char text[200];
    va_list words;
    va_start(words, format);
    vsnprintf(text, sizeof text, format, words);
    va_end(words);
    fprintf(stderr, "FAULT %s\n", text);
    print("FAULT %s\n", text);
    exit(1);
}

/* ---- what must be where ---- */

static void fill(unsigned char *at, size_t length, uint64_t salt, uint64_t of)
{
    uint64_t state = run ^ salt << 56 ^ of << 20;
    for (size_t i = 0; i < length; i += 8)
        put64(at + i, mix(&state));
}

static void compose(unsigned char *record, uint64_t of, uint64_t disk)
{
    memcpy(record, MAGIC, 8);
    put64(record + 8, of);
    put64(record + 16, run);
    put64(record + 24, disk);
    fill(record + 32, RECORD - 40, disk, of);
    put64(record + RECORD - 8, crc32(record, RECORD - 8));
}

/* The newest n <= number that belongs on this page, 0 for none. */
static uint64_t due_on(uint64_t page)
{
    return page > number ? 0 : number - (number - page) % pages;
}

static void compose_page(unsigned char *page, uint64_t of)
{
    if (of)
        fill(page, PAGE, DISKS, of);
    else
        memset(page, 0, PAGE);
}

/* ---- looking ---- */

static void look_at_disk(int which)
{
    ssize_t got = pread(disks[which].fd, buffer, sizeof buffer, 0);
    if (got != sizeof buffer)
        fault("disk %d cannot be read: %s", which, got < 0 ? strerror(errno) : "too short");
    if (memcmp(buffer, disks[which].ring, sizeof buffer) == 0)
        return;
    for (int slot = 0; slot < SLOTS; slot++) {
        const unsigned char *found = buffer[slot], *due = disks[which].ring[slot];
        if (memcmp(found, due, RECORD) == 0)
            continue;
        uint64_t has = get64(found + 8), must = get64(due + 8);
        const char *how = "damaged";
        if (memcmp(found, MAGIC, 8) == 0 && get64(found + 16) != run)
            how = "of another run";
        else if (get64(found + RECORD - 8) == crc32(found, RECORD - 8) || has == 0)
            how = has < must ? "behind memory" : has > must ? "ahead of memory" : "damaged";
        fault("disk %d is %s: slot %d has record %llu and must have %llu, the last one being %llu", which, how, slot,
              (unsigned long long)has, (unsigned long long)must, (unsigned long long)number);
    }
}

static void look_at_page(uint64_t page)
{
    static unsigned char must[PAGE];
    compose_page(must, due_on(page));
    if (memcmp(table + page * PAGE, must, PAGE))
        fault("memory: page %llu of the table does not hold what record %llu made of it, the last one being %llu",
              (unsigned long long)page, (unsigned long long)due_on(page), (unsigned long long)number);
}

static void look_at_table(void)
{
    static uint64_t next;
    look_at_page(number % pages);
    look_at_page((number + 1) % pages);
    for (int i = 0; i < IN_TURN; i++, next = (next + 1) % pages)
        look_at_page(next);
}

/* ---- the work ---- */

static void write_record(int which)
{
    int slot = (number - 1) % SLOTS;
    unsigned char *copy = disks[which].ring[slot];
    compose(copy, number, which);
    memcpy(buffer[0], copy, RECORD);
    ssize_t done = pwrite(disks[which].fd, buffer[0], RECORD, (off_t)slot * RECORD);
    if (done != RECORD)
        fault("disk %d cannot be written: %s", which, done < 0 ? strerror(errno) : "too short");
}

static void start(char **words, uint64_t mib)
{
    char boot[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!file || !fgets(boot, sizeof boot, file))
        die("boot id");
    fclose(file);
    int random = open("/dev/urandom", O_RDONLY);
    if (random < 0 || read(random, &run, sizeof run) != sizeof run)
        die("/dev/urandom");
    close(random);

    output = strcmp(words[2], "-") ? open(words[2], O_WRONLY) : 1;
    if (output < 0)
        die(words[2]);
    for (int which = 0; which < DISKS; which++) {
        disks[which].name = words[which];
        disks[which].fd = open(words[which], O_RDWR | O_DIRECT);
        if (disks[which].fd < 0)
            die(words[which]);
        write_at(disks[which].fd, buffer[0], sizeof buffer, 0, words[which]);
    }
    pages = mib * (1 << 20) / PAGE;
    table = aligned_alloc(PAGE, pages * PAGE);
    if (!table)
        die("table");
    memset(table, 0, pages * PAGE);
    print("S %.*s %016llx\n", (int)strcspn(boot, "\n"), boot, (unsigned long long)run);
}

int main(int count, char **words)
{
    uint64_t mib = count > 5 ? strtoull(words[5], NULL, 10) : 4;
    if (count < 4 || count > 6 || mib < 1 || mib > 1024) {
        fprintf(stderr, "usage: witness DISK0 DISK1 OUTPUT [RATE [MIB]]\n");
        return 2;
    }
    start(words + 1, mib);
    double rate = count > 4 ? atof(words[4]) : 0;
    uint64_t due = now_ns(), gap = rate > 0 ? (uint64_t)(1e9 / rate) : 0;
    uint32_t chain = 0;
    for (;;) {
        look_at_disk(0);
        look_at_disk(1);
        look_at_table();
        number++;
        unsigned char *page = table + number % pages * PAGE;
        compose_page(page, number);
        write_record(0);
        write_record(1);

        unsigned char link[16];
        put64(link, chain);
        put64(link + 8, crc32(page, PAGE));
        chain = crc32(link, sizeof link);
        print("W %llu %08x\n", (unsigned long long)number, chain);
        /* a VM that was slow or paused for a while does not catch up in a burst */
        due = due + gap < now_ns() ? now_ns() : due + gap;
        if (gap)
            sleep_until_ns(due);
    }
}
