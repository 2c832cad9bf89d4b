/* Every kernel in one unit: what a fatbin, a run-time compilation and the host simulator build. */
#include "copy.cu"
#include "relayout.cu"
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include "bulk.cu"
#endif
