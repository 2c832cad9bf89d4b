"""Between the slots of tokens, which engines pass around, and page ids, which the tree keeps. One pass each way.

    page ids  [ 7          3       ]
    slots     [28 29 30 31 12 13 14 15]      page_size 4
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from radixkv.hicache._dlpack cimport DL_CPU, DL_INT, DLPACK_MAJOR, DLExchange, DLManaged, DLTensor
from radixkv.tree._tokens cimport TokenView, read_tokens, release_tokens

from radixkv.errors import AllocationError, ArgumentTypeError, InvalidArgumentError, TokenRangeError

cnp.import_array()

ctypedef fused slot_t:
    int32_t
    int64_t


cdef void expand(const int32_t *pages, Py_ssize_t n, int64_t size, int64_t *out) noexcept nogil:
    cdef Py_ssize_t i
    cdef int64_t k, first
    if size == 1:
        for i in range(n):
            out[i] = pages[i]
        return
    for i in range(n):
        first = pages[i] * size
        for k in range(size):
            out[k] = first + k
        out += size


cdef Py_ssize_t narrow(const slot_t *slots, Py_ssize_t n, int64_t size, int32_t *out) noexcept nogil:
    """Page ids of n pages of slots. Returns the place of the first slot that is not where a whole page has it, or -1."""
    cdef Py_ssize_t i
    cdef int64_t k, first, wrong = 0
    cdef int shift = 0
    if size == 1:       # apart: this loop is one of vectors
        for i in range(n):
            out[i] = <int32_t>slots[i]
            wrong |= (slots[i] ^ out[i]) | (<int64_t>out[i] & <int64_t>0x80000000)
        if wrong:
            for i in range(n):
                if slots[i] < 0 or slots[i] != <int32_t>slots[i]:
                    return i
        return -1
    while size >> shift > 1:
        shift += 1
    if <int64_t>1 << shift != size:
        shift = -1      # a division a page would be half of the time
    for i in range(n):
        first = slots[0]
        out[i] = <int32_t>(first >> shift) if shift >= 0 else <int32_t>(first // size)
        wrong = (first < 0) | (out[i] * size != first)
        for k in range(1, size):
            wrong |= slots[k] ^ (first + k)
        if wrong:
            for k in range(size):
                if slots[k] != <int64_t>out[i] * size + k:
                    return i * size + k
            return i * size
        slots += size
    return -1


def slots_of(const int32_t[::1] page_ids, int64_t page_size):
    """The slots of pages, page by page: a new int64 array [len(page_ids) * page_size]."""
    cdef cnp.npy_intp total = page_ids.shape[0] * page_size
    out = cnp.PyArray_EMPTY(1, &total, cnp.NPY_INT64, 0)
    if total:
        expand(&page_ids[0], page_ids.shape[0], page_size, <int64_t *>cnp.PyArray_DATA(out))
    return out


cdef object read_pages(const void *slots, bint wide, int64_t n, int64_t page_size, Py_ssize_t num_pages):
    """The pages of n int64 (or int32) slots, see pages_of."""
    cdef cnp.npy_intp pages
    cdef Py_ssize_t wrong
    cdef int64_t slot
    if num_pages < 0 and n % page_size:
        raise InvalidArgumentError(f"{n} slots are no whole pages of {page_size}")
    pages = n // page_size if num_pages < 0 else num_pages
    if pages * page_size > n:
        raise InvalidArgumentError(f"{n} slots for {pages * page_size} tokens in pages of {page_size}")
    out = cnp.PyArray_EMPTY(1, &pages, cnp.NPY_INT32, 0)
    if wide:
        wrong = narrow(<const int64_t *>slots, pages, page_size, <int32_t *>cnp.PyArray_DATA(out))
    else:
        wrong = narrow(<const int32_t *>slots, pages, page_size, <int32_t *>cnp.PyArray_DATA(out))
    if wrong >= 0:
        slot = (<const int64_t *>slots)[wrong] if wide else (<const int32_t *>slots)[wrong]
        raise InvalidArgumentError(
            f"slot {slot} at position {wrong} is not where a whole page of {page_size} has it: pages are handed over "
            "whole, each in ascending order from a multiple of the page size")
    return out


def pages_of(cnp.ndarray slots, int64_t page_size, Py_ssize_t num_pages=-1):
    """The pages that whole runs of slots are: a new int32 array [len(slots) // page_size], or of the first num_pages.

    Args: slots: int32 or int64 [n]; n is a multiple of page_size, or enough for num_pages.
    Raises: InvalidArgumentError, naming the place, unless they are whole pages, each in ascending order; ArgumentTypeError.
    """
    cdef int kind = cnp.PyArray_TYPE(slots)
    if slots.ndim != 1:
        raise ArgumentTypeError(f"slots are one-dimensional, not {slots.ndim}-d")
    if kind != cnp.NPY_INT64 and kind != cnp.NPY_INT32 and cnp.PyArray_SIZE(slots):     # of an empty list it is anything
        raise ArgumentTypeError(f"slots are int32 or int64, not {slots.dtype}")
    if not cnp.PyArray_IS_C_CONTIGUOUS(slots) or not cnp.PyArray_ISALIGNED(slots):
        slots = cnp.PyArray_GETCONTIGUOUS(slots)
    return read_pages(cnp.PyArray_DATA(slots), kind == cnp.NPY_INT64, cnp.PyArray_SIZE(slots), page_size, num_pages)


# ---- tensors ---------------------------------------------------------------------------------------------------------

cdef struct Block:                  # the memory of a tensor of slots, which follow behind
    DLManaged managed
    int64_t shape
    int64_t stride


cdef inline size_t slots_at() noexcept nogil:
    return (sizeof(Block) + 63) // 64 * 64


cdef void release_block(DLManaged *managed) noexcept nogil:
    free(managed.manager_ctx)


cdef class Tensors:
    """Slots out of CPU tensors of one class, and into new ones, each in one C call.

    By its methods, half a dozen calls ask a tensor for its address, and what it is; an array has to be made first for a new tensor,
    and torch.from_numpy lets go of the GIL, which another thread then may keep for a while.
    """
    cdef object kind
    cdef const DLExchange *exchange

    def __cinit__(self, kind, capsule):
        """Args: kind: the class; capsule: its ``__dlpack_c_exchange_api__``."""
        self.kind = kind
        self.exchange = <const DLExchange *>PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
        if self.exchange.version.major != DLPACK_MAJOR or self.exchange.look_at == NULL:
            raise InvalidArgumentError(f"a DLPack exchange API of version {self.exchange.version.major}, not {DLPACK_MAJOR}, or a part of one")

    def pages_of(self, object slots, int64_t page_size, Py_ssize_t num_pages=-1):
        """As pages_of; None for what is no contiguous CPU tensor of this very class, int32 or int64, with one dimension."""
        cdef DLTensor tensor
        if type(slots) is not self.kind:
            return None
        self.exchange.look_at(<void *>slots, &tensor)
        if tensor.device_type != DL_CPU or tensor.ndim != 1 or tensor.code != DL_INT or tensor.lanes != 1 or \
                (tensor.bits != 64 and tensor.bits != 32) or \
                (tensor.strides != NULL and tensor.strides[0] != 1 and tensor.shape[0] > 1):
            return None
        return read_pages(<const char *>tensor.data + tensor.byte_offset, tensor.bits == 64, tensor.shape[0], page_size, num_pages)

    def slots_of(self, const int32_t[::1] page_ids, int64_t page_size):
        """As slots_of: a new int64 tensor."""
        cdef int64_t total = page_ids.shape[0] * page_size
        cdef Block *block = <Block *>malloc(slots_at() + 8 * total)
        cdef DLTensor *tensor
        cdef void *made = NULL
        if block == NULL:
            raise AllocationError(f"no memory for {total} slots")
        memset(block, 0, sizeof(Block))
        block.shape = total
        block.stride = 1
        block.managed.version.major = DLPACK_MAJOR
        block.managed.manager_ctx = block
        block.managed.deleter = release_block
        tensor = &block.managed.tensor
        tensor.data = <char *>block + slots_at()
        tensor.device_type = DL_CPU
        tensor.ndim = 1
        tensor.code = DL_INT
        tensor.bits = 64
        tensor.lanes = 1
        tensor.shape = &block.shape
        tensor.strides = &block.stride
        if total:
            expand(&page_ids[0], page_ids.shape[0], page_size, <int64_t *>tensor.data)
        self.exchange.import_(&block.managed, &made)
        out = <object>made
        Py_DECREF(out)              # the reference that was handed over
        return out


def tokens_of(object tokens):
    """Tokens as an int32 array, so that several calls read a list once. What is one already is returned as it is.

    Raises: ArgumentTypeError, TokenRangeError, as ``tree.base.Tokens`` says.
    """
    cdef TokenView view
    cdef cnp.npy_intp n
    if cnp.PyArray_CheckExact(tokens):
        return tokens
    view.owned = NULL
    view.has_buffer = False
    try:
        read_tokens(tokens, &view)
        n = view.n
        out = cnp.PyArray_EMPTY(1, &n, cnp.NPY_INT32, 0)
        memcpy(cnp.PyArray_DATA(out), view.data, 4 * n)
        return out
    finally:
        release_tokens(&view)
