"""The live page of a farm, which only looks: gathering (what is known) · metrics (Prometheus) · server."""
