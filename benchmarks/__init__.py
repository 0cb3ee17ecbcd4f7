"""Speed and memory of the package, measured against peers: `python -m benchmarks --list`."""
