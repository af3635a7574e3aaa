"""One `evaluate.Metric` a file, named as the file. `evaluate` copies a script elsewhere: imports are absolute."""
