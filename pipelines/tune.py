"""Search for the cleaning recipe that suits a data set, and print the best recipe. Copy it and change it.

python pipelines/tune.py photos.yaml       # a run file with a section `search`
"""

import sys

import posttrain


def main(run_file: str) -> None:
    summary = posttrain.tune(posttrain.load(run_file))
    best = summary["trials"][summary["best"]]
    print(f"trial {best['number']}: validation accuracy {100 * best['validation_accuracy']:.1f} %, {best['values']}")
    print("as a run file:", summary["files"]["best run file"])


if __name__ == "__main__":
    main(sys.argv[1])
