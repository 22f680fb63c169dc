"""Who owns what, and what it would cost.

cut (blocks -> local modules), placement (local modules -> ranks), assembly (the plan, and one rank's modules from it),
profiling (what modules cost, measured), simulation (what a schedule makes of these costs), memory, and explain (all of
it said before a run).
"""
