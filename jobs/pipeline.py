"""A whole run: prepare, teach, synthesize, relabel, distill, evaluate, report; with `stages=[...]` a part of it.

    python jobs/pipeline.py recipe=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/pipeline.py recipe=digits storage=s3://bucket/prism

Reproduces: dataset distillation or data-free distillation, as the recipe says: `digits` and `fashion_mnist` on a small
    scale, `imagenet1k_prism`, `imagenet1k_sre2l` (arXiv 2511.09905, 2306.13092) and `imagenet1k_eda` (arXiv 2509.16897)
    on the papers' scale.
Hardware: digits: 2 CPU cores. imagenet1k_...: GPUs, `compute=ray_gpu`; `prism-ray plan` counts the work first.
Time and result: digits: one to two minutes on two free CPU cores. Top-1 of students on 359 held-out digits: 98.61 with
    soft labels, 90.90 with the class alone (mean of three seeds).
How sure: digits was measured on the machine named in benchmarks/LOG.md, from a command line; as a job, digits_smoke was
    run. The ImageNet-1k recipes have been checked as plans only, never run.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("pipeline")
