/*
 * The ledger: numbered, checksummed records, each written to two places on two disks, one strictly after the other.
 *
 *   ledger write FILE DEVICE [RATE [LIMIT]]   append records, RATE a second at most (0: as fast as it goes), LIMIT in
 *                                             all (0: for ever), going on behind the last one; prints "R <n>" when
 *                                             record n is durable in both places
 *   ledger check FILE DEVICE                  print one line of JSON; exit 0 only if all of this holds:
 *       - FILE is whole records 1, 2, ..., F, each with its own number and a good checksum, and nothing else;
 *       - the slots of DEVICE hold, of the records 1 ... S, exactly the last SLOTS ones, each in its place;
 *       - F == S or F == S + 1.
 *
 * FILE lies on a file system on the first disk; DEVICE is the second disk itself. Record n goes to FILE, then fsync; only
 * then to DEVICE, slot (n - 1) modulo SLOTS, with O_DIRECT and fdatasync. So at every instant of one machine F is S or
 * S + 1: images that are of two instants differ by more as soon as two records lie between them, in one direction or the
 * other.
 *
 * A record is RECORD bytes, in both places the same:
 *   0     8     magic "LEDGER01"
 *   8     8     its number, from 1
 *   16    8     time of writing, CLOCK_MONOTONIC of the guest, nanoseconds
 *   24    4064  contents that follow from number and time
 *   4088  8     CRC-32 of the 4,088 bytes before
 * It is a file-system block, and the file too is written with O_DIRECT: a whole record reaches the disk in one write, and
 * ext4 makes the file longer only after it. (Through the page cache the file could, for an instant before the fsync, be
 * longer than its data.) So a torn record is always a fault. All numbers are little-endian.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <stdalign.h>

enum { RECORD = 4096, SLOTS = 512 };

static const char MAGIC[8] = {'L', 'E', 'D', 'G', 'E', 'R', '0', '1'};
static alignas(RECORD) unsigned char record[RECORD];

static void compose(uint64_t number, uint64_t time)
{
    uint64_t state = number ^ time << 20;
    memcpy(record, MAGIC, 8);
    put64(record + 8, number);
    put64(record + 16, time);
    for (int at = 24; at < RECORD - 8; at += 8)
        put64(record + at, mix(&state));
    put64(record + RECORD - 8, crc32(record, RECORD - 8));
}

enum verdict { EMPTY, TORN, GOOD };

static enum verdict judge(uint64_t *number)
{
    *number = get64(record + 8);
    if (memcmp(record, MAGIC, 8) == 0 && get64(record + RECORD - 8) == crc32(record, RECORD - 8))
        return GOOD;
    for (int i = 0; i < RECORD; i++)
        if (record[i])
            return TORN;
    return EMPTY;
}

static int fetch(int fd, off_t offset)
{
    ssize_t got = pread(fd, record, RECORD, offset);
    if (got < 0)
        die("read");
    if (got < RECORD)
        memset(record + got, 0, RECORD - got);
    return got;
}

/* ---- check ---- */

static int faults;

static void fault(const char *what, uint64_t where, uint64_t found)
{
    if (faults++ < 8)
        printf("%s\"%s at %llu (found %llu)\"", faults > 1 ? ", " : "", what, (unsigned long long)where,
               (unsigned long long)found);
}

static int check(const char *file, const char *device)
{
    int on_file = open(file, O_RDONLY);
    int on_device = open(device, O_RDONLY);
    if (on_file < 0)
        die(file);
    if (on_device < 0)
        die(device);

    printf("{\"faults\": [");
    uint64_t in_file = 0, number = 0;
    for (;;) {
        int got = fetch(on_file, (off_t)in_file * RECORD);
        if (got == 0)
            break;
        if (got < RECORD)
            fault("file: part of a record", in_file + 1, got);
        else if (judge(&number) != GOOD)
            fault("file: torn record", in_file + 1, number);
        else if (number != in_file + 1)
            fault("file: gap", in_file + 1, number);
        in_file++;
    }

    uint64_t found[SLOTS], in_slots = 0;
    for (int slot = 0; slot < SLOTS; slot++) {
        fetch(on_device, (off_t)slot * RECORD);
        found[slot] = 0;
        switch (judge(&number)) {
        case GOOD:
            found[slot] = number;
            break;
        case TORN:
            fault("slots: torn record", slot, number);
            break;
        case EMPTY:
            break;
        }
        if (found[slot] > in_slots)
            in_slots = found[slot];
    }
    for (int slot = 0; slot < SLOTS; slot++) {
        /* the greatest n <= in_slots with (n - 1) % SLOTS == slot, or 0 */
        uint64_t round = in_slots > (uint64_t)slot ? (in_slots - slot - 1) / SLOTS : 0;
        uint64_t due = in_slots > (uint64_t)slot ? round * SLOTS + slot + 1 : 0;
        if (found[slot] != due)
            fault("slots: gap", slot, found[slot]);
    }
    if (in_file != in_slots && in_file != in_slots + 1)
        fault("file and slots are not of one instant: slots have", in_slots, in_file);
    printf("], \"file\": %llu, \"slots\": %llu, \"ok\": %s}\n", (unsigned long long)in_file,
           (unsigned long long)in_slots, faults ? "false" : "true");
    return faults ? 1 : 0;
}

/* ---- write ---- */

static int keep_writing(const char *file, const char *device, double rate, uint64_t limit)
{
    int on_file = open(file, O_RDWR | O_CREAT | O_DIRECT, 0644);
    int on_device = open(device, O_WRONLY | O_DIRECT);
    if (on_file < 0)
        die(file);
    if (on_device < 0)
        die(device);
    off_t end = lseek(on_file, 0, SEEK_END);
    if (end % RECORD) {
        fprintf(stderr, "%s ends inside a record: check it first\n", file);
        return 1;
    }

    uint64_t first = end / RECORD + 1, due = now_ns();
    uint64_t gap = rate > 0 ? (uint64_t)(1e9 / rate) : 0;
    for (uint64_t number = first; limit == 0 || number < first + limit; number++) {
        compose(number, now_ns());
        write_at(on_file, record, RECORD, (off_t)(number - 1) * RECORD, file);
        if (fsync(on_file))
            die("fsync");
        write_at(on_device, record, RECORD, (off_t)((number - 1) % SLOTS) * RECORD, device);
        if (fdatasync(on_device))
            die("fdatasync");
        printf("R %llu\n", (unsigned long long)number);
        fflush(stdout);
        /* a VM that was slow or paused for a while does not catch up in a burst */
        due = due + gap < now_ns() ? now_ns() : due + gap;
        if (gap)
            sleep_until_ns(due);
    }
    return 0;
}

int main(int count, char **words)
{
    if (count == 4 && strcmp(words[1], "check") == 0)
        return check(words[2], words[3]);
    if (count >= 4 && count <= 6 && strcmp(words[1], "write") == 0)
        return keep_writing(words[2], words[3], count > 4 ? atof(words[4]) : 0, count > 5 ? strtoull(words[5], NULL, 10) : 0);
    fprintf(stderr, "usage: ledger write FILE DEVICE [RATE [LIMIT]] | ledger check FILE DEVICE\n");
    return 2;
}
