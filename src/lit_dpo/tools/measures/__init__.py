"""What is measured of fitted policies on held-out comparisons, and what may be said of their differences.

`table.pair_table` makes a row per comparison, `completions.sampled` completes held-out prompts, `summary.summarise`
makes measures, intervals and paired tests of both, `writing.write` and `writing.table` put them down.
"""
