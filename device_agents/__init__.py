"""Everything between the lab host and a device: wire protocol, runner, devices, lab agent.

May import kvengine and adbutils; knows nothing of tests, reports or Ray.
"""
