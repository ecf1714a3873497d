"""Dashboards for Grafana, made by `python -m cluster.grafana`; the JSON files beside this are what it writes."""
