"""The sides that are compared: callables that take a number of steps. Each is built from the same `Workload`."""
