"""FSDP2 (``fully_shard``): its reduce-scatters and all-gathers, and the replicas of its shards."""
