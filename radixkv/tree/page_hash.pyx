"""L1: SHA-256 over the pages of a prefix, as storage keys are chained; native, without Python for each page.

    digest[0] = sha256(tokens of page 0)                              each token as 4 bytes, little endian
    digest[i] = sha256(digest[i - 1] || tokens of page i)

Byte for byte the chain of SGLang (``get_hash_str`` in mem_cache/hicache_storage.py), whose keys are these digests in hex. Another than
the default namespace (an adapter, a tenant) begins with a digest of its name in place of a page before the first one:

    start     = sha256(sha256(namespace) || "n")                      namespace: the bytes of encode_namespace
    digest[0] = sha256(start || tokens of page 0)

so that no page of one namespace has the digest of a page of another. The 33 bytes matter: a page's message has a multiple of 4, so no
tokens, not even chosen ones, make a prefix of the default namespace that goes on like one of a tenant.

The hash itself is OpenSSL's, the very library that Python's hashlib uses: found at run time through the _hashlib module, or by name. It
is called through EVP (public and not deprecated since 1.1), on one context for a whole chain. Where there is none (a Python without
OpenSSL, a big-endian machine) hashlib does the same work, a page at a time under the GIL; ``sha256_provider`` tells which it is.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from radixkv.tree._abi cimport mix, process_secret, rkv_page_run, store_be64
from radixkv.tree._tokens cimport TokenView, read_tokens, release_tokens

import ctypes
import hashlib
import sys

import numpy as np

from radixkv.errors import AllocationError, ArgumentTypeError, InvalidArgumentError, TokenRangeError
from radixkv.tree.core import page_hash_capsule
from radixkv.tree.tokens import read_int

cdef extern from "sync.h" nogil:
    ctypedef struct rkv_mutex:
        pass
    int mutex_create "rkv_mutex_init"(rkv_mutex *mutex)
    void mutex_destroy "rkv_mutex_destroy"(rkv_mutex *mutex)
    void mutex_lock "rkv_mutex_lock"(rkv_mutex *mutex)
    void mutex_unlock "rkv_mutex_unlock"(rkv_mutex *mutex)

cnp.import_array()                  # read_tokens needs it

DIGEST_BYTES = 32

cdef enum:
    DIGEST = 32
    NAMESPACE_TAG = 0x6e    # "n"
    JOINED_BYTES = 512      # a page of so many is joined with the digest before it: copied faster than a second update
    SHORT_TOKENS = 4096     # a chain of fewer tokens and
    SHORT_PAGES = 256       # pages keeps the GIL (about 30 us): whoever takes it may keep it for 5 ms

ctypedef void *(*context_new_fn)() noexcept nogil
ctypedef void (*context_free_fn)(void *) noexcept nogil
ctypedef int (*init_fn)(void *, const void *, void *) noexcept nogil
ctypedef int (*update_fn)(void *, const void *, size_t) noexcept nogil
ctypedef int (*final_fn)(void *, uint8_t *, uint32_t *) noexcept nogil


cdef struct Crypto:                 # what is used of libcrypto
    const void *sha256              # an EVP_MD; NULL: there is no libcrypto
    context_new_fn context_new
    context_free_fn context_free
    init_fn init
    update_fn update
    final_fn final


cdef struct Hasher:                 # the ctx of a page-hash callback
    Crypto crypto
    void *context                   # made beforehand, so that a callback, which cannot fail, needs no memory
    rkv_mutex lock                  # of context: one capsule may serve several trees
    uint64_t failures               # pages


cdef Crypto native                  # the one in use, chosen at import
cdef object library = None          # holds it open
cdef str provider = "hashlib"


cdef bint hash_chain(const Crypto *c, void *context, const uint8_t *parent, const int32_t *tokens, size_t page_size, size_t num_pages,
                     uint8_t *digests) noexcept nogil:
    """Write num_pages digests of 32 bytes. False: libcrypto refused."""
    cdef uint8_t joined[DIGEST + JOINED_BYTES]
    cdef size_t k, page_bytes = 4 * page_size
    cdef bint join = page_bytes <= JOINED_BYTES, fine
    for k in range(num_pages):
        fine = c.init(context, c.sha256, NULL)
        if parent == NULL:
            fine = fine and c.update(context, tokens, page_bytes)
        elif join:
            memcpy(joined, parent, DIGEST)
            memcpy(joined + DIGEST, tokens, page_bytes)
            fine = fine and c.update(context, joined, DIGEST + page_bytes)
        else:
            fine = fine and c.update(context, parent, DIGEST) and c.update(context, tokens, page_bytes)
        if not fine or not c.final(context, digests, NULL):
            return False
        parent = digests
        tokens += page_size
        digests += DIGEST
    return True


cdef bint hash_namespace(const Crypto *c, void *context, const void *name, size_t name_bytes, uint8_t *start) noexcept nogil:
    """Write the digest that stands before a namespace's first page; see namespace_digest. False: libcrypto refused."""
    cdef uint8_t message[DIGEST + 1]
    message[DIGEST] = NAMESPACE_TAG
    return c.init(context, c.sha256, NULL) and c.update(context, name, name_bytes) and c.final(context, message, NULL) and \
        c.init(context, c.sha256, NULL) and c.update(context, message, DIGEST + 1) and c.final(context, start, NULL)


