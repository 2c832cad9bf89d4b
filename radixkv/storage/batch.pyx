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


cdef class FlatParts:
    """The parts of values, contiguous memoryviews of bytes, and the bytes of each value: looked at once for a call.

    A sequence of lists of views. Either lists are kept, or all are slices of one memory, made when they are asked for: of
    1,024 pages two views each, and a list around them, are much to make, to keep and to walk through.

    Attributes: sizes: bytes of each value; writable.
    """
    cdef list lists             # None: slices of memory
    cdef object memory
    cdef const long long[:, :] starts
    cdef Py_ssize_t piece_bytes
    cdef object rows            # None, or what has the first part of each value
    cdef Py_ssize_t row_bytes
    cdef readonly list sizes
    cdef readonly bint writable

    def __init__(self, list lists, list sizes, *, bint writable):
        if lists is not None and len(lists) != len(sizes):
            raise ValueError(f"{len(lists)} lists of parts and {len(sizes)} sizes")
        self.lists, self.sizes, self.writable = lists, sizes, writable

    @staticmethod
    def of_slices(memory, starts, Py_ssize_t piece_bytes):
        """Slices of a flat memoryview of bytes. Args: starts: int64 [values, pieces]; piece_bytes: of each slice."""
        cdef FlatParts made = FlatParts(None, [piece_bytes * starts.shape[1]] * starts.shape[0], writable=not memory.readonly)
        made.memory, made.starts, made.piece_bytes = memory, starts, piece_bytes
        return made

    def behind(self, rows, Py_ssize_t row_bytes):
        """These, each behind its part of ``rows``: a flat memoryview of bytes, writable, ``row_bytes`` a value."""
        cdef FlatParts made = FlatParts(self.lists, [row_bytes + size for size in self.sizes], writable=self.writable)
        if self.rows is not None:
            raise ValueError("there are rows in front of them already")
        made.memory, made.starts, made.piece_bytes = self.memory, self.starts, self.piece_bytes
        made.rows, made.row_bytes = rows, row_bytes
        return made

    cdef int append_to(self, list flat, Py_ssize_t position) except -1:
        """Append the parts of a value."""
        cdef Py_ssize_t at, piece
        if not 0 <= position < len(self.sizes):
            raise IndexError(f"value {position} of {len(self.sizes)}")
        if self.rows is not None:
            at = position * self.row_bytes
            flat.append(self.rows[at : at + self.row_bytes])
        if self.lists is not None:
            flat.extend(<list>self.lists[position])
            return 0
        for piece in range(self.starts.shape[1]):
            at = self.starts[position, piece]
            flat.append(self.memory[at : at + self.piece_bytes])
        return 0

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, Py_ssize_t position):
        cdef list parts = []
        self.append_to(parts, position)
        return parts


def sums(module, rows, Py_ssize_t header_bytes, Py_ssize_t covered, FlatParts payloads, positions, list digests):
    """Write XXH3-64 digests of payloads, seeded with those of the first ``covered`` bytes of their rows, into ``digests``.

    Args: module: xxhash. digests: for each payload; only those at ``positions`` are written.
    """
    cdef Py_ssize_t at, position
    cdef list pieces
    seed_of, digest, new = module.xxh3_64_intdigest, module.xxh3_64_digest, module.xxh3_64
    for position in positions:
        at = header_bytes * position
        pieces = []
        payloads.append_to(pieces, position)
        seed = seed_of(rows[at : at + covered])
        if len(pieces) == 1:
            digests[position] = digest(pieces[0], seed)
            continue
        state = new(seed=seed)
        for piece in pieces:
            state.update(piece)
        digests[position] = state.digest()


def gather(FlatParts parts, list positions):
    """The parts of these values, one after the other."""
    cdef Py_ssize_t position
    cdef list flat = []
    for position in positions:
        parts.append_to(flat, position)
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
