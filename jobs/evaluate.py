"""Measurements and the report of a run whose images are there.

    python jobs/evaluate.py recipe=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/evaluate.py recipe=digits storage=s3://bucket/prism

Reproduces: diversity and, for data-free distillation, precision and recall against held-out real images; the report
    with whatever students there are.
Hardware: 2 CPU cores, or one GPU for feature networks of ImageNet's size.
Time and result: minutes for the small recipes; `metrics/`, `report/` and the data-set card in the run folder.
How sure: tested with small recipes on CPUs.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("evaluate")
