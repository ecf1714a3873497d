"""Load tests of the running service over HTTP. `python -m loadtest.load --help`, and docs/load-testing.md."""
