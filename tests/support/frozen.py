"""Imported last by the fork server of commands.py: no fork's garbage collector looks through what was imported before.

That also keeps the memory of these objects shared.
"""

import gc

gc.collect()
gc.freeze()
