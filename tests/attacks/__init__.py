"""Attacks that must fail, each through real messages to honest owners. Numbers are those of SECURITY.md's list.

Every test here fails when the check it is about is removed: `test_mutations.py` does so, one check at a time.
"""
