"""Studies, one per file; study.py and jobs.py hold the parts that they share."""
