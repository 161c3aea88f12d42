"""What surrounds the steps of a run: processes, signals, bad numbers, logs, records, its folder."""
