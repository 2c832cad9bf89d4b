"""DLPack's C exchange API (1.3): a tensor's memory, and a tensor of some memory, without a Python call. From its specification."""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t

cdef enum:
    DLPACK_MAJOR = 1
    DL_CPU = 1                      # DLDeviceType
    DL_INT = 0                      # DLDataTypeCode

cdef extern from *:
    """
    #include <stdint.h>
    typedef struct { uint32_t major, minor; } RkvDLVersion;
    typedef struct {
        void *data;
        struct { int32_t device_type, device_id; } device;
        int32_t ndim;
        struct { uint8_t code, bits; uint16_t lanes; } dtype;
        int64_t *shape, *strides;           /* strides: NULL if contiguous */
        uint64_t byte_offset;
    } RkvDLTensor;
    typedef struct RkvDLManaged {
        RkvDLVersion version;
        void *manager_ctx;
        void (*deleter)(struct RkvDLManaged *);
        uint64_t flags;
        RkvDLTensor tensor;
    } RkvDLManaged;
    typedef struct {
        RkvDLVersion version;
        void *older;
        void *allocate, *export_;           /* not used here */
        int (*import_)(RkvDLManaged *, void **);
        int (*look_at)(void *, RkvDLTensor *);
        void *work_stream;
    } RkvDLExchange;
    """
    ctypedef struct DLVersion "RkvDLVersion":
        uint32_t major
        uint32_t minor

    ctypedef struct DLTensor "RkvDLTensor":
        void *data
        int32_t device_type "device.device_type"
        int32_t device_id "device.device_id"
        int32_t ndim
        uint8_t code "dtype.code"
        uint8_t bits "dtype.bits"
        uint16_t lanes "dtype.lanes"
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct DLManaged "RkvDLManaged":
        DLVersion version
        void *manager_ctx
        void (*deleter)(DLManaged *) noexcept nogil
        uint64_t flags
        DLTensor tensor

    ctypedef struct DLExchange "RkvDLExchange":
        DLVersion version
        int (*import_)(DLManaged *, void **) except -1      # takes the memory over; fails with an exception set
        int (*look_at)(void *, DLTensor *) except -1        # may be NULL; what it gives lives as long as the tensor
