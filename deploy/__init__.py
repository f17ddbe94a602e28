"""Brings parties up: the command line, the simulation of all parties on one machine, the demo."""
