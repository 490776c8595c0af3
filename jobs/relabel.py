"""Soft labels of images that are there: a run of jobs/synthesize.py, or other label settings for the same images.

    python jobs/relabel.py recipe=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/relabel.py recipe=digits labels=sre2l storage=s3://bucket/prism

Reproduces: the labels of a recipe, the same bytes as those of jobs/pipeline.py with the same settings. With other
    label settings it is another run; its images are taken over from the first, not made again.
Hardware: one GPU or a few CPU cores; each image passes each teacher once per view.
Time and result: `labels/` in the run folder.
How sure: equal bytes are tested with small recipes on CPUs; times on GPUs were not measured.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("relabel")
