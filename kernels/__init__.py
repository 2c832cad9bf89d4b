"""CUDA C++ sources of the transfer kernels; shipped as package data (see ``radixkv.transfer``)."""
