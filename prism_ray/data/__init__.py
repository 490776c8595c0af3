"""Real data sets as one parquet contract: see `prism_ray.data.prepared`."""
