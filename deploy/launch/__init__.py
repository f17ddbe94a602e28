"""Starts Flower's processes and stops them; the only place that touches Flower's internals.

flower.py             Flower's environment, its command line, the bundle and its digest
processes.py          child processes: started, watched, ended with everything that they started
simulation.py         Flower's own simulation engine
guarded_superlink.py  a SuperLink that shows other machines the owners' interface only (a process of its own)
pinned_supernode.py   a SuperNode that runs one bundle only (a process of its own)
bound_superexec.py    a SuperExec that ends with the process it works for (a process of its own)
fork_server.py        starts Flower's apps by forking a process that has imported their libraries
internals.py          refuses to start any of these with a Flower that they were not tested with
check_flower.py       shows what another version of Flower changes
"""
