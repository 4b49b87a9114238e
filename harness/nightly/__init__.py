"""A whole night in one command: discover, calibrate, check, measure, gate, report, keep the history."""