cdef bytes chain_in_python(bytes tokens, size_t page_bytes, bytes previous):
    """The same by hashlib: the digests one after the other."""
    digest = previous
    digests = []
    for at in range(0, len(tokens), page_bytes):
        digest = hashlib.sha256(digest + tokens[at : at + page_bytes]).digest()
        digests.append(digest)
    return b"".join(digests)


cdef bytes little_endian(const int32_t *tokens, size_t n):
    data = (<const char *>tokens)[: 4 * n]
    return data if sys.byteorder == "little" else np.frombuffer(data, np.int32).astype("<i4").tobytes()


cdef bint hash_in_python(const rkv_page_run *run) noexcept with gil:
    """A run of pages by hashlib. The tree's lock is held; a tree with a page hash never waits for it with the GIL in hand."""
    cdef bytes digests
    cdef const char *source
    try:
        tokens = little_endian(run.tokens, run.num_pages * run.page_size)
        if run.parent == NULL:
            previous = namespace_digest((<const char *>run.ns)[: run.ns_bytes] if run.ns_bytes else b"") or b""
        else:
            previous = (<const char *>run.parent)[:DIGEST]
        digests = chain_in_python(tokens, 4 * <size_t>run.page_size, previous)
        source = digests
        memcpy(run.digests, source, DIGEST * run.num_pages)
        return True
    except BaseException:           # no memory, or an interrupt: the caller has an answer to both
        return False


