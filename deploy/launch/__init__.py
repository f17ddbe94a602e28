"""Starts Flower's processes and stops them; the only place that touches Flower's internals.

flower.py             Flower's environment, its command line, the bundle and its digest
processes.py          children of ours: started, watched, ended with all that they started
simulation.py         Flower's own simulation engine
guarded_superlink.py  a SuperLink that shows others the owners' interface only (a process of its own)
pinned_supernode.py   a SuperNode that runs one bundle only (a process of its own)
internals.py          refuses to start either where Flower is not the one that they were made for
"""
