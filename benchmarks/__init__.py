"""How fast it is: `python -m benchmarks NAME... [--toy] [--out DIR]`.

Each benchmark measures sides in turn (A B A B ...), reports the median of the ratio of neighbours with its 95%
interval, and writes a table, NAME.json, a dated NAME-DATE.md and the figure of all benchmarks, speed.svg.
"""
