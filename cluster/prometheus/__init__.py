"""Prometheus for the service: scrape configuration, rules with tests, and a way to run it beside `make serve`."""
