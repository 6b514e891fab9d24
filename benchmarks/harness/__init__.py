"""What the benchmarks share: environments of their own, rows, processes run in turn, memory, the line of JSON.

A benchmark is a script in the folder above. It starts each *side* (a program in ``sides/`` or a command line) in a
process of its own, so that neither finds anything warm, reads the result file the side leaves, and compares the two.
"""
