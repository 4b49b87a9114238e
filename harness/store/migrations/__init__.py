"""One file a version in ``versions``. To add one: copy the last, count up, change tables.py likewise.

A migration is history: it imports nothing of ours, so that it does next year what it does today. It runs
on SQLite and on PostgreSQL, inside the one transaction of harness.store.schema.
"""