cdef void hash_run(void *ctx, const rkv_page_run *run) noexcept nogil:
    """The rkv_page_hash_fn. It has no way to say that it failed; then the digests are such as no page has, so that they are never found
    again: that costs hits, and a zero or a stale digest could cost a wrong page."""
    cdef Hasher *h = <Hasher *>ctx
    cdef size_t k
    cdef bint done = False
    cdef uint8_t start[DIGEST]
    cdef const uint8_t *parent = run.parent
    if h.context != NULL:
        mutex_lock(&h.lock)
        done = True
        if parent == NULL and run.ns_bytes > 0:
            done = hash_namespace(&h.crypto, h.context, run.ns, run.ns_bytes, start)
            parent = start
        done = done and hash_chain(&h.crypto, h.context, parent, run.tokens, run.page_size, run.num_pages, run.digests)
        mutex_unlock(&h.lock)
    if done or hash_in_python(run):
        return
    mutex_lock(&h.lock)
    for k in range(DIGEST // 8 * run.num_pages):
        store_be64(run.digests + 8 * k, mix(process_secret() ^ mix(<uint64_t><size_t>h + k) ^ h.failures))
    h.failures += run.num_pages
    mutex_unlock(&h.lock)


cdef class Sha256Hasher:
    """Owns what the callback works with; kept alive by the capsule."""
    cdef Hasher h
    cdef bint has_lock
    cdef object library

    def __cinit__(self):
        memset(&self.h, 0, sizeof(Hasher))
        self.has_lock = mutex_create(&self.h.lock) == 0
        if not self.has_lock:
            raise AllocationError("no lock for a page hash")
        self.library = library
        self.h.crypto = native
        if native.sha256 != NULL:
            self.h.context = native.context_new()
            if self.h.context == NULL or not native.init(self.h.context, native.sha256, NULL):
                raise AllocationError("no OpenSSL context for a page hash")

    def __dealloc__(self):
        if self.h.context != NULL:
            self.h.crypto.context_free(self.h.context)
        if self.has_lock:
            mutex_destroy(&self.h.lock)

    def capsule(self):
        return page_hash_capsule(<size_t>&hash_run, <size_t>&self.h, DIGEST, self)


def sha256_page_hash():
    """Make the page hash for ``RadixTree(page_hash=...)``: its page_digests are the SHA-256 chain of this module, 32 bytes a page.

    Page keys and events then carry the first 8 bytes of these digests. One hash may serve several trees; with one each they hash at the
    same time.
    Raises: AllocationError.
    """
    return Sha256Hasher().capsule()


def namespace_digest(namespace):
    """The digest that stands before the first page of a namespace: sha256(sha256(namespace) || "n").

    Args: namespace: the bytes of ``encode_namespace(extra_key, cache_salt)``.
    Returns: 32 bytes, ``previous`` for sha256_chain; None for the default namespace, b"", whose chain has nothing before it.
    Raises: ArgumentTypeError for what is no bytes.
    """
    if not isinstance(namespace, bytes):
        raise ArgumentTypeError(f"a namespace is the bytes of encode_namespace, not {type(namespace).__name__}")
    if not namespace:
        return None
    return hashlib.sha256(hashlib.sha256(namespace).digest() + bytes([NAMESPACE_TAG])).digest()


def sha256_chain(tokens, page_size, previous=None):
    """Hash the pages of a key, each with the digest of the page before it.

    Args:
        tokens: as everywhere (see base.Tokens); a tail shorter than a page is ignored. Negative ids: two's complement.
        page_size: tokens a page, 1 .. 65,536.
        previous: digest of the page before the first one, 32 bytes; at the start of a prefix ``namespace_digest`` of its namespace: None
            for the default one.
    Returns: a new uint8 array [len(tokens) // page_size, 32].
    Thread: any; long chains are hashed without the GIL.
    Raises: InvalidArgumentError for a page_size out of range or another length of ``previous``; ArgumentTypeError, TokenRangeError;
        AllocationError.
    """
    cdef TokenView view
    cdef size_t size = read_int(page_size, "page_size", 1, 65_536), pages
    cdef const uint8_t *parent = NULL
    cdef uint8_t[:, ::1] out
    cdef bint done
    if previous is not None:
        if not isinstance(previous, bytes):
            raise ArgumentTypeError(f"previous is a digest of {DIGEST} bytes, not {type(previous).__name__}")
        if len(previous) != DIGEST:
            raise InvalidArgumentError(f"previous has {len(previous)} bytes, a digest has {DIGEST}")
        parent = <const uint8_t *><const char *>previous
    view.owned = NULL
    view.has_buffer = False
    try:
        read_tokens(tokens, &view)
        pages = view.n // size
        result = np.empty((pages, DIGEST), np.uint8)
        if pages == 0:
            return result
        if native.sha256 == NULL:
            digests = chain_in_python(little_endian(view.data, pages * size), 4 * size, previous or b"")
            return np.frombuffer(digests, np.uint8).reshape(pages, DIGEST).copy()
        out = result
        if view.n < SHORT_TOKENS and pages < SHORT_PAGES:
            done = whole_chain(parent, view.data, size, pages, &out[0, 0])
        else:
            with nogil:
                done = whole_chain(parent, view.data, size, pages, &out[0, 0])
        if not done:
            raise AllocationError(f"OpenSSL could not hash {pages} pages")
        return result
    finally:
        release_tokens(&view)


cdef bint whole_chain(const uint8_t *parent, const int32_t *tokens, size_t page_size, size_t num_pages, uint8_t *digests) noexcept nogil:
    """hash_chain on a context of its own, so that threads do not wait for each other."""
    cdef void *context = native.context_new()
    cdef bint done = context != NULL and hash_chain(&native, context, parent, tokens, page_size, num_pages, digests)
    if context != NULL:
        native.context_free(context)
    return done


def sha256_provider():
    """What hashes: "OpenSSL 3.0.19 27 Jan 2026" (its own words for itself), or "hashlib": correct, several times slower, under the GIL."""
    return provider


# ---- finding libcrypto -----------------------------------------------------------------------------------------------

def _candidates():
    """Places to look, best first: what Python's hashlib is linked with (in the module, or in the interpreter), then libraries by name."""
    try:
        import _hashlib
    except ImportError:             # a Python without OpenSSL
        pass
    else:
        yield getattr(_hashlib, "__file__", None)
    yield None
    yield from ("libcrypto.so.3", "libcrypto.so.1.1")


cdef size_t address(object lib, str name) except? 0:
    return ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0


cdef bint is_right(const Crypto *c) except -1:
    """Does it compute SHA-256? Compared with hashlib on two chained pages."""
    cdef int32_t[6] tokens = [1, -2, 3, 0x7fffffff, 5, 6]
    cdef uint8_t[2 * DIGEST] digests
    cdef void *context = c.context_new()
    cdef bint done = context != NULL and hash_chain(c, context, NULL, tokens, 3, 2, digests)
    if context != NULL:
        c.context_free(context)
    return done and (<char *>digests)[: 2 * DIGEST] == chain_in_python(little_endian(tokens, 6), 12, b"")


def _choose(candidates):
    """Use the first of these libraries (paths, names, None for the process) that has what it takes, or hashlib if none has.

    Not while another thread hashes. Returns: sha256_provider().
    """
    global native, library, provider
    cdef Crypto found
    memset(&native, 0, sizeof(Crypto))
    library, provider = None, "hashlib"
    if sys.byteorder != "little":
        return provider
    for name in candidates:
        try:
            lib = ctypes.CDLL(name)
            found.context_new = <context_new_fn>address(lib, "EVP_MD_CTX_new")
            found.context_free = <context_free_fn>address(lib, "EVP_MD_CTX_free")
            found.init = <init_fn>address(lib, "EVP_DigestInit_ex")
            found.update = <update_fn>address(lib, "EVP_DigestUpdate")
            found.final = <final_fn>address(lib, "EVP_DigestFinal_ex")
            found.sha256 = <const void *><size_t>_find_sha256(lib)
            lib.OpenSSL_version.restype = ctypes.c_char_p
            version = lib.OpenSSL_version(0).decode("ascii", "replace")
        except (OSError, AttributeError):
            continue
        if found.sha256 != NULL and is_right(&found):
            native, library, provider = found, lib, version
            break
    return provider


def _find_sha256(lib):
    """The address of the EVP_MD. OpenSSL 3 looks an EVP_sha256() up again at each use, so there it is fetched, once for the process."""
    if hasattr(lib, "EVP_MD_fetch"):
        lib.EVP_MD_fetch.restype = ctypes.c_void_p
        lib.EVP_MD_fetch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
        fetched = lib.EVP_MD_fetch(None, b"SHA256", None)
        if fetched:
            return fetched
    lib.EVP_sha256.restype = ctypes.c_void_p
    return lib.EVP_sha256() or 0


_choose(_candidates())
