"""One file per stage: built once per worker, run once per unit. No Ray; stages meet in parquet."""
