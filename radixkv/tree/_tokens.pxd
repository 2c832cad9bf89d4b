"""Step 1 of a request's life: whatever a caller calls tokens (or page ids) becomes a run of int32, without a copy where it can.

The Python import below only declares the names: a module that cimports this must import them too, where inline functions look them up.
"""

cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.list cimport PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLong
from cpython.tuple cimport PyTuple_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from radixkv.errors import AllocationError, ArgumentTypeError, TokenRangeError

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    bint PyLong_CheckExact(object)
    bint PyBool_Check(object)

cdef extern from *:
    """
    #include <stdint.h>
    /* The value of an int of one digit, which is nearly every token: 1 if it is one. A list of 8,192 is then read in 6 us, not in 36. */
    static inline int rkv_small_int(PyObject *item, int32_t *out) {
    #if PY_VERSION_HEX >= 0x030C0000
        if (!PyLong_CheckExact(item) || !PyUnstable_Long_IsCompact((PyLongObject *)item)) return 0;
        *out = (int32_t)PyUnstable_Long_CompactValue((PyLongObject *)item);
    #else
        if (!PyLong_CheckExact(item) || (size_t)(Py_SIZE(item) + 1) > 2) return 0;
        *out = (int32_t)Py_SIZE(item) * (int32_t)((PyLongObject *)item)->ob_digit[0];
    #endif
        return 1;
    }
    /* Two comparisons and no multiplication where it can be: a positive int of one digit. */
    static inline int rkv_token(PyObject *item, const PyTypeObject *exact_int, int32_t *out) {
    #if PY_VERSION_HEX < 0x030C0000
        if (Py_TYPE(item) == exact_int && Py_SIZE(item) == 1) {
            *out = (int32_t)((PyLongObject *)item)->ob_digit[0];
            return 1;
        }
    #endif
        return rkv_small_int(item, out);
    }
    static inline size_t rkv_small_ints(void **items, size_t n, int32_t *out) {
        const PyTypeObject *exact_int = &PyLong_Type;
        size_t i = 0;
        __asm__("" : "+r"(exact_int));    /* in a register: its address is not looked up anew for each item */
        #pragma GCC unroll 8
        for (; i < n; i++)
            if (!rkv_token((PyObject *)items[i], exact_int, &out[i])) return i;
        return n;
    }
    """
    size_t rkv_small_ints(void **items, size_t n, int32_t *out) noexcept
    ctypedef struct PyListObject:
        void *ob_item
    ctypedef struct PyTupleObject:
        void *ob_item


cdef struct TokenView:
    const int32_t *data
    size_t n
    int32_t *owned                  # a converted copy, or NULL
    bint has_buffer
    Py_buffer buffer


cdef inline void release_tokens(TokenView *v) noexcept:
    if v.owned != NULL:
        free(v.owned)
    if v.has_buffer:
        PyBuffer_Release(&v.buffer)


cdef inline int32_t *own(TokenView *v, size_t n) except NULL:
    v.owned = <int32_t *>malloc(4 * n if n else 4)
    if v.owned == NULL:
        raise AllocationError(f"no memory for {n} tokens")
    v.data = v.owned
    v.n = n
    return v.owned


cdef inline int out_of_range(object value, size_t at) except -1:
    raise TokenRangeError(f"value {value} at position {at} does not fit int32")


cdef inline int narrow_items(TokenView *v, const char *data, size_t n, Py_ssize_t stride, int itemsize, bint signed_) except -1:
    """Convert n items of 4 or 8 bytes, ``stride`` bytes apart, into an int32 copy; each is checked."""
    cdef int32_t *out = own(v, n)
    cdef size_t i
    cdef int64_t x
    cdef uint64_t bad = 0
    if itemsize == 4:
        for i in range(n):
            memcpy(&out[i], data + <Py_ssize_t>i * stride, 4)       # may be unaligned
            bad |= out[i] < 0 and not signed_
    elif stride == 8 and signed_:
        for i in range(n):
            memcpy(&x, data + i * 8, 8)
            out[i] = <int32_t>x
            bad |= out[i] != x
    else:
        for i in range(n):
            memcpy(&x, data + <Py_ssize_t>i * stride, 8)
            out[i] = <int32_t>x
            bad |= out[i] != x or (x < 0 and not signed_)
    if bad:
        for i in range(n):
            if itemsize == 4 and out[i] < 0:
                out_of_range(<uint32_t>out[i], i)
            if itemsize == 8:
                memcpy(&x, data + <Py_ssize_t>i * stride, 8)
                if not signed_ and <uint64_t>x > 0x7fffffff:
                    out_of_range(<uint64_t>x, i)
                if signed_ and out[i] != x:
                    out_of_range(x, i)
    return 0


cdef inline int read_uint32(TokenView *v, const int32_t *data, size_t n) except -1:
    """uint32 is int32 as it stands, unless a top bit is set."""
    cdef size_t i
    cdef int32_t bits = 0
    for i in range(n):
        bits |= data[i]
    v.data = data
    v.n = n
    if bits < 0:
        for i in range(n):
            if data[i] < 0:
                out_of_range(<uint32_t>data[i], i)
    return 0


