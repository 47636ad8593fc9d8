"""The allocator replay of :mod:`rankfit.estimator.allocator` in C, for large fleets.

Built once with the system's C compiler and kept in the cache folder. Where there is no compiler the
Python code runs instead, to the same result.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int64_t i64;
enum { ROUND = 512, MIB = 1 << 20 };
typedef struct { i64 address, size, prev, next; int free, small; } Block;
typedef struct { i64 size, address, block; } Entry;
typedef struct { Entry *at; i64 count; } Pool;
typedef struct {
    i64 cap, reserved, allocated, peak_reserved, peak_allocated, top, count;
    Block *blocks;
    Pool pools[2];
} State;

static i64 find(const Pool *pool, i64 size, i64 address) {
    i64 low = 0, high = pool->count;
    while (low < high) {
        i64 mid = (low + high) / 2;
        const Entry *e = pool->at + mid;
        if (e->size < size || (e->size == size && e->address < address)) low = mid + 1;
        else high = mid;
    }
    return low;
}
static void drop(Pool *pool, i64 place) {
    memmove(pool->at + place, pool->at + place + 1, (pool->count - place - 1) * sizeof(Entry));
    pool->count--;
}
static void put(State *s, i64 block) {
    Block *b = s->blocks + block;
    Pool *pool = s->pools + b->small;
    i64 place = find(pool, b->size, b->address);
    memmove(pool->at + place + 1, pool->at + place, (pool->count - place) * sizeof(Entry));
    pool->at[place] = (Entry){b->size, b->address, block};
    pool->count++;
}
static void take(State *s, i64 block) {
    Block *b = s->blocks + block;
    drop(s->pools + b->small, find(s->pools + b->small, b->size, b->address));
}
static i64 make(State *s, i64 address, i64 size, int small) {
    s->blocks[s->count] = (Block){address, size, -1, -1, 1, small};
    return s->count++;
}
static void give_back(State *s) {
    for (int kind = 0; kind < 2; kind++) {
        Pool *pool = s->pools + kind;
        i64 kept = 0;
        for (i64 i = 0; i < pool->count; i++) {
            Block *b = s->blocks + pool->at[i].block;
            if (b->prev < 0 && b->next < 0) s->reserved -= b->size;
            else pool->at[kept++] = pool->at[i];
        }
        pool->count = kept;
    }
}
static i64 segment(State *s, i64 size) {
    i64 need = size <= MIB ? 2 * MIB
             : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if (s->cap && s->reserved + need > s->cap) {
        give_back(s);
        if (s->reserved + need > s->cap) return -1;
    }
    i64 block = make(s, s->top, need, size <= MIB);
    s->top += need;
    s->reserved += need;
    if (s->reserved > s->peak_reserved) s->peak_reserved = s->reserved;
    return block;
}
static i64 allocate(State *s, i64 nbytes) {
    i64 size = (nbytes + ROUND - 1) / ROUND * ROUND;
    int small = size <= MIB;
    Pool *pool = s->pools + small;
    i64 place = find(pool, size, -1), block;
    if (place < pool->count) {
        block = pool->at[place].block;
        drop(pool, place);
    } else if ((block = segment(s, size)) < 0) return -1;
    i64 rest = s->blocks[block].size - size;
    if (small ? rest >= ROUND : rest > MIB) {
        i64 other = make(s, s->blocks[block].address + size, rest, small);
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
static void join(State *s, i64 block, i64 after) {
    Block *b = s->blocks + block, *a = s->blocks + after;
    b->size += a->size;
    b->next = a->next;
    if (a->next >= 0) s->blocks[a->next].prev = block;
}
static void release(State *s, i64 block) {
    Block *b = s->blocks + block;
    s->allocated -= b->size;
    b->free = 1;
    if (b->next >= 0 && s->blocks[b->next].free) {
        i64 after = b->next;
        take(s, after);
        join(s, block, after);
    }
    if (b->prev >= 0 && s->blocks[b->prev].free) {
        i64 before = b->prev;
        take(s, before);
        join(s, before, block);
        block = before;
    }
    put(s, block);
}
/* 1 = survived, 0 = out of memory, -1 = this process is out of memory. */
int rankfit_replay(const i64 *sizes, i64 allocations, const i64 *events, i64 count, i64 cap,
                   i64 *out) {
    State s = {0};
    i64 room = 2 * allocations + 2, survived = 1;
    i64 *held = malloc((allocations + 1) * sizeof(i64));
    s.cap = cap;
    s.blocks = malloc(room * sizeof(Block));
    for (int kind = 0; kind < 2; kind++) s.pools[kind].at = malloc(room * sizeof(Entry));
    if (!held || !s.blocks || !s.pools[0].at || !s.pools[1].at) survived = -1;
    else for (i64 i = 0; i < allocations; i++) held[i] = -1;
    for (i64 i = 0; survived == 1 && i < count; i++) {
        i64 event = events[i];
        if (event < 0) {
            if (held[-1 - event] >= 0) release(&s, held[-1 - event]);
            held[-1 - event] = -1;
        } else if (sizes[event] > 0) {
            held[event] = allocate(&s, sizes[event]);
            if (held[event] < 0) survived = 0;
        }
    }
    out[0] = s.peak_reserved;
    out[1] = s.peak_allocated;
    free(held);
    free(s.blocks);
    free(s.pools[0].at);
    free(s.pools[1].at);
    return (int)survived;
}
"""


def native_replay(
    sizes: NDArray[np.int64], events: NDArray[np.int64], cap_bytes: int | None
) -> tuple[int, int, bool] | None:
    """Peaks of reserved and allocated bytes, and whether it survived; None = there is no C code."""
    library = _library()
    if library is None:
        return None
    sizes, events = np.ascontiguousarray(sizes), np.ascontiguousarray(events)
    out = (ctypes.c_int64 * 2)()
    pointer = ctypes.POINTER(ctypes.c_int64)
    survived = library.rankfit_replay(
        sizes.ctypes.data_as(pointer),
        ctypes.c_int64(len(sizes)),
        events.ctypes.data_as(pointer),
        ctypes.c_int64(len(events)),
        ctypes.c_int64(cap_bytes or 0),
        out,
    )
    if survived < 0:
        raise MemoryError("no memory for the allocator's replay")
    return out[0], out[1], bool(survived)


@cache
def _library() -> ctypes.CDLL | None:
    name = hashlib.sha256(_SOURCE.encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "rankfit" / "native" / f"replay-{name}.so"
    try:
        if not path.exists():
            _build(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("the allocator's replay runs in Python: %s", error)
        return None


def _build(path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler found")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "replay.c", Path(folder) / "replay.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        built.replace(path)  # another process may build it too
