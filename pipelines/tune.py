"""Search for the cleaning recipe that suits a data set, and print the best trials. Copy it and change it.

python pipelines/tune.py photos.yaml       # a run file with a section `search`
"""

import sys

import posttrain


def main(run_file: str) -> None:
    summary = posttrain.tune(posttrain.load(run_file))
    print(summary)


if __name__ == "__main__":
    main(sys.argv[1])
