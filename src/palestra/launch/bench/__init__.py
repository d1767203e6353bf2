"""`palestra bench`: what the loop makes of its parts, measured on whole runs. The numbers: docs/bench.md."""
