"""Make and compare many quantized models of one base, for sweeps and comparisons with other tools.

setup opens the folder and the texts, grid lists the runs of a sweep, runs makes and scores their models, results
compares them.
"""
