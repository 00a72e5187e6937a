"""Studies, a file each; what they share is study.py and jobs.py."""
