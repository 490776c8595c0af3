"""Submit an entry point of this folder to a cluster, follow its log, and end as it ends. `--help` explains the options.

    python jobs/submit.py pipeline recipe=digits storage=s3://bucket/prism
    python jobs/submit.py --address http://head:8265 --no-wait bench suite=digits storage=s3://bucket/prism

The submission id is the run's name with the number of the attempt; the metadata carries its name and address. The same
command follows the job while it runs and, when it has ended, submits it again: its run continues.
"""

from prism_ray.submit import main

if __name__ == "__main__":
    main()
