"""What a configuration takes and how long it lasts on a cluster, computed without one."""
