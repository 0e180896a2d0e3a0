"""The engine for FSDP2 (``fully_shard``): reduce-scatters, all-gathers, and exchanges between replicas of a shard."""
