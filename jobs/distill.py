"""Students of a run whose images and labels are there: one per seed and kind of label, under one protocol.

    python jobs/distill.py recipe=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/distill.py recipe=imagenet1k_prism compute=ray_gpu storage=s3://bucket/prism

Reproduces: the students of a recipe, the same bytes as those of jobs/pipeline.py with the same settings, unless
    `compute.workers_per_student` shares one student between workers.
Hardware: one training worker per student that is to be trained at the same time.
Time and result: `student/` in the run folder, each with its accuracy.
How sure: equal bytes are tested with small recipes on CPUs; times on GPUs were not measured.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("distill")
