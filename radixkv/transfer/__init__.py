"""L2: moves pages between pools: what a copy is (plan.py), its loops (loops.py), and who does it.

cpu.pyx: threads and streaming stores. engine.py: the GPU's copy engine. choose.py: kernel or copy engine.
reference.py: the oracle.
"""