cdef inline int read_item(object item, size_t at, int32_t *out) except -1:
    cdef int overflow = 0
    cdef long long x
    if not PyLong_CheckExact(item):
        if PyBool_Check(item) or isinstance(item, float) or not hasattr(item, "__index__"):
            raise ArgumentTypeError(f"item {at} is of type {type(item).__name__}, not int")
        item = item.__index__()
    x = PyLong_AsLongLongAndOverflow(item, &overflow)
    out[0] = <int32_t>x
    if overflow or out[0] != x:
        out_of_range(item, at)
    return 0


cdef inline int read_sequence(object tokens, TokenView *v) except -1:
    """A list or a tuple. ``__index__`` of an odd item may change the list, so after each the items are looked up anew."""
    cdef bint is_list = isinstance(tokens, list)
    cdef size_t i = 0, n = PyList_GET_SIZE(tokens) if is_list else PyTuple_GET_SIZE(tokens)
    cdef int32_t *out = own(v, n)
    cdef void **items
    cdef object item
    while True:
        if is_list and n > <size_t>PyList_GET_SIZE(tokens):
            raise ArgumentTypeError("the list shrank while it was read")
        items = <void **>(<PyListObject *>tokens).ob_item if is_list else <void **>&(<PyTupleObject *>tokens).ob_item
        i += rkv_small_ints(items + i, n - i, out + i)
        if i == n:
            return 0
        item = <object>items[i]
        read_item(item, i, &out[i])
        i += 1


cdef inline int read_buffer(object tokens, TokenView *v) except -1:
    cdef const char *format_
    cdef bint signed_
    cdef Py_ssize_t stride
    try:
        PyObject_GetBuffer(tokens, &v.buffer, PyBUF_STRIDES | PyBUF_FORMAT)
    except (ValueError, BufferError) as error:
        raise ArgumentTypeError(f"no readable buffer: {error}") from None
    v.has_buffer = True
    if v.buffer.ndim != 1:
        raise ArgumentTypeError(f"a one-dimensional buffer is needed, this one has {v.buffer.ndim} dimensions")
    format_ = v.buffer.format
    if format_[0] == c'@' or format_[0] == c'=' or format_[0] == c'<':
        format_ += 1
    if format_[0] == 0 or format_[1] != 0 or format_[0] not in b"ilqILQ" or v.buffer.itemsize not in (4, 8):
        raise ArgumentTypeError(f"a buffer of 4- or 8-byte integers is needed, not format {(<bytes>v.buffer.format).decode()!r}")
    signed_ = format_[0] in b"ilq"
    stride = v.buffer.strides[0] if v.buffer.strides != NULL else v.buffer.itemsize     # ctypes arrays give no strides
    if v.buffer.itemsize == 4 and stride == 4 and <size_t>v.buffer.buf % 4 == 0:
        if signed_:
            v.data = <const int32_t *>v.buffer.buf
            v.n = v.buffer.shape[0]
            return 0
        return read_uint32(v, <const int32_t *>v.buffer.buf, v.buffer.shape[0])
    return narrow_items(v, <const char *>v.buffer.buf, v.buffer.shape[0], stride, <int>v.buffer.itemsize, signed_)


cdef inline int read_tokens(object tokens, TokenView *v) except -1:
    """Fill a view of a token (or page id) argument; release_tokens must follow, also after an exception.

    Raises ArgumentTypeError or TokenRangeError, as base.Tokens says.
    """
    cdef int kind
    v.owned = NULL
    v.has_buffer = False
    if cnp.PyArray_CheckExact(tokens) and cnp.PyArray_NDIM(tokens) == 1 and cnp.PyArray_IS_C_CONTIGUOUS(tokens) \
            and cnp.PyArray_ISNOTSWAPPED(tokens) and cnp.PyArray_ISALIGNED(tokens):
        kind = cnp.PyArray_TYPE(tokens)
        if kind == cnp.NPY_INT32:
            v.data = <const int32_t *>cnp.PyArray_DATA(tokens)
            v.n = cnp.PyArray_DIM(tokens, 0)
            return 0
        if kind == cnp.NPY_INT64:
            return narrow_items(v, <const char *>cnp.PyArray_DATA(tokens), cnp.PyArray_DIM(tokens, 0), 8, 8, True)
        if kind == cnp.NPY_UINT32:
            return read_uint32(v, <const int32_t *>cnp.PyArray_DATA(tokens), cnp.PyArray_DIM(tokens, 0))
    if isinstance(tokens, (list, tuple)):
        return read_sequence(tokens, v)
    if PyObject_CheckBuffer(tokens):
        return read_buffer(tokens, v)
    if hasattr(tokens, "numpy") and hasattr(tokens, "data_ptr"):
        try:
            array = tokens.detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise ArgumentTypeError(f"a CPU tensor is needed: {error}") from None
        return read_buffer(array, v)
    raise ArgumentTypeError(f"tokens of type {type(tokens).__name__}: an array, a buffer, a CPU tensor or a list of integers is needed")
