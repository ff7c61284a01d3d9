"""The sides that are compared: callables that take so many steps. Each is built from the same `Workload`."""
