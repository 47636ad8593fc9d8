"""The allocator replay of :mod:`rankfit.estimator.allocator` in C, for large fleets."""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Array = NDArray[np.int64]
_POINTER = ctypes.POINTER(ctypes.c_int64)

_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int64_t i64;
enum { ROUND = 512, MIB = 1 << 20 };
typedef int32_t i32;
typedef struct { i64 address, size; i32 prev, next, free, small; } Block;
/* Free blocks of one size, the lowest address last. */
typedef struct { i64 size; i32 count, room, *at; } Bin;
/* Bins by size. Those beyond count are empty and keep their room. */
typedef struct { Bin *bins; i32 count, room; } Pool;
typedef struct {
    i64 cap, reserved, allocated, peak_reserved, peak_allocated, top, refused;
    i32 count, spare, starved;
    Block *blocks;
    Pool pools[2];
} State;

/* First bin of at least a size; there are few. */
static inline i32 find(const Pool *pool, i64 size) {
    i32 place = 0;
    while (place < pool->count && pool->bins[place].size < size) place++;
    return place;
}
/* First place in a bin whose address is below; addresses fall. */
static inline i32 seek(const State *s, const Bin *bin, i64 address) {
    i32 place = bin->count;
    while (place > 0 && s->blocks[bin->at[place - 1]].address < address) place--;
    return place;
}
static void close_bin(Pool *pool, i32 place) {
    Bin empty = pool->bins[place];
    for (i32 i = place; i < pool->count - 1; i++) pool->bins[i] = pool->bins[i + 1];
    pool->bins[--pool->count] = empty;
}
static Bin *open_bin(State *s, Pool *pool, i32 place, i64 size) {
    if (pool->count == pool->room) {
        i32 room = pool->room ? 2 * pool->room : 64;
        Bin *bins = realloc(pool->bins, room * sizeof(Bin));
        if (!bins) { s->starved = 1; return 0; }
        memset(bins + pool->room, 0, (room - pool->room) * sizeof(Bin));
        pool->bins = bins;
        pool->room = room;
    }
    Bin empty = pool->bins[pool->count];
    for (i32 i = pool->count; i > place; i--) pool->bins[i] = pool->bins[i - 1];
    empty.size = size;
    empty.count = 0;
    pool->bins[place] = empty;
    pool->count++;
    return pool->bins + place;
}
static void put(State *s, i32 block) {
    Block *b = s->blocks + block;
    Pool *pool = s->pools + b->small;
    i32 place = find(pool, b->size);
    Bin *bin = pool->bins + place;
    if (place == pool->count || bin->size != b->size) bin = open_bin(s, pool, place, b->size);
    if (!bin) return;
    if (bin->count == bin->room) {
        i32 room = bin->room ? 2 * bin->room : 16;
        i32 *at = realloc(bin->at, room * sizeof(i32));
        if (!at) { s->starved = 1; return; }
        bin->at = at;
        bin->room = room;
    }
    i32 where = seek(s, bin, b->address);
    for (i32 i = bin->count; i > where; i--) bin->at[i] = bin->at[i - 1];
    bin->at[where] = block;
    bin->count++;
}
static void take(State *s, i32 block) {
    Block *b = s->blocks + block;
    Pool *pool = s->pools + b->small;
    i32 place = find(pool, b->size);
    Bin *bin = pool->bins + place;
    i32 where = seek(s, bin, b->address) - 1;
    for (i32 i = where; i < bin->count - 1; i++) bin->at[i] = bin->at[i + 1];
    if (!--bin->count) close_bin(pool, place);
}
/* Blocks that are no more are used again, linked by next: what is touched stays in the cache. */
static i32 make(State *s, i64 address, i64 size, i32 small) {
    i32 block = s->spare;
    if (block >= 0) s->spare = s->blocks[block].next;
    else block = s->count++;
    s->blocks[block] = (Block){address, size, -1, -1, 1, small};
    return block;
}
static void unmake(State *s, i32 block) {
    s->blocks[block].next = s->spare;
    s->spare = block;
}
/* Whether a segment fits under the cap; the least total that did not is kept. */
static int fits(State *s, i64 need) {
    i64 total = s->reserved + need;
    if (!s->cap || total <= s->cap) return 1;
    if (!s->refused || total < s->refused) s->refused = total;
    return 0;
}
static void give_back(State *s) {
    for (int kind = 0; kind < 2; kind++) {
        Pool *pool = s->pools + kind;
        for (i32 place = pool->count - 1; place >= 0; place--) {
            Bin *bin = pool->bins + place;
            i32 kept = 0;
            for (i32 i = 0; i < bin->count; i++) {
                Block *b = s->blocks + bin->at[i];
                if (b->prev < 0 && b->next < 0) {
                    s->reserved -= b->size;
                    unmake(s, bin->at[i]);
                } else bin->at[kept++] = bin->at[i];
            }
            bin->count = kept;
            if (!kept) close_bin(pool, place);
        }
    }
}
static i32 segment(State *s, i64 size) {
    i64 need = size <= MIB ? 2 * MIB
             : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if (!fits(s, need)) {
        give_back(s);
        if (!fits(s, need)) return -1;
    }
    i32 block = make(s, s->top, need, size <= MIB);
    s->top += need;
    s->reserved += need;
    if (s->reserved > s->peak_reserved) s->peak_reserved = s->reserved;
    return block;
}
static i32 allocate(State *s, i64 nbytes) {
    i64 size = (nbytes + ROUND - 1) / ROUND * ROUND;
    i32 small = size <= MIB, block;
    Pool *pool = s->pools + small;
    i32 place = find(pool, size);
    if (place < pool->count) {
        Bin *bin = pool->bins + place;
        block = bin->at[--bin->count];
        if (!bin->count) close_bin(pool, place);
    } else if ((block = segment(s, size)) < 0) return -1;
    i64 rest = s->blocks[block].size - size;
    if (small ? rest >= ROUND : rest > MIB) {
        i32 other = make(s, s->blocks[block].address + size, rest, small);
        Block *b = s->blocks + block, *o = s->blocks + other;
        o->prev = block;
        o->next = b->next;
        if (b->next >= 0) s->blocks[b->next].prev = other;
        b->next = other;
        b->size = size;
        put(s, other);
    }
    s->blocks[block].free = 0;
    s->allocated += s->blocks[block].size;
    if (s->allocated > s->peak_allocated) s->peak_allocated = s->allocated;
    return block;
}
static void join(State *s, i32 block, i32 after) {
    Block *b = s->blocks + block, *a = s->blocks + after;
    b->size += a->size;
    b->next = a->next;
    if (a->next >= 0) s->blocks[a->next].prev = block;
    unmake(s, after);
}
static void release(State *s, i32 block) {
    Block *b = s->blocks + block;
    s->allocated -= b->size;
    b->free = 1;
    if (b->next >= 0 && s->blocks[b->next].free) {
        i32 after = b->next;
        take(s, after);
        join(s, block, after);
    }
    if (b->prev >= 0 && s->blocks[b->prev].free) {
        i32 before = b->prev;
        take(s, before);
        join(s, before, block);
        block = before;
    }
    put(s, block);
}
/* 1 = survived, 0 = out of memory, -1 = this process is out of memory. Allocation i takes
   amount[i] * point[column[i]] bytes; resting bytes are there before all else. */
