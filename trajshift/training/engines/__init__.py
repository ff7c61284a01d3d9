"""Engines: ways of running the loop's inner steps, which all give the numbers of the reference, `loop`."""
