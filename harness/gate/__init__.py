"""The release gate: is a candidate no worse than its baseline, measured live in paired blocks?

metrics: what is compared. statistics: numbers in, bounds out. judging: bounds to verdicts.
settings, waivers: the two files people write. references: what a REF on the command line means.
blocks, entry, canary, legs: one block on one device. session: all of them, stored, resumed.
calibration: how often this very gate is wrong here.
"""
