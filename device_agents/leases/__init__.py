"""Exclusive use of a lab host's devices: who has which, who waits, and what a restarted agent recovers from.

model (the words) · protocol (the pure rules) · process (who lives) · ledger (the journal, shared by all lab
agents of a machine) · check (two holders at any time? by the journal). docs/leases.md is the page about it.
"""
