"""A queueing model of a fleet of engine replicas: cluster/simulate.py runs autoscaling policies on it."""
