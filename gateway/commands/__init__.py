"""Groups of the command line that have more to say than a function: one module each."""