int rankfit_replay(const i64 *column, const i64 *amount, const i64 *point, i64 allocations,
                   const i64 *events, i64 count, i64 resting, i64 cap, i64 *out) {
    State s = {0};
    s.spare = -1;
    i64 survived = 1;
    i32 *held = malloc((allocations + 1) * sizeof(i32));
    s.cap = cap;
    s.blocks = malloc((2 * allocations + 4) * sizeof(Block));
    if (!held || !s.blocks) survived = -1;
    else for (i64 i = 0; i < allocations; i++) held[i] = -1;
    if (survived == 1 && resting > 0 && allocate(&s, resting) < 0) survived = 0;
    for (i64 i = 0; survived == 1 && !s.starved && i < count; i++) {
        i64 event = events[i];
        if (event < 0) {
            if (held[-1 - event] >= 0) release(&s, held[-1 - event]);
            held[-1 - event] = -1;
        } else {
            i64 size = amount[event] * point[column[event]];
            if (size <= 0) continue;
            held[event] = allocate(&s, size);
            if (held[event] < 0) survived = 0;
        }
    }
    if (s.starved) survived = -1;
    out[0] = s.peak_reserved;
    out[1] = s.peak_allocated;
    out[2] = s.refused;
    free(held);
    free(s.blocks);
    for (int kind = 0; kind < 2; kind++) {
        for (i32 i = 0; i < s.pools[kind].room; i++) free(s.pools[kind].bins[i].at);
        free(s.pools[kind].bins);
    }
    return (int)survived;
}
"""


def native_replay(
    column: Array,
    amount: Array,
    point: Array,
    events: Array,
    resting: int,
    cap_bytes: int | None,
) -> tuple[int, int, int, bool] | None:
    """Peaks of reserved and allocated bytes, least total refused, survived; None = no C code.

    Parameters
    ----------
    column, amount, events : Array
        As in :class:`~rankfit.estimator.trace.Trace`.
    point : Array
        Values of the variables.
    resting : int
        Bytes that are there before the first event.
    cap_bytes : int, optional
        Cap on reserved bytes.
    """
    library = _library()
    if library is None:
        return None
    arrays = [np.ascontiguousarray(each) for each in (column, amount, point, events)]
    out = (ctypes.c_int64 * 3)()
    columns, amounts, points, order = (each.ctypes.data_as(_POINTER) for each in arrays)
    survived = library.rankfit_replay(
        columns, amounts, points, ctypes.c_int64(len(column)), order,
        ctypes.c_int64(len(events)), ctypes.c_int64(resting), ctypes.c_int64(cap_bytes or 0), out,
    )  # fmt: skip
    if survived < 0:
        raise MemoryError("no memory for the allocator's replay")
    return out[0], out[1], out[2], bool(survived)


@cache
def _library() -> ctypes.CDLL | None:
    name = hashlib.sha256(_SOURCE.encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "rankfit" / "native" / f"replay-{name}.so"
    try:
        if not _own(path):
            _build(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("the allocator's replay runs in Python: %s", error)
        return None


def _own(path: Path) -> bool:
    """Whether the file is there, made by this user and open to nobody else's changes.

    Raises
    ------
    OSError
        If it, or its folder, belongs to another user: what lies there is not run.
    """
    for each in (path.parent, path):
        if not os.path.lexists(each):
            return False
        found = each.lstat()
        if found.st_uid != os.getuid() or stat.S_ISLNK(found.st_mode):
            raise OSError(f"{each} is not this user's own; remove it")
        if found.st_mode & 0o022:
            return False  # others could have put something there: made anew
    return True


def _build(path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler found")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "replay.c", Path(folder) / "replay.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        built.chmod(0o700)
        built.replace(path)  # another process may build it too
