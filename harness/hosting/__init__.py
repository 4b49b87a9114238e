"""A lab of many hosts: Ray's head node, the machines that join it, and what each of them offers."""
