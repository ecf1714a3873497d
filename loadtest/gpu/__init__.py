"""What `make gpu` runs on a machine with a GPU: wrong numbers are errors, slow ones are numbers."""
