"""L1: what pools do to each page of a call, in one pass without a Python object a page: nodes are short, so that numpy's cost
a call would be most of it. Arrays are changed in place; nothing changes if a function raises, or reports a page.

The bookkeeping itself is in ``slots.py``, ``states.py`` and the controller's ledger.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy

import numpy as np

from radixkv.errors import ArgumentTypeError, PageOwnershipError

cnp.import_array()


cdef cnp.ndarray int32_ids(object given):
    """Page ids as a contiguous int32 array: itself if it is one."""
    cdef cnp.ndarray a
    if cnp.PyArray_Check(given):
        a = <cnp.ndarray>given
        if a.ndim == 1 and cnp.PyArray_TYPE(a) == cnp.NPY_INT32 and cnp.PyArray_ISCARRAY_RO(a):
            return a
    else:
        a = np.asarray(given)
    if cnp.PyArray_SIZE(a) == 0:
        return np.zeros(0, np.int32)
    if a.ndim != 1 or not (cnp.PyArray_ISINTEGER(a)):
        raise ArgumentTypeError(f"page ids are a 1-d array of integers, not {a.ndim}-d {a.dtype}")
    wide = a.astype(np.int64)
    if cnp.PyArray_TYPE(a) == cnp.NPY_UINT64 and (wide < 0).any() or (wide != wide.astype(np.int32)).any():
        raise PageOwnershipError(f"page {a[wide != wide.astype(np.int32)][0]} is not of this pool")
    return np.ascontiguousarray(wide, np.int32)


cdef uint8_t *bytes_of(cnp.ndarray table) except NULL:
    if cnp.PyArray_ITEMSIZE(table) != 1 or table.ndim != 1 or not cnp.PyArray_ISCARRAY(table):
        raise ArgumentTypeError(f"a table is a contiguous 1-d array of bytes, not {table.ndim}-d {table.dtype}")
    return <uint8_t *>cnp.PyArray_DATA(table)


cdef int32_t *ids_of(cnp.ndarray table) except? NULL:
    if cnp.PyArray_TYPE(table) != cnp.NPY_INT32 or table.ndim != 1 or not cnp.PyArray_ISCARRAY(table):
        raise ArgumentTypeError(f"a table is a contiguous 1-d int32 array, not {table.ndim}-d {table.dtype}")
    return <int32_t *>cnp.PyArray_DATA(table)


cdef int inside(const int32_t *ids, Py_ssize_t n, Py_ssize_t capacity) except -1:
    cdef Py_ssize_t i
    for i in range(n):
        if ids[i] < 0 or ids[i] >= capacity:
            raise PageOwnershipError(f"page {ids[i]} is not of this pool of {capacity} pages")
    return 0


# ---- allocation ----
cdef enum:
    SEEN = 0x80     # of an id that this call frees, until it is done


def take(cnp.ndarray stack, Py_ssize_t stack_len, Py_ssize_t from_stack, Py_ssize_t fresh, Py_ssize_t from_fresh,
         cnp.ndarray in_use, uint8_t mark=1):
    """The topmost from_stack ids of a stack and the from_fresh ids from ``fresh`` on: a new int32 array.

    Args: mark: 1 .. 127, what in_use has for them from now on.
    """
    cdef cnp.npy_intp n = from_stack + from_fresh
    cdef Py_ssize_t i
    cdef uint8_t *used = bytes_of(in_use)
    cdef int32_t *out
    if not 0 <= from_stack <= stack_len <= cnp.PyArray_SIZE(stack) or not 0 <= fresh <= cnp.PyArray_SIZE(in_use) - from_fresh:
        raise PageOwnershipError(f"{from_stack} of {stack_len} pages, {from_fresh} from {fresh} on: not of this pool")
    ids = cnp.PyArray_EMPTY(1, &n, cnp.NPY_INT32, 0)
    out = <int32_t *>cnp.PyArray_DATA(ids)
    if from_stack:
        memcpy(out, ids_of(stack) + (stack_len - from_stack), 4 * from_stack)
    for i in range(from_fresh):
        out[from_stack + i] = <int32_t>(fresh + i)
    for i in range(n):
        used[out[i]] = mark
    return ids


def give_back(page_ids, cnp.ndarray in_use, cnp.ndarray stack, Py_ssize_t stack_len):
    """Mark ids as not in use (0) and push them. Returns: how many.

    Raises: PageOwnershipError for an id outside, one that is not in use, or one given twice; ArgumentTypeError.
    """
    cdef cnp.ndarray ids = int32_ids(page_ids)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(ids), i, k
    cdef const int32_t *at = <const int32_t *>cnp.PyArray_DATA(ids)
    cdef uint8_t *used = bytes_of(in_use)
    if n == 0:
        return 0
    inside(at, n, cnp.PyArray_SIZE(in_use))
    for i in range(n):
        if used[at[i]] == 0 or used[at[i]] & SEEN:
            twice = used[at[i]] != 0
            for k in range(i):
                used[at[k]] &= ~<uint8_t>SEEN
            raise PageOwnershipError(
                f"page {at[i]} is given twice in one call" if twice else f"page {at[i]} is freed twice: it is not in use")
        used[at[i]] |= SEEN
    for i in range(n):
        used[at[i]] = 0
    memcpy(ids_of(stack) + stack_len, at, 4 * n)
    return n


# ---- states ----
def find_not(cnp.ndarray states, page_ids, unsigned int allowed):
    """The place of the first page whose state is no bit of ``allowed``; -1 if there is none."""
    cdef cnp.ndarray ids = int32_ids(page_ids)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(ids), i
    cdef const int32_t *at = <const int32_t *>cnp.PyArray_DATA(ids)
    cdef const uint8_t *state = bytes_of(states)
    inside(at, n, cnp.PyArray_SIZE(states))
    for i in range(n):
        if not (allowed >> state[at[i]]) & 1:
            return i
    return -1


def move(cnp.ndarray states, page_ids, unsigned int allowed, unsigned int to):
    """Set the states of pages, unless ``find_not`` finds one: its place, else -1."""
    cdef cnp.ndarray ids = int32_ids(page_ids)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(ids), i
    cdef const int32_t *at = <const int32_t *>cnp.PyArray_DATA(ids)
    cdef uint8_t *state = bytes_of(states)
    inside(at, n, cnp.PyArray_SIZE(states))
    for i in range(n):
        if not (allowed >> state[at[i]]) & 1:
            return i
    for i in range(n):
        state[at[i]] = <uint8_t>to
    return -1


# ---- pairs: a table by id, -1 where there is none ----
def set_pairs(cnp.ndarray table, keys, values):
    """table[keys] = values. Returns: -1; or the largest key, and nothing has changed, if the table is too short."""
    cdef cnp.ndarray k = int32_ids(keys), v = int32_ids(values)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(k), i
    cdef const int32_t *key = <const int32_t *>cnp.PyArray_DATA(k)
    cdef const int32_t *value = <const int32_t *>cnp.PyArray_DATA(v)
    cdef int32_t *out = ids_of(table)
    cdef int64_t top = -1
    if cnp.PyArray_SIZE(v) != n:
        raise ArgumentTypeError(f"{n} pages on one side, {cnp.PyArray_SIZE(v)} on the other")
    for i in range(n):
        if key[i] < 0:
            raise PageOwnershipError(f"page {key[i]} is not of any pool")
        top = max(top, <int64_t>key[i])
    if top >= cnp.PyArray_SIZE(table):
        return top
    for i in range(n):
        out[key[i]] = value[i]
    return -1


def pairs_of(cnp.ndarray table, keys):
    """The values that keys have, without those that have none: a new int32 array."""
    cdef cnp.ndarray k = int32_ids(keys)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(k), i, size = cnp.PyArray_SIZE(table)
    cdef const int32_t *key = <const int32_t *>cnp.PyArray_DATA(k)
    cdef const int32_t *values = ids_of(table)
    cdef cnp.npy_intp found = 0
    cdef int32_t *out
    for i in range(n):
        found += 0 <= key[i] < size and values[key[i]] >= 0
    result = cnp.PyArray_EMPTY(1, &found, cnp.NPY_INT32, 0)
    out = <int32_t *>cnp.PyArray_DATA(result)
    for i in range(n):
        if 0 <= key[i] < size and values[key[i]] >= 0:
            out[0] = values[key[i]]
            out += 1
    return result


def clear_pairs(cnp.ndarray table, keys):
    """Let keys have no value."""
    cdef cnp.ndarray k = int32_ids(keys)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(k), i, size = cnp.PyArray_SIZE(table)
    cdef const int32_t *key = <const int32_t *>cnp.PyArray_DATA(k)
    cdef int32_t *out = ids_of(table)
    for i in range(n):
        if 0 <= key[i] < size:
            out[key[i]] = -1


def move_values(cnp.ndarray table, keys, cnp.ndarray states, unsigned int allowed, unsigned int to):
    """``move`` of the values that keys have, and then they have none. Returns: how many; -1, and nothing changes, if a state is
    no bit of ``allowed``."""
    cdef cnp.ndarray k = int32_ids(keys)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(k), i, size = cnp.PyArray_SIZE(table), num_states = cnp.PyArray_SIZE(states), found = 0
    cdef const int32_t *key = <const int32_t *>cnp.PyArray_DATA(k)
    cdef int32_t *values = ids_of(table)
    cdef uint8_t *state = bytes_of(states)
    for i in range(n):
        if 0 <= key[i] < size and values[key[i]] >= 0:
            inside(&values[key[i]], 1, num_states)
            if not (allowed >> state[values[key[i]]]) & 1:
                return -1
    for i in range(n):
        if 0 <= key[i] < size and values[key[i]] >= 0:
            state[values[key[i]]] = <uint8_t>to
            values[key[i]] = -1
            found += 1
    return found
