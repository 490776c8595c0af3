"""Images alone: prepare, teach, synthesize. Labels and students can follow from other jobs, on other machines.

    python jobs/synthesize.py recipe=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/synthesize.py recipe=imagenet1k_prism compute=ray_gpu storage=s3://bucket/prism

Reproduces: the images of a recipe, the same bytes as those of jobs/pipeline.py with the same settings.
Hardware: that of the recipe; the stage that wants the most GPUs.
Time and result: `images/` in the run folder; `prism-ray plan` estimates the time from `compute.effective_tflops`.
How sure: equal bytes are tested with small recipes on CPUs; times on GPUs were not measured.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("synthesize")
