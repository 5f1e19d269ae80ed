"""Speed and accuracy lines: `python -m bench.run`."""
