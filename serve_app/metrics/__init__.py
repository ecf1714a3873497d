"""What the service measures: defined once, counted where it happens, told to Prometheus in two ways.

definitions   every metric: name, type, labels, buckets, help, and which process measures it
process       the metrics of one process, and what it hands to whoever shows them
exposition    the metrics of all processes as the text of /metrics
ray_export    the metrics of one process to the agent of its Ray node
requests      one HTTP request that generates, from its first byte to its outcome
engine        the engine's counters as metrics
"""
