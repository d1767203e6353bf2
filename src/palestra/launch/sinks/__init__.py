"""Metrics of a run, told elsewhere too: a process for each place follows metrics.jsonl, which stays the truth.

A place that fails stops nothing and slows nothing: it can be told everything later, from the file.
"""
