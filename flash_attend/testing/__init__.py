"""What shows that attention is right: the float64 oracle, the error budget, calls that any backend has to answer."""
