"""Mixed load and faults for half an hour, and what is lost, leaked or wrong after it: `make soak`."""
