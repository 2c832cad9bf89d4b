"""L2: moves pages between pools: what a copy is (plan.py), its loops (loops.py), and who does it.

base.py: the contract. cpu.pyx: threads and streaming stores. gpu.py: kernels (cuda.py, launch.py) or copy engine
(engine.py), as choose.py has measured. reference.py: the oracle of them all.
"""
