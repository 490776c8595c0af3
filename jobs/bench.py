"""A suite: several methods under one protocol, one table, one report.

    python jobs/bench.py suite=digits storage=/shared/prism
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/bench.py suite=digits storage=s3://bucket/prism

Reproduces: comparisons of methods with the controls that matter (random real images, full data). `suite=digits` in
    minutes, `fashion_mnist` and `fashion_mnist_dfkd` in hours, `imagenet_lite` on ImageNet teachers.
Hardware: 2 CPU cores for the digits; more workers finish sooner with the same result.
Time and result: digits: 5 min 55 s on 2 CPU cores (benchmarks/LOG.md), `results.md` and a report in the storage.
How sure: digits and Fashion-MNIST were measured (benchmarks/LOG.md) from a command line, not as a job.
"""

from prism_ray.jobs import main

if __name__ == "__main__":
    main("bench")
