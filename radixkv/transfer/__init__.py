"""L2: moves pages between pools: what a copy is (plan.py), its loops (loops.py), and who does it.

base.py: the contract. pick.py: the path for a pool. cpu.pyx: threads and streaming stores. gpu.py: kernels (cuda.py,
launch.py, staging.py) or copy engine (engine.py), as choose.py has measured, followed by events (progress.py).
reference.py: the oracle of them all.
"""
