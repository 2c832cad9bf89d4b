"""L2: the loops over the values of a call, compiled: at 64 KiB a page they cost as much as hashing it.

Nothing here does I/O, and nothing knows what a page is.
"""

from cpython.buffer cimport PyBUF_FULL_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.string cimport strcmp


cdef bint is_flat(object part, bint writable, Py_ssize_t *size) except -1:
    """Whether a part is a contiguous view of bytes already, and its length."""
    cdef Py_buffer buffer
    cdef bint flat
    if type(part) is not memoryview:
        return False
    PyObject_GetBuffer(part, &buffer, PyBUF_FULL_RO)
    flat = buffer.ndim == 1 and buffer.strides[0] == 1 and strcmp(buffer.format, b"B") == 0
    flat = flat and not (writable and buffer.readonly)
    size[0] = buffer.len
    PyBuffer_Release(&buffer)
    return flat


def flat_sizes(parts, bint writable):
    """The bytes of each value, if all of its parts are contiguous memoryviews of bytes, and writable if need be; else None.

    Raises: ValueError for a view that was released.
    """
    cdef Py_ssize_t size = 0, total
    sizes = []
    for pieces in parts:
        total = 0
        if type(pieces) is not list:
            return None
        for piece in <list>pieces:
            if not is_flat(piece, writable, &size):
                return None
            total += size
        sizes.append(total)
    return sizes


def slices(memory, starts, Py_ssize_t size):
    """Views of ``size`` bytes. Args: starts: int64 [values, pieces]. Returns: a list for each value."""
    cdef Py_ssize_t at
    cdef const long long[:, :] table = starts
    cdef Py_ssize_t row, column
    values = []
    for row in range(table.shape[0]):
        pieces = []
        for column in range(table.shape[1]):
            at = table[row, column]
            pieces.append(memory[at : at + size])
        values.append(pieces)
    return values


def with_headers(rows, Py_ssize_t header_bytes, payloads):
    """Each payload's parts behind its slice of ``rows``."""
    cdef Py_ssize_t at = 0
    values = []
    for payload in payloads:
        value = [rows[at : at + header_bytes]]
        value.extend(payload)
        values.append(value)
        at += header_bytes
    return values


def sums(module, rows, Py_ssize_t header_bytes, Py_ssize_t covered, payloads, positions, list digests):
    """Write XXH3-64 digests of payloads, seeded with those of the first ``covered`` bytes of their rows, into ``digests``.

    Args: module: xxhash. digests: for each payload; only those at ``positions`` are written.
    """
    cdef Py_ssize_t at, position
    seed_of, digest, new = module.xxh3_64_intdigest, module.xxh3_64_digest, module.xxh3_64
    for position in positions:
        at = header_bytes * position
        pieces = payloads[position]
        seed = seed_of(rows[at : at + covered])
        if len(pieces) == 1:
            digests[position] = digest(pieces[0], seed)
            continue
        state = new(seed=seed)
        for piece in pieces:
            state.update(piece)
        digests[position] = state.digest()


def gather(parts, list positions):
    """The parts of these values, one after the other."""
    cdef Py_ssize_t position
    flat = []
    for position in positions:
        flat.extend(<list>parts[position])
    return flat


def copy_at(list positions, list source, list target):
    """target[position] = source[position] for these positions."""
    cdef Py_ssize_t position
    for position in positions:
        target[position] = source[position]


def by_segment(list places, list found):
    """What is to be read of each segment: lists of (offset, bytes, position) by offset; bytes also go to ``found``.

    Args: places: for each key (segment, (number, offset, bytes)), or None.
    """
    cdef Py_ssize_t position
    cdef dict reads = {}
    cdef object last = None, segment
    cdef list some = []
    for position in range(len(places)):
        place = places[position]
        if place is None:
            continue
        segment, entry = <tuple>place
        _, offset, num_bytes = <tuple>entry
        found[position] = num_bytes
        if segment is not last:
            last, some = segment, reads.setdefault(segment, [])
        some.append((offset, num_bytes, position))
    for some in reads.values():
        some.sort()
    return reads


def runs(list reads, list rooms, Py_ssize_t most_bytes):
    """Join reads where one begins where the one before it ended, in the file and in its parts.

    Args: reads: of ``by_segment``. rooms: bytes of the parts of each value. most_bytes: of a run, unless it is one value.
    Returns: a list of (offset, bytes of all parts, positions).
    """
    cdef long long offset, num_bytes, end = -1
    cdef Py_ssize_t position, room, size = 0, start = 0
    cdef list positions = []
    joined = []
    for read in reads:
        offset, num_bytes, position = <tuple>read
        room = rooms[position]
        if offset != end or size + room > most_bytes:
            if positions:
                joined.append((start, size, positions))
            start, size, positions = offset, 0, []
        positions.append(position)
        size += room
        end = offset + num_bytes if room == num_bytes else -1
    if positions:
        joined.append((start, size, positions))
    return joined
