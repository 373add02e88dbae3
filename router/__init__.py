"""Which source answers a question: the cheapest one that is proven to be as fresh as asked.

A question names what is asked and how each kind of source answers it (`tiers`). The plan is a pure function of the
question, the watermarks measured last and the clock (`plan`). Carrying it out proves the freshness again, in the
snapshot of the data itself, and falls back within the same request where the proof fails (`execute`).
"""
