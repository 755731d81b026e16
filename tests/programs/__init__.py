"""Programs that run on any world: plain functions, one life of a rank each, from ``init_process_group`` to its end."""
