"""Sources to shards, in tasks that any number of processes and machines share."""
