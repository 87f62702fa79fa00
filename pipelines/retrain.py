"""One start of a scheduled job that keeps a model up to date. Copy it and change it.

python pipelines/retrain.py job.yaml       # a run file with a section `job`
"""

import sys

import posttrain


def main(job_file: str) -> int:
    summary = posttrain.retrain(posttrain.load(job_file))
    print(summary["outcome"], summary["reason"])
    return summary["exit_code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
